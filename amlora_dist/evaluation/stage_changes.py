"""Backward transfer row by row: which answers to the rows of earlier tasks a stage changed, and whether a route did it.

Base model and old adapters are frozen, so a text that is routed as before is answered much as before; a new task can take
texts from an old one whose texts look alike. That is what backward transfer is made of, and this says which rows it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from amlora_dist.evaluation.intervals import Cells, Interval, percentiles, resampled
from amlora_dist.evaluation.metrics import Matrix, mean, minus
from amlora_dist.evaluation.scoring import Prediction

StageAnswers = Sequence[Sequence[Sequence[Prediction] | None]]
"""``answers[t - 1][i]``: what was answered to the test rows of task i (0-based) after stage t; None: not known."""


@dataclass(frozen=True, slots=True)
class ChangedAnswer:
    """A row that is answered otherwise after a stage."""

    task: str
    before: Prediction
    after: Prediction

    @property
    def rerouted(self) -> bool:
        """Whether its text goes to another task than before."""
        return self.before.route != self.after.route

    @property
    def worse(self) -> bool:
        """Of labels: right before, wrong after. Of free text: a lower score."""
        return self.after.correct < self.before.correct

    @property
    def better(self) -> bool:
        """Of labels: wrong before, right after. Of free text: a higher score."""
        return self.after.correct > self.before.correct


@dataclass(frozen=True, slots=True)
class StageChange:
    """What became of the test rows of one earlier task by a stage, or of all earlier tasks since their own stages."""

    stage: int
    """From 1."""
    task: str | None
    """None: all tasks learned before, each against its own stage: ``difference`` is the backward transfer (BWT)."""
    before: float
    """Score before the stage, 0 to 1; of all tasks the mean right after their own stages."""
    after: float
    difference: float
    interval: Interval | None
    """Of the difference, paired over rows; None where rows are missing."""
    answers: tuple[ChangedAnswer, ...] | None
    """The rows that are answered otherwise; None where rows are missing."""
    routed: bool
    """Whether a router chose a task for the rows."""

    def counts(self) -> dict[str, int | None]:
        """StageAnswers that changed, became worse, became better; and of each how many go to another task than before. None:
        not known, or nothing routes."""
        found: dict[str, int | None] = {}
        kept = self.answers
        for name, other in (("changed", "rerouted"), ("worse", "worse, rerouted"), ("better", "better, rerouted")):
            chosen = None if kept is None else [one for one in kept if name == "changed" or getattr(one, name)]
            found[name] = None if chosen is None else len(chosen)
            found[other] = None if chosen is None or not self.routed else sum(one.rerouted for one in chosen)
        return found


def stage_changes(tasks: Sequence[str], matrix: Matrix, answers: StageAnswers, *, seed: int) -> list[StageChange]:
    """What each stage from the second on did to the tasks before it: a line for each of these tasks, against the stage
    before, then one for all of them, against their own stages (Lopez-Paz and Ranzato's BWT of the sequence so far). Lines
    whose scores are not known are left out.

    Args:
        tasks: of the sequence, in order; stage t learned ``tasks[t - 1]``.
        matrix: R with row 0 untrained.
        answers: the rows behind it.
        seed: of the intervals' draws.

    Raises:
        ValueError: two stages answered different rows of a task.
    """
    cells: Cells = [
        [None] * len(tasks),
        *([None if rows is None else [one.correct for one in rows] for rows in line] for line in answers),
    ]
    drawn = resampled(cells, seed=seed)
    found = []
    for stage in range(2, len(matrix)):
        groups: list[tuple[str | None, list[tuple[int, int]]]] = [
            (tasks[place], [(place, stage - 1)]) for place in range(stage - 1)
        ]
        groups.append((None, [(place, place + 1) for place in range(stage - 1)]))
        for task, pairs in groups:
            before = mean([matrix[old][place] for place, old in pairs])
            after = mean([matrix[stage][place] for place, _ in pairs])
            if before is None or after is None:
                continue
            difference = after - before
            draws = [mean([minus(one[stage][place], one[old][place]) for place, old in pairs]) for one in drawn]
            known = [(tasks[place], answers[old - 1][place], answers[stage - 1][place]) for place, old in pairs]
            found.append(
                StageChange(
                    stage, task, before, after, difference, percentiles(difference, draws), _changed(known),
                    any(one.route is not None for _, _, rows in known for one in rows or ()),
                )
            )  # fmt: skip
    return found


def _changed(
    known: Sequence[tuple[str, Sequence[Prediction] | None, Sequence[Prediction] | None]],
) -> tuple[ChangedAnswer, ...] | None:
    found = []
    for task, before, after in known:
        if before is None or after is None:
            return None
        if [one.row for one in before] != [one.row for one in after]:
            raise ValueError(f"{task}: stages answered different rows, expected the same rows at every stage")
        pairs = zip(before, after, strict=True)
        found += [ChangedAnswer(task, old, new) for old, new in pairs if old.given != new.given]
    return tuple(found)
