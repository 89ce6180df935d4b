"""An embedded store and a tracking server, each started once for all tests of this folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from amlora_dist.registry.store import Store
from tests.ports import free_port


@pytest.fixture(scope="session")
def embedded_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``AMLORA_HOME`` of an embedded store; the space in its name is on purpose."""
    home = tmp_path_factory.mktemp("registry") / "amlora home"
    Store.open(home)
    return home


@pytest.fixture(scope="session")
def tracking_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URI of an MLflow server with proxied artifacts."""
    folder = tmp_path_factory.mktemp("server")
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--serve-artifacts"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder, start_new_session=True)
    uri = f"http://127.0.0.1:{port}"
    try:
        _wait_for(uri, server, folder / "server.log")
        yield uri
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait(timeout=20)


def _wait_for(uri: str, server: subprocess.Popen[bytes], log: Path, deadline_s: float = 240) -> None:
    start = time.monotonic()
    while time.monotonic() - start < deadline_s:
        try:
            with urllib.request.urlopen(f"{uri}/health", timeout=2):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            if server.poll() is not None:
                break
            time.sleep(0.25)
    raise AssertionError(f"no MLflow server at {uri} after {deadline_s} s:\n{log.read_text()[-2000:]}")


@pytest.fixture(scope="session", params=["embedded", "server"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The same tests on both kinds of store."""
    if request.param == "embedded":
        return Store.open(request.getfixturevalue("embedded_home"))
    return Store.open(tmp_path_factory.mktemp("home"), request.getfixturevalue("tracking_server"))


@pytest.fixture
def name(request: pytest.FixtureRequest) -> Iterator[str]:
    """A registered model of this test's own, gone after it: the stores are shared, and some tests damage what they made."""
    words = request.node.name.partition("[")[0].removeprefix("test_").split("_")
    model = "-".join(words[:12]) + f"-{time.time_ns() % 10**9}"
    yield model
    if "store" in request.fixturenames:
        store: Store = request.getfixturevalue("store")
        if model in store.registered_models():
            store.connection.client.delete_registered_model(model)
