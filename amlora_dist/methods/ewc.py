"""Elastic weight consolidation on the LoRA's parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from amlora_dist.errors import UserError
from amlora_dist.methods.seq_lora import SeqLoRA

if TYPE_CHECKING:
    from amlora_dist.adapters.adapter import Adapter
    from amlora_dist.adapters.inject import Mixture
    from amlora_dist.methods.base import Trained
    from amlora_dist.training.micro_batch import MicroBatch
    from amlora_dist.training.result import Result
    from amlora_dist.training.settings import StageSettings


class EWC(SeqLoRA):
    """``seq_lora`` held back where earlier tasks are sensitive::

        loss = CE + ewc_weight / 2 * sum_p F_p (theta_p - theta*_p)^2

    theta* is the adapter after the last stage. F is the diagonal of the empirical Fisher information, summed over the
    earlier tasks: for each, the mean over at most ``ewc_rows`` of its training rows of the squared gradient of the
    row's log-likelihood, taken at the end of its own stage. It is stored with the stage's result, in the shapes of A
    and B.

    Source: Kirkpatrick et al. 2017; one penalty around the newest parameters with the Fishers added up is the online
    form (Schwarz et al. 2018, with gamma 1), which needs one anchor however many tasks there are.
    """

    uses = ("ewc_weight",)

    def __init__(self, settings: StageSettings) -> None:
        super().__init__(settings)
        self._fisher: dict[str, Tensor] = {}
        self._anchor: dict[str, Tensor] = {}

    def reads(self, stage: int) -> dict[str, Any]:
        return super().reads(stage) | {"ewc_rows": self.settings.method_settings.ewc_rows}

    def prepare(self, mixture: Mixture, parents: Sequence[Result]) -> None:
        if not parents:
            return
        last = parents[-1]
        for name in mixture.trainable():
            if f"fisher.{name}" not in last.method_state:
                raise UserError(
                    f"parent: the adapter of {last.adapter.task!r} was published without Fisher information, which"
                    " method 'ewc' goes on from; take a parent bank that 'ewc' has trained"
                )
            self._fisher[name] = last.method_state[f"fisher.{name}"].to(mixture.device)
            self._anchor[name] = last.adapter.tensors()[name].float().to(mixture.device)

    def loss(self, batch: MicroBatch) -> Tensor:
        loss = super().loss(batch)
        if not self._fisher:
            return loss
        terms = [
            (self._fisher[name] * (parameter.float() - self._anchor[name]).square()).sum()
            for name, parameter in batch.mixture.trainable().items()
        ]
        return loss + batch.once(0.5 * self.settings.method_settings.ewc_weight * torch.stack(terms).sum())

    def finished(self, trained: Trained) -> tuple[Adapter, dict[str, Tensor]]:
        named = trained.mixture.trainable()
        squares = [torch.zeros_like(p, dtype=torch.float32, requires_grad=False) for p in named.values()]
        for loss in trained.row_losses(self.settings.method_settings.ewc_rows):
            for square, gradient in zip(squares, torch.autograd.grad(loss, list(named.values())), strict=True):
                square += gradient.float().square()
        count = min(trained.rows, self.settings.method_settings.ewc_rows)
        own = {name: trained.add_up(square) / count for name, square in zip(named, squares, strict=True)}
        fisher = {n: f + self._fisher[n] if self._fisher else f for n, f in own.items()}
        return trained.adapter, {f"fisher.{name}": f.cpu() for name, f in fisher.items()}
