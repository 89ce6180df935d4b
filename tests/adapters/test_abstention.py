"""Distance from stored numbers equals its definition, and learned tasks are not abstained from."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from amlora_dist.adapters.abstention import background
from amlora_dist.adapters.statistics import TaskStatistics, keys
from tests.adapters.test_statistics import WIDTH, bank, dense_sigma, features, with_holdout


def long_form(stats: list[TaskStatistics], x: Tensor, shrinkage: float) -> Tensor:
    """RMD as its definition has it, with dense inverses."""
    total = sum(s.count for s in stats)
    means = torch.stack([s.mean for s in stats])
    shares = torch.tensor([s.count / total for s in stats], dtype=torch.float64)
    centre = shares @ means
    sigma = dense_sigma(stats, shrinkage)
    between = (1 - shrinkage) * (means - centre).T @ torch.diag(shares) @ (means - centre)

    def distance(mean: Tensor, covariance: Tensor) -> Tensor:
        return ((x - mean) @ torch.linalg.inv(covariance) * (x - mean)).sum(1)

    return torch.stack([distance(m, sigma) for m in means], 1) - distance(centre, sigma + between)[:, None]


@pytest.mark.parametrize("shrinkage", [0.1, 1.0])
@pytest.mark.parametrize("width", [WIDTH, 400])
def test_relative_mahalanobis_from_stored_numbers_equals_its_definition(shrinkage: float, width: int) -> None:
    stats = bank(width=width)
    x = torch.cat([features(t, 10, width) for t in range(5)])
    far = background(stats, shrinkage)
    got = far.distance(x, *keys(stats, shrinkage))
    torch.testing.assert_close(got, long_form(stats, x, shrinkage), rtol=1e-6, atol=1e-6)
    assert far.factor.shape == (3, width)


@pytest.mark.parametrize("held_out", [False, True])
def test_moments_of_the_distance_are_those_of_a_gaussian_task(held_out: bool) -> None:
    stats = bank()
    scatter = [dense_sigma(stats, 0.1)] * 3
    if held_out:
        wider = [s.mean + 3 * (features(t, 50) - s.mean) for t, s in enumerate(stats)]
        scatter = [(x - s.mean).T @ (x - s.mean) / 50 for x, s in zip(wider, stats, strict=True)]
        stats = [s.with_holdout(x, stats[:t], 0.1) for t, (x, s) in enumerate(zip(wider, stats, strict=True))]
    far = background(stats, 0.1)
    noise = torch.randn(20000, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    for t, s in enumerate(stats):
        root = torch.linalg.cholesky(scatter[t])
        sample = far.distance(s.mean + noise @ root.T, *keys(stats, 0.1))[:, t]
        assert sample.mean().item() == pytest.approx(far.mean[t].item(), abs=0.05 * far.std[t].item())
        assert sample.std().item() == pytest.approx(far.std[t].item(), rel=0.05)


def test_held_out_rows_keep_abstention_from_taking_new_rows_of_learned_tasks() -> None:
    """Few rows in many dimensions: the statistics' own scatter is far too narrow for rows they have not seen."""
    stats = with_holdout(rows=12, tasks=4, width=60)
    fresh = torch.cat([features(t, 200, 60, spread=3.0)[60:] for t in range(4)])
    narrow = [TaskStatistics(s.task, s.count, s.mean, s.factor) for s in stats]
    shares = [(background(bank, 0.1).excess(fresh, *keys(bank, 0.1)) > 3).double().mean() for bank in (stats, narrow)]
    assert shares[0] < 0.05 < shares[1]
