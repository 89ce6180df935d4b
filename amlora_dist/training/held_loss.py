"""The loss on rows that nobody trains on: what decides which checkpoint is kept and which start goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from amlora_dist.evaluation.scoring import deal
from amlora_dist.tasks.batches import Example
from amlora_dist.training.batching import LossComputer, target_tokens
from amlora_dist.training.engine import TrainingEngine

BATCH = 16


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

    def __call__(self) -> float:
        ranks, model = self.engine.ranks, self.engine.model
        total = torch.zeros(1, dtype=torch.float64, device=self.engine.device)
        was_training = model.training
        model.eval()
        with torch.no_grad():
            for indices, counts in deal(self.rows, BATCH, ranks.rank, ranks.world):
                part = self.loss(model, [self.rows[place] for place in indices], self.gate)
                total += part.double() if counts else 0.0 * part.double()
        model.train(was_training)
        return float(ranks.sum(total)) / target_tokens(self.rows)


def beats(one: float, other: float, margin: float) -> bool:
    """Whether a held-out loss is lower than another by more than a near-tie: ``margin`` is a share of the other."""
    return one < other * (1.0 - margin)
