"""Mixed boundaries are seen in the statistics alone: the share of foreign rows comes back, and unlike tasks show none."""

from __future__ import annotations

import pytest
import torch

from amlora_dist.adapters.boundaries import mixed_shares
from amlora_dist.adapters.statistics import TaskStatistics

WIDTH = 48


def heap(place: int, rows: int, *, spread: float = 1.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + place)
    centre = torch.zeros(WIDTH)
    centre[place] = 6.0
    return centre + spread * torch.randn(rows, WIDTH, generator=generator)


def statistics(**rows: torch.Tensor) -> list[TaskStatistics]:
    return [TaskStatistics.from_features(name, features) for name, features in rows.items()]


@pytest.mark.parametrize("share", [0.2, 0.3, 0.45])
@pytest.mark.parametrize("seed", range(3))
def test_the_share_of_foreign_rows_comes_back(share: float, seed: int) -> None:
    count = round(230 * share / (1 - share))
    mixed = torch.cat([heap(0, 230, seed=seed), heap(1, count, seed=seed + 10)])
    found = mixed_shares(statistics(a=mixed, b=heap(1, 230, seed=seed)))
    assert found["a"]["b"] == pytest.approx(share, abs=0.08)
    assert found["b"]["a"] == 0.0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("spread", [0.7, 1.0, 1.5])
def test_unlike_tasks_of_unequal_spread_do_not_look_mixed(seed: int, spread: float) -> None:
    found = mixed_shares(statistics(a=heap(0, 230, spread=spread, seed=seed), b=heap(1, 230, seed=seed)))
    assert max(found["a"]["b"], found["b"]["a"]) < 0.1


def test_look_alikes_are_left_out() -> None:
    near = heap(0, 230, seed=3) + 0.3
    assert mixed_shares(statistics(a=heap(0, 230), b=near)) == {}


def test_one_task_has_no_boundary() -> None:
    assert mixed_shares(statistics(a=heap(0, 20))) == {}


def test_the_newest_task_is_compared_with_each_earlier_one() -> None:
    found = mixed_shares(statistics(a=heap(0, 100), b=heap(1, 100), c=heap(2, 100)))
    assert {task: set(others) for task, others in found.items()} == {"a": {"c"}, "b": {"c"}, "c": {"a", "b"}}
