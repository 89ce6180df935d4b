"""What keeps workers between stages, and what passes between them and the driver; Ray itself is in test_ray_stages."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from amlora_dist.config.loading import load_config
from amlora_dist.errors import LeaseLostError, TrainingError
from amlora_dist.registry.store import Store
from amlora_dist.training.worker_cache import WorkerCache
from pipelines.cluster import event_channel
from pipelines.cluster.event_channel import EventChannel
from pipelines.cluster.executor import ClusterExecutor, has_outgrown
from pipelines.cluster.resources import Demand, Supply
from pipelines.cluster.session import RayCluster, WorkerPlacement
from pipelines.runs import sequence
from pipelines.runs.executor import InProcess, executor_of
from pipelines.runs.inputs import gather_inputs
from tests.tiny_config import write_config


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch) -> list[WorkerCache | None]:
    """What stages of this process were given."""
    seen: list[WorkerCache | None] = []

    def run_stage(work: Any, *, report: Any, cache: WorkerCache | None, **rest: Any) -> None:
        seen.append(cache)
        report({"kind": "step"})

    monkeypatch.setattr("amlora_dist.training.stage.run_stage", run_stage)
    return seen


def two_stages(executor: Any) -> None:
    with executor as entered:
        for _ in range(2):
            entered.run(SimpleNamespace(), lambda event: None, lambda: None)


def test_this_process_keeps_what_it_has_for_a_run_or_for_a_stage(caches: list[WorkerCache | None], tmp_path: Path) -> None:
    config, mine = write_config(tmp_path, tasks=("colours",)), WorkerCache()
    two_stages(executor_of(load_config(config)))
    two_stages(executor_of(load_config(config, ["worker_lifetime=stage"])))
    two_stages(executor_of(load_config(config), mine))
    assert caches[0] is caches[1] is not None
    assert caches[2:] == [None, None, mine, mine]
    assert isinstance(executor_of(load_config(config, ["workers=2"])), ClusterExecutor)


def test_only_while_a_run_goes_on_its_process_is_not_searched_for_what_was_there_before(
    caches: list[WorkerCache | None],
) -> None:
    gc.unfreeze()
    with InProcess() as executor:
        assert not gc.get_freeze_count()
        executor.run(SimpleNamespace(), lambda event: None, lambda: None)  # type: ignore[arg-type]
        assert gc.get_freeze_count() > 10_000
    assert not gc.get_freeze_count()


def test_a_run_that_was_lost_to_another_driver_ends_at_the_next_event(caches: list[WorkerCache | None]) -> None:
    def lost() -> None:
        raise LeaseLostError("lost")

    with pytest.raises(LeaseLostError):
        InProcess().run(SimpleNamespace(), lambda event: None, lost)  # type: ignore[arg-type]


def test_workers_are_replaced_when_one_has_grown_by_a_tenth_of_the_largest_node() -> None:
    node = 64 << 30
    assert [has_outgrown(grown, node) for grown in (-1, 0, 6 << 30, 7 << 30)] == [False, False, False, True]
    assert not has_outgrown(7 << 30, None)


class Group:
    """Replaces workers: what matters here is when they are made and when they end."""

    made: ClassVar[list[Group]] = []

    def __init__(self, placement: Any, workers: int, *, gpus: bool) -> None:
        self.workers, self.lives, self.ended, self.grown = workers, True, "", 0
        self.made.append(self)

    def run(self, work: Any, on_event: Any, watch: Any) -> None:
        if work is not None:
            raise work

    def end(self) -> None:
        self.ended = "idle"

    def abandon(self) -> None:
        self.ended = "at work"


@pytest.mark.parametrize("own", [True, False])
def test_workers_start_as_soon_as_a_cluster_of_ones_own_has(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a cluster that others use, none is held before it is needed."""

    def started(cluster: RayCluster) -> None:
        cluster.own = own

    monkeypatch.setattr(Group, "made", [])
    monkeypatch.setattr("pipelines.cluster.executor.WorkerGroup", Group)
    monkeypatch.setattr(RayCluster, "_start", started)
    monkeypatch.setattr(RayCluster, "use_gpus", lambda self: False)
    monkeypatch.setattr(RayCluster, "workers", lambda self, placement: placement.workers)
    monkeypatch.setattr("pipelines.cluster.session.resources.in_cluster", Supply)
    placement = WorkerPlacement(2, Path("/nowhere"), Demand(2, 0, 0, 1, "fp32", 0))
    executor = ClusterExecutor(2)
    executor.prepare(placement)
    executor._cluster.wait_for_begin()
    begun = list(Group.made)
    assert len(begun) == own
    executor.ready(placement, again=False)
    assert Group.made[:1] == begun or not own
    assert len(Group.made) == 1, "those that were started are those that work"


