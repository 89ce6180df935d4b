"""What happens after a stage failed: a pure table of the kind of failure and the attempt."""

from __future__ import annotations

from dataclasses import dataclass

from amlora_dist.errors import AmloraError

RETRIES = {
    "WorkersLostError": 4,
    "NonFiniteLossError": 1,
}
"""Error class -> how often a stage is tried again. A class that is not named here is not retried: a configuration
fault, a full disk or a lost lease would only fail again. Workers and nodes die, and the stage goes on from its last
checkpoint. A loss that is not finite is tried once more, from the last checkpoint: a broken node computes nonsense,
but the same step failing twice is the training's own fault."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Try again or not, and why, in words for the user."""

    retry: bool
    reason: str


def decide(error: AmloraError, attempt: int) -> Verdict:
    """The verdict after ``attempt`` (1-based) ended with ``error``."""
    name = type(error).__name__
    allowed = RETRIES.get(name, 0)
    if attempt <= allowed:
        return Verdict(True, f"attempt {attempt} of {allowed + 1} failed ({error}); trying again from the last checkpoint")
    if not allowed:
        return Verdict(False, str(error))
    return Verdict(False, f"{error} (given up after {attempt} attempts)")
