"""Abstention: how far an input is from everything the bank was trained on, by relative Mahalanobis distance.

Weak on text (AUROC .7 to .98 on far text, about chance on near text), hence off by default (docs/method.md).

Shapes: n rows, d features, T tasks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from amlora_dist.adapters.statistics import Covariance

if TYPE_CHECKING:
    from collections.abc import Sequence

    from amlora_dist.adapters.statistics import TaskStatistics


@dataclass(frozen=True, slots=True)
class Background:
    """Relative Mahalanobis distance (Ren et al. 2021) in the few numbers that serving needs.

    RMD_t(f) = (f - mu_t)^T Sigma^-1 (f - mu_t) - (f - mu_0)^T Sigma_0^-1 (f - mu_0), where the background Gaussian has
    the mean mu_0 of all rows and Sigma_0 = Sigma + (1 - shrinkage) x between-task scatter / N. Because Sigma_0 differs
    from Sigma by rank T only, Sigma^-1 - Sigma_0^-1 = V^T V with V (T, d), and

    RMD_t(f) = |V f|^2 - 2 (w_t . f + b_t) + 2 (w_0 . f + b_0),   w_0 = Sigma_0^-1 mu_0, b_0 = -1/2 mu_0 . w_0.

    ``mean`` and ``std`` (T,) are those of RMD_t over Gaussian rows with the second moments, around mu_t, of the task's
    held-out rows, but no less than those of Sigma: rows that the statistics have not seen scatter more. With one task
    RMD is 0 and nothing is ever far.
    """

    factor: Tensor
    key: Tensor
    bias: Tensor
    mean: Tensor
    std: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """The fields by name."""
        return {name: getattr(self, name) for name in ("factor", "key", "bias", "mean", "std")}

    def distance(self, features: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
        """RMD to each task, features (n, d) -> (n, T)."""
        rows = features.to(weights)
        common = (rows @ self.factor.T).square().sum(dim=-1) + 2 * (rows @ self.key + self.bias)
        return common[:, None] - 2 * (rows @ weights.T + bias)

    def excess(self, features: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
        """How many standard deviations beyond what its nearest task expects, features (n, d) -> (n,)."""
        return ((self.distance(features, weights, bias) - self.mean) / self.std).amin(dim=-1)


def background(statistics: Sequence[TaskStatistics], shrinkage: float) -> Background:
    """What abstention needs, from the same statistics as the keys; see ``Background``."""
    covariance = Covariance(statistics, shrinkage)
    means = torch.stack([s.mean for s in statistics])
    shares = torch.tensor([s.count for s in statistics], dtype=torch.float64)
    shares = shares / shares.sum()
    centre = shares @ means
    apart = (shares * (1 - shrinkage)).sqrt()[:, None] * (means - centre)
    solved = covariance.solve(apart)
    chol = torch.linalg.cholesky(torch.eye(len(means), dtype=torch.float64) + apart @ solved.T)
    factor = torch.linalg.solve_triangular(chol, solved, upper=False)
    key = covariance.solve(centre[None])[0] - factor.T @ (factor @ centre)
    weights = covariance.solve(means)
    unset = torch.zeros(len(means), dtype=torch.float64)
    plain = Background(factor, key, -0.5 * centre @ key, unset, unset + 1)
    at_means = plain.distance(means, weights, -0.5 * (means * weights).sum(dim=1)).diagonal()
    # With f = mu_t + e: RMD_t = |V e|^2 + slope_t . e + RMD_t(mu_t), a quadratic form of a Gaussian e.
    slopes = 2 * (means @ factor.T @ factor - weights + key)
    found = [
        _moments(s, torch.cat([factor, slope[None]]), covariance) for s, slope in zip(statistics, slopes, strict=True)
    ]
    mean, std = torch.tensor(found, dtype=torch.float64).T
    return replace(plain, mean=mean + at_means, std=std.contiguous())


def _moments(statistics: TaskStatistics, rows: Tensor, covariance: Covariance) -> tuple[float, float]:
    """Mean and deviation of |V e|^2 + slope . e for one task; ``rows`` (T + 1, d) are V and the slope."""
    scatters = [covariance.between(rows)]
    if statistics.holdout_factor is not None:
        seen = rows @ statistics.holdout_factor.T
        scatters.append(seen @ seen.T / statistics.holdout_count)
    mean = max(float(scatter[:-1, :-1].trace()) for scatter in scatters)
    variance = max(float(2 * scatter[:-1, :-1].square().sum() + scatter[-1, -1]) for scatter in scatters)
    return mean, max(variance, torch.finfo(torch.float64).eps) ** 0.5
