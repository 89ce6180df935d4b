"""What a task scores without learning anything: its labels drawn evenly, or its most frequent label always."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from amlora_dist.evaluation import metrics
from amlora_dist.reporting.facts import RunFacts

if TYPE_CHECKING:
    from amlora_dist.reporting.figures import Number

CHANCE, MAJORITY = "chance", "majority label"
"""What figures and tables call the two."""


@dataclass(frozen=True, slots=True)
class Baselines:
    """By task, in the order of the run; fractions, None for free text and where rows were not scored."""

    chance: list[Number]
    """1 / number of labels: every label equally likely, whatever the text."""
    majority: list[Number]
    """Share of the scored rows whose right answer is the most frequent one among them: the best constant answer."""

    @property
    def lines(self) -> list[tuple[str, list[Number]]]:
        """Those of which anything is known, by name."""
        both = [(MAJORITY, self.majority), (CHANCE, self.chance)]
        return [(name, line) for name, line in both if any(value is not None for value in line)]

    @property
    def means(self) -> list[tuple[str, float]]:
        """Their means, by name, where they are known for every task."""
        found = [(name, metrics.mean(line)) for name, line in self.lines if None not in line]
        return [(name, mean) for name, mean in found if mean is not None]


def baselines(facts: RunFacts) -> Baselines:
    """The two baselines of every task of a run."""
    pairs = [_of_task(facts, task) for task in facts.tasks]
    return Baselines([chance for chance, _ in pairs], [majority for _, majority in pairs])


def _of_task(facts: RunFacts, task: str) -> tuple[Number, Number]:
    about = facts.inputs.get("tasks", {}).get(task, {})
    labels = about.get("labels")
    if not labels or about.get("metric", "accuracy") != "accuracy":
        return None, None
    answers = Counter(p.answer for p in facts.cell("router", task) or [])
    return 1.0 / len(labels), max(answers.values()) / answers.total() if answers else None
