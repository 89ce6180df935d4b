"""O-LoRA: the sum of all adapters, the new one pushed away from the directions that earlier ones read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from amlora_dist.methods.inc_lora import IncLoRA

if TYPE_CHECKING:
    from amlora_dist.adapters.adapter import Adapter
    from amlora_dist.adapters.inject import Mixture
    from amlora_dist.training.micro_batch import MicroBatch
    from amlora_dist.training.result import Result
    from amlora_dist.training.settings import StageSettings


class OLoRA(IncLoRA):
    """IncLoRA with a penalty on the overlap of the new A with all earlier ones, averaged over layers::

        loss = CE + ortho_weight * mean over layers of 1/r sum_j sum_k cos^2(new row j, old row k)

    Rows are compared by their cosine and the sum is divided by the new rank, so the weight means the same at every
    width, rank and scale of A: for orthonormal old rows the term is the share of a new direction that lies in their
    span. The published code adds up |<a_j, a_k>| without any normalisation, which grows with all of these.

    Source: Wang et al. 2023 (arXiv 2310.14152), equation 7; the normalisation is ours.
    """

    uses = ("ortho_weight",)

    def __init__(self, settings: StageSettings) -> None:
        super().__init__(settings)
        self._old: list[tuple[list[str], Tensor]] = []
        """For each input width: module paths, and their unit rows of all earlier A (modules, earlier ranks, d_in)."""

    def prepare(self, mixture: Mixture, parents: Sequence[Result]) -> None:
        self._old = [(paths, rows.to(mixture.device)) for paths, rows in directions([p.adapter for p in parents])]

    def loss(self, batch: MicroBatch) -> Tensor:
        loss = super().loss(batch)
        if not self._old:
            return loss
        trainable = batch.mixture.trainable()
        total = sum(
            (
                overlap(torch.stack([trainable[f"a.{path}"].float() for path in paths]), old_MRI)
                for paths, old_MRI in self._old
            ),
            torch.zeros((), device=batch.mixture.device),
        )
        penalty = self.settings.method_settings.ortho_weight * total / sum(len(paths) for paths, _ in self._old)
        return loss + batch.once(penalty)


def directions(adapters: Sequence[Adapter]) -> list[tuple[list[str], Tensor]]:
    """Module paths of equal input width, and unit rows of all adapters' A there, (modules, ranks, d_in) fp32."""
    by_width: dict[int, list[str]] = {}
    for path, a in adapters[0].a.items() if adapters else ():
        by_width.setdefault(a.shape[1], []).append(path)

    def rows(path: str) -> Tensor:
        return F.normalize(torch.cat([one.a[path].float() for one in adapters]), dim=1)

    return [(paths, torch.stack([rows(path) for path in paths])) for paths in by_width.values()]


def overlap(new_MrI: Tensor, old_MRI: Tensor) -> Tensor:
    """Squared cosines between new rows and unit old rows: summed over modules and old rows, mean over new rows."""
    cosines_MrR = F.normalize(new_MrI, dim=2) @ old_MRI.transpose(1, 2)
    return cosines_MrR.square().sum() / new_MrI.shape[1]
