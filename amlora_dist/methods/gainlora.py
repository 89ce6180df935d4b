"""GainLoRA: the sum of all adapters, each behind a gate of the input that is closed on what came before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from amlora_dist.methods.base import Method

if TYPE_CHECKING:
    from amlora_dist.adapters.inject import Mixture
    from amlora_dist.adapters.statistics import TaskStatistics
    from amlora_dist.adapters.subspace_router import SubspaceRouter
    from amlora_dist.training.result import Result


class GainLoRA(Method):
    """h = W0 x + sum_{i<=t} a_i(x) (alpha/r) B_i A_i x, where A_t and B_t alone are learned, on top of the gated old ones::

        a_i(x) = |2 sigmoid(w_i . f(x)) - 1|,   w_i outside of the subspace of the features of tasks 1 to i-1

    so that the new branch adds next to nothing on old tasks' inputs, which is what the method protects by. While it is
    learned its own gate is 1.

    Source: Liang et al. 2025 (GainLoRA, arXiv 2505.15424): gating modules of the input, the function |2 sigmoid - 1|, and
    the two constraints (start and updates orthogonal to a memory of old gates' inputs) are theirs. Ours differs in three
    points. Their gate is a network of three layers on pooled token embeddings, trained with the adapter; here it is its
    last layer alone, on the features that every router here reads (frozen states from the middle of the depth, which
    tell tasks apart better), fitted in closed form after the adapter. Their memory is kept layer by layer, ours is that of
    the features, exact from the statistics; ``gain_energy`` is their threshold, whose value is not known here. And A and B
    have no constraint of their own, as in their variant on O-LoRA without its penalty.
    """

    routed = False
    uses = ("gain_energy",)

    def prepare(self, mixture: Mixture, parents: Sequence[Result]) -> None:
        if parents:
            gates = self.router([parent.statistics for parent in parents])
            mixture.set_router(gates.learning(mixture.task_names[-1]))

    def training_gate(self, tasks: int) -> Tensor | None:
        return super().training_gate(tasks) if tasks == 1 else None

    def router(self, statistics: Sequence[TaskStatistics]) -> SubspaceRouter:
        from amlora_dist.adapters.subspace_router import SubspaceRouter

        return SubspaceRouter.of(statistics, self.settings.method_settings.gain_energy)
