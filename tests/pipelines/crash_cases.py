"""The crash matrix: a run dies at a point, the same command starts again, and what is there must be what would have been.

Used by the tests and by ``benchmarks/crash_matrix.py``, which prints the table.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from amlora_dist.crash_points import POINTS
from tests.fork_server import ROOT
from tests.tiny_config import write_config

KINDS = {"raise": "exception", "kill": "SIGKILL"}
"""Kinds of death, and what they are called in the table."""
RUN_ID = "r"
STAGES = 2
DIES_AT = {
    "stage_claimed": 2, "workers_started": 2, "step_done": 11, "checkpoint_written": 6, "checkpoint_committed": 6,
    "training_ended": 2, "adapter_gathered": 2, "scores_written": 6, "artifacts_uploaded": 2, "read_back": 2,
    "version_registered": 2, "alias_moved": 2, "run_closed": 1,
}  # fmt: skip
"""Which arrival of the one process kills it: in the middle of the second of two stages, or when that is published."""
DIES_AT_IN_WORKER = {
    "workers_started": 1, "step_done": 3, "checkpoint_written": 2, "checkpoint_committed": 2, "training_ended": 1,
    "adapter_gathered": 1, "scores_written": 2,
}  # fmt: skip
"""Under Ray these are reached by workers, which count from 1 in the first stage; the others by the driver."""
NOT_PUBLISHED = "artifacts_uploaded:hold:1"
"""The first stage is not published before something else happens."""
ORDERS = {
    f"the second stage, at {point}, before the first is published": (point, DIES_AT[point], NOT_PUBLISHED)
    for point in ("stage_claimed", "step_done", "checkpoint_committed", "training_ended", "scores_written")
} | {
    f"the first stage's publication, at {point}, {when}": (point, 1, meanwhile)
    for when, meanwhile in {
        "at once": "", "when the second has trained": f"{NOT_PUBLISHED},training_ended:pass:2",
    }.items()
    for point in ("artifacts_uploaded", "read_back", "version_registered", "alias_moved")
    if not (meanwhile and point == "artifacts_uploaded")
}  # fmt: skip
"""A stage is published while the next one trains: who dies where, at which arrival, and what decides whose turn it is."""


class Command(Protocol):
    """An ``amlora run`` that was started."""

    @property
    def stdout(self) -> str: ...
    @property
    def stderr(self) -> str: ...
    def wait(self, timeout: float = ...) -> int: ...


Start = Callable[..., Command]
"""``start(folder, *arguments, **environment)``."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What must be equal: everything that was learned, measured and published."""

    matrices: dict[str, Any]
    adapters: list[str]
    router: str
    versions: list[str]
    """Numbers of all versions, stale ones included."""
    stages: list[str]
    """Training fingerprints of the versions."""
    current: str
    """Version that the alias points at."""
    statuses: dict[str, int]
    """How many MLflow runs have which status."""
    leases: list[str]
    """Leases and claims that nobody gave back."""


@dataclass(frozen=True, slots=True)
class Crashed:
    """One case: where and how, the exit codes of the two starts, seconds of both, and the outcome."""

    point: str
    kind: str
    fired: bool
    codes: list[int]
    seconds: float
    outcome: Outcome | None
    stderr: str
    """Standard error of the last start."""


def matrix_config(folder: Path, **more: Any) -> Path:
    """Two small stages of eight steps, with a checkpoint every second step."""
    training = {
        "epochs": 2, "batch_size": 6, "learning_rate": 3e-2, "warmup_steps": 2, "checkpoint_every": 2, "probe_rows": 8,
    }  # fmt: skip
    return write_config(folder, tasks=("colours", "shapes"), training=training, **more)


def outcome_of(home: Path, stdout: str) -> Outcome:
    """Read what a finished run left, from its output and straight from the files: none of the code under test."""
    result = json.loads(stdout)
    name = result["registered_model"]
    with closing(sqlite3.connect(home / "mlflow.db")) as database:
        versions = database.execute(
            "SELECT v.version, v.source, t.value FROM model_versions v JOIN model_version_tags t"
            " ON t.name = v.name AND t.version = v.version AND t.key = 'amlora.training_fingerprint'"
            " WHERE v.name = ? ORDER BY v.version",
            (name,),
        ).fetchall()
        current = database.execute(
            "SELECT version FROM registered_model_aliases WHERE name = ? AND alias = 'current'", (name,)
        ).fetchone()
        statuses = dict(database.execute("SELECT status, count(*) FROM runs GROUP BY status").fetchall())
        leases = database.execute(
            "SELECT name FROM registered_models WHERE name LIKE 'amlora.lease.%' AND name NOT IN"
            " (SELECT name FROM registered_model_tags WHERE key = 'amlora.released') ORDER BY name"
        ).fetchall()
    _, run, root = versions[-1][1].replace("runs:/", "runs/").split("/", 2)
    (file,) = (home / "artifacts").glob(f"*/{run}/artifacts/{root}/manifest.json")
    manifest = json.loads(file.read_text(encoding="utf-8"))
    return Outcome(
        matrices={key: result[key] for key in ("accuracy_matrix", "ranked_accuracy_matrix", "untrained", "oracle")},
        adapters=[entry["digest"] for entry in manifest["adapters"]],
        router=manifest["router"]["digest"],
        versions=[str(number) for number, _, _ in versions],
        stages=[fingerprint for _, _, fingerprint in versions],
        current=str(current[0]),
        statuses=statuses,
        leases=[name for (name,) in leases],
    )


