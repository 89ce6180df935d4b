"""What MLflow's pages, and the trackers, show of a finished stage."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from amlora_dist.config.loading import home
from amlora_dist.evaluation.plain_choice import shown_choice
from amlora_dist.evaluation.text_metrics import common_name
from amlora_dist.privacy import public_name
from amlora_dist.registry import tags
from amlora_dist.registry.how_scored import how_scored
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
    if (chosen := record.plain_text) is not None:
        ways = {"ranks": chosen.ranks, "writes": chosen.writes}
        rows += [(f"plain_text/{way}", value, record.index, now) for way, value in ways.items() if value is not None]
        for run in (record.run, parent_run):
            store.set_tags(run, {tags.PLAIN_TEXT: chosen.way})
    for score in record.scores:
        for key in ("accuracy", "ranked_accuracy", "keys_elsewhere"):
            if score.get(key) is not None:
                name = f"{key}/{score['mode']}/{score['task']}"
                rows.append((name, float(score[key]), record.index, now))
        if score["mode"] == "router" and score.get("accuracy") is not None:
            above.append((f"accuracy/{score['task']}", float(score["accuracy"]), record.index, now))
    store.add_metrics(record.run, rows)
    store.add_metrics(parent_run, above)
    trained = [record.task] if record.task in inputs.data else inputs.tasks
    if record.published is not None and not described(store, record.published):
        known = manifest or manifest_of(store, record.published)
        _describe(store, inputs, record, record.published, known, above=parent_run)
    read = [_data(inputs, task, "training") for task in trained]
    scored = dict.fromkeys(score["task"] for score in record.scores if score["task"] in inputs.data)
    log_data(store, record.run, [*read, *(_data(inputs, task, "evaluation") for task in scored)])
    log_data(store, parent_run, read)
    scores = {key: value for key, value, *_ in above}
    shown = StageFigures(record.index, record.task, record.training.get("losses", []), scores)
    write_stage(inputs.config.tracking, store, record.run, home(), mapping, shown)
    store.end_run(record.run, "FINISHED")


def run_description(result: Mapping[str, Any], base: str, configuration: Mapping[str, Any]) -> str:
    """Markdown for the page of a run: what it learned, what it lost of that, where its versions are and how one is loaded.

    MLflow shows three lines until it is asked for more: what people come for is there.

    Args:
        result: of the run so far, as ``results.result`` makes it.
        base: the base model's public name.
        configuration: of the run, resolved.
    """
    tasks, rows, model = result["tasks"], result["accuracy_matrix"], result["registered_model"]
    numbers = {stage["task"]: stage["version"] for stage in result["stages"]}
    in_turn = list(numbers) == tasks[: len(rows)]
    done = f"{len(rows)} of {len(tasks)} tasks learned one after another" if in_turn else f"{len(tasks)} tasks together"
    lines = [f"`{result['method']}` on `{base}`, seed {result['seed']}: {done}."]
    page = f"#/models/{quote(model, safe='')}"
    if any(numbers.values()):
        load = f'AMLoRAModel.from_bank("models:/{model}@{tags.CHAMPION}")'
        lines.append(f"Served: the version of [{model}]({page}) with the alias `{tags.CHAMPION}`; in Python: `{load}`.")
    headline = {name: result["metrics"].get(name) for name in ("average_performance", "backward_transfer", "forgetting")}
    if shown := [f"{name.replace('_', ' ')} {value:.3f}" for name, value in headline.items() if value is not None]:
        lines.append(f"{', '.join(shown).capitalize()}; the curves are `accuracy/TASK` below *Model metrics*, step = stage.")
    measure = common_name(result["task_metrics"].values())
    lines += ["", f"| task | {measure} when learned | now | version |", "|---|---|---|---|"]
    for place, task in enumerate(tasks):
        learned = rows[place][place] if in_turn and place < len(rows) else None
        number = numbers.get(task)
        link = "–" if number is None else f"[{number}]({page}/versions/{number})"
        lines.append(f"| {task} | {_shown(learned)} | {_shown(rows[-1][place])} | {link} |")
    how, split = how_scored(configuration, result["method"], shown_choice(result)), configuration["evaluation"]["split"]
    lines += ["", f"Scores of {split} rows. {how.sentence} *Datasets*: the rows trained on, by digest."]
    return "\n".join(lines)


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _describe(
    store: Store, inputs: RunInputs, record: StageRecord, version: Version, manifest: Manifest, *, above: str
) -> None:
    """What MLflow's pages say of a version; that of an earlier start, or of older code, is made up for."""
    scores = [
        TaskScore(_data(inputs, score["task"], "evaluation"), float(score["accuracy"]))
        for score in record.scores
        if score["mode"] == "router" and score.get("accuracy") is not None
    ]
    log_model(store, version, manifest, scores, above=above, step=record.index, timestamp=int(time.time() * 1000))
    describe(store, version, manifest)


def _data(inputs: RunInputs, task: str, context: str) -> DataInput:
    """The rows of a task that are trained on, or scored."""
    spec, data = inputs.specs[task], inputs.data[task]
    split = "train" if context == "training" else inputs.config.evaluation.split
    hub = spec.source.kind == "hub"
    source = {"path": spec.source.repository, "revision": spec.source.revision} if hub else {"uri": public_name(task)}
    return DataInput(task, data.digest(split), len(data.rows[split]), context, source, "hugging_face" if hub else "local")
