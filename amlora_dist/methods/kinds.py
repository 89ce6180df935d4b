"""What kinds of methods there are, in words that planning and checks read without importing torch."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum


class Trains(Enum):
    """What a stage makes that is published."""

    ADAPTER = "adapter"
    STATISTICS = "statistics"
    """It reads its rows and takes no optimizer step: its adapter stays zero, and ``answer.evidence`` is ``keys``."""
    NOTHING = "nothing"
    """It only scores."""


class Stages(Enum):
    """What stages a sequence of tasks has, and what each sees of those before."""

    CHAINED = "chained"
    """One a task, each on top of the adapters of the earlier ones."""
    APART = "apart"
    """One a task, each in a bank of its own, and every row is scored by the adapter of its own task: an upper bound, not a
    method to serve."""
    ONE = "one"
    """A single one about all tasks, named like the method."""

    def names(self, tasks: Sequence[str], method: str) -> list[str]:
        """Names of the stages of a sequence, in order."""
        return [method] if self is Stages.ONE else list(tasks)
