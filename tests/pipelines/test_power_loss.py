"""A machine that loses power forgets what was not synced: what is registered is whole all the same, and the run goes on.

``tests/registry/forgetful.c`` notes what each ``fsync`` has put on the disk, whoever calls it: Python, SQLite, safetensors.
A run stops at every crash point for a moment, and what a disk would hold is built next to it: each file with the content
of its last ``fsync``, under the names that its folder was last synced with. Then the same command starts on each such disk.
"""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from amlora_dist.crash_points import POINTS
from amlora_dist.registry.store import Store
from tests.fork_server import Server
from tests.pipelines.crash_cases import DIES_AT, RUN_ID, Crashed, Outcome, faults, matrix_config, outcome_of, spawned
from tests.registry.tiny_banks import TASKS, publish_sequence

pytestmark = [pytest.mark.crash, pytest.mark.timeout(1800)]

SOURCE = Path(__file__).resolve().parents[1] / "registry" / "forgetful.c"
END = "after its end"
DEADLINE_S = 900.0


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library, where it can be built and loaded."""
    if not sys.platform.startswith("linux"):
        pytest.skip("LD_PRELOAD: Linux only")
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler to build the forgetful disk with")
    made = tmp_path_factory.mktemp("forgetful") / "forgetful.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(made), str(SOURCE), "-ldl"]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode:
        pytest.skip(f"the forgetful disk cannot be built: {built.stderr.strip()[-200:]}")
    return made


class Disk:
    """A folder on a disk that forgets; all that is in it now was synced."""

    def __init__(self, folder: Path, notes: Path) -> None:
        self.folder, self.notes = folder, notes
        notes.mkdir()
        self._names: dict[int, list[tuple[int, bool, str]]] = {}
        self._contents: dict[int, bytes] = {}
        self._held: list[int] = []  # so that no later folder gets the number of one that was deleted
        for one in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
            inside = [(path.stat().st_ino, path.is_dir(), path) for path in one.iterdir()]
            self._names[one.stat().st_ino] = [(inode, is_folder, path.name) for inode, is_folder, path in inside]
            self._held.append(os.open(one, os.O_RDONLY))
            for inode, is_folder, path in inside:
                if not is_folder:
                    self._contents[inode] = path.read_bytes()
                    (notes / f"{inode}.pin").hardlink_to(path)

    def without_power(self, target: Path) -> int:
        """Write to ``target`` what is left; how many files of the folder are not there, or other ones."""
        self._write(self.folder.stat().st_ino, target)
        lost = 0
        for path in self.folder.rglob("*"):
            left = target / path.relative_to(self.folder)
            lost += path.is_file() and not (left.is_file() and left.read_bytes() == path.read_bytes())
        return lost

    def _write(self, inode: int, target: Path) -> None:
        target.mkdir()
        file = self.notes / f"{inode}.names"
        named = self._names.get(inode, [])
        if file.is_file():
            parts = [line.split(" ", 2) for line in file.read_text(encoding="utf-8").splitlines()]
            named = [(int(number), kind == "d", name) for number, kind, name in parts]
        for number, is_folder, name in named:
            if is_folder:
                self._write(number, target / name)
            else:
                synced = self.notes / str(number)
                content = synced.read_bytes() if synced.is_file() else self._contents.get(number, b"")
                (target / name).write_bytes(content)


def test_the_disk_forgets_what_was_not_synced(library: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "old").mkdir(parents=True)
    for name in ("old/moved", "old/deleted", "old/changed"):
        (home / name).write_text("before")
    disk = Disk(home, tmp_path / "notes")
    code = (
        "import os, pathlib, sqlite3, sys; from amlora_dist.files import write_bytes; home = pathlib.Path(sys.argv[1]);"
        "(home / 'lost').write_text('x' * 99); write_bytes(home / 'deep' / 'kept', b'y' * 99);"
        "file = (home / 'deep' / 'kept').open('ab'); file.write(b'z'); file.flush();"
        "(home / 'deep' / 'unnamed').write_text('x'); (home / 'old' / 'moved').rename(home / 'old' / 'there');"
        "(home / 'old' / 'deleted').unlink(); (home / 'old' / 'changed').write_text('after');"
        "base = sqlite3.connect(home / 'a.db'); base.execute('PRAGMA synchronous=FULL');"
        "base.execute('CREATE TABLE t (x)'); base.execute('INSERT INTO t VALUES (1)'); base.commit()"
    )
    environment = {**os.environ, "LD_PRELOAD": str(library), "FORGETFUL": str(disk.notes)}
    subprocess.run([sys.executable, "-c", code, str(home)], env=environment, check=True, timeout=120)
    left = tmp_path / "left"
    assert disk.without_power(left) == 5
    assert sorted(path.name for path in (left / "old").iterdir()) == ["changed", "deleted", "moved"]
    assert all((left / "old" / name).read_text() == "before" for name in ("changed", "deleted", "moved"))
    assert not (left / "deep" / "unnamed").exists()
    assert not (left / "lost").read_bytes(), "named, because its folder was synced for another, and empty"
    assert (left / "deep" / "kept").read_bytes() == b"y" * 99
    assert (left / "a.db").read_bytes() == (home / "a.db").read_bytes(), "SQLite syncs what it commits, and its name"


@dataclass(frozen=True, slots=True)
class Recorded:
    """One run, and what a disk would have held had the power gone at each point of it."""

    home: Path
    config: Path
    disks: dict[str, Path]
    lost: dict[str, int]
    outcome: Outcome


@pytest.fixture(scope="module")
def recorded(library: Path, empty_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    """A run of two stages that stops at each crash point, and goes on when the disk was looked at."""
    folder = tmp_path_factory.mktemp("power")
    home, once = folder / "home", folder / "reached"
    shutil.copytree(empty_home, home)
    disk = Disk(home, folder / "notes")
    config = matrix_config(folder)
    run = spawned(
        folder / "run", "run", str(config), "--run-id", RUN_ID, "--json", AMLORA_HOME=str(home), LD_PRELOAD=str(library),
        FORGETFUL=str(disk.notes), AMLORA_CRASH=",".join(f"{point}:stop:{DIES_AT[point]}" for point in POINTS),
        AMLORA_CRASH_ONCE=str(once),
    )  # fmt: skip
    disks: dict[str, Path] = {}
    lost: dict[str, int] = {}
    deadline = time.monotonic() + DEADLINE_S
    while run.poll() is None:
        assert time.monotonic() < deadline, run.stderr[-2000:]
        point = next((one for one in POINTS if one not in disks and Path(f"{once}.{one}").exists()), None)
        if point is None or not _stopped(run.pid):
            time.sleep(0.02)
            continue
        disks[point] = folder / point
        lost[point] = disk.without_power(disks[point])
        run.send(signal.SIGCONT)
    assert run.wait() == 0, run.stderr[-2000:]
    disks[END] = folder / "end"
    lost[END] = disk.without_power(disks[END])
    outcome = outcome_of(home, run.stdout)
    shutil.rmtree(home)
    yield Recorded(home, config, disks, lost, outcome)


def _stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0] == "T"


@pytest.mark.parametrize("point", [*POINTS, END])
def test_a_run_whose_power_went_there_ends_with_the_undisturbed_result(
    point: str, recorded: Recorded, tmp_path: Path, forking: Server
) -> None:
    """Every version that is registered can be pulled and is whole, before and after."""
    assert recorded.lost[point] > 0 or point == END, "nothing was lost: is the library at work?"
    recorded.disks[point].rename(recorded.home)
    try:
        registered = _whole_versions(recorded.home, tmp_path / "before", forking)
        if point in ("version_registered", "alias_moved", "run_closed", END):
            assert registered == 2, "registered is registered"
        began = time.monotonic()
        again = forking.start(
            tmp_path / "again", "run", str(recorded.config), "--run-id", RUN_ID, "--json", AMLORA_HOME=str(recorded.home)
        )
        code = again.wait(600)
        outcome = outcome_of(recorded.home, again.stdout) if code == 0 else None
        found = Crashed(point, "power", True, [code], time.monotonic() - began, outcome, again.stderr)
        assert faults(found, recorded.outcome) == []
        assert _whole_versions(recorded.home, tmp_path / "after", forking) == 2
    finally:
        shutil.rmtree(recorded.home)


def _whole_versions(home: Path, folder: Path, forking: Server) -> int:
    """Look at every part of every version of the run, in processes that know of no other disk; how many versions there
    are."""
    with closing(sqlite3.connect(home / "mlflow.db")) as database:
        found = database.execute("SELECT version FROM model_versions WHERE name = ?", (RUN_ID,)).fetchall()
    for (number,) in found:
        seen = forking.start(folder / str(number), "verify", f"models:/{RUN_ID}/{number}", AMLORA_HOME=str(home))
        assert seen.wait(120) == 0, seen.stderr
    return len(found)


@pytest.fixture
def published(empty_home: Path, tmp_path: Path) -> Path:
    """A folder with a home that has a version of a bank, which is signed, and a key."""
    folder = tmp_path / "world"
    shutil.copytree(empty_home, folder / "home")
    (tmp_path / "work").mkdir()
    publish_sequence(Store.open(folder / "home"), "banks", tmp_path / "work", tasks=TASKS[:1])
    pytest.importorskip("model_signing", reason="the extra `sign` is not installed")
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key = ec.generate_private_key(ec.SECP256R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / "bank.key").write_bytes(key)
    return folder


@pytest.mark.parametrize(
    ("before", "command", "made"),
    [
        ((), ("pull", "models:/banks/1", "W/new/deep/bank", "--statistics"), "new/deep/bank"),
        (("pull", "models:/banks/1", "W/bank"), ("pull", "models:/banks/1", "W/bank", "--statistics"), "bank"),
        (("pull", "models:/banks/1", "W/bank"), ("sign", "W/bank", "--key", "W/bank.key"), "bank"),
        ((), ("sign", "models:/banks/1", "--key", "W/bank.key"), "home/artifacts"),
        ((), ("export", "models:/banks/1", "W/new/deep/export"), "new/deep/export"),
        ((), ("backup", "W/new/deep/backup"), "new/deep/backup"),
        (("backup", "W/backup"), ("restore", "W/backup"), "new/home"),
    ],
    ids=["pull", "pull-statistics", "sign", "sign-a-version", "export", "backup", "restore"],
)
def test_what_a_command_says_it_has_made_is_there_after_a_loss_of_power(
    before: tuple[str, ...], command: tuple[str, ...], made: str, library: Path, published: Path, tmp_path: Path,
    forking: Server,
) -> None:  # fmt: skip
    def told(arguments: tuple[str, ...]) -> list[str]:
        return [one.replace("W/", f"{published}/") for one in arguments]

    if before:
        first = forking.start(tmp_path / "first", *told(before), AMLORA_HOME=str(published / "home"))
        assert first.wait() == 0, first.stderr
    disk = Disk(published, tmp_path / "notes")
    home = published / ("new/home" if command[0] == "restore" else "home")
    forgetful = {"LD_PRELOAD": str(library), "FORGETFUL": str(disk.notes)}
    run = spawned(tmp_path / "run", *told(command), AMLORA_HOME=str(home), **forgetful)
    assert run.wait() == 0, run.stderr
    disk.without_power(tmp_path / "left")
    files = [path for path in (published / made).rglob("*") if path.is_file() and not path.name.startswith("mlflow.db-")]
    assert files
    for path in files:
        left = tmp_path / "left" / path.relative_to(published)
        assert left.is_file() and left.read_bytes() == path.read_bytes(), path.relative_to(published)