def test_workers_that_cannot_be_started_ahead_of_time_are_started_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(cluster: RayCluster) -> None:
        cluster.own = True

    def failing(*given: Any, **named: Any) -> Any:
        raise RuntimeError("no room yet")

    monkeypatch.setattr(RayCluster, "_start", started)
    monkeypatch.setattr(RayCluster, "use_gpus", lambda self: False)
    monkeypatch.setattr(RayCluster, "workers", lambda self, placement: placement.workers)
    monkeypatch.setattr("pipelines.cluster.session.resources.in_cluster", Supply)
    monkeypatch.setattr("pipelines.cluster.executor.WorkerGroup", failing)
    placement = WorkerPlacement(2, Path("/nowhere"), Demand(2, 0, 0, 1, "fp32", 0))
    executor = ClusterExecutor(2)
    executor.prepare(placement)
    executor._cluster.wait_for_begin()
    monkeypatch.setattr(Group, "made", [])
    monkeypatch.setattr("pipelines.cluster.executor.WorkerGroup", Group)
    executor.ready(placement, again=False)
    assert len(Group.made) == 1


@pytest.mark.parametrize(("gpus", "dtype", "attention"), [(4.0, "bf16", "sdpa"), (0.0, "fp32", "eager")])
def test_auto_follows_the_gpus_of_a_cluster_that_is_joined_and_not_those_of_its_head(
    gpus: float, dtype: str, attention: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AMLORA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RAY_ADDRESS", "ray.example:6379")
    monkeypatch.setattr(RayCluster, "_start", lambda self: None)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0, "GPU": gpus})
    config = load_config(write_config(tmp_path, tasks=("colours",), workers=2), ["dtype=auto", "model.attention=auto"])
    with executor_of(config) as executor:
        inputs = gather_inputs(config, tmp_path / "home", run_id="one", gpus=sequence._gpus(config, executor))
        assert (inputs.dtype, inputs.config.model.attention) == (dtype, attention)
        named = load_config(tmp_path / "run.yaml", ["dtype=fp32", "model.attention=sdpa"])
        assert sequence._gpus(named, executor) is None, "nobody waits for a cluster that decides nothing"


@pytest.mark.parametrize(
    ("overrides", "status", "expected"),
    [
        ([], None, True), ([], "KILLED", True), ([], "FINISHED", False), (["workers=0"], None, False),
        (["min_workers=1"], None, False), (["min_workers=2"], None, True),
    ],
)  # fmt: skip
def test_workers_are_expected_where_a_run_will_need_them(
    overrides: list[str], status: str | None, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AMLORA_HOME", str(tmp_path / "home"))
    config = load_config(write_config(tmp_path, tasks=("colours",), workers=2), overrides)
    if status is not None:
        store = Store.open(tmp_path / "home")
        store.end_run(store.parent_run("one", "one", {}), status)
    found = sequence._expected(config, "one")
    assert (found is not None) == expected
    if found is not None:
        assert found.workers == found.demand.workers == 2


@pytest.mark.parametrize("lifetime", ["run", "stage"])
def test_workers_are_made_again_when_they_have_to_be(lifetime: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    there, waits = {"workers": 2}, []
    monkeypatch.setattr(Group, "made", [])
    monkeypatch.setattr("pipelines.cluster.executor.WorkerGroup", Group)
    monkeypatch.setattr("pipelines.cluster.executor.resources.in_cluster", lambda: SimpleNamespace(largest_node=100))
    monkeypatch.setattr(RayCluster, "ready", lambda self, placement, *, again: waits.append(again))
    monkeypatch.setattr(RayCluster, "workers", lambda self, placement: there["workers"])
    monkeypatch.setattr(RayCluster, "use_gpus", lambda self: False)
    executor = ClusterExecutor(2, lifetime=lifetime)

    def stage(error: Exception | None = None) -> Group:
        executor.ready(None, again=False)  # type: ignore[arg-type]
        executor.run(error, lambda event: None, lambda: None)  # type: ignore[arg-type]
        return Group.made[-1]

    first = stage()
    assert (stage() is first) == (lifetime == "run")
    there["workers"] = 1  # a node has left
    smaller = stage()
    assert smaller is not first and first.ended == "idle"
    smaller.grown = 11
    stage()
    after_growth = stage()
    assert after_growth is not smaller and smaller.ended == "idle"
    after_growth.lives = False  # lost while it had nothing to do
    assert stage() is not after_growth and waits[-1] == (lifetime == "run"), "what was lost may come back"
    with pytest.raises(TrainingError):
        stage(TrainingError("diverged"))
    assert Group.made[-1].ended == "at work"
    last = stage()
    executor.release()
    assert last.ended == "idle"


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
