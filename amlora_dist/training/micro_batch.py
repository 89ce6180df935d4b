"""One micro-batch as a method's loss sees it (``Method.loss``).

Every term that it gives is on the scale of the step's loss: the cross-entropy of the global batch divided by its target
tokens. What must not be forgotten is done here: rows that only fill up a rank's share count for nothing, but stay in the
graph, since a gradient on some ranks only would hang a collective; and what is no sum over rows is counted once for all
ranks and micro-batches.

Shapes: B rows, L tokens, N target tokens, V logits, T tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from amlora_dist.tasks.batches import IGNORED

if TYPE_CHECKING:
    from amlora_dist.adapters.dropout import DropoutKeys
    from amlora_dist.adapters.inject import Mixture
    from amlora_dist.tasks.batches import Example
    from amlora_dist.training.batching import Chosen, LossComputer
    from amlora_dist.training.engine import TrainingEngine


@dataclass(frozen=True, slots=True)
class Answers:
    """What the model says at each place that is followed by a target."""

    logits_BLV: Tensor
    labels_BL: Tensor
    """``IGNORED`` where there is no target."""

    @property
    def at_targets(self) -> Tensor:
        """(N, V) fp32"""
        return self.logits_BLV[self.labels_BL != IGNORED].float()


class MicroBatch:
    """Rows of one rank that go through the model together.

    Args:
        computer: makes passes of rows.
        engine: of the rank.
        mixture: of the model that learns.
        rows: the micro-batch.
        counts: False where the rows only fill up this rank's share.
        tokens: target tokens of the global batch.
        share: of the global batch's rows that are in this micro-batch.
        parts: micro-batches of all ranks in one step.
        smoothing: of labels, in the cross-entropy.
        phase: 1, or 2 while the layers' selectors learn alone.
        dropout_keys: of the rows, if the new adapter drops parts of what it reads.
    """

    def __init__(
        self,
        computer: LossComputer,
        engine: TrainingEngine,
        mixture: Mixture,
        rows: Sequence[Example],
        *,
        counts: bool,
        tokens: int,
        share: float,
        parts: int,
        smoothing: float = 0.0,
        phase: int = 1,
        dropout_keys: DropoutKeys | None = None,
    ) -> None:
        self._computer, self._engine, self.mixture, self._rows = computer, engine, mixture, rows
        self._counts, self._tokens, self._share, self._parts = counts, tokens, share, parts
        self._smoothing, self.phase, self._keys = smoothing, phase, dropout_keys
        self.reported = torch.zeros((), device=engine.device)
        """The cross-entropy, without what a method adds to it."""

    @property
    def tasks(self) -> int:
        """T, the one that is learned among them."""
        return len(self.mixture.task_names)

    def answers(self, gate_T: Tensor | None, chosen: Chosen | None = None, *, gradient: bool = True) -> Answers:
        """One pass of the model.

        Args:
            gate_T: weighs the adapters for every row; None leaves it to the layers.
            chosen: is filled with what the layers' selectors chose: of each layer its selection and a mask (B, S) that
                weighs the positions that count, sum 1 in every row; None where the gate is one for the whole row.
            gradient: False for a teacher, which sees no dropout.
        """
        if gradient:
            forward, keys = self._engine.forward, self._keys
            return Answers(*self._computer.logits(forward, self._rows, gate_T, chosen, keys))
        with torch.no_grad():
            return Answers(*self._computer.logits(self._engine.model, self._rows, gate_T, chosen))

    def cross_entropy(self, answers: Answers) -> Tensor:
        """Of the targets, smoothed if so configured: what a step reports as its loss."""
        summed = self._computer.cross_entropy(answers.logits_BLV, answers.labels_BL, self._rows, self._smoothing)
        loss = self.sum_over_tokens(summed)
        self.reported = loss.detach()
        return loss

    def sum_over_tokens(self, total: Tensor) -> Tensor:
        """A term that is a sum over the target tokens of these rows."""
        return total / self._tokens if self._counts else total * 0.0

    def mean_over_rows(self, mean: Tensor) -> Tensor:
        """A term that is a mean over these rows."""
        return mean * (self._counts * self._share)

    def once(self, term: Tensor) -> Tensor:
        """A term of the parameters, equal on all ranks."""
        return term / self._parts
