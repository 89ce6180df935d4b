"""Signals, two drivers, a paused driver, a full disk, a loss that is not finite: real commands, without Ray."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from pipelines.runs.interrupts import stops_handled
from tests.fork_server import Child, Server
from tests.pipelines.crash_cases import Outcome, outcome_of

LONG = "training.epochs=600"
"""A stage that is still at work when a test sends its signal: 2400 steps."""


class Runs:
    """Starts the same command in the same home, again and again."""

    def __init__(self, server: Server, config: Path, home: Path, folder: Path) -> None:
        self._server, self._config, self.home, self._folder = server, config, home, folder
        self._count = 0

    def start(self, *overrides: str, dead_after_s: float = 30, max_file: int | None = None, **environment: str) -> Child:
        self._count += 1
        return self._server.start(
            self._folder / f"start-{self._count}", "run", str(self._config), "--run-id", "r", "--json", *overrides,
            dead_after_s=dead_after_s, max_file=max_file, AMLORA_HOME=str(self.home), **environment,
        )  # fmt: skip

    def checkpoints(self) -> list[int]:
        """Steps of committed checkpoints."""
        marks = self.home.glob("storage/stages/*/checkpoints/step-*/COMMIT")
        return sorted(int(mark.parent.name.removeprefix("step-")) for mark in marks)


@pytest.fixture
def runs(forking: Server, config: Path, home: Path, tmp_path: Path) -> Runs:
    return Runs(forking, config, home, tmp_path)


def wait_paused_outside_the_store(runs: Runs, child: Child) -> None:
    """Wait until it has stopped itself. One of its other threads may be inside SQLite then, which lets nobody else in
    (whoever waits is told after two minutes): it goes on for a moment until none is."""
    child.wait_paused()
    while True:
        with closing(sqlite3.connect(runs.home / "mlflow.db", timeout=0.5, isolation_level=None)) as store:
            try:
                store.execute("BEGIN IMMEDIATE")
                store.execute("ROLLBACK")
                return
            except sqlite3.OperationalError as error:
                assert "locked" in str(error)
        child.send(signal.SIGCONT)
        time.sleep(0.01)
        child.send(signal.SIGSTOP)
        child.wait_paused()


def wait_until_training(runs: Runs, child: Child, timeout: float = 60.0) -> None:
    deadline = time.monotonic() + timeout
    while not runs.checkpoints():
        assert child.poll() is None, child.stderr
        assert time.monotonic() < deadline, f"no checkpoint within {timeout:.0f} s: {child.stderr}"
        time.sleep(0.02)


# -- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"])
def test_a_signal_lets_the_step_end_writes_a_checkpoint_and_the_run_goes_on_from_there(
    number: int, code: int, runs: Runs, undisturbed: Outcome
) -> None:
    first = runs.start(AMLORA_CRASH="step_done:stop:4")
    first.wait_paused()
    assert runs.checkpoints() == [2], "a checkpoint every second step"
    first.send(number)
    first.send(signal.SIGCONT)
    assert first.wait() == code, first.stderr
    assert runs.checkpoints() == [4, 5], "one more was written, for the signal"
    assert "stopped after step" in first.stderr and "Traceback" not in first.stderr
    again = runs.start()
    assert again.wait() == 0, again.stderr
    assert "resumed after step 5" in again.stderr
    assert outcome_of(runs.home, again.stdout) == undisturbed


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.parametrize("point", ["workers_started", "step_done"])
def test_a_signal_before_a_step_is_not_answered_by_a_step(point: str, runs: Runs, undisturbed: Outcome) -> None:
    begun = point == "step_done"
    first = runs.start(AMLORA_CRASH=f"{point}:stop")
    first.wait_paused()
    first.send(signal.SIGTERM)
    first.send(signal.SIGCONT)
    assert first.wait() == 143, first.stderr
    assert len(runs.checkpoints()) == begun, first.stderr
    assert ("checkpoint after this step" in first.stderr) == begun
    assert ("stopped before a step was done" in first.stderr) != begun
    again = runs.start()
    assert again.wait() == 0, again.stderr
    assert outcome_of(runs.home, again.stdout) == undisturbed


def test_the_first_signal_asks_and_a_second_sigint_ends_at_once(tmp_path: Path) -> None:
    reached = False
    with pytest.raises(KeyboardInterrupt), stops_handled(tmp_path):
        os.kill(os.getpid(), signal.SIGINT)
        assert (tmp_path / "STOP").exists()
        reached = True
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    assert reached
    assert not (tmp_path / "STOP").exists(), "the next start must not stop at once"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# -- two drivers ------------------------------------------------------------------------------------------------------


@pytest.mark.integration
@pytest.mark.slow
def test_of_two_drivers_one_works_and_the_other_says_who(runs: Runs) -> None:
    first = runs.start(LONG)
    wait_until_training(runs, first)
    second = runs.start(LONG)
    assert second.wait() == 3
    for part in ("run 'r' is held by", socket.gethostname(), f"pid {first.pid}", "since 20"):
        assert part in second.stderr
    first.send(signal.SIGKILL)
    first.wait()
    began = time.monotonic()
    third = runs.start(LONG)
    third.wait_for("resumed after step")
    assert time.monotonic() - began < 30, "a dead holder is replaced within 30 s"
    third.send(signal.SIGTERM)
    assert third.wait() == 143


MORE = pytest.mark.crash
"""Of several cases of one promise, one is tested every time and the others by ``make test-crash``."""


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.parametrize(
    "point",
    [
        pytest.param("step_done:stop:11", marks=MORE),
        "artifacts_uploaded:stop:2",
        pytest.param("version_registered:stop:2", marks=MORE),
    ],
)
def test_a_driver_that_was_paused_and_wakes_up_late_changes_nothing(point: str, runs: Runs, undisturbed: Outcome) -> None:
    paused = runs.start(AMLORA_CRASH=point)
    wait_paused_outside_the_store(runs, paused)
    other = runs.start(dead_after_s=2)
    assert other.wait() == 0, other.stderr
    assert "no sign of life" in other.stderr
    done = outcome_of(runs.home, other.stdout)
    assert done == undisturbed
    paused.send(signal.SIGCONT)
    assert paused.wait() == 3, paused.stderr
    assert "was replaced" in paused.stderr
    assert outcome_of(runs.home, other.stdout) == done, "after the paused one has ended too"


# -- losses and disks -------------------------------------------------------------------------------------------------


@pytest.mark.integration
@pytest.mark.slow
def test_a_loss_that_is_twice_not_finite_at_one_step_is_named_and_not_tried_again(runs: Runs) -> None:
    child = runs.start("training.learning_rate=1e30", "training.clip=0")
    assert child.wait() == 4, child.stderr
    assert child.stderr.count("trying again from the last checkpoint") == 1
    output = child.stderr.strip().splitlines()
    last = output[-1]
    assert all(line.count("colours") == 1 for line in output if "not finite" in line), "the stage is named once"
    for part in ("stage 'colours'", "step ", "rows ", "lower training.learning_rate", "2 failures in the same place"):
        assert part in last


@pytest.mark.integration
@pytest.mark.slow
def test_a_store_that_cannot_grow_is_reported_and_the_run_goes_on_when_it_can(runs: Runs, undisturbed: Outcome) -> None:
    child = runs.start(max_file=150_000)  # SQLite's log grows past it in the middle of the run
    assert child.wait() == 2, child.stderr
    assert "the disk is full" in child.stderr and "make room" in child.stderr
    assert "Traceback" not in child.stderr
    again = runs.start()
    assert again.wait() == 0, again.stderr
    assert outcome_of(runs.home, again.stdout) == undisturbed


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of a few megabytes, where this system lets a test have one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)], capture_output=True, check=False)
    if mount.returncode != 0:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def resize(disk: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.parametrize("room", [pytest.param(60_000, marks=MORE), 100_000, pytest.param(140_000, marks=MORE)])
def test_a_disk_that_fills_up_anywhere_is_reported_and_the_run_goes_on_when_there_is_room(
    room: int, small_disk: Path, runs: Runs, empty_home: Path, undisturbed: Outcome
) -> None:
    runs.home = small_disk / "home"
    shutil.copytree(empty_home, runs.home)
    with closing(sqlite3.connect(runs.home / "mlflow.db")) as database:  # the first start would give back what its log takes
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    used = shutil.disk_usage(small_disk).used
    resize(small_disk, used + room)
    child = runs.start()
    assert child.wait() == 2, child.stderr
    assert "make room" in child.stderr
    assert "Traceback" not in child.stderr
    resize(small_disk, 64 << 20)
    again = runs.start()
    assert again.wait() == 0, again.stderr
    assert outcome_of(runs.home, again.stdout) == undisturbed
