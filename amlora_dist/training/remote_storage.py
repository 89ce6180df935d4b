"""Files on whatever fsspec reaches, for nodes that share no folder: each works in its own and copies what others need.

``RemoteCheckpoints`` holds the checkpoints of one stage, ``RemoteStorage`` what is finished: adapters and scores. A copy
counts when its mark is there (``COMMIT``, of a score ``summary.json``), which is copied last, since object storage renames
nothing. What is fetched is checked like what lay on the disk all the time, so a torn or foreign copy is passed over.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amlora_dist.errors import UserError, plain_reason

log = logging.getLogger(__name__)

MARK = "COMMIT"
MARKS = (MARK, "summary.json")
"""A folder has one of them, and is whole when it is there."""
LOCK_DEADLINE_S = 600.0
PAUSES_S = (1.0, 4.0, 15.0)
"""Before what is finished is sent once more. Every store has errors of its own, so that any counts as its absence."""


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, which always looks again, and the path in it."""
    from fsspec.core import url_to_fs

    system, path = url_to_fs(url, use_listings_cache=False)
    return system, str(path)


class RemoteCheckpoints:
    """The copies of one stage's checkpoints, below ``url``. A store that is away costs no training: the stage goes on with
    the checkpoints it has."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._fs, self._root = file_system(url)

    def upload(self, checkpoint: Path) -> None:
        """Copy a committed checkpoint, and drop all but the newest ``checkpoint.KEEP`` copies."""
        from amlora_dist.training.checkpoint import KEEP

        try:
            _put(self._fs, checkpoint, f"{self._root}/{checkpoint.name}")
            for old in self._names()[:-KEEP]:
                self._fs.rm(f"{self._root}/{old}", recursive=True)
        except Exception as error:  # noqa: BLE001
            log.warning("no copy of %s at %s: %s; going on without", checkpoint.name, self.url, plain_reason(error))

    def fetch_newest(self, folder: Path) -> None:
        """Bring the newest copy into ``folder``, unless something as new is there."""
        newest_here = max((mark.parent.name for mark in folder.glob(f"step-*/{MARK}")), default="")
        for name in reversed(self.committed()):
            if name <= newest_here:
                return
            self.fetch(name, folder)
            return

    def fetch(self, name: str, folder: Path) -> None:
        """Bring the copy ``name`` into ``folder``, if there is one."""
        try:
            _get(self._fs, f"{self._root}/{name}", folder / name, lambda: (folder / name / MARK).is_file())
        except Exception as error:  # noqa: BLE001
            log.warning("no checkpoint from %s: %s; going on without", self.url, plain_reason(error))

    def committed(self) -> list[str]:
        """Names of the copies that count, the oldest first; none where the store is away."""
        try:
            return [name for name in self._names() if self._fs.exists(f"{self._root}/{name}/{MARK}")]
        except Exception as error:  # noqa: BLE001
            log.warning("no checkpoint from %s: %s; going on without", self.url, plain_reason(error))
            return []

    def forget(self) -> None:
        """Delete all copies: the stage is published."""
        with contextlib.suppress(Exception):
            if self._fs.exists(self._root):
                self._fs.rm(self._root, recursive=True)

    def _names(self) -> list[str]:
        if not self._fs.exists(self._root):
            return []
        found = [str(path).rstrip("/").rpartition("/")[2] for path in self._fs.ls(self._root, detail=False)]
        return sorted(name for name in found if name.startswith("step-"))


@dataclass(frozen=True, slots=True)
class RemoteStorage:
    """What is finished below a node's own folder ``root``, at the same place below ``url``."""

    url: str
    root: Path
    _fs: Any = field(init=False, repr=False, compare=False)
    _base: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        system, base = file_system(self.url)
        object.__setattr__(self, "_fs", system)
        object.__setattr__(self, "_base", base)

    def check(self) -> None:
        """See that something can be written there.

        Raises:
            UserError: it cannot.
        """
        probe = f"{self._base}/.probe-{uuid.uuid4().hex}"
        try:
            self._fs.makedirs(self._base, exist_ok=True)
            self._fs.pipe_file(probe, b"x")
            self._fs.rm_file(probe)
        except Exception as error:
            raise self._away("cannot write to", error) from error

    def checkpoints(self, stage: Path) -> RemoteCheckpoints:
        """The copies of a stage's checkpoints."""
        return RemoteCheckpoints(f"{self.url}/{self._relative(stage)}/checkpoints")

    def upload(self, path: Path) -> None:
        """Copy a whole folder, or a file, unless its copy is there.

        Raises:
            UserError: the store stays away.
        """
        target = f"{self._base}/{self._relative(path)}"
        mark = _mark(path)
        for pause in (*PAUSES_S, None):
            try:
                there = f"{target}/{mark.name}" if mark else target
                if self._fs.exists(there) and self._fs.cat_file(there) == (mark or path).read_bytes():
                    return
                _put(self._fs, path, target)
                return
            except Exception as error:
                if pause is None:
                    raise self._away(f"cannot copy {path.name} to", error) from error
                log.warning("%s: %s; trying again", self.url, plain_reason(error))
                time.sleep(pause)

    def fetch(self, path: Path, whole: Callable[[], bool]) -> None:
        """Fetch the copy of a folder or file, if there is one, unless it is here and ``whole``.

        Raises:
            UserError: the store is away.
        """
        try:
            _get(self._fs, f"{self._base}/{self._relative(path)}", path, whole)
        except Exception as error:
            raise self._away(f"cannot fetch {path.name} from", error) from error

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def _away(self, what: str, error: Exception) -> UserError:
        return UserError(
            f"storage: {what} {self.url}: {plain_reason(error)}; fix the address, its permissions or this node's disk,"
            " then run the same command again: it goes on"
        )


def _mark(folder: Path) -> Path | None:
    """The file that makes a folder whole; None of a file."""
    return next((folder / name for name in MARKS if (folder / name).is_file()), None)


def _put(system: Any, path: Path, target: str) -> None:
    """Copy a folder of files, its mark last, or one file."""
    if path.is_file():
        system.makedirs(target.rpartition("/")[0], exist_ok=True)
        system.put_file(str(path), target)
        return
    system.makedirs(target, exist_ok=True)
    for file in sorted(path.iterdir(), key=lambda file: file.name in MARKS):
        system.put_file(str(file), f"{target}/{file.name}")


def _get(system: Any, source: str, path: Path, whole: Callable[[], bool]) -> None:
    """Fetch a file, or a folder with its mark, to a temporary path; then rename. Nothing where there is none, or it
    is ``whole`` here: several workers of a node ask for the same."""
    from filelock import FileLock

    if whole():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.fetched.{os.getpid()}")
    with FileLock(path.with_name(f".{path.name}.lock"), timeout=LOCK_DEADLINE_S):
        if whole():
            return
        if system.isfile(source):
            try:
                system.get_file(source, str(tmp))
                tmp.replace(path)
            finally:
                tmp.unlink(missing_ok=True)
            return
        names = [str(found).rstrip("/").rpartition("/")[2] for found in _listed(system, source)]
        if not set(MARKS) & set(names):
            return
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir()
        try:
            for name in names:
                system.get_file(f"{source}/{name}", str(tmp / name))
            shutil.rmtree(path, ignore_errors=True)
            tmp.replace(path)
        finally:
            shutil.rmtree(tmp, ignore_errors=True)


def _listed(system: Any, source: str) -> list[Any]:
    try:
        return list(system.ls(source, detail=False))
    except FileNotFoundError:
        return []
