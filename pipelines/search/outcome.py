"""What a search found, as the JSON object that ``amlora tune --json`` prints and reports are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from amlora_dist.config.search_space import DIRECTIONS
from amlora_dist.errors import TrainingError

if TYPE_CHECKING:
    from pipelines.search.journal import Trial
    from pipelines.search.plan import SearchPlan

FILE = "search.json"
"""Artifact of the search's MLflow run: its result."""


def search_result(
    plan: SearchPlan, search_id: str, registered_model: str, trials: Sequence[Trial], tracking_uri: str
) -> dict[str, Any]:
    """The result object without its ``winner.test`` and its seconds.

    Raises:
        TrainingError: no trial finished.
    """
    ranked = best_first(plan, trials)
    if not ranked:
        failed = [trial for trial in trials if "error" in trial.report]
        why = f": trial {failed[0].number}: {failed[0].report['error']}" if failed else ""
        raise TrainingError(f"none of the {len(trials)} trials finished{why}")
    config = plan.base
    return {
        "search_id": search_id,
        "registered_model": registered_model,
        "method": config.method,
        "seed": config.seed,
        "algorithm": plan.settings.algorithm,
        "scheduler": plan.settings.scheduler,
        "objectives": {name: DIRECTIONS[name] for name in plan.settings.objectives},
        "split": "dev",
        "space": {d.path: {d.kind: list(d.values)} for d in plan.dimensions},
        "stages": plan.stages,
        "tasks": ranked[0].report["tasks"],
        "trials": [_entry(trial, search_id) for trial in sorted(trials, key=lambda t: t.number)],
        "ranking": [trial.number for trial in ranked],
        "winner": _short(ranked[0], search_id),
        "runner_up": _short(ranked[1], search_id) if len(ranked) > 1 else None,
        "front": [trial.number for trial in _front(plan, ranked)] if len(plan.settings.objectives) > 1 else None,
        "cost": _cost(plan, trials),
        "tracking_uri": tracking_uri,
    }


def best_first(plan: SearchPlan, trials: Sequence[Trial]) -> list[Trial]:
    """The finished trials by the first objective, then the second, then forgetting, then their number."""
    finished = [t for t in trials if t.outcome == "finished" and (t.report["objectives"] or [None])[0] is not None]
    return sorted(finished, key=lambda t: (_costs(plan, t), t.report["metrics"].get("forgetting") or 0.0, t.number))


def _costs(plan: SearchPlan, trial: Trial) -> list[float]:
    """The objectives, smaller being better; what is undefined comes last."""
    pairs = zip(plan.settings.objectives, trial.report["objectives"], strict=True)
    return [float("inf") if v is None else -v if DIRECTIONS[name] == "max" else v for name, v in pairs]


def _front(plan: SearchPlan, ranked: Sequence[Trial]) -> list[Trial]:
    """The trials that no other is at least as good as in everything and better in something."""
    costs = {trial.number: _costs(plan, trial) for trial in ranked}

    def beaten(mine: list[float]) -> bool:
        return any(all(a <= b for a, b in zip(other, mine, strict=True)) and other != mine for other in costs.values())

    return [trial for trial in ranked if not beaten(costs[trial.number])]


def _entry(trial: Trial, search_id: str) -> dict[str, Any]:
    report = trial.report
    return {
        "number": trial.number,
        "run_id": f"{search_id}-t{trial.number:03d}",
        "mlflow_run": trial.run,
        "values": trial.values,
        "outcome": trial.outcome,
        "error": report.get("error"),
        "metrics": report.get("metrics", {}),
        "interval": None,
        "curve": report.get("curve", []),
        "accuracy_matrix": report.get("accuracy_matrix", []),
        "stages": report.get("records", []),
        "l1": reach_of_l1(report.get("records", [])),
    }


def reach_of_l1(stages: Sequence[Mapping[str, Any]]) -> dict[str, int] | None:
    """What ``training.l1`` came to in some stages: ``recipes``, how many have one that was learned, and ``reached``, in how
    many of them weights are exactly 0. None where nobody noted it (stages of older code)."""
    known = [stage["recipe_zeros"] for stage in stages if "recipe_zeros" in stage]
    if len(known) < len(stages) or not stages:
        return None
    found = [zeros for zeros in known if zeros is not None]
    return {"recipes": len(found), "reached": sum(zeros > 0 for zeros in found)}


def _short(trial: Trial, search_id: str) -> dict[str, Any]:
    entry = _entry(trial, search_id)
    return {key: entry[key] for key in ("number", "run_id", "values", "metrics")}


def _cost(plan: SearchPlan, trials: Sequence[Trial]) -> dict[str, Any]:
    """Stages by what became of them, and the seconds that went into them.

    A stage was trained by the trial whose version does not refer to another run's; counted so, a search that was
    killed and one that was not come to the same numbers.
    """
    records = [record for trial in trials for record in trial.report.get("records", [])]
    trained = [record for record in records if record["reused_from"] is None]
    pruned = sum(plan.stages - len(t.report.get("records", [])) for t in trials if t.outcome == "pruned")
    return {
        "stages_total": plan.stages * len(trials),
        "stages_trained": len(trained),
        "stages_reused": len(records) - len(trained),
        "stages_pruned": pruned,
        "train_seconds": sum(record["train_seconds"] for record in trained),
        "score_seconds": sum(record["score_seconds"] for record in records),
        "other_seconds": sum(record["other_seconds"] for record in records),
    }
