"""A race of starts: each candidate takes the stage's own first steps, and the one that loses least on held-out rows goes on.

The winner's steps are kept as the stage's first ones, so that only the losers cost. A race that is cut short by a crash
or a signal is run again from its beginning, and ends the same.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from amlora_dist.training.checkpoint import StageProgress
from amlora_dist.training.held_loss import HeldLoss, beats
from amlora_dist.training.loop import Learner

log = logging.getLogger(__name__)

FEWEST_STEPS = 8
"""Of each candidate; where losers may take fewer, there is no race."""
LONG_STAGE = 100
"""Steps from which a stage counts as long."""
SHARE_OF_LONG, SHARE_OF_SHORT = 0.15, 0.5
"""Of the stage's steps, which the losers may cost together."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One start: its name, and tensors of ``TrainingEngine.export_state`` that differ from the fresh state."""

    name: str | None
    state: Mapping[str, Tensor]


def race_steps(steps: int, candidates: int, most: int) -> int:
    """Steps of each candidate in a stage of ``steps``; 0: no race."""
    share = SHARE_OF_LONG if steps >= LONG_STAGE else SHARE_OF_SHORT
    each = min(most, int(share * steps / max(1, candidates - 1)))
    return each if each >= FEWEST_STEPS and candidates > 1 else 0


def run_race(
    learner: Learner, held: HeldLoss, candidates: Sequence[Candidate], steps: int, near_tie: float, fresh: StageProgress
) -> tuple[Candidate, StageProgress, dict[str, float]]:
    """Let every candidate take ``steps`` steps from the engine's present state.

    Args:
        candidates: the first one wins near-ties.
        near_tie: share by which a held-out loss has to be lower.
        fresh: progress at step 0.

    Returns:
        The winner, whose state is in the engine; the stage's progress, ``steps`` steps in; the held-out losses by name
        (``none`` for a candidate without one).

    Raises:
        StoppedError: asked to stop; the race will begin again.
        NonFiniteLossError: a candidate's loss became NaN, as it would have in the stage itself.
    """
    start = learner.engine.export_state()
    best: tuple[Candidate, StageProgress, float, dict[str, Tensor]] | None = None
    losses: dict[str, float] = {}
    for candidate in candidates:
        learner.engine.import_state(start | dict(candidate.state), 0)
        progress = learner.warm(fresh.copied(), steps)
        loss = held()
        losses[candidate.name or "none"] = loss
        if best is None or beats(loss, best[2], near_tie):
            best = (candidate, progress, loss, learner.engine.export_state())
    assert best is not None
    winner, progress, _, state = best
    learner.engine.import_state(state, steps)
    return winner, progress, losses
