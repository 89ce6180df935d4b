"""Whether a version may take an alias: what is required of it, and what it may lose against the one it replaces.

Scores are shares of a sample's rows, 0 to 1, of answers as they are served. Nothing here knows a registry.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from amlora_dist.errors import UserError

SCORES = ("accuracy", "routing_accuracy")
"""What may be required: right answers, and texts that are routed to their own task."""
DEFAULT_MARGIN = 0.02
_REQUIREMENT = re.compile(r"\s*(?P<score>\w+)\s*(?:\[(?P<task>[^\]]+)\])?\s*(?P<sign>>=|>)\s*(?P<bound>\S+)\s*")
_ROUNDING = 1e-9

Scores = Mapping[str, Mapping[str, float | None]]
"""By task: each of ``SCORES``."""


@dataclass(frozen=True, slots=True)
class Requirement:
    """``accuracy[TASK] >= 0.6``; without a task the mean over the tasks of the sample."""

    score: str
    task: str | None
    strict: bool
    """``>`` instead of ``>=``."""
    bound: float

    @classmethod
    def parse(cls, text: str) -> Requirement:
        """From its text.

        Raises:
            UserError: it is none.
        """
        found = _REQUIREMENT.fullmatch(text)
        try:
            bound = float(found["bound"]) if found else math.nan
        except ValueError:
            bound = math.nan
        if found is None or found["score"] not in SCORES or not 0.0 <= bound <= 1.0:
            raise UserError(
                f"--require: found {text!r}, expected SCORE[TASK] >= NUMBER with a SCORE of {', '.join(SCORES)} and a NUMBER"
                " from 0 to 1, such as 'accuracy[agnews] >= 0.6'; without [TASK] it is the mean over the sample's tasks"
            )
        return cls(found["score"], found["task"], found["sign"] == ">", bound)

    def __str__(self) -> str:
        task = "" if self.task is None else f"[{self.task}]"
        return f"{self.score}{task} {'>' if self.strict else '>='} {self.bound:g}"


@dataclass(frozen=True, slots=True)
class PromotionCheck:
    """One thing that was looked at."""

    what: str
    found: float
    """The version's score."""
    bound: float
    """What it must have at least."""
    replaced: float | None
    """The score of the version it replaces; None where this check does not ask for it."""
    passed: bool

    def __str__(self) -> str:
        before = "" if self.replaced is None else f" (the replaced version has {self.replaced:.3f})"
        return f"{self.what}: found {self.found:.3f}{before}"


def check_margin(margin: float) -> float:
    """A margin from 0 to 1. Raises UserError for another number."""
    if not 0.0 <= margin <= 1.0:
        raise UserError(f"--margin: found {margin:g}, expected a share of the rows from 0 to 1, such as {DEFAULT_MARGIN:g}")
    return margin


def check_covered(requirements: Sequence[Requirement], sample: Sequence[str], replaced: Sequence[str]) -> None:
    """Refuse a sample that cannot tell what is asked of it.

    Args:
        requirements: of the version.
        sample: tasks that the sample has rows of.
        replaced: tasks of the version that is replaced.

    Raises:
        UserError: names the task.
    """
    for one in requirements:
        if one.task is not None and one.task not in sample:
            raise UserError(f"--require {str(one)!r}: the sample has no rows of {one.task!r}, only of {', '.join(sample)}")
    if missing := [task for task in replaced if task not in sample]:
        raise UserError(
            f"--sample: found no rows of {', '.join(missing)}, which the version to be replaced serves; add some, or nobody"
            " knows whether they get worse"
        )


def judge(
    requirements: Sequence[Requirement], margin: float, scores: Scores, replaced: Scores | None
) -> list[PromotionCheck]:
    """Every check of a promotion.

    Args:
        requirements: of the version.
        margin: share of a task's rows by which it may be worse than the version it replaces.
        scores: of the version, by task of the sample.
        replaced: of the version it replaces, of the tasks that that one has; None where it replaces none.

    Returns:
        The requirements, then accuracy task by task against the replaced version.
    """
    found = []
    for one in requirements:
        value = _value(scores, one)
        passed = value > one.bound if one.strict else value >= one.bound - _ROUNDING
        found.append(PromotionCheck(str(one), value, one.bound, None, passed))
    for task, before in (replaced or {}).items():
        earlier, now = before["accuracy"] or 0.0, scores[task]["accuracy"] or 0.0
        bound = max(0.0, earlier - margin)
        found.append(PromotionCheck(f"accuracy[{task}] >= {bound:.3f}", now, bound, earlier, now >= bound - _ROUNDING))
    return found


def _value(scores: Scores, one: Requirement) -> float:
    if one.task is not None:
        return scores[one.task][one.score] or 0.0
    values = [task[one.score] or 0.0 for task in scores.values()]
    return math.fsum(values) / len(values)
