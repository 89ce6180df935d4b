"""Several drivers as processes on one store: four writers at once, and a holder that is stopped and goes on."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

from amlora_dist import crash_points
from amlora_dist.errors import HeldError
from amlora_dist.registry.store import Store
from tests.registry.driver import TIMING
from tests.registry.tiny_banks import TASKS, fingerprint, publish_sequence

pytestmark = pytest.mark.integration

PATIENT = dataclasses.replace(TIMING, dead_after_s=100)
"""For a holder that lives, however loaded the machine is."""
ROOT = Path(__file__).resolve().parents[2]


def start(mode: str, home: Path, uri: str, name: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.registry.driver", mode, str(home), uri, name],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def expect(process: subprocess.Popen[str], word: str, deadline_s: float = 120) -> str:
    """The next line of a driver, which must start with ``word``; it is killed at the deadline."""
    assert process.stdout is not None
    timer = threading.Timer(deadline_s, process.kill)
    timer.start()
    try:
        line = process.stdout.readline()
    finally:
        timer.cancel()
    if not line.startswith(word):
        process.kill()
        raise AssertionError(f"expected {word!r}, found {line!r}\n{process.communicate()[1][-3000:]}")
    return line


@pytest.mark.timeout(600)
def test_four_writers_at_once_on_a_new_store_never_see_it_locked(tmp_path: Path) -> None:
    names = [f"trial-{k}" for k in range(4)]
    writers = [start("write", tmp_path / "home", "", name) for name in names]
    for writer in writers:
        out, err = writer.communicate(timeout=400)
        assert (writer.returncode, out) == (0, "done\n"), err[-3000:]
        assert "locked" not in err
    store = Store.open(tmp_path / "home")
    assert store.registered_models() == names
    for name in names:
        assert len(store.counted_versions(name)) == len(TASKS)
        run = store.find_runs({"amlora.stage": "0 noise"}, registered_model=name)[0].run
        assert len(store.metric_history(run, "metric-3")) == 40


@pytest.mark.timeout(600)
def test_a_stopped_holder_is_replaced_and_writes_nothing_when_it_goes_on(
    store: Store, name: str, tmp_path: Path
) -> None:
    holder = start("hold", tmp_path / "home", store.connection.uri, name)
    try:
        expect(holder, "held")
        with pytest.raises(HeldError, match=f"pid {holder.pid}"):
            store.hold_run(name, name, PATIENT)
        holder.send_signal(signal.SIGSTOP)
        with store.hold_run(name, name, TIMING) as lease:
            assert lease.epoch == 2
            holder.send_signal(signal.SIGCONT)
            assert holder.stdin is not None
            holder.stdin.write("go on\n")
            holder.stdin.flush()
            assert "was replaced" in expect(holder, "lost")
            assert store.versions(name) == []
            publish_sequence(store, name, tmp_path, tasks=TASKS[:1], epoch=lease.epoch, guard=lease.check)
            assert len(store.counted_versions(name)) == 1
    finally:
        holder.kill()
        holder.communicate(timeout=30)


@pytest.mark.parametrize("point", ["artifacts_uploaded", "read_back", "version_registered", "alias_moved"])
def test_publishing_that_died_anywhere_is_finished_by_the_next_driver(
    store: Store, name: str, tmp_path: Path, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crash_points, "_SPEC", f"{point}:raise:2")
    monkeypatch.setattr(crash_points, "_seen", Counter())
    lease = store.hold_run(name, name)
    with pytest.raises(crash_points.CrashedOnPurposeError):
        publish_sequence(store, name, tmp_path, epoch=lease.epoch, guard=lease.check)
    lease.release()
    monkeypatch.setattr(crash_points, "_SPEC", "")
    with store.hold_run(name, name) as lease:
        done = store.counted_versions(name)
        assert len(done) == (2 if point in {"version_registered", "alias_moved"} else 1)
        store.ensure_current(name, lease.check)
        assert store.resolve(f"models:/{name}@current") == done[-1]
        publish_sequence(store, name, tmp_path, epoch=lease.epoch, guard=lease.check, start=len(done) + 1)
        counted = store.counted_versions(name)
        assert [version.number for version in counted] == [1, 2, 3]
        for index in (1, 2, 3):
            assert len(store.find_stage(fingerprint(name, *TASKS[:index]))) == 1
        assert store.resolve(f"models:/{name}@current").number == 3
