"""ELLA: the sum of all adapters, the new one held back where the earlier ones have changed the weights most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from amlora_dist.methods.inc_lora import IncLoRA

if TYPE_CHECKING:
    from amlora_dist.adapters.inject import Mixture
    from amlora_dist.training.micro_batch import MicroBatch
    from amlora_dist.training.result import Result
    from amlora_dist.training.settings import StageSettings


class ELLA(IncLoRA):
    """IncLoRA with a penalty on the new update dW_t, element by element where the past ones are large::

        loss = CE + ella_weight * mean over layers of || dW_t * W_past ||_F^2 / mean(W_past^2),   W_past = sum_{i<t} dW_i

    ``*`` is the elementwise product, so that each entry of dW_t shrinks by the energy that the past has there, and entries
    that nobody has used are free. One matrix a layer stands for the whole past, however many tasks there were.

    Source: Das Biswas et al. 2026 (ELLA, arXiv 2601.02232), known by its abstract: one aggregated update matrix, a
    regularizer that penalises alignment with its high-energy directions, an anisotropic shrinkage. That it is elementwise
    is from memory of the paper; its weight and schedule are not known. The division by the mean square is ours, so that
    the weight means the same at every scale of the past.
    """

    uses = ("ella_weight",)

    def __init__(self, settings: StageSettings) -> None:
        super().__init__(settings)
        self._energy: dict[str, Tensor] = {}
        """W_past squared over its mean, (d_out, d_in) fp32, by module path."""

    def prepare(self, mixture: Mixture, parents: Sequence[Result]) -> None:
        adapters = [parent.adapter for parent in parents]
        for path in adapters[0].a if adapters else ():
            updates = [one.scale * (one.b[path].float() @ one.a[path].float()) for one in adapters]
            energy_OI = torch.stack(updates).sum(dim=0).square()
            self._energy[path] = (energy_OI / energy_OI.mean().clamp(min=1e-30)).to(mixture.device)

    def loss(self, batch: MicroBatch) -> Tensor:
        loss = super().loss(batch)
        if not self._energy:
            return loss
        trainable, layers = batch.mixture.trainable(), self.layers
        terms = [
            (energy_OI * (trainable[f"b.{path}"].float() @ trainable[f"a.{path}"].float()).square()).sum()
            for path, energy_OI in self._energy.items()
        ]
        penalty = self.settings.method_settings.ella_weight * (layers.alpha / layers.rank) ** 2 * torch.stack(terms).mean()
        return loss + batch.once(penalty)
