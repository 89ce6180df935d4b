"""A process that has imported everything once, and forks a child for each command line: seconds of imports saved.

``Server()`` starts it; ``Server.start`` runs ``amlora ARGUMENTS`` in a fresh child, with an environment of its own.
The server itself never opens a store, computes nothing and has one thread, so that a child is as good as a new process.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
START_DEADLINE_S = 180.0
WARM = (
    "amlora_dist.training.stage", "mlflow.store.model_registry.sqlalchemy_store", "mlflow.store.tracking.sqlalchemy_store",
    "pipelines.cli", "pipelines.runs.sequence", "torch._dynamo", "torch.distributed",
    "transformers.models.llama.modeling_llama", "transformers.models.t5.modeling_t5",
)  # fmt: skip
"""What a run with ``workers: 0`` imports on its way, so that children need not."""


@dataclass(slots=True)
class Child:
    """One command at work or ended."""

    server: Server
    pid: int
    folder: Path
    """Where its standard output and error go."""
    returncode: int | None = None

    def poll(self) -> int | None:
        """Exit code, minus the signal's number for one that was killed; None while it works."""
        if self.returncode is None:
            self.returncode = self.server.ask(poll=self.pid)["code"]
        return self.returncode

    def wait(self, timeout: float = 120.0) -> int:
        """Wait for its end; killed at the deadline."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.send(signal.SIGKILL)
                raise AssertionError(f"no end within {timeout:.0f} s:\n{self.stderr[-3000:]}")
            time.sleep(0.05)
        assert self.returncode is not None
        return self.returncode

    def wait_for(self, text: str, timeout: float = 60.0) -> None:
        """Wait until standard error holds ``text``."""
        deadline = time.monotonic() + timeout
        while text not in self.stderr:
            assert self.poll() is None, f"ended with {self.returncode} before it printed {text!r}:\n{self.stderr[-3000:]}"
            assert time.monotonic() < deadline, f"did not say {text!r} within {timeout:.0f} s:\n{self.stderr[-3000:]}"
            time.sleep(0.01)

    def wait_paused(self, timeout: float = 60.0) -> None:
        """Wait until it has stopped itself (crash kind ``stop``)."""
        deadline = time.monotonic() + timeout
        while Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            assert self.poll() is None, f"ended with {self.returncode}:\n{self.stderr[-3000:]}"
            assert time.monotonic() < deadline, f"did not stop within {timeout:.0f} s:\n{self.stderr[-3000:]}"
            time.sleep(0.01)

    def send(self, number: int) -> None:
        """Send a signal, if it still works."""
        if self.poll() is None:
            os.kill(self.pid, number)

    @property
    def stdout(self) -> str:
        return (self.folder / "stdout").read_text(encoding="utf-8")

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text(encoding="utf-8")


class Server:
    """The process that forks. Also a context manager."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fork_server"], cwd=ROOT, env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._lock = threading.Lock()
        self._children: list[Child] = []
        timer = threading.Timer(START_DEADLINE_S, self._process.kill)
        timer.start()
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        timer.cancel()
        assert line == "ready\n", f"the forking process printed {line!r}"

    def ask(self, **request: Any) -> dict[str, Any]:
        """One question and its answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with self._lock:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer: dict[str, Any] = json.loads(self._process.stdout.readline())
            return answer

    def start(
        self,
        folder: Path,
        *arguments: str,
        cwd: Path | None = None,
        dead_after_s: float | None = None,
        max_file: int | None = None,
        **environment: str,
    ) -> Child:
        """Run ``amlora ARGUMENTS`` in a new child.

        Args:
            folder: gets the files ``stdout`` and ``stderr``.
            arguments: of the command line.
            cwd: working folder; default: this process's own.
            dead_after_s: without a heartbeat for so long a holder is dead, with heartbeats ten times as fast as usual.
            max_file: bytes that a file may have (``RLIMIT_FSIZE``): writing more fails.
            environment: variables on top of this process's own.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("stdout", "stderr"):
            (folder / name).touch()
        everything = dict(os.environ) | environment
        answer = self.ask(
            start=list(arguments), folder=str(folder), cwd=str(cwd or Path.cwd()), dead_after_s=dead_after_s,
            max_file=max_file, environment=everything,
        )  # fmt: skip
        child = Child(self, answer["pid"], folder)
        self._children.append(child)
        return child

    def close(self) -> None:
        for child in self._children:
            child.send(signal.SIGKILL)
        self._process.kill()  # it holds nothing, and taking itself down would cost seconds
        self._process.wait(timeout=60)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _serve() -> None:
    for name in WARM:
        importlib.import_module(name)
    import mlflow
    import torch

    mlflow.MlflowClient  # noqa: B018 (loaded on first use)
    torch.set_num_threads(1)
    assert threading.active_count() == 1, threading.enumerate()
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            code = os.waitstatus_to_exitcode(status) if pid else None
            answer = {"code": code}
        else:
            pid = os.fork()
            if pid == 0:
                _child(request)
            answer = {"pid": pid}
        print(json.dumps(answer), flush=True)


def _child(request: dict[str, Any]) -> None:
    """Never returns."""
    from amlora_dist import crash_points
    from amlora_dist.registry import leases
    from pipelines.cli.main import main

    os.setsid()
    os.chdir(request["cwd"])
    for number, name in ((1, "stdout"), (2, "stderr")):
        with open(Path(request["folder"]) / name, "wb") as file:
            os.dup2(file.fileno(), number)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.environ.clear()
    os.environ.update(request["environment"])
    crash_points._SPEC = os.environ.get("AMLORA_CRASH", "")
    crash_points._seen = Counter()
    crash_points._happened = threading.Event()
    if request["dead_after_s"] is not None:
        defaults = {"heartbeat_s": 0.2, "dead_after_s": request["dead_after_s"], "poll_s": 0.1}
        leases.Timing.__init__.__kwdefaults__.update(defaults)
    if request["max_file"] is not None:
        sys.dont_write_bytecode = True  # a compiled module that is cut short would fail every later import
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["max_file"], resource.RLIM_INFINITY))
    sys.argv = ["amlora", *request["start"]]
    code: object = 1
    try:
        main()
        code = 0
    except SystemExit as leaving:
        code = leaving.code
    except BaseException:  # noqa: BLE001 (what the interpreter does at its end)
        sys.excepthook(*sys.exc_info())
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


if __name__ == "__main__":
    _serve()
