"""A stage keeps features of a sample of the rows that its statistics count: the same on any number of ranks."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from amlora_dist.adapters.settings import RouterSettings
from amlora_dist.adapters.statistics import TaskStatistics
from amlora_dist.errors import BankError
from amlora_dist.evaluation.scoring import deal
from amlora_dist.tasks.batches import Example
from amlora_dist.training.stage_statistics import BATCH, SAMPLED, StageStatistics, sampled_places
from amlora_dist.training.worker_cache import WorkerCache

ROWS, LABELS, DEADLINE_S = 120, 3, 60


class Threads:
    """Ranks that are threads of this process."""

    def __init__(self, rank: int, board: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.world, self._board, self._barrier = rank, len(board), board, barrier

    def sum(self, values: Tensor) -> Tensor:
        raise AssertionError("statistics are gathered, not summed")

    def gather(self, value: Any) -> list[Any]:
        self._board[self.rank] = value
        self._barrier.wait(DEADLINE_S)
        found = list(self._board)
        self._barrier.wait(DEADLINE_S)
        return found


class WithoutModel(StageStatistics):
    """Reads no text: a row's features are a function of its number."""

    def _texts(self, mixture: Any, examples: Sequence[Example]) -> tuple[Tensor, list[int]]:
        dealt = deal(examples, BATCH, self.ranks.rank, self.ranks.world)
        mine = [index for indices, counts in dealt if counts for index in indices]
        numbers = torch.tensor([examples[index].row for index in mine], dtype=torch.float32)
        return torch.stack([numbers, (numbers + 1).sqrt(), numbers.cos()], dim=1), mine


def of_ranks(world: int, router: RouterSettings, *, labels: int = LABELS, rows: int = ROWS) -> list[TaskStatistics]:
    """What each rank has in the end."""
    examples = [Example(n, tuple(range(1 + n % 7)), (), n % labels if labels else None, "") for n in range(rows)]
    board, barrier = [None] * world, threading.Barrier(world)

    def one(rank: int) -> TaskStatistics:
        ranks = Threads(rank, board, barrier)
        makes = WithoutModel(
            "colours", 3, router, None, False, ranks, torch.device("cpu"), False, True, WorkerCache()
        )  # fmt: skip
        return makes.of(None, examples, [], None, labels)  # type: ignore[arg-type]

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(one, range(world)))


@pytest.mark.parametrize("labels", [LABELS, 0], ids=["labels", "free text"])
def test_the_sample_is_the_same_on_any_number_of_ranks(labels: int) -> None:
    (alone,), several = of_ranks(1, RouterSettings(), labels=labels), of_ranks(3, RouterSettings(), labels=labels)
    assert alone.sample is not None and alone.held is not None and len(alone.sample.labels) == SAMPLED
    for one in several:
        assert one.sample is not None
        assert torch.equal(one.sample.features, alone.sample.features)
        assert torch.equal(one.sample.labels, alone.sample.labels)
    numbers, unseen = (set(rows.features[:, 0].int().tolist()) for rows in (alone.sample, alone.held))
    assert len(numbers) == SAMPLED and not numbers & unseen, "rows that are counted, each once"
    wanted = [n % labels if labels else -1 for n in alone.sample.features[:, 0].int().tolist()]
    assert alone.sample.labels.tolist() == wanted


def test_all_of_few_rows_are_kept_and_none_where_none_is_held_out() -> None:
    (few,) = of_ranks(1, RouterSettings(), rows=20)
    assert few.sample is not None and len(few.sample.labels) == few.count == 15
    (off,) = of_ranks(1, RouterSettings(holdout=0))
    assert off.sample is None and off.held is None and not any(name.startswith("sample.") for name in off.tensors())
    assert sampled_places(500, seed=1, task="a") != sampled_places(500, seed=2, task="a")


def test_a_sample_comes_back_from_its_tensors_and_what_was_stored_before_has_none() -> None:
    (one,) = of_ranks(1, RouterSettings())
    back, tensors = TaskStatistics.from_tensors("colours", one.tensors()), one.tensors()
    assert back.sample is not None and one.sample is not None
    assert torch.equal(back.sample.features, one.sample.features) and torch.equal(back.sample.labels, one.sample.labels)
    before = {name: tensor for name, tensor in tensors.items() if not name.startswith("sample.")}
    assert TaskStatistics.from_tensors("colours", before).sample is None
    for name, broken in (
        ("sample.labels", tensors["sample.labels"][:-1]),
        ("sample.labels", tensors["sample.labels"] + LABELS),
        ("sample.features", tensors["sample.features"] * torch.nan),
    ):
        with pytest.raises(BankError, match="statistics of task 'colours': "):
            TaskStatistics.from_tensors("colours", tensors | {name: broken})
