"""What keeps workers between stages, and what passes between them and the driver; Ray itself is in test_ray_stages."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from amlora_dist.config.loading import load_config
from amlora_dist.errors import LeaseLostError
from amlora_dist.training.worker_cache import WorkerCache
from pipelines.cluster import event_channel
from pipelines.cluster.event_channel import EventChannel
from pipelines.cluster.executor import ClusterExecutor, has_outgrown
from pipelines.runs.executor import InProcess, executor_of
from tests.tiny_config import write_config


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch) -> list[WorkerCache]:
    """What stages of this process were given."""
    seen: list[WorkerCache] = []

    def run_stage(work: Any, *, report: Any, cache: WorkerCache, **rest: Any) -> None:
        seen.append(cache)
        report({"kind": "step"})

    monkeypatch.setattr("amlora_dist.training.stage.run_stage", run_stage)
    return seen


def two_stages(executor: Any) -> None:
    with executor as entered:
        for _ in range(2):
            entered.run(SimpleNamespace(), lambda event: None, lambda: None)


def test_this_process_keeps_what_it_has_for_a_run_or_for_a_stage(caches: list[WorkerCache], tmp_path: Path) -> None:
    config, mine = write_config(tmp_path, tasks=("colours",)), WorkerCache()
    two_stages(executor_of(load_config(config)))
    two_stages(executor_of(load_config(config, ["worker_lifetime=stage"])))
    two_stages(executor_of(load_config(config), mine))
    same = [one is other for one, other in zip(caches[::2], caches[1::2], strict=True)]
    assert same == [True, False, True] and caches[4] is mine
    assert isinstance(executor_of(load_config(config, ["workers=2"])), ClusterExecutor)


def test_a_run_that_was_lost_to_another_driver_ends_at_the_next_event(caches: list[WorkerCache]) -> None:
    def lost() -> None:
        raise LeaseLostError("lost")

    with pytest.raises(LeaseLostError):
        InProcess().run(SimpleNamespace(), lambda event: None, lost)  # type: ignore[arg-type]


def test_workers_are_replaced_when_one_has_grown_by_a_tenth_of_the_largest_node() -> None:
    node = 64 << 30
    assert [has_outgrown(grown, node) for grown in (-1, 0, 6 << 30, 7 << 30)] == [False, False, False, True]
    assert not has_outgrown(7 << 30, None)


def test_every_worker_gets_each_plan_once_and_waits_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_channel, "WAIT_S", 0.05)

    async def talk() -> list[Any]:
        channel = EventChannel()
        waiting = [asyncio.ensure_future(channel.plan(0)) for _ in range(3)]
        await asyncio.sleep(0)
        await channel.hand_out(1, "first")
        got = [await one for one in waiting]
        return [got, await channel.plan(1), await channel.plan(0)]

    assert asyncio.run(talk()) == [[(1, "first")] * 3, None, (1, "first")]


def test_events_come_in_order_and_a_stage_is_stopped_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_channel, "WAIT_S", 0.05)

    async def talk() -> list[Any]:
        channel = EventChannel()
        assert await channel.take() == []
        for step in range(3):
            await channel.tell({"step": step})
        stopped = asyncio.ensure_future(channel.stopped(2))
        await channel.stop(2)
        return [await channel.take(), await channel.take(), await stopped, await channel.stopped(3)]

    assert asyncio.run(talk()) == [[{"step": 0}, {"step": 1}, {"step": 2}], [], True, False]
