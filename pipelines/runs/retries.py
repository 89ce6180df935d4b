"""What happens after a stage failed: a pure table of the kind of failure, and of how often it came in the same place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from amlora_dist.errors import AmloraError

RETRIES = {
    "WorkersLostError": 4,
    "NonFiniteLossError": 1,
}
"""Error class -> how often a stage is tried again after it failed in the same place. A class that is not named here is
not retried: a configuration fault, too little memory, a full disk or a lost lease would only fail again.

Workers and nodes die, and the stage goes on from its last checkpoint; the place is how far the stage had come, so that
one that runs for days may lose a node every day. A loss that is not finite is tried once more: a broken node computes
nonsense, but the same step failing twice is the training's own fault."""


@dataclass(frozen=True, slots=True)
class Failure:
    """How one attempt at a stage ended."""

    error: AmloraError
    place: object
    """Where it was; equal for two failures in the same place."""

    @classmethod
    def of(cls, error: AmloraError, progress: object) -> Failure:
        """``progress``: what the stage had finished. An error that knows its step is there instead."""
        step = getattr(error, "step", None)
        return cls(error, progress if step is None else f"step {step}")

    @property
    def kind(self) -> str:
        return type(self.error).__name__


@dataclass(frozen=True, slots=True)
class Verdict:
    """Try again or not, and why, in words for the user."""

    retry: bool
    reason: str


def decide(failures: Sequence[Failure]) -> Verdict:
    """The verdict on the last of a stage's failures, the earlier ones before it."""
    last = failures[-1]
    allowed = RETRIES.get(last.kind, 0)
    times = sum(one.kind == last.kind and one.place == last.place for one in failures)
    if times <= allowed:
        return Verdict(
            True,
            f"attempt {len(failures)} failed ({last.error}); trying again from the last checkpoint"
            f" ({times} of {allowed} retries in this place)",
        )
    if not allowed:
        return Verdict(False, str(last.error))
    return Verdict(False, f"{last.error} (given up after {times} failures in the same place)")
