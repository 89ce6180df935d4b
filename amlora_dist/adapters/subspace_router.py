"""A gate for each adapter, closed on what earlier tasks looked like: the router of the method ``gainlora``.

Shapes: B inputs, T tasks, d features, k rows of a factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from amlora_dist.errors import BankError

if TYPE_CHECKING:
    from amlora_dist.adapters.statistics import TaskStatistics

RIDGE = 0.1
"""Of each gate's fit, times the mean square of a feature."""
OPEN = 4.0
"""What a gate's score is fitted to on its own rows: |2 sigmoid(4) - 1| = 0.96."""


@dataclass(frozen=True, eq=False)
class SubspaceRouter:
    """a_t(x) = |2 sigmoid(w_t . f(x)) - 1| for every task t by itself: gates need not sum to 1.

    ``w_t`` lies outside of the subspace in which the features of tasks 1 to t-1 have ``energy`` of their second moment, so
    that there adapter t stays silent; within the rest it is fitted to the rows of task t.

    Args:
        tasks: names.
        weights: (T, d), fp64.
        opened: the last task's gate is 1, whatever the input: while it is learned.
    """

    tasks: list[str]
    weights: Tensor
    opened: bool = False
    kind: str = "subspace"
    needs_features: bool = True

    def __post_init__(self) -> None:
        if self.weights.dim() != 2 or len(self.weights) != len(self.tasks):
            raise BankError(f"router: weights {tuple(self.weights.shape)} do not fit {len(self.tasks)} tasks")
        if not bool(torch.isfinite(self.weights).all()):
            raise BankError("router: weights hold NaN or infinity")

    @classmethod
    def of(cls, statistics: Sequence[TaskStatistics], energy: float) -> SubspaceRouter:
        """The gates of a bank from the statistics of its tasks, in their order."""
        weights, past = [], torch.empty(0, len(statistics[0].mean), dtype=torch.float64)
        for one in statistics:
            weights.append(_fit(one, basis(past, energy)))
            past = torch.cat([past, second_moment(one)])
        return cls([one.task for one in statistics], torch.stack(weights))

    def learning(self, task: str) -> SubspaceRouter:
        """The gates while another task's adapter is learned on top, which is wide open."""
        weights = torch.cat([self.weights, torch.zeros_like(self.weights[:1])])
        return SubspaceRouter([*self.tasks, task], weights, opened=True)

    def gates(self, features_BD: Tensor | None, batch: int) -> Tensor:
        """See ``Router``; ``features_BD`` (B, d) are required."""
        if features_BD is None or len(features_BD) != batch:
            raise ValueError(f"the subspace router needs features of all {batch} inputs")
        gates_BT = (2.0 * torch.sigmoid(features_BD.detach().to(self.weights) @ self.weights.T) - 1.0).abs()
        if self.opened:
            gates_BT[:, -1] = 1.0
        return gates_BT.float()

    def to(self, device: torch.device | str) -> SubspaceRouter:
        """See ``Router``."""
        return replace(self, weights=self.weights.to(device))

    def tensors(self) -> dict[str, Tensor]:
        """``weights``."""
        return {"weights": self.weights.cpu().contiguous()}

    def settings(self) -> dict[str, Any]:
        """See ``Router``."""
        return {"kind": self.kind, "tasks": self.tasks}


def second_moment(one: TaskStatistics) -> Tensor:
    """A factor (k, d) of sum_j f_j f_j^T over a task's rows, around 0."""
    return torch.cat([one.task_factor.double(), one.count**0.5 * one.mean.double()[None]])


def basis(factor_KD: Tensor, energy: float) -> Tensor:
    """Orthonormal rows (m, d) of the smallest subspace that holds ``energy`` of the factor's squared norm."""
    if not len(factor_KD):
        return factor_KD
    values: Tensor
    rows: Tensor
    _, values, rows = torch.linalg.svd(factor_KD, full_matrices=False)
    held = values.square().cumsum(dim=0) / values.square().sum()
    return rows[: int((held < energy).sum()) + 1]


def _fit(one: TaskStatistics, past_MD: Tensor) -> Tensor:
    """Ridge regression of ``OPEN`` on a task's rows, in the complement of ``past_MD``."""
    rows_KD = second_moment(one) / one.count**0.5
    rows_KD = rows_KD - rows_KD @ past_MD.T @ past_MD
    mean = rows_KD[-1]
    moment = rows_KD.T @ rows_KD
    size = len(mean)
    ridge = RIDGE * moment.diagonal().mean().clamp(min=1e-12)
    found: Tensor = torch.linalg.solve(moment + ridge * torch.eye(size, dtype=torch.float64), OPEN * mean)
    return found - past_MD.T @ (past_MD @ found)
