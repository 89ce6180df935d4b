"""``amlora backup`` and ``restore``: a consistent copy of the embedded store, made while runs go on.

::

    backup.json    format, and every file with its size and sha256
    mlflow.db      as SQLite's own backup gives it: one moment of the journal
    artifacts/     everything that the journal of that moment names
    storage/       trained stages that are whole, and models' places (with ``--storage``)

The database is copied first. A version is registered after its files are there and synced, so whatever the copy of the
journal names is found when the files are copied after it; what is newer is copied too, and harmless.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from amlora_dist.digests import file_digest
from amlora_dist.errors import UserError, is_full, plain_reason
from amlora_dist.files import new_folder, sync_folder, sync_tree, write_bytes
from amlora_dist.registry.connection import NO_ROOM, check_home
from amlora_dist.registry.places import ARTIFACTS, DATABASE, settle

log = logging.getLogger(__name__)

FILE = "backup.json"
FORMAT = 1
LOCKED_DEADLINE_S = 60.0
_HELD = (5, 6)
"""SQLITE_BUSY and SQLITE_LOCKED, which Python names since 3.11."""
FOLDERS = (ARTIFACTS, "bases", "storage")
"""What a backup holds besides the database: no other folder of a home is taken from one (its caches are believed)."""
OF_THE_DISK = ("lost+found",)
"""What lies in a disk's own folder that is empty."""


@dataclass(frozen=True, slots=True)
class Copied:
    """What a backup holds, or what was restored."""

    folder: Path
    files: int
    size: int
    """Bytes."""


def backup(home: Path, dest: Path, *, storage: bool = False) -> Copied:
    """Copy a home's store to a new folder, whole or not at all.

    Args:
        home: ``AMLORA_HOME``; runs may be at work in it.
        dest: must not exist, or be empty.
        storage: copy what was trained, too, so that runs need not train again what their store has not.

    Raises:
        UserError: there is no store, ``dest`` holds something or lies inside the home, or the disk is full.
    """
    home, dest = home.resolve(), dest.resolve()
    if not (home / DATABASE).is_file():
        raise UserError(
            f"AMLORA_HOME: {home} holds no store ({DATABASE}); a tracking server's store is backed up with its own tools"
        )
    if dest.is_relative_to(home):
        raise UserError(
            f"DEST: found {dest}, which lies in AMLORA_HOME {home}; expected a folder outside, best on another disk"
        )
    _refuse_full(dest, "DEST")
    with _made_aside(dest, FILE) as part:
        _copy_database(home / DATABASE, part / DATABASE)
        _copy_tree(home / ARTIFACTS, part / ARTIFACTS)
        if (home / "bases").is_dir():
            _copy_tree(home / "bases", part / "bases")
        if storage:
            for mark in sorted((home / "storage").glob("stages/*/trained/COMMIT")):
                _copy_tree(mark.parent, part / mark.parent.relative_to(home))
        listed: dict[str, dict[str, Any]] = {
            path.relative_to(part).as_posix(): {"size": path.stat().st_size, "sha256": file_digest(path)}
            for path in sorted(part.rglob("*"))
            if path.is_file()
        }
        text = json.dumps({"format": FORMAT, "files": listed}, indent=1, sort_keys=True) + "\n"
        write_bytes(part / FILE, text.encode())
    return Copied(dest, len(listed), sum(one["size"] for one in listed.values()))


def restore(source: Path, home: Path) -> Copied:
    """Make a home of a backup, checked file by file, whole or not at all.

    Args:
        source: what ``backup`` made.
        home: ``AMLORA_HOME``; must not exist, or be empty.

    Raises:
        UserError: it is no backup, a file of it is missing or damaged, or the home holds something.
    """
    home = home.resolve()
    check_home(home)
    listed = _read_list(source)
    _refuse_full(home, "AMLORA_HOME")
    with _made_aside(home, DATABASE) as part:
        for name, expected in listed.items():
            _copy_file(source / name, part / name)
            found = (part / name).stat().st_size, file_digest(part / name)
            if found != (expected["size"], expected["sha256"]):
                raise UserError(
                    f"{source / name}: found {found[0]} bytes, sha256 {found[1][:12]}..., expected those of {FILE}:"
                    f" {expected['size']}, {expected['sha256'][:12]}...; the backup is damaged, take another"
                )
        _check_database(part / DATABASE, source / DATABASE)
    settle(home / DATABASE, home)
    return Copied(home, len(listed), sum(one["size"] for one in listed.values()))


def _read_list(source: Path) -> dict[str, dict[str, Any]]:
    file = source / FILE
    if not file.is_file():
        raise UserError(f"{source}: no {FILE} in it; expected a folder that `amlora backup` made")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        listed: dict[str, dict[str, Any]] = dict(data["files"])
        named = {name: {"size": int(one["size"]), "sha256": str(one["sha256"])} for name, one in listed.items()}
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise UserError(f"{file}: not what `amlora backup` writes ({error!r}); take another backup") from error
    if data.get("format") != FORMAT:
        raise UserError(
            f"{file}: format: found {data.get('format')!r}, expected {FORMAT}; a newer one needs a newer amlora-dist"
        )
    root = source.resolve()
    for name in named:
        path, parts = source / name, Path(name).parts
        try:
            # A name with ".." may end in this folder, and outside of the home that it is copied to.
            outside = not path.resolve().is_relative_to(root) or path.is_symlink() or ".." in parts
            outside, there = outside or Path(name).is_absolute(), path.is_file()
        except (OSError, ValueError):  # a name that no disk takes
            outside, there = False, False
        if outside:
            raise UserError(f"{file}: found {name!r}, expected files of this folder alone")
        if name != DATABASE and not (len(parts) > 1 and parts[0] in FOLDERS):
            raise UserError(
                f"{file}: found {name!r}, expected {DATABASE} and files in {', '.join(FOLDERS)}; take another backup"
            )
        if not there:
            raise UserError(f"{path}: missing; the backup is damaged, take another")
    if DATABASE not in named:
        raise UserError(f"{file}: {DATABASE} is not listed; take another backup")
    return named


