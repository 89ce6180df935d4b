"""The numbers of a comparison: methods over seeds and task orders, with intervals and paired differences.

Two things move a number, and both are shown: other training (the spread over seeds and orders) and other test rows (the
bootstrap interval). Methods are compared pair by pair on the same seed, order and test rows.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from amlora_dist.evaluation import metrics
from amlora_dist.evaluation.intervals import Cells, cell_means, over_seeds, percentiles, resampled
from amlora_dist.evaluation.metrics import MatrixMetric
from amlora_dist.evaluation.plain_choice import shown_choice
from amlora_dist.evaluation.text_metrics import common_name
from amlora_dist.reporting.baselines import baselines
from amlora_dist.reporting.facts import RunFacts
from amlora_dist.reporting.routing_facts import routing_by_stage

if TYPE_CHECKING:
    from amlora_dist.reporting.figures import Number

RESAMPLES = 1000
UNIFORM = "uniform"
"""The control whose average performance the recovered share of the oracle gap starts from."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One run of the grid."""

    method: str
    order: str
    seed: int
    facts: RunFacts

    @property
    def pair(self) -> tuple[str, int]:
        return self.order, self.seed


@dataclass(slots=True)
class _Sample:
    """A metric of one run: its value, and its values under resampled test rows (empty if predictions are missing)."""

    value: Number
    draws: list[Number]


def compare(entries: Sequence[Entry], reference: str) -> dict[str, Any]:
    """Tables of a comparison, JSON-able; what is undefined is None.

    Args:
        entries: finished runs; methods keep their order of first appearance.
        reference: the method that the others are subtracted from.

    Returns:
        ``measure``: what the scores are called. ``baselines``: of each task the scores that need no learning, ``chance``
        and ``majority`` (None for free text). ``methods``: for each its ``runs`` (number), ``train_seconds`` (mean of a
        run), ``asked`` (what its rows were asked with, in two words) and ``metrics``: by name ``mean``, ``deviation`` and
        ``range`` over runs, and the ``interval`` of the mean over test rows. Of methods that find no task by themselves
        ``told`` is the score behind each task's own prompt, ``by_ranking`` that of the best of all labels,
        ``written_freely`` that of unrestricted output, and ``plain_text`` in how many runs which of the two was chosen.
        ``differences``: for each other method the average performance of the reference minus its own over the
        runs both have, with ``interval``, ``deviation`` and ``wins``. ``tasks``: mean score after the last stage, by
        method. ``also``: the same of test sets that no stage learned. ``by_order``: average performance by method and
        order. ``runs``: one line a run.
    """
    methods = list(dict.fromkeys(entry.method for entry in entries))
    of = {method: [entry for entry in entries if entry.method == method] for method in methods}
    references = _references(entries)
    places: dict[str, int] = {}  # a task's rows are drawn alike wherever an order has it
    for task in (task for entry in entries for task in entry.facts.tasks):
        places.setdefault(task, len(places))
    table = {method: _method(of[method], references, places) for method in methods}
    return {
        "reference": reference,
        "measure": _measure(entries),
        "baselines": _baselines(entries),
        "methods": {method: line for method, (line, _) in table.items()},
        "differences": {
            method: _difference(table[reference][1], table[method][1])
            for method in methods
            if method != reference and reference in table
        },
        "tasks": {method: _by_task(of[method]) for method in methods},
        "also": {method: _also(of[method]) for method in methods},
        "by_order": {method: _by_order(of[method]) for method in methods},
        "runs": [_run(entry, table[entry.method][1][entry.pair]) for entry in entries],
    }


