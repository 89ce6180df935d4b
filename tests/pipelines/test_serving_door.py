"""What is in front of ``amlora serve``'s replicas: the door in Ray Serve's proxy, and where the key is not."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from pipelines.cluster.serve import KEY_VARIABLE, Place, taken_key
from tests.bank_with_base import write_working_bank
from tests.pipelines.test_serving import Server

KEY = "s3cret-of-the-door"
READ_S = 3


@pytest.fixture
def server(tmp_path: Path, amlora_home: Path) -> Iterator[Server]:
    write_working_bank(tmp_path / "words", tmp_path / "base")
    one = Server(amlora_home, tmp_path / "log", str(tmp_path / "words"), "--read-timeout", str(READ_S), key=KEY)
    one.wait(f"at {one.url}", deadline_s=400)
    yield one
    one.end()


def closed_after(connection: socket.socket) -> float:
    """Seconds until the server closes a connection."""
    start = time.monotonic()
    connection.settimeout(60)
    try:
        while connection.recv(4096):
            pass
    except ConnectionError:
        pass
    return time.monotonic() - start


def processes(home: Path) -> list[psutil.Process]:
    """All that belong to this server."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("AMLORA_HOME") == str(home):
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def texts_inside(server: Server) -> int:
    """Texts that the replica has at work."""
    lines = httpx.get(f"{server.url}/metrics", timeout=60).text.splitlines()
    return int(float(next(line for line in lines if line.startswith("amlora_texts ")).split()[1]))


@pytest.mark.integration
@pytest.mark.timeout(900)
@pytest.mark.crash  # a server on Ray Serve whose replica is killed
def test_key_in_environment_slow_sockets_host_header_and_a_replica_that_dies(server: Server, amlora_home: Path) -> None:
    """One server for all of it, because starting Ray takes most of the time."""
    own = processes(amlora_home)
    assert len(own) > 3, "Ray's processes are among them"
    with_key = [process.name() for process in own if KEY in str(process.environ())]
    assert with_key == [], "key-in-environment"

    key = {"authorization": f"Bearer {KEY}"}
    strange = httpx.get(f"{server.url}/healthz", headers={"host": "evil.test"})
    assert strange.status_code == 403 and strange.json()["error"]["code"] == "unknown_host", "host-header"
    plain = httpx.post(f"{server.url}/v1/completions", content=b'{"prompt": "red"}', headers=key)
    assert plain.status_code == 415 and "application/json" in plain.json()["error"]["message"]

    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    waits = {
        "idle": b"", "half a head": b"POST /v1/comp", "no body": head + b"content-length: 50\r\n\r\n{",
        "endless": head + b"transfer-encoding: chunked\r\n\r\n1\r\n{\r\n",
    }  # fmt: skip
    connections = {name: [socket.create_connection(("127.0.0.1", server.port)) for _ in range(10)] for name in waits}
    for name, sockets in connections.items():
        for one in sockets:
            one.sendall(waits[name])
    start = time.monotonic()
    for sockets in connections.values():
        for one in sockets:
            closed_after(one)
            one.close()
    assert time.monotonic() - start < 20 * READ_S, "slow-sockets"
    assert httpx.get(f"{server.url}/healthz").status_code == 200

    (replica,) = (process for process in own if "ServeReplica" in " ".join(process.cmdline()))
    body = {"prompt": ["red wall"] * 64, "max_tokens": 40, "raw": True}
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(httpx.post, f"{server.url}/v1/completions", json=body, headers=key, timeout=120)
        start = time.monotonic()
        while texts_inside(server) == 0:
            assert not asked.done() and time.monotonic() - start < 60
        os.kill(replica.pid, signal.SIGKILL)
        answer = asked.result()
    assert answer.status_code == 503, answer.text
    assert answer.headers["retry-after"] and answer.json()["error"]["type"] == "server_error"
    start = time.monotonic()
    while httpx.post(f"{server.url}/v1/completions", json=body, headers=key, timeout=60).status_code != 200:
        assert time.monotonic() - start < 180, "Ray Serve starts another replica"
        time.sleep(0.5)


def test_key_is_taken_out_of_the_environment_and_of_what_the_system_shows_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "of-this-process")
    assert taken_key() == "of-this-process"
    assert KEY_VARIABLE not in os.environ and taken_key() is None
    assert b"of-this-process" not in Path("/proc/self/environ").read_bytes()


@pytest.mark.parametrize(
    ("host", "names", "hosts"),
    [
        ("127.0.0.1", (), None), ("::1", (), None), ("localhost", (), None), ("0.0.0.0", (), ("*",)),
        ("127.0.0.1", ("models.example",), ("127.0.0.1", "models.example")), ("box", ("*",), ("box", "*")),
    ],
)  # fmt: skip
def test_only_who_listens_at_loopback_alone_or_names_hosts_asks_for_names(
    host: str, names: tuple[str, ...], hosts: tuple[str, ...] | None
) -> None:
    assert Place(host=host, port=1, replicas=1, threads=None, names=names).hosts == hosts
