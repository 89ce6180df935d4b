"""Stop at the best: the step whose adapter loses least on held-out rows is the one that is kept.

The best adapter so far travels inside every checkpoint, so that a stage that is killed, copied to another node or begun
again under another world size knows it. All decisions are functions of the recorded losses alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from amlora_dist.training.checkpoint import BEST
from amlora_dist.training.held_loss import HeldLoss, beats
from amlora_dist.training.settings import TrainingSettings

MOST_CHECKS = 8
Look = Sequence[Any]
"""(step, loss on the held-out rows in nats per target token, or None where it was not finite)."""


def check_interval(settings: TrainingSettings, steps: int, held: int) -> int:
    """Optimizer steps between two looks at the held-out rows.

    By default so many looks, ``MOST_CHECKS`` at most, that they read about half as many rows as the steps do: a pass
    without gradient costs a third of a step's.
    """
    if settings.check_every is not None:
        return settings.check_every
    looks = max(1, min(MOST_CHECKS, steps * settings.batch_size // (2 * max(1, held))))
    return math.ceil(steps / looks)


def best_of(losses: Sequence[Look], margin: float) -> int | None:
    """Which of the entries is kept: an earlier one, unless a later one is better by more than ``margin``; None where none
    is finite."""
    best: int | None = None
    for place, (_, loss) in enumerate(losses):
        if beats(loss, None if best is None else losses[best][1], margin):
            best = place
    return best


def exhausted(losses: Sequence[Look], settings: TrainingSettings) -> bool:
    """Whether so many looks in a row have brought nothing better that the stage ends."""
    best = best_of(losses, settings.near_tie)
    return bool(settings.patience) and best is not None and len(losses) - 1 - best >= settings.patience


class BestKeeper:
    """Looks at the held-out rows every so often and holds the best adapter's fp32 weights, on the CPU of every rank."""

    def __init__(self, held: HeldLoss, settings: TrainingSettings, steps: int) -> None:
        self._held, self._settings, self._steps = held, settings, steps
        self._every = check_interval(settings, steps, len(held.rows))
        self._best: dict[str, Tensor] = {}

    def look(self, step: int, losses: list[list[Any]]) -> bool:
        """Called after every optimizer step, 1-based: adds to ``losses`` where it is time to look; whether it did."""
        if step % self._every and step != self._steps:
            return False
        losses.append([step, self._held()])
        if best_of(losses, self._settings.near_tie) == len(losses) - 1:
            state = self._held.engine.export_state()
            self._best = {f"{BEST}{name}": tensor for name, tensor in state.items() if name.startswith("master.")}
        return True

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps besides the current state: ``best.master.<name>``."""
        return self._best

    def take_up(self, state: Mapping[str, Tensor]) -> None:
        """The same from a checkpoint."""
        self._best = {name: tensor for name, tensor in state.items() if name.startswith(BEST)}

    def restore(self, step: int) -> None:
        """Put the best adapter in the place of the current one, after ``step`` optimizer steps."""
        if self._best:
            state = self._held.engine.export_state()
            self._held.engine.import_state(state | {name.removeprefix(BEST): t for name, t in self._best.items()}, step)
