"""The loss on rows that nobody trains on: what decides which checkpoint is kept and which start goes on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from amlora_dist.evaluation.scoring import deal
from amlora_dist.tasks.batches import Example
from amlora_dist.training.batching import LossComputer, target_tokens
from amlora_dist.training.engine import TrainingEngine
from amlora_dist.training.failures import LESS_MEMORY, memory_watched

BATCH = 16


def pass_rows(micro_batch_size: int | None) -> int:
    """Rows of one pass without gradient, on one rank, at most: a function of the configuration, not of the world size, so
    that the same rows share a pass on any number of ranks."""
    return BATCH if micro_batch_size is None else min(BATCH, micro_batch_size)


@dataclass(frozen=True, slots=True)
class HeldLoss:
    """Mean loss over the held-out rows, in nats per target token, without dropout and smoothing.

    The same number on every rank; every rank makes equally many passes.
    """

    engine: TrainingEngine
    loss: LossComputer
    rows: Sequence[Example]
    gate: Tensor | None
    """Of the task that is learned, (tasks,)."""
    batch: int = BATCH
    """Rows of a pass on one rank, at most (``pass_rows``)."""

    def __call__(self) -> float | None:
        """The loss; None where it is not finite, which loses against every other (``beats``).

        Raises:
            DeviceMemoryError: a pass does not fit in memory.
        """
        with memory_watched("the loss on the held-out rows", LESS_MEMORY):
            mean = self._mean()
        return mean if math.isfinite(mean) else None

    def _mean(self) -> float:
        ranks, model = self.engine.ranks, self.engine.model
        total = torch.zeros(1, dtype=torch.float64, device=self.engine.device)
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                for indices, counts in deal(self.rows, self.batch, ranks.rank, ranks.world):
                    part = self.loss(model, [self.rows[place] for place in indices], self.gate)
                    total += part.double() if counts else 0.0 * part.double()
        finally:
            model.train(was_training)
        return float(ranks.sum(total)) / target_tokens(self.rows)


def beats(one: float | None, other: float | None, margin: float) -> bool:
    """Whether a held-out loss is lower than another by more than a near-tie: ``margin`` is a share of the other. One that
    is not finite (None in what is stored) is lower than none, and every other is lower than it."""
    return _comparable(one) < _comparable(other) * (1.0 - margin)


def first_lowest(losses: Sequence[float | None], margin: float) -> int | None:
    """Which loss wins: the first one, in the order of preference, that the lowest of all does not beat. None: none is
    finite."""
    least = min(map(_comparable, losses), default=math.inf)
    if least == math.inf:
        return None
    return next(place for place, loss in enumerate(losses) if not beats(least, loss, margin))


def _comparable(loss: float | None) -> float:
    return loss if loss is not None and math.isfinite(loss) else math.inf
