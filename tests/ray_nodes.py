"""Ray nodes as an operator starts them, each in a process group of its own, with a token, on ports of their own."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from http.client import HTTPResponse
from pathlib import Path

from tests.ports import free_port

REPOSITORY = Path(__file__).resolve().parents[1]
TOKEN = "a-token-for-tests-only-0123456789abcdef"


class Nodes:
    """A head and its workers on loopback addresses. Ends everything it started, and nothing else."""

    def __init__(self) -> None:
        # Short: Ray's sockets lie below it, and their paths may have 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="amlora-ray-"))
        (self.folder / "token").write_text(TOKEN, encoding="utf-8")
        self.gcs_port, self.dashboard_port = free_port(), free_port()
        self.address = f"http://127.0.0.1:{self.dashboard_port}"
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    @staticmethod
    def plain_environment() -> dict[str, str]:
        """Of a process on a machine of the cluster that has nothing to do with Ray."""
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "AMLORA_"))}
        return kept | {"PATH": path, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}

    @property
    def environment(self) -> dict[str, str]:
        """What nodes and whoever talks to them have in their environment."""
        return self.plain_environment() | {
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.folder / "token"), "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2", "RAY_TRAIN_METRICS_ENABLED": "0",
            "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        }  # fmt: skip

    def head(self, cpus: int) -> None:
        """Start the head and wait until its dashboard answers."""
        self._start(
            "head", "--head", f"--port={self.gcs_port}", f"--dashboard-port={self.dashboard_port}",
            "--dashboard-host=127.0.0.1", "--include-dashboard=true", f"--temp-dir={self.folder / 'head'}",
            f"--num-cpus={cpus}", "--node-ip-address=127.0.0.1", f"--dashboard-agent-listen-port={free_port()}",
            f"--metrics-export-port={free_port()}", f"--ray-client-server-port={free_port()}",
        )  # fmt: skip
        self._wait("the dashboard", lambda: self._asked("/api/version").status == 200)

    def worker(self, name: str, cpus: int, address: str, **environment: str) -> None:
        """Start a worker node with a loopback address of its own, such as 127.0.0.2, and more in its environment.

        Its temporary folder is its own as well, as on another machine: a node unpacks a job's working directory there, and
        in a shared one it would pull the folder away from under whoever runs in it.
        """
        self._start(
            name, f"--address=127.0.0.1:{self.gcs_port}", f"--num-cpus={cpus}", f"--node-ip-address={address}",
            f"--temp-dir={self.folder / name}",
            f"--dashboard-agent-listen-port={free_port()}", f"--metrics-export-port={free_port()}", **environment,
        )  # fmt: skip

    def joined(self, count: int) -> None:
        """Wait until the head counts so many nodes, itself among them."""

        def alive() -> bool:
            listed = json.load(self._asked("/nodes?view=summary"))["data"]["summary"]
            return sum(node["raylet"].get("state") == "ALIVE" for node in listed) == count

        self._wait(f"{count} nodes", alive)

    def _asked(self, path: str) -> HTTPResponse:
        request = urllib.request.Request(self.address + path, headers={"Authorization": f"Bearer {TOKEN}"})
        response: HTTPResponse = urllib.request.urlopen(request, timeout=5)
        return response

    def kill(self, name: str) -> None:
        """The machine is gone: every process of the node, at once."""
        process = self.running.pop(name)
        for pid in _descendants(process.pid):
            _signal(pid, signal.SIGKILL)
        process.wait(timeout=30)

    def close(self) -> None:
        for name in list(self.running):
            self.kill(name)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, name: str, *arguments: str, **environment: str) -> None:
        ray = str(Path(sys.executable).parent / "ray")
        log = (self.folder / f"{name}.log").open("ab")
        command = [ray, "start", "--block", "--disable-usage-stats", f"--object-store-memory={100 << 20}", *arguments]
        self.running[name] = subprocess.Popen(
            command, env=self.environment | environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )

    def _wait(self, what: str, there: object, deadline_s: float = 90.0) -> None:
        assert callable(there)
        deadline = time.monotonic() + deadline_s
        while True:
            with contextlib.suppress(OSError):
                if there():
                    return
            for name, process in self.running.items():
                assert process.poll() is None, f"{name} ended: {(self.folder / f'{name}.log').read_text()[-2000:]}"
            assert time.monotonic() < deadline, f"waited {deadline_s:.0f} s for {what}"
            time.sleep(0.3)


def _descendants(pid: int) -> list[int]:
    """The process and everything below it, children last."""
    import psutil

    try:
        process = psutil.Process(pid)
        return [pid, *(child.pid for child in process.children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