def _method(
    entries: Sequence[Entry], references: Callable[[Entry], dict[str, Sequence[Number]]], places: Mapping[str, int]
) -> tuple[dict[str, Any], dict[tuple[str, int], dict[str, _Sample]]]:
    samples = {entry.pair: _samples(entry, references(entry), places) for entry in entries}
    names = list(dict.fromkeys(name for one in samples.values() for name in one))
    seconds = [sum(stage.public["train_seconds"] or 0.0 for stage in entry.facts.stages) for entry in entries]
    found = {name: _summary([one[name] for one in samples.values() if name in one]) for name in names}
    line = {"runs": len(entries), "train_seconds": statistics.fmean(seconds), "asked": entries[0].facts.how.asked}
    ways = Counter(chosen.way for entry in entries if (chosen := shown_choice(entry.facts.result)) is not None)
    return line | ({"plain_text": dict(sorted(ways.items()))} if ways else {}) | {"metrics": found}, samples


def _samples(
    entry: Entry, references: dict[str, Sequence[Number]], places: Mapping[str, int]
) -> dict[str, _Sample]:
    """Every metric of one run."""
    facts = entry.facts
    sampled = partial(_sampled, places=[places[task] for task in facts.tasks])
    ranked = facts.result["ranked_accuracy_matrix"][-1:]
    besides = sampled(ranked, facts.cells(of="ranked_correct")[-1:], {"ranked_average_performance": _mean})
    last = facts.result.get("last") or {}
    if (own := last.get("own_prompt")) is not None:
        besides |= sampled([own], [[facts.row_scores("own", task) for task in facts.tasks]], {"told": _mean})
        ranked_all = last.get("model_accuracy") or [None] * len(facts.tasks)
        besides |= sampled([ranked_all], facts.cells(of="model_correct")[-1:], {"by_ranking": _mean})
    if (freely := last.get("greedy_accuracy")) is not None:
        besides |= sampled([freely], facts.cells(of="greedy_correct")[-1:], {"written_freely": _mean})
    if not facts.in_sequence:
        return sampled(facts.matrix[-1:], facts.cells()[-1:], {"average_performance": _mean}) | besides
    found = sampled(facts.matrix, facts.cells(), metrics.METRICS) | besides
    if (oracle := facts.result.get("oracle")) is not None:
        found |= sampled([oracle], facts.oracle_cells()[1:], {"oracle": _mean})
    if (single := references.get("single")) is not None:
        value = metrics.forward_transfer_single(facts.matrix, single)
        found["forward_transfer_single"] = _Sample(value, [])
    if (uniform := references.get(UNIFORM)) is not None and oracle is not None and entry.method != UNIFORM:
        value = metrics.oracle_gap_recovered(_mean(facts.matrix[-1:]), metrics.mean(uniform), metrics.mean(oracle))
        found["oracle_gap_recovered"] = _Sample(value, [])
    routing = routing_by_stage(facts)
    if routing:
        found["routing_accuracy"] = _Sample(routing[-1].learned_accuracy, [])
    return found


def _references(entries: Sequence[Entry]) -> Callable[[Entry], dict[str, Sequence[Number]]]:
    """What other runs of the same order and seed lend: scores alone (``per_task``), and under uniform gates."""
    lent: dict[tuple[str, int], dict[str, Sequence[Number]]] = {}
    for entry in entries:
        if entry.method in ("per_task", UNIFORM):
            name = "single" if entry.method == "per_task" else UNIFORM
            lent.setdefault(entry.pair, {})[name] = entry.facts.matrix[-1]
    return lambda entry: lent.get(entry.pair, {})


def _sampled(
    matrix: metrics.Matrix, cells: Cells, wanted: Mapping[str, MatrixMetric], *, places: Sequence[int]
) -> dict[str, _Sample]:
    means, drawn = cell_means(cells), resampled(cells, seed=0, resamples=RESAMPLES, places=places)
    return {
        name: _Sample(metric(matrix), [metric(one) for one in drawn] if metric(means) is not None else [])
        for name, metric in wanted.items()
    }


