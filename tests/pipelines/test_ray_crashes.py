"""Through Ray and DeepSpeed: whatever dies, and wherever, the result is the one of an undisturbed run."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.fork_server import ROOT
from tests.pipelines.crash_cases import (
    DIES_AT_IN_WORKER,
    KINDS,
    Outcome,
    Process,
    calm,
    cases,
    crash,
    faults,
    matrix_config,
    nth_of,
    outcome_of,
    spawned,
)

pytestmark = [pytest.mark.crash, pytest.mark.timeout(900)]

CASES = cases()
ARGUMENTS = ("--run-id", "r", "--json")
LONG = "training.epochs=60"
"""A stage of 240 steps, which takes long enough to lose a node in its middle."""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return matrix_config(tmp_path_factory.mktemp("config"), workers=2, deepspeed={"zero_stage": 2})


@pytest.fixture(scope="module")
def undisturbed(config: Path, empty_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return calm(spawned, tmp_path_factory.mktemp("calm"), config, empty_home)


@pytest.fixture
def home(tmp_path: Path, empty_home: Path) -> Path:
    shutil.copytree(empty_home, tmp_path / "home")
    return tmp_path / "home"


def start(folder: Path, config: Path, home: Path, *overrides: str, **environment: str) -> Process:
    return spawned(folder, "run", str(config), *ARGUMENTS, *overrides, AMLORA_HOME=str(home), **environment)


def wait_until(reached: Callable[[], bool], process: Process, what: str, deadline_s: float = 300) -> None:
    deadline = time.monotonic() + deadline_s
    while not reached():
        assert process.poll() is None, process.stderr
        assert time.monotonic() < deadline, f"{what}: not within {deadline_s:.0f} s\n{process.stderr}"
        time.sleep(0.1)


def checkpoints(home: Path) -> int:
    return len(list(home.glob("storage/stages/*/checkpoints/step-*/COMMIT")))


@pytest.mark.parametrize(("point", "kind"), CASES, ids=[f"{point}-{KINDS[kind]}" for point, kind in CASES])
def test_a_run_that_died_there_ends_with_the_undisturbed_result(
    point: str, kind: str, config: Path, undisturbed: Outcome, empty_home: Path, tmp_path: Path
) -> None:
    case = crash(spawned, tmp_path / "case", config, empty_home, point, kind, nth_of(point, 2))
    assert faults(case, undisturbed) == []
    in_worker = point in DIES_AT_IN_WORKER
    assert case.codes == ([0] if in_worker else [-9 if kind == "kill" else 1, 0])
    assert ("trying again from the last checkpoint" in case.stderr) == in_worker


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"])
def test_a_signal_in_the_first_stage_writes_a_checkpoint_before_the_run_ends(
    number: int, code: int, config: Path, home: Path, tmp_path: Path
) -> None:
    process = start(tmp_path / "start", config, home, "training.epochs=300", "training.checkpoint_every=1000000")
    events = "storage/stages/*/progress.jsonl"
    wait_until(lambda: any('"loss"' in file.read_text() for file in home.glob(events)), process, "a step")
    assert checkpoints(home) == 0
    process.send(number)
    assert process.wait(120) == code, process.stderr
    assert checkpoints(home) == 1
    assert "stopped after step" in process.stderr and "Traceback" not in process.stderr


def test_a_signal_while_workers_start_waits_for_none_of_them(config: Path, home: Path, tmp_path: Path) -> None:
    process = start(tmp_path / "start", config, home)
    wait_until(lambda: any(home.glob("storage/stages/*/progress.jsonl")), process, "workers on their way")
    began = time.monotonic()
    process.send(signal.SIGTERM)
    assert process.wait(60) == 143, process.stderr
    assert time.monotonic() - began < 20
    assert "stopped before a step was done" in process.stderr and "checkpoint after this step" not in process.stderr
    assert checkpoints(home) == 0


def test_a_second_sigint_ends_at_once(config: Path, home: Path, tmp_path: Path) -> None:
    process = start(tmp_path / "start", config, home, "training.epochs=300")
    events = "storage/stages/*/progress.jsonl"
    wait_until(lambda: any('"loss"' in file.read_text() for file in home.glob(events)), process, "a step")
    process.send(signal.SIGINT)
    began = time.monotonic()
    process.send(signal.SIGINT)
    assert process.wait(60) == 130, process.stderr
    assert time.monotonic() - began < 20


def test_a_node_that_is_lost_in_mid_stage_is_waited_for_and_the_stage_goes_on(
    config: Path, home: Path, empty_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.cluster_utils import Cluster

    undisturbed = calm(spawned, tmp_path / "calm", config, empty_home, LONG)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for the workers of the nodes
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        process = start(tmp_path / "start", config, home, LONG, RAY_ADDRESS=cluster.address)
        wait_until(lambda: checkpoints(home) >= 2, process, "two checkpoints")
        cluster.remove_node(nodes[1], allow_graceful=False)
        wait_until(lambda: "trying again from the last checkpoint" in process.stderr, process, "the loss was noticed")
        cluster.add_node(num_cpus=1)
        assert process.wait(400) == 0, process.stderr
    finally:
        cluster.shutdown()
    assert outcome_of(home, process.stdout) == undisturbed


def test_a_node_that_does_not_come_back_ends_the_run_with_what_is_missing(
    config: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        patience = {"RAY_ADDRESS": cluster.address, "AMLORA_RESOURCES_DEADLINE_S": "20"}
        process = start(tmp_path / "start", config, home, LONG, **patience)
        wait_until(lambda: checkpoints(home) >= 2, process, "two checkpoints")
        cluster.remove_node(nodes[1], allow_graceful=False)
        assert process.wait(300) == 2, process.stderr
        assert "2 workers need 2 CPUs, the cluster has 1" in process.stderr
    finally:
        cluster.shutdown()


def test_a_cluster_that_is_too_small_is_refused_within_30_seconds_and_not_joined_without_an_address(
    config: Path, home: Path, undisturbed: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        began = time.monotonic()
        process = start(tmp_path / "start", config, home, RAY_ADDRESS=cluster.address)
        assert process.wait(120) == 2
        assert time.monotonic() - began < 30, "imports, 10 s of patience, and no pending for ever"
        assert "2 workers need 2 CPUs, the cluster has 1" in process.stderr
        alone = start(tmp_path / "alone", config, home)  # starts a Ray of its own, though this one runs here
        assert alone.wait(300) == 0, alone.stderr
        assert outcome_of(home, alone.stdout) == undisturbed
    finally:
        cluster.shutdown()


def test_a_worker_killed_by_rays_memory_monitor_is_not_tried_again(config: Path, home: Path, tmp_path: Path) -> None:
    memory = psutil.virtual_memory()
    used = memory.total - memory.available
    # Ray and its idle processes take less than this, two workers that have imported torch and DeepSpeed take more.
    threshold = (used + (1700 << 20)) / memory.total
    limits = {"RAY_memory_usage_threshold": f"{threshold:.4f}", "RAY_memory_monitor_refresh_ms": "100"}
    process = start(tmp_path / "start", config, home, "training.epochs=300", **limits)
    assert process.wait(240) == 4, process.stderr
    assert "ran out of memory" in process.stderr and "training.micro_batch_size" in process.stderr
    assert "trying again" not in process.stderr
