"""How sure the best trials' scores are: bootstrap intervals over the dev rows, from the predictions that MLflow keeps."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amlora_dist.evaluation.intervals import metric_interval
from amlora_dist.evaluation.metrics import Matrix, mean
from amlora_dist.evaluation.scoring import read_predictions
from amlora_dist.registry import tags

if TYPE_CHECKING:
    from amlora_dist.registry.store import Store

TOP = 5
"""Trials that get an interval: beyond them nobody chooses."""


def add_intervals(result: dict[str, Any], store: Store) -> None:
    """Give the best trials ``interval``: of their average performance, 95%; None where predictions are missing."""
    by_number = {trial["number"]: trial for trial in result["trials"]}
    for number in result["ranking"][:TOP]:
        trial = by_number[number]
        rows = last_row(store, trial["run_id"], result["tasks"])
        found = None if rows is None else metric_interval([rows], mean_of_row, seed=result["seed"])
        trial["interval"] = None if found is None else [found.low, found.high]


def last_row(store: Store, run_id: str, tasks: list[str]) -> list[list[float]] | None:
    """Scores of a run's rows after its last stage, task by task; None where MLflow does not have them all."""
    stages = store.find_runs({tags.KIND: "stage", tags.RUN_ID: run_id})
    if not stages:
        return None
    last = max(stages, key=lambda run: int(run.tags[tags.STAGE].split()[0]))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for task in tasks:
            file = store.download(last.run, f"predictions/router-{task.replace('/', '.')}.jsonl", Path(folder))
            if file is None:
                return None
            rows.append([prediction.correct for prediction in read_predictions(file)])
    return rows


def mean_of_row(matrix: Matrix) -> float | None:
    """Average performance, of a matrix that is its own last row."""
    return mean(list(matrix[-1]))
