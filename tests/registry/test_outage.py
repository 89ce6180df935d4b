"""A tracking server that goes away in mid-run: training goes on, publishing waits, and what gives up can be resumed."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from amlora_dist.config.loading import load_config
from amlora_dist.registry import connection, leases
from amlora_dist.registry.connection import StoreAwayError
from amlora_dist.registry.store import Store
from pipelines.runs.progress import Silent
from pipelines.runs.sequence import run_sequence
from tests.registry.tiny_banks import TASKS, publish_sequence
from tests.tiny_config import write_config

pytestmark = pytest.mark.integration


class Wire:
    """A port of this machine that leads to a server, until it is cut."""

    def __init__(self, target: str) -> None:
        parts = urlsplit(target)
        self._target = (parts.hostname or "", parts.port or 0)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.uri = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self._open: set[socket.socket] = set()
        self.is_cut = False
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Drop every connection, and each new one as soon as it is made."""
        self.is_cut = True
        for one in list(self._open):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def fix(self) -> None:
        self.is_cut = False

    def close(self) -> None:
        self.cut()
        self._listening.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listening.accept()
                if self.is_cut:
                    near.close()
                    continue
                far = socket.create_connection(self._target)
                self._open |= {near, far}
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
        for one in (source, sink):
            self._open.discard(one)
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def wire(tracking_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Wire]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    wire = Wire(tracking_server)
    yield wire
    wire.close()


@pytest.mark.crash
def test_what_was_cut_off_in_mid_publication_goes_on_when_the_server_is_back(
    wire: Wire, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store.open(tmp_path / "home", wire.uri)
    calls: list[int] = []

    def guard() -> None:
        calls.append(1)
        if len(calls) == 5:  # each version is guarded three times: in the middle of the second
            wire.cut()
            threading.Timer(2.0, wire.fix).start()

    with caplog.at_level(logging.WARNING):
        publish_sequence(store, name, tmp_path, guard=guard)
    assert "no answer; trying again for 15 min" in caplog.text
    assert "answers again" in caplog.text
    assert [version.number for version in store.counted_versions(name)] == list(range(1, len(TASKS) + 1))


class Observer(Silent):
    """Cuts the wire when training begins, fixes it some seconds after the stage was scored."""

    def __init__(self, wire: Wire) -> None:
        self.wire, self.steps_while_cut = wire, 0
        self.fixed: threading.Timer | None = None

    def step(self, done: int, total: int, loss: float | None, tokens_per_second: float | None) -> None:
        if self.fixed is None and done == 2:
            self.wire.cut()
        self.steps_while_cut += self.wire.is_cut

    def note(self, text: str) -> None:
        if self.wire.is_cut and self.fixed is None and "accuracy" in text:
            self.fixed = threading.Timer(3.0, self.wire.fix)
            self.fixed.start()


def test_training_goes_on_while_the_server_is_away_and_publishing_waits(wire: Wire, name: str, tmp_path: Path) -> None:
    observer = Observer(wire)
    config = load_config(write_config(tmp_path, tasks=("colours",), mlflow={"tracking_uri": wire.uri}))
    result = run_sequence(config, run_id=name, progress=observer)
    assert observer.steps_while_cut == 15, "steps 2 to 16 were made without the server"
    assert [stage["version"] for stage in result["stages"]] == [1]
    assert all(value is not None for value in result["accuracy_matrix"][0])


class Cutting(Silent):
    def __init__(self, wire: Wire) -> None:
        self.wire = wire

    def note(self, text: str) -> None:
        if "accuracy" in text:
            self.wire.cut()


@pytest.mark.crash
def test_a_run_that_gave_up_says_so_and_goes_on_when_the_server_is_back(
    wire: Wire, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "OUTAGE_DEADLINE_S", 1.0)
    monkeypatch.setitem(leases.Timing.__init__.__kwdefaults__, "dead_after_s", 2.0)
    file = write_config(tmp_path, tasks=("colours",), mlflow={"tracking_uri": wire.uri})
    began = time.monotonic()
    with pytest.raises(StoreAwayError, match=r"no answer for .* what was trained is kept.* same command") as caught:
        run_sequence(load_config(file), run_id=name, progress=Cutting(wire))
    assert caught.value.exit_code == 2
    assert time.monotonic() - began < 60, "after it gave up it does not wait again for each thing left to do"
    wire.fix()
    result = run_sequence(load_config(file), run_id=name, progress=Silent())
    assert [stage["version"] for stage in result["stages"]] == [1]
    store = Store.open(tmp_path / "home", wire.uri)
    assert {run.status for run in store.find_runs({"amlora.run_id": name})} == {"FINISHED"}
