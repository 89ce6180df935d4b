"""From stages to the accuracy matrix, its metrics, and the JSON object that ``amlora run --json`` prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from amlora_dist.config.loading import home
from amlora_dist.evaluation import metrics
from amlora_dist.registry.store import Store
from amlora_dist.training.stage_spec import WITHOUT

if TYPE_CHECKING:
    from pipelines.runs.inputs import RunInputs
    from pipelines.runs.stage_record import StageRecord

INPUTS = "materials.json"
"""Artifact of the sequence's MLflow run: what it is made of (``RunInputs.facts``)."""
STAGE_FILE = "stage.json"
"""Artifact of a stage's MLflow run: its scores and how it was trained."""

MatrixRow = list[float | None]
METRICS = (
    "average_performance", "average_incremental_performance", "backward_transfer", "forward_transfer_gem",
    "forward_transfer_single", "forgetting", "learning_accuracy",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Matrices:
    """R by two scores: row 0 untrained, then one row a stage; None where not scored."""

    accuracy: list[MatrixRow]
    ranked_accuracy: list[MatrixRow]
    oracle: MatrixRow | None


def matrices(tasks: Sequence[str], stages: Sequence[StageRecord]) -> Matrices:
    """The accuracy matrices of the stages so far, one column a task."""

    def rows(score: str) -> list[MatrixRow]:
        untrained = _row(tasks, [s for stage in stages for s in stage.scores], "untrained", score)
        return [untrained, *(_row(tasks, stage.scores, "router", score) for stage in stages)]

    oracle = _row(tasks, stages[-1].scores, "oracle", "accuracy") if stages else []
    return Matrices(rows("accuracy"), rows("ranked_accuracy"), oracle if any(v is not None for v in oracle) else None)


def _knockout(tasks: Sequence[str], scores: Sequence[dict[str, Any]]) -> list[MatrixRow] | None:
    """Accuracy with each adapter of the bank disabled, in its order; None where that was not scored."""
    count = len({one["mode"] for one in scores if one["mode"].startswith(WITHOUT)})
    return [_row(tasks, scores, f"{WITHOUT}{n}", "accuracy") for n in range(1, count + 1)] or None


def _also(tasks: Sequence[str], scores: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Scores of the test sets that no stage learns."""
    keys = ("task", "accuracy", "ranked_accuracy", "rows")
    return [{key: one[key] for key in keys} for one in scores if one["mode"] == "router" and one["task"] not in tasks]


LAST = {
    "routing_accuracy": ("router", "routing_accuracy"),
    "model_accuracy": ("router", "model_accuracy"),
    "keys_accuracy": ("router", "keys_accuracy"),
    "greedy_accuracy": ("router", "greedy_accuracy"),
    "keys_elsewhere": ("router", "keys_elsewhere"),
    "told_model_accuracy": ("oracle", "model_accuracy"),
    "own_prompt": ("own", "accuracy"),
}
"""Rows about the last bank, by name: the mode and the score that they are of."""


def last_rows(tasks: Sequence[str], scores: Sequence[dict[str, Any]]) -> dict[str, MatrixRow]:
    """What is known of the last bank's answers besides their accuracy, one score a task (of ``keys_elsewhere`` a number of
    rows); what was not scored is left out."""
    found = {name: _row(tasks, scores, mode, score) for name, (mode, score) in LAST.items()}
    return {name: row for name, row in found.items() if any(value is not None for value in row)}


def _row(tasks: Sequence[str], scores: Sequence[dict[str, Any]], mode: str, score: str) -> MatrixRow:
    found = {one["task"]: one.get(score) for one in scores if one["mode"] == mode}
    return [found.get(task) for task in tasks]


def result(inputs: RunInputs, stages: Sequence[StageRecord]) -> dict[str, Any]:
    """The result object; what is undefined is None. Where it is kept is not in it: it may be shown to anybody.

    Where the one stage is about all tasks, the only metric is the mean of its row.
    """
    tasks, in_sequence = inputs.tasks, inputs.stage_names == inputs.tasks
    found = matrices(tasks, stages)
    complete = metrics.summary(found.accuracy) if stages and in_sequence else {}
    if stages and not in_sequence:
        complete = {"average_performance": metrics.mean(found.accuracy[-1])}
    untrained, scores = found.accuracy[0], stages[-1].scores if stages else []
    chosen = stages[-1].plain_text if stages else None
    return {
        "run_id": inputs.run_id,
        "registered_model": inputs.model,
        "method": inputs.config.method,
        "seed": inputs.config.seed,
        "tasks": tasks,
        "task_metrics": {task: str(inputs.specs[task].metric) for task in tasks},
        "accuracy_matrix": found.accuracy[1:],
        "ranked_accuracy_matrix": found.ranked_accuracy[1:],
        "untrained": untrained if any(value is not None for value in untrained) else None,
        "oracle": found.oracle,
        "last": last_rows(tasks, scores),
        "knockout": _knockout(tasks, scores),
        "also": _also(tasks, scores),
        "metrics": {name: complete.get(name) for name in METRICS},
        "learning_rate": inputs.rate,
        "stages": [stage.public() for stage in stages],
        **({} if chosen is None else {"plain_text": chosen.to_mapping()}),
    }


def load_result(run_id: str, tracking_uri: str | None = None) -> dict[str, Any]:
    """The result of a run as far as it has come.

    Raises:
        UserError: no run of this id.
    """
    store = Store.open(home(), tracking_uri, reads=True)
    run, result = store.result_of(run_id)
    return result | kept_at(store, run)


def kept_at(store: Store, run: str) -> dict[str, Any]:
    """Where a result is kept: the store, and the page of its run in MLflow."""
    return {"tracking_uri": store.connection.shown, "mlflow_page": store.page_of(run)}
