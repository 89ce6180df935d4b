"""The arithmetic of the sweeps under ``benchmarks/``: what their tables say is what they measured."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture
def abstention(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    return importlib.import_module("abstention")


def test_auroc_is_the_chance_of_the_right_order_and_ties_count_half(abstention: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    outside, inside = (torch.randint(6, (n,), generator=generator).double() for n in (13, 17))
    pairs = outside[:, None] - inside[None]
    expected = float(((pairs > 0).double() + 0.5 * (pairs == 0)).mean())
    assert abstention.auroc(outside, inside) == pytest.approx(expected)
    assert abstention.auroc(inside + 10, inside) == 1.0


def test_distances_tell_what_is_far_and_mahalanobis_is_the_dense_formula(abstention: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    centres = 4 * torch.randn(3, 8, generator=generator)

    def rows(count: int, centre: torch.Tensor) -> torch.Tensor:
        return centre + torch.randn(count, 8, generator=generator)

    train = {f"task{n}": {0: rows(60, c), 1: rows(60, c)} for n, c in enumerate(centres)}
    inside = {layer: torch.cat([rows(20, c) for c in centres]) for layer in (0, 1)}
    far = {layer: rows(60, 9 * torch.randn(8, generator=generator)) for layer in (0, 1)}
    scores = abstention.statistics_of(train, (0, 1))
    # Relative distance sees nothing but the directions between the tasks' means: it may miss what these do.
    for name in ("mahalanobis", "nearest"):
        assert abstention.auroc(scores[name](far), scores[name](inside)) > 0.9, name
    squared = torch.stack([abstention_distance(train, inside[0], task) for task in train]).amin(dim=0)
    offset = scores["mahalanobis"](inside) - squared
    torch.testing.assert_close(offset, torch.zeros_like(offset), atol=1e-6, rtol=0)


def abstention_distance(train: dict[str, dict[int, torch.Tensor]], rows: torch.Tensor, task: str) -> torch.Tensor:
    """Squared Mahalanobis distance to one task by the dense formula, over the rows that are not held out."""
    kept = {}
    for name, found in train.items():
        order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
        kept[name] = found[0][order[6:]].double()
    scatter = sum(((x - x.mean(dim=0)).T @ (x - x.mean(dim=0)) for x in kept.values()), torch.zeros(8, 8).double())
    pooled = scatter / sum(len(x) for x in kept.values())
    sigma = 0.9 * pooled + 0.1 * pooled.diagonal().mean() * torch.eye(8).double()
    apart = rows.double() - kept[task].mean(dim=0)
    return (apart @ torch.linalg.inv(sigma) * apart).sum(dim=1)


def test_the_paired_interval_is_of_the_mean_difference_over_seeds(abstention: ModuleType) -> None:
    sweeps = importlib.import_module("sweeps")
    first, second = [[1.0, 1.0, 0.0, 1.0], [1.0, 0.0, 0.0, 1.0]], [[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0]]
    found = sweeps.paired(first, second)
    assert found.value == pytest.approx(0.25) and found.low <= 0.25 <= found.high
    same = sweeps.paired(first, first)
    assert (same.low, same.value, same.high) == (0.0, 0.0, 0.0)