def calm(start: Start, folder: Path, config: Path, empty_home: Path, *overrides: str) -> Outcome:
    """The undisturbed run."""
    home = folder / "home"
    shutil.copytree(empty_home, home)
    command = start(folder, *_arguments(config, overrides), AMLORA_HOME=str(home))
    assert command.wait(1500) == 0, command.stderr
    return outcome_of(home, command.stdout)


def crash(
    start: Start, folder: Path, config: Path, empty_home: Path, point: str, kind: str, nth: int, *overrides: str,
    meanwhile: str = "",
) -> Crashed:  # fmt: skip
    """Die once at a point, and start the same command again until it ends by itself (twice at most).

    Args:
        meanwhile: what decides the order of two threads (kinds ``hold`` and ``pass`` of crash points).
    """
    home, once = folder / "home", folder / "fired"
    folder.mkdir(parents=True)
    shutil.copytree(empty_home, home)
    began = time.monotonic()
    environment = {"AMLORA_HOME": str(home), "AMLORA_CRASH_ONCE": str(once)}
    environment["AMLORA_CRASH"] = ",".join(filter(None, [f"{point}:{kind}:{nth}", meanwhile]))
    codes: list[int] = []
    command: Command | None = None
    while not codes or (codes[-1] != 0 and len(codes) < 2):
        command = start(folder / f"start-{len(codes) + 1}", *_arguments(config, overrides), **environment)
        codes.append(command.wait(400))
    assert command is not None
    outcome = outcome_of(home, command.stdout) if codes[-1] == 0 else None
    return Crashed(point, kind, Path(f"{once}.{point}").exists(), codes, time.monotonic() - began, outcome, command.stderr)


def faults(crashed: Crashed, calm: Outcome) -> list[str]:
    """What is not as it should be; empty when the crash changed nothing."""
    found = [] if crashed.fired else ["the point was never reached"]
    if crashed.outcome is None:
        return [*found, f"exit codes {crashed.codes}: {crashed.stderr.strip()[-1500:]}"]
    for name in Outcome.__slots__:
        one, other = getattr(crashed.outcome, name), getattr(calm, name)
        if one != other:
            found.append(f"{name}: {one}, undisturbed {other}")
    if len(calm.versions) != STAGES:
        found.append(f"{len(calm.versions)} versions of {STAGES} stages")
    return found


def within_one_row(found: list[list[float | None]], expected: list[list[float | None]]) -> bool:
    """Whether each cell of an accuracy matrix over nine test rows is at most one row away."""
    pairs = [pair for rows in zip(found, expected, strict=True) for pair in zip(*rows, strict=True)]
    return all(x is y is None or (x is not None and y is not None and abs(x - y) <= 1 / 9 + 1e-9) for x, y in pairs)


def cases() -> list[tuple[str, str]]:
    """Every point with every kind."""
    return [(point, kind) for point in POINTS for kind in KINDS]


def nth_of(point: str, workers: int) -> int:
    """The arrival at which to die."""
    return DIES_AT_IN_WORKER.get(point, DIES_AT[point]) if workers else DIES_AT[point]


class Process:
    """A command in a process of its own, as a user starts it."""

    def __init__(self, folder: Path, *arguments: str, **environment: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pipelines.cli", *arguments],
                env=os.environ | {"PYTHONPATH": str(ROOT)} | environment, stdout=out, stderr=err, start_new_session=True,
            )  # fmt: skip

        self.pid, self.poll, self.kill, self.send = (
            self._process.pid, self._process.poll, self._process.kill, self._process.send_signal
        )  # fmt: skip

    def wait(self, timeout: float = 400.0) -> int:
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise

    @property
    def stdout(self) -> str:
        return (self._folder / "stdout").read_text(encoding="utf-8")

    @property
    def stderr(self) -> str:
        return (self._folder / "stderr").read_text(encoding="utf-8")


def spawned(folder: Path, *arguments: str, **environment: str) -> Process:
    """Starts a command in a process of its own."""
    return Process(folder, *arguments, **environment)


def _arguments(config: Path, overrides: tuple[str, ...]) -> list[str]:
    return ["run", str(config), "--run-id", RUN_ID, "--json", *overrides]