def _summary(samples: Sequence[_Sample]) -> dict[str, Any] | None:
    spread = over_seeds([sample.value for sample in samples])
    if spread is None:
        return None
    interval = None
    if all(sample.draws for sample in samples):
        interval = percentiles(spread.mean, [metrics.mean(line) for line in zip(*(s.draws for s in samples), strict=True)])
    return {
        "mean": spread.mean,
        "deviation": spread.deviation,
        "range": [spread.low, spread.high],
        "interval": [interval.low, interval.high] if interval else None,
        "runs": spread.seeds,
    }


def _difference(
    first: dict[tuple[str, int], dict[str, _Sample]], second: dict[tuple[str, int], dict[str, _Sample]]
) -> dict[str, Any] | None:
    """Average performance of the first minus the second, over the runs that both have."""
    name = "average_performance"
    pairs = [(first[pair][name], second[pair][name]) for pair in first if pair in second]
    samples = [
        _Sample(
            metrics.minus(a.value, b.value),
            [metrics.minus(x, y) for x, y in zip(a.draws, b.draws, strict=True)] if a.draws and b.draws else [],
        )
        for a, b in pairs
    ]
    found = _summary(samples) if samples else None
    if found is not None:
        found["wins"] = sum((sample.value or 0.0) > 0 for sample in samples)
    return found


def _measure(entries: Sequence[Entry]) -> str:
    known = [(entry.facts.result.get("task_metrics") or {}, entry.facts.tasks) for entry in entries]
    return common_name(metrics_of.get(task, "accuracy") for metrics_of, tasks in known for task in tasks)


def _baselines(entries: Sequence[Entry]) -> dict[str, dict[str, Number]]:
    """Of every task, from the first run that has it: test rows and labels are the same in all."""
    found: dict[str, dict[str, Number]] = {}
    for entry in entries:
        floor = baselines(entry.facts)
        for task, chance, majority in zip(entry.facts.tasks, floor.chance, floor.majority, strict=True):
            found.setdefault(task, {"chance": chance, "majority": majority})
    return found


def _by_task(entries: Sequence[Entry]) -> dict[str, Number]:
    tasks = list(dict.fromkeys(task for entry in entries for task in entry.facts.tasks))
    lines = [dict(zip(entry.facts.tasks, entry.facts.matrix[-1], strict=True)) for entry in entries]
    return {task: metrics.mean([line[task] for line in lines if task in line]) for task in tasks}


def _also(entries: Sequence[Entry]) -> dict[str, Number]:
    """Mean score on each test set that no stage learned (shifted text, paraphrases)."""
    scores: dict[str, list[Number]] = {}
    for entry in entries:
        for one in entry.facts.result.get("also") or []:
            scores.setdefault(one["task"], []).append(one["accuracy"])
    return {name: metrics.mean(values) for name, values in scores.items()}


def _by_order(entries: Sequence[Entry]) -> dict[str, Any]:
    orders = list(dict.fromkeys(entry.order for entry in entries))
    values = {order: [_mean(e.facts.matrix[-1:]) for e in entries if e.order == order] for order in orders}
    found = {order: over_seeds(line) for order, line in values.items()}
    return {
        order: None if spread is None else {"mean": spread.mean, "deviation": spread.deviation, "runs": spread.seeds}
        for order, spread in found.items()
    }


def _run(entry: Entry, samples: dict[str, _Sample]) -> dict[str, Any]:
    stages = range(1, len(entry.facts.matrix))
    by_stage = [metrics.average_performance(entry.facts.matrix[: t + 1]) for t in stages] if entry.facts.in_sequence else []
    return {
        "run_id": entry.facts.run_id,
        "method": entry.method,
        "order": entry.order,
        "seed": entry.seed,
        "tasks": entry.facts.tasks,
        "metrics": {name: sample.value for name, sample in samples.items()},
        "average_performance_by_stage": by_stage,
        "reused_stages": sum(bool(stage.public["reused"]) for stage in entry.facts.stages),
    }


def _mean(matrix: metrics.Matrix) -> Number:
    return metrics.mean(matrix[-1])