def _copy_database(source: Path, target: Path) -> None:
    # Where nobody can write, SQLite cannot make the files next to it by which readers and writers know of each other.
    still = not _writable(source.parent) and not Path(f"{source}-wal").exists()
    address = f"file:{quote(str(source))}?mode=ro" + ("&immutable=1" if still else "")
    try:
        with (
            contextlib.closing(sqlite3.connect(address, uri=True, timeout=1)) as live,
            contextlib.closing(sqlite3.connect(target)) as copy,
        ):
            live.backup(copy, progress=_Patience())  # one moment, whoever writes meanwhile
            copy.execute("PRAGMA journal_mode=DELETE")  # one file, without a log next to it
    except sqlite3.Error as error:
        if not isinstance(error, sqlite3.OperationalError):
            raise UserError(f"{source}: damaged ({error}); restore an earlier backup") from error
        fix = "end the programs that hold it, and try again"
        if is_full(error):
            fix = NO_ROOM
        elif not _writable(source.parent):
            fix = "SQLite cannot read it where it cannot write: copy the whole home (cp -a), and back up the copy"
        raise UserError(f"{source}: cannot be copied ({error}); {fix}") from error
    _check_database(target, source)


class _Patience:
    """Ends a copy that waits for somebody who holds the database; SQLite's own would wait for ever."""

    def __init__(self) -> None:
        self._until = time.monotonic() + LOCKED_DEADLINE_S

    def __call__(self, status: int, left: int, pages: int) -> None:
        if status in _HELD and time.monotonic() > self._until:
            raise sqlite3.OperationalError(f"locked by another program for {LOCKED_DEADLINE_S:.0f} s")


def _writable(folder: Path) -> bool:
    return os.access(folder, os.W_OK) and not os.statvfs(folder).f_flag & os.ST_RDONLY


def _check_database(file: Path, source: Path) -> None:
    """See that what was copied is MLflow's database, and whole."""
    try:
        with contextlib.closing(sqlite3.connect(file)) as copy:
            found = copy.execute("PRAGMA integrity_check").fetchone()[0]
            tables = copy.execute("SELECT count(*) FROM sqlite_master WHERE name = 'experiments'").fetchone()[0]
    except sqlite3.DatabaseError as error:
        found, tables = str(error), 0
    if found != "ok" or not tables:
        reason = "it holds no tables of MLflow's" if found == "ok" else found
        raise UserError(f"{source}: damaged ({reason}); take an earlier backup")


def _copy_tree(source: Path, target: Path) -> None:
    """Copy files; those being written next to their place, and those deleted meanwhile, are passed over."""
    target.mkdir(parents=True, exist_ok=True)
    for path in _files(source):
        with contextlib.suppress(FileNotFoundError):
            _copy_file(path, target / path.relative_to(source))


def _files(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Files below a folder, also behind links: whoever runs out of room moves a part of a home to another disk."""
    real = folder.resolve()
    try:
        found = [] if real in above else sorted(folder.iterdir())
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"cannot read {folder}: {plain_reason(error)}; fix the permissions") from error
    for path in found:
        if path.is_dir():
            yield from _files(path, (*above, real))
        elif path.is_file() and not path.name.startswith("."):
            yield path


def _copy_file(source: Path, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(
            f"cannot copy {source} to {target}: {plain_reason(error)}; make room, or fix the permissions"
        ) from error


def _refuse_full(folder: Path, what: str) -> None:
    names = list(folder.iterdir()) if folder.is_dir() else [folder] if folder.exists() else []
    if first := next((one for one in names if one.name not in OF_THE_DISK), None):
        raise UserError(f"{what}: found {folder} with {first.name!r} in it, expected no such folder, or an empty one")


@contextlib.contextmanager
def _made_aside(folder: Path, last: str) -> Iterator[Path]:
    """A folder that becomes ``folder``, synced, when all of it is there; removed where something went wrong."""
    try:
        with _filled(folder, last) if folder.is_dir() else new_folder(folder) as part:
            yield part
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({plain_reason(error)}); make room, or name another place") from error


@contextlib.contextmanager
def _filled(folder: Path, last: str) -> Iterator[Path]:
    """A folder inside one that is there, whose content moves up when all of it is there.

    ``folder`` may be a disk of its own, over which nothing can be renamed: it is filled from inside, with ``last``, without
    which it is nothing, as the last.
    """
    moved: list[Path] = []
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name[:100]}.unfinished-", dir=folder))
    try:
        yield part
        sync_tree(part)
        for path in sorted(part.iterdir(), key=lambda one: one.name == last):
            if path.name == last:
                sync_folder(folder)  # with the names of all the others
            place = folder / path.name
            if os.path.lexists(place):
                raise UserError(f"{place}: somebody else has made it meanwhile, and it stays; name another place")
            path.rename(place)
            moved.append(place)
        sync_folder(folder)
        moved = []
    finally:
        for path in [*moved, part]:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
