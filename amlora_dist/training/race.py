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
from amlora_dist.training.failures import SLOWER, NonFiniteLossError
from amlora_dist.training.held_loss import HeldLoss, beats, first_lowest
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
) -> tuple[Candidate, StageProgress, dict[str, float | None]]:
    """Let every candidate take ``steps`` steps from the engine's present state. One that diverges has lost.

    Args:
        candidates: of those that are near-ties with the lowest loss the first one wins.
        near_tie: share by which a held-out loss has to be lower.
        fresh: progress at step 0.

    Returns:
        The winner, whose state is in the engine; the stage's progress, ``steps`` steps in; the held-out losses by name
        (``none`` for a candidate without one), None of those that diverged.

    Raises:
        StoppedError: asked to stop; the race will begin again.
        NonFiniteLossError: the loss became NaN under every candidate, as it would have in the stage itself.
        DeviceMemoryError: a step or a pass does not fit in memory.
    """
    engine = learner.engine
    start = engine.export_state()
    ended: dict[int, tuple[StageProgress, dict[str, Tensor]]] = {}  # those that may still win
    losses: list[float | None] = []
    diverged: NonFiniteLossError | None = None
    for place, candidate in enumerate(candidates):
        engine.import_state(start | dict(candidate.state), 0)
        loss, progress = None, fresh.copied()
        try:
            progress = learner.warm(progress, steps)
            loss = held()
        except NonFiniteLossError as error:
            engine.drop_gradients()
            diverged = diverged or error
        losses.append(loss)
        if loss is not None:
            ended[place] = progress, engine.export_state()
        ended = {one: kept for one, kept in ended.items() if not any(beats(loss, losses[one], near_tie) for loss in losses)}
    winner = first_lowest(losses, near_tie)
    if winner is None:
        raise diverged or NonFiniteLossError(f"the loss on the held-out rows is not finite after {steps} steps; {SLOWER}")
    progress, state = ended[winner]
    engine.import_state(state, steps)
    named = {one.name or "none": loss for one, loss in zip(candidates, losses, strict=True)}
    return candidates[winner], progress, named
