"""Files that outlive a loss of power: written under another name, synced, renamed, and the folder synced that names them.

A process that dies leaves what it wrote to the system, which writes it out later; a machine that dies does not. Whatever is
noted as done elsewhere (a version in MLflow, a commit marker) must be on the disk first: the bytes by ``fsync`` of the
file, its name by ``fsync`` of its folder.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

from amlora_dist.errors import UserError


def write_bytes(file: Path, content: bytes) -> None:
    """Write bytes under another name, then rename: a reader sees the old file or the new one, never half of one, also
    after a loss of power. A device or a pipe is written to, and stays what it is."""
    make_folders(file.parent)
    if file.exists() and not file.is_file() and not file.is_dir():
        file.write_bytes(content)
        return
    # Of a long name only its beginning; pods all have the same few process ids.
    part = file.with_name(f".{file.name[:60]}.{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        with part.open("wb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())
        part.replace(file)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
    sync_folder(file.parent)


def make_folders(folder: Path) -> None:
    """Make a folder and those above it, as far as they are not there, and keep their names over a loss of power."""
    missing = []
    above = folder
    while not above.exists():
        missing.append(above)
        above = above.parent
    folder.mkdir(parents=True, exist_ok=True)
    for one in missing:
        sync_folder(one.parent)


def rename_synced(source: Path, target: Path) -> None:
    """Rename within a disk, also to where an empty folder is, and keep the name over a loss of power; what ``source`` holds
    is synced before."""
    sync_tree(source)
    _rename(source, target)


def _rename(source: Path, target: Path) -> None:
    if target.is_dir() and not target.is_symlink():
        target.rmdir()
    source.replace(target)
    sync_folder(target.parent)


@contextlib.contextmanager
def new_folder(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """A folder that becomes ``folder``, synced, when all of it is there; removed where something went wrong.

    What ``folder`` held by then is deleted (``replace``); else it may at most be an empty folder.
    """
    folder = folder.resolve()  # what is behind a link is replaced, not the link
    make_folders(folder.parent)
    stem = f".{folder.name[:100]}.{uuid.uuid4().hex[:12]}"
    part, old = folder.with_name(f"{stem}.new"), folder.with_name(f"{stem}.old")
    part.mkdir()
    try:
        yield part
        sync_tree(part)  # before the old one goes: between the two lie no more than two renames
        before = replace and folder.exists()
        if before:
            _move_away(folder, old)
        try:
            _rename(part, folder)
        except BaseException:
            if before and not folder.exists():
                old.replace(folder)
            raise
        finally:
            if folder.exists():  # else the old one is all there is
                _remove(old)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _move_away(folder: Path, old: Path) -> None:
    try:
        folder.replace(old)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise UserError(f"{folder}: something is mounted there, expected a folder to rename; name another") from error
        raise


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's bytes into a folder that may be new; who renames the folder afterwards syncs them."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def sync_files(folder: Path, names: Iterable[str], *, above: int = 0) -> None:
    """Sync files below a folder that somebody else wrote, the folders that lead to them, and so many ``above`` it that may
    be new too."""
    folders = {folder, *folder.parents[:above]}
    for name in names:
        file = folder / name
        if file.is_file():
            _sync(file)
            folders |= {one for one in file.parents if one.is_relative_to(folder)}
    for one in sorted(folders, reverse=True):
        sync_folder(one)


def sync_tree(path: Path) -> None:
    """Sync a file, or all files of a folder with their names."""
    if path.is_dir():
        for inner in sorted(path.rglob("*"), reverse=True):
            if not inner.is_symlink() and inner.is_file():
                _sync(inner)
            elif inner.is_dir() and not inner.is_symlink():
                sync_folder(inner)
        sync_folder(path)
    else:
        _sync(path)


def sync_folder(folder: Path) -> None:
    """Sync the names in a folder; where a system knows no such thing (Windows, some network disks) nothing happens."""
    with contextlib.suppress(OSError):
        _sync(folder)


def _sync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
