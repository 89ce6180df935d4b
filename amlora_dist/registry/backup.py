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
import shutil
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amlora_dist.digests import file_digest
from amlora_dist.errors import UserError, plain_reason
from amlora_dist.files import new_folder, write_bytes
from amlora_dist.registry.places import ARTIFACTS, DATABASE, settle

log = logging.getLogger(__name__)

FILE = "backup.json"
FORMAT = 1


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
    home, dest = home.resolve(), dest.absolute()
    if not (home / DATABASE).is_file():
        raise UserError(
            f"AMLORA_HOME: {home} holds no store ({DATABASE}); a tracking server's store is backed up with its own tools"
        )
    if dest.resolve().is_relative_to(home):
        raise UserError(
            f"DEST: found {dest}, which lies in AMLORA_HOME {home}; expected a folder outside, best on another disk"
        )
    _refuse_full(dest, "DEST")
    with new_folder(dest) as part:
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
    home = home.absolute()
    listed = _read_list(source)
    _refuse_full(home, "AMLORA_HOME")
    with new_folder(home) as part:
        for name, expected in listed.items():
            _copy_file(source / name, part / name)
            found = (part / name).stat().st_size, file_digest(part / name)
            if found != (expected["size"], expected["sha256"]):
                raise UserError(
                    f"{source / name}: found {found[0]} bytes, sha256 {found[1][:12]}..., expected those of {FILE}:"
                    f" {expected['size']}, {expected['sha256'][:12]}...; the backup is damaged, take another"
                )
    settle(home.resolve() / DATABASE, home.resolve())
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
        path = source / name
        try:
            # A name with ".." may end in this folder, and outside of the home that it is copied to.
            outside = not path.resolve().is_relative_to(root) or path.is_symlink() or ".." in Path(name).parts
            outside, there = outside or Path(name).is_absolute(), path.is_file()
        except (OSError, ValueError):  # a name that no disk takes
            outside, there = False, False
        if outside:
            raise UserError(f"{file}: found {name!r}, expected files of this folder alone")
        if not there:
            raise UserError(f"{path}: missing; the backup is damaged, take another")
    if DATABASE not in named:
        raise UserError(f"{file}: {DATABASE} is not listed; take another backup")
    return named


def _copy_database(source: Path, target: Path) -> None:
    try:
        with (
            contextlib.closing(sqlite3.connect(f"file:{source}?mode=ro", uri=True, timeout=60)) as live,
            contextlib.closing(sqlite3.connect(target)) as copy,
        ):
            live.backup(copy)  # one moment, whoever writes meanwhile
            if (found := copy.execute("PRAGMA integrity_check").fetchone()[0]) != "ok":
                raise UserError(f"{source}: damaged ({found}); restore an earlier backup")
            copy.execute("PRAGMA journal_mode=DELETE")  # one file, without a log beside it
    except sqlite3.Error as error:
        raise UserError(f"{source}: cannot be copied ({error}); end the programs that hold it, and try again") from error


def _copy_tree(source: Path, target: Path) -> None:
    """Copy files; those that are being written beside their place, and those that are deleted meanwhile, are passed over."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.rglob("*")):
        if path.is_file() and not path.is_symlink() and not path.name.startswith("."):
            with contextlib.suppress(FileNotFoundError):
                _copy_file(path, target / path.relative_to(source))


def _copy_file(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        shutil.copyfile(source, target)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(
            f"cannot copy {source} to {target}: {plain_reason(error)}; make room, or fix the permissions"
        ) from error


def _refuse_full(folder: Path, what: str) -> None:
    names: Iterable[Path] = folder.iterdir() if folder.is_dir() else [folder] if folder.exists() else []
    if first := next(iter(names), None):
        raise UserError(f"{what}: found {folder} with {first.name!r} in it, expected no such folder, or an empty one")
