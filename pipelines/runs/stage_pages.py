"""What MLflow's pages, and the trackers beside it, show of a finished stage."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from amlora_dist.config.loading import home
from amlora_dist.privacy import public_name
from amlora_dist.registry.pulling import manifest_of
from amlora_dist.registry.records import DataInput, TaskScore, describe, described, log_data, log_model
from pipelines.runs.trackers import StageFigures, write_stage

if TYPE_CHECKING:
    from amlora_dist.registry.manifest import Manifest
    from amlora_dist.registry.store import Store
    from amlora_dist.registry.versions import Version
    from pipelines.runs.inputs import RunInputs
    from pipelines.runs.stage_record import StageRecord


def show_stage(
    store: Store,
    inputs: RunInputs,
    record: StageRecord,
    *,
    parent_run: str,
    run_id: str,
    mapping: dict[str, Any],
    manifest: Manifest | None,
) -> None:
    """Loss curve, speed, scores and data of the stage's run, which is closed; its scores on the run above too, where
    MLflow draws them as curves over the stages. What is there already is not written again.

    Args:
        store: MLflow.
        inputs: of the run.
        record: of the stage.
        parent_run: MLflow's id of the run above.
        run_id: of the run, for trackers.
        mapping: its public configuration, for trackers.
        manifest: of the version, where it is at hand.
    """
    now = int(time.time() * 1000)
    rows = [("loss", loss, step, now) for step, loss in enumerate(record.training.get("losses", []), start=1)]
    figures = record.public()
    for key in ("train_seconds", "score_seconds", "other_seconds", "tokens_per_second"):
        if figures[key] is not None and not record.resumed:
            rows.append((key, float(figures[key]), record.index, now))
    above = []
    for score in record.scores:
        for key in ("accuracy", "ranked_accuracy"):
            if score.get(key) is not None:
                name = f"{key}/{score['mode']}/{score['task']}"
                rows.append((name, float(score[key]), record.index, now))
        if score["mode"] == "router" and score.get("accuracy") is not None:
            above.append((f"accuracy/{score['task']}", float(score["accuracy"]), record.index, now))
    store.add_metrics(record.run, rows)
    store.add_metrics(parent_run, above)
    trained = [record.task] if record.task in inputs.data else inputs.tasks
    if record.published is not None and not described(store, record.published):
        _describe(store, inputs, record, record.published, manifest or manifest_of(store, record.published))
    read = [_data(inputs, task, "training") for task in trained]
    scored = dict.fromkeys(score["task"] for score in record.scores if score["task"] in inputs.data)
    log_data(store, record.run, [*read, *(_data(inputs, task, "evaluation") for task in scored)])
    log_data(store, parent_run, read)
    scores = {key: value for key, value, *_ in above}
    shown = StageFigures(record.index, record.task, record.training.get("losses", []), scores)
    write_stage(inputs.config.tracking, store, record.run, run_id, home(), mapping, shown)
    store.end_run(record.run, "FINISHED")


def _describe(store: Store, inputs: RunInputs, record: StageRecord, version: Version, manifest: Manifest) -> None:
    """What MLflow's pages say of a version; that of an earlier start, or of older code, is made up for."""
    scores = [
        TaskScore(_data(inputs, score["task"], "evaluation"), float(score["accuracy"]))
        for score in record.scores
        if score["mode"] == "router" and score.get("accuracy") is not None
    ]
    log_model(store, version, manifest, scores, step=record.index, timestamp=int(time.time() * 1000))
    describe(store, version, manifest)


def _data(inputs: RunInputs, task: str, context: str) -> DataInput:
    """The rows of a task that are trained on, or scored."""
    spec, data = inputs.specs[task], inputs.data[task]
    split = "train" if context == "training" else inputs.config.evaluation.split
    hub = spec.source.kind == "hub"
    source = {"path": spec.source.repository, "revision": spec.source.revision} if hub else {"uri": public_name(task)}
    return DataInput(task, data.digest(split), len(data.rows[split]), context, source, "hugging_face" if hub else "local")
