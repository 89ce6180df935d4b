"""A machine that loses power forgets what was not synced: what is registered is whole all the same.

``tests/registry/forgetful.c`` notes what each ``fsync`` has put on the disk. A run is killed at a crash point; then every
file of its home gets the content of its last ``fsync``, and every name that its folder was not synced with goes.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from amlora_dist.registry.bank_folder import read_bank
from amlora_dist.registry.store import Store
from tests.fork_server import Server
from tests.tiny_config import write_config

pytestmark = [pytest.mark.crash, pytest.mark.timeout(1800)]

SOURCE = Path(__file__).resolve().parents[1] / "registry" / "forgetful.c"
QUICK = ("training.epochs=1", "evaluation.untrained=false", "evaluation.oracle=false")


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


def arguments(config: Path) -> list[str]:
    return ["run", str(config), *QUICK, "--run-id", "power", "--json"]


def run(config: Path, home: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, because the library is loaded when it starts."""
    command = [sys.executable, "-m", "pipelines.cli", *arguments(config)]
    environment = {**os.environ, "AMLORA_HOME": str(home), **more}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)


Names = dict[int, dict[str, int]]
"""What a folder's inode names: names and inodes."""


def names_below(home: Path) -> Names:
    """Every folder as it is."""
    folders = [home, *(path for path in home.rglob("*") if path.is_dir())]
    return {folder.stat().st_ino: {path.name: path.lstat().st_ino for path in folder.iterdir()} for folder in folders}


def lose_power(home: Path, notes: Path, before: Names) -> tuple[int, int]:
    """Leave of a home what was synced, or there ``before``; how many files lost bytes, and how many lost their name."""
    synced = dict(before)
    for file in notes.glob("*.names"):
        pairs = [line.partition(" ") for line in file.read_text(encoding="utf-8").splitlines()]
        synced[int(file.stem)] = {name: int(inode) for inode, _, name in pairs if name not in (".", "..")}
    old = {inode for names in before.values() for inode in names.values()}
    torn = forgotten = 0
    for folder in sorted([home, *(path for path in home.rglob("*") if path.is_dir())], reverse=True):
        known = synced.get(folder.stat().st_ino, {})
        for path in list(folder.iterdir()):
            inode = path.lstat().st_ino
            if path.name not in known and path.name not in SQLITE:
                forgotten += 1
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            elif path.is_file():
                kept = notes / str(known.get(path.name, inode) if path.name not in SQLITE else inode)
                content = kept.read_bytes() if kept.is_file() else path.read_bytes() if inode in old else b""
                if content != path.read_bytes():
                    torn += 1
                    path.write_bytes(content)
    return torn, forgotten


SQLITE = ("mlflow.db", "mlflow.db-wal", "mlflow.db-shm")
"""Whose names SQLite syncs on its own, when it makes them."""


def test_the_disk_forgets_what_was_not_synced(library: Path, tmp_path: Path) -> None:
    home, notes = tmp_path / "home", tmp_path / "notes"
    home.mkdir()
    notes.mkdir()
    before = names_below(home)
    code = (
        "import os, pathlib, sys; from amlora_dist.files import write_bytes; home = pathlib.Path(sys.argv[1]);"
        "(home / 'lost').write_text('x' * 99); write_bytes(home / 'deep' / 'kept', b'y' * 99);"
        "file = (home / 'deep' / 'kept').open('ab'); file.write(b'z'); file.flush();"
        "(home / 'deep' / 'unnamed').write_text('x')"
    )
    environment = {**os.environ, "LD_PRELOAD": str(library), "FORGETFUL": str(notes)}
    subprocess.run([sys.executable, "-c", code, str(home)], env=environment, check=True, timeout=120)
    assert lose_power(home, notes, before) == (2, 1)
    assert not (home / "deep" / "unnamed").exists()
    assert not (home / "lost").read_bytes(), "named, because its folder was synced for another, and empty"
    assert (home / "deep" / "kept").read_bytes() == b"y" * 99


@pytest.mark.parametrize("point", ["checkpoint_committed", "version_registered"])
def test_a_run_goes_on_after_a_loss_of_power_and_what_is_registered_is_whole(
    point: str, library: Path, tmp_path: Path, empty_home: Path, forking: Server
) -> None:
    home, notes = tmp_path / "home", tmp_path / "notes"
    shutil.copytree(empty_home, home)
    notes.mkdir()
    before = names_below(home)
    config = write_config(tmp_path, tasks=("colours", "shapes"))
    died = run(config, home, LD_PRELOAD=str(library), FORGETFUL=str(notes), AMLORA_CRASH=f"{point}:kill:2")
    assert died.returncode == -signal.SIGKILL, died.stderr[-2000:]
    assert sum(lose_power(home, notes, before)) > 0
    store = Store.open(home)
    for number, version in enumerate(store.versions("power")):
        read_bank(store.pull_version(version, tmp_path / f"pulled-{number}"))
    if point == "version_registered":
        assert len(store.versions("power")) == 2, "registered is registered"
    del store
    done = forking.start(tmp_path / "again", *arguments(config), AMLORA_HOME=str(home))
    assert done.wait(600) == 0, done.stderr[-2000:]
    bank = read_bank(Store.open(home).pull("models:/power@current", tmp_path / "bank"))
    assert bank.manifest.tasks == ["colours", "shapes"]
