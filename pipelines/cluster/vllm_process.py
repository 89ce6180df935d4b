"""vLLM for ``amlora serve --engine vllm``: one that runs already, or a child of this process that ends with it."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from amlora_dist.config.loading import home
from amlora_dist.errors import AmloraError, UserError

if TYPE_CHECKING:
    from amlora_dist.registry.bank_folder import Bank

START_S = 900.0
"""For a child to load the base model and answer."""
END_S = 20.0
"""For a child to end when it is asked to; then it is killed."""
FOUND_S = 120.0
"""For its Python to say whether vLLM is installed."""
LAST_LINES = 12
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class VllmSettings:
    """How ``--engine vllm`` is asked for."""

    url: str | None
    """Of a server that runs; None: a child is started."""
    python: Path | None
    """That has vLLM; None: this one."""
    rank: int
    """The server's ``--max-lora-rank``."""


@dataclass(frozen=True, slots=True)
class Vllm:
    """A server for the replicas."""

    url: str
    rank: int
    child: subprocess.Popen[bytes] | None = None
    log_file: Path | None = None

    def check(self) -> None:
        """Raise AmloraError where the child has ended."""
        if self.child is not None and (code := self.child.poll()) is not None:
            raise AmloraError(f"vLLM ended with exit code {code}; its log is {self.log_file}{_tail(self.log_file)}")


@contextlib.contextmanager
def vllm_for(
    asked: VllmSettings, bank: Bank, name: str, version: str, options: dict[str, str | None], say: Callable[[str], None]
) -> Iterator[Vllm]:
    """Inside, a vLLM serves the bank's base model and has taken all of its rows.

    Args:
        asked: which.
        bank: to serve.
        name: what clients call it.
        version: of the bank.
        options: ``base``, ``device`` and ``dtype`` of the server's.
        say: is called with what a person who started it wants to know.

    Raises:
        UserError: no vLLM there, or it does not take a row.
    """
    from amlora_dist.serving.vllm_rows import write_rows
    from amlora_dist.serving.vllm_start import check_rows

    if (bits := options.get("quantisation") or bank.manifest.base.quantisation) != "none":
        raise UserError(
            f"--engine vllm: found a base model in {bits}, expected one that is not quantised, as vLLM serves it; ask for"
            " it with --quantisation none: the bank then answers otherwise than it was measured"
        )
    rows = write_rows(bank, name, version, home(), asked.rank)
    if asked.url is not None:
        asyncio.run(check_rows(asked.url, rows))
        yield Vllm(asked.url, asked.rank)
        return
    if os.environ.get("RAY_ADDRESS"):
        raise UserError(
            "--engine vllm: replicas on the cluster of RAY_ADDRESS do not reach a vLLM that this machine starts for itself; "
            "start one they reach and give --engine-url"
        )
    with _child(asked, bank, options, say) as started:
        asyncio.run(check_rows(started.url, rows))
        yield started


@contextlib.contextmanager
def _child(
    asked: VllmSettings, bank: Bank, options: dict[str, str | None], say: Callable[[str], None]
) -> Iterator[Vllm]:
    python = _python(asked.python)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log_file = home() / "vllm" / f"vllm-{port}.log"
    log_file.parent.mkdir(parents=True, exist_ok=True)
    say(f"starting vLLM; its log is {log_file}")
    with log_file.open("wb") as output:
        child = subprocess.Popen(
            [str(python), *_arguments(asked, bank, options, port)], stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, env=_environment(), start_new_session=True, preexec_fn=_ends_with_parent,
        )  # fmt: skip
    started = Vllm(f"http://127.0.0.1:{port}", asked.rank, child, log_file)
    try:
        _until_ready(started)
        yield started
    finally:
        _end(child)


def _arguments(asked: VllmSettings, bank: Bank, options: dict[str, str | None], port: int) -> list[str]:
    """vLLM's command line for a bank."""
    from amlora_dist.inference.loading import chosen_device, chosen_dtype, resolve_bank_base

    device = chosen_device(options["device"])
    dtype = str(chosen_dtype(options["dtype"], device)).removeprefix("torch.")
    tasks = len(bank.manifest.tasks)
    # Rows of two versions lie there while an alias moves.
    adapters = ["--enable-lora", "--max-lora-rank", str(asked.rank), "--max-loras", str(min(tasks, 8)),
                "--max-cpu-loras", str(max(16, 4 * tasks))]  # fmt: skip
    # On a GPU the router's copy of the base model needs room too.
    place = ["--enforce-eager"] if device.type == "cpu" else ["--gpu-memory-utilization", "0.7"]
    base = resolve_bank_base(bank.manifest.base, options["base"]).path
    return ["-m", "vllm.entrypoints.openai.api_server", "--model", str(base), "--host", "127.0.0.1", "--port", str(port),
            "--dtype", dtype, *adapters, *place]  # fmt: skip


def _environment() -> dict[str, str]:
    """This process's own, and what vLLM needs to take rows. On CPUs, unless it says otherwise, a cache of 1 GiB, and torch
    compiles nothing: that would take a C++ compiler, and the first requests minutes."""
    defaults = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCH_COMPILE_DISABLE": "1"}
    return {**defaults, **os.environ, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}


def _python(given: Path | None) -> Path:
    """A Python that has vLLM."""
    python = Path(sys.executable) if given is None else given.expanduser()
    look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    try:
        found = subprocess.run([str(python), "-c", look], timeout=FOUND_S, capture_output=True, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"--engine-python: {python} cannot be run ({error}); give the Python that has vLLM") from error
    if not found:
        raise UserError(
            f"--engine vllm: {python} has no vLLM; make it an environment (`make vllm-env` does, for CPUs) and give its "
            "bin/python as --engine-python, or the address of a vLLM that runs as --engine-url"
        )
    return python


def _until_ready(started: Vllm) -> None:
    deadline = time.monotonic() + START_S
    while True:
        if started.child is not None and (code := started.child.poll()) is not None:
            hint = f"its log is {started.log_file}{_tail(started.log_file)}"
            raise UserError(f"vLLM ended with exit code {code} before it answered; {hint}")
        try:
            with urllib.request.urlopen(f"{started.url}/health", timeout=5):
                return
        except OSError:
            if time.monotonic() > deadline:
                raise UserError(
                    f"vLLM did not answer within {START_S:.0f} s; its log is {started.log_file}{_tail(started.log_file)}"
                ) from None
        time.sleep(0.5)


def _end(child: subprocess.Popen[bytes]) -> None:
    """End a child and those that it started: they are a group of their own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(END_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait(END_S)


def _ends_with_parent() -> None:
    """In the child: SIGTERM when this process dies, however (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _tail(file: Path | None) -> str:
    """The last lines of a log, for a message."""
    try:
        lines = [] if file is None else file.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
    except OSError:
        return ""
    return "".join(f"\n  {line[:300]}" for line in lines)
