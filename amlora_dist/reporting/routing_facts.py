"""What the router did in a run, from the gates stored with every prediction."""

from __future__ import annotations

from dataclasses import dataclass

from amlora_dist.evaluation.routing import RoutingDrift, RoutingStatistics, routing_drift, routing_statistics
from amlora_dist.methods import METHODS, method_class
from amlora_dist.reporting.facts import RunFacts

Gates = list[list[float]]


@dataclass(frozen=True, slots=True)
class StageRouting:
    """Routing after one stage, over the tasks that were scored."""

    stage: int
    statistics: RoutingStatistics
    chosen: list[list[float] | None]
    """Task x adapter: share of a task's inputs whose largest gate is that adapter's."""
    learned_accuracy: float | None
    """Over the inputs of the tasks learned in this run so far."""
    drift: RoutingDrift | None
    """Against the stage before, on the inputs of the tasks that it had learned."""


def is_routed(facts: RunFacts) -> bool:
    """Whether a router chooses per input, and its gates are there to read."""
    name = str(facts.result["method"])
    stages = range(1, len(facts.stages) + 1)  # with `evaluate: last` the last one alone was scored
    return name in METHODS and method_class(name).routed and any(_gates(facts, stage) for stage in stages)


def routing_by_stage(facts: RunFacts) -> list[StageRouting]:
    """Routing after every stage of which gates are known; empty for a method without a router."""
    if not is_routed(facts):
        return []
    parents = list(facts.inputs.get("parent_tasks", []))
    found: list[StageRouting] = []
    before: dict[str, Gates] = {}
    for number in range(1, len(facts.stages) + 1):
        gates = _gates(facts, number)
        adapters = [*parents, *(stage.task for stage in facts.stages[:number])]
        gates = {task: rows for task, rows in gates.items() if len(rows[0]) == len(adapters)}
        if gates:
            found.append(_stage(number, gates, adapters, len(parents), before))
        before = gates
    return found


def _stage(
    number: int, gates: dict[str, Gates], adapters: list[str], parents: int, before: dict[str, Gates]
) -> StageRouting:
    tasks = list(gates)
    flat = [row for rows in gates.values() for row in rows]
    truth = [index for index, task in enumerate(tasks) for _ in gates[task]]
    statistics = routing_statistics(flat, truth, tasks=tasks, adapters=adapters)
    learned = adapters[parents:]
    pairs = [(a, n) for a, n in zip(statistics.accuracy, statistics.inputs, strict=True) if a is not None]
    inputs = sum(n for _, n in pairs)
    old = [task for task in learned[:-1] if task in gates and task in before and len(gates[task]) == len(before[task])]
    drift = None
    if old:
        first = [row for task in old for row in before[task]]
        second = [row for task in old for row in gates[task]]
        drift = routing_drift(first, second, old=len(adapters) - 1, new=len(adapters))
    return StageRouting(
        stage=number,
        statistics=statistics,
        chosen=[_choices(gates[task], len(adapters)) for task in tasks],
        learned_accuracy=sum(a * n for a, n in pairs) / inputs if inputs else None,
        drift=drift,
    )


def _gates(facts: RunFacts, stage: int) -> dict[str, Gates]:
    """Gates of a stage's predictions, by task; tasks without any are left out."""
    found = {}
    for task in facts.tasks:
        rows = [p.gates for p in facts.cell("router", task, stage) or []]
        known = [row for row in rows if row]
        if known and len(known) == len(rows):
            found[task] = known
    return found


def _choices(gates: Gates, columns: int) -> list[float]:
    counts = [0] * columns
    for row in gates:
        best = max(range(columns), key=row.__getitem__)
        counts[best] += row[best] > 0
    return [count / len(gates) for count in counts]
