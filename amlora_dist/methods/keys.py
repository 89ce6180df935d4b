"""Keys alone: the closed-form statistics of each task, and no adapter that is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from amlora_dist.methods.base import Method
from amlora_dist.methods.kinds import Trains

if TYPE_CHECKING:
    from amlora_dist.adapters.adapted_layers import AdaptedLayers


class Keys(Method):
    """A stage reads its rows once. A text has the label and the task whose Gaussian explains its features best::

        p(label | text) over all labels of all tasks, by one common covariance (``adapters.keys``)

    The answer is that label's words; where the routed task has free text, the base model writes. The adapters of such a
    bank are zero, of rank 1: a bank is adapters with statistics in every format, and these add nothing. What a trained bank
    gains over this row is what its adapters know.

    Source: linear discriminant analysis with shrinkage, on the features that AM-LoRA's router reads. Not a published
    method of its own here; Any-SSR (arXiv 2503.13575) and Latent-LoRA (2607.23837) route by such statistics.
    """

    trains = Trains.STATISTICS

    def reads(self, stage: int) -> dict[str, Any]:
        adapters = self.settings.adapters
        return {
            "dtype": self.settings.dtype,
            "attention": self.settings.attention,
            "adapters": {"targets": adapters.targets, "layers": adapters.layers, "alpha": adapters.alpha},
            "router": self._read_of_router(),
        }

    @property
    def layers(self) -> AdaptedLayers:
        from amlora_dist.adapters.adapted_layers import AdaptedLayers

        return AdaptedLayers(rank=1, alpha=self.settings.adapters.alpha)
