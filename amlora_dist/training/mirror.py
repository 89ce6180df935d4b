"""Copies of a stage's checkpoints on whatever fsspec reaches, for stages whose folder goes with their machine.

A copy counts when ``COMMIT`` is there, which is copied last. What is fetched is checked like a checkpoint that lay on the
disk all the time (``training.checkpoint``), so a torn or foreign copy is passed over. An object store that is away costs
no training: the stage goes on with the checkpoints it has.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from pathlib import Path

from amlora_dist.errors import UserError
from amlora_dist.training.checkpoint import KEEP

log = logging.getLogger(__name__)

MARK = "COMMIT"


class Mirror:
    """The copies of one stage's checkpoints, below ``url``."""

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs

        self.url = url
        self._fs, self._root = url_to_fs(url)

    def check(self) -> None:
        """See that something can be written there.

        Raises:
            UserError: it cannot.
        """
        probe = f"{self._root}/.probe-{os.getpid()}"
        try:
            self._fs.makedirs(self._root, exist_ok=True)
            self._fs.pipe_file(probe, b"x")
            self._fs.rm_file(probe)
        except OSError as error:
            raise UserError(f"storage: cannot write to {self.url}: {error}; mend the address or its permissions") from error

    def keep(self, checkpoint: Path) -> None:
        """Copy a committed checkpoint, and drop all but the newest ``KEEP`` copies."""
        target = f"{self._root}/{checkpoint.name}"
        try:
            self._fs.makedirs(target, exist_ok=True)
            for file in sorted(checkpoint.iterdir(), key=lambda file: file.name == MARK):
                self._fs.put_file(str(file), f"{target}/{file.name}")
            for old in self._names()[:-KEEP]:
                self._fs.rm(f"{self._root}/{old}", recursive=True)
        except OSError as error:
            log.warning("no copy of %s at %s: %s; going on without", checkpoint.name, self.url, error)

    def fetch(self, folder: Path) -> None:
        """Bring the newest copy into ``folder``, unless something as new is there."""
        newest_here = max((mark.parent.name for mark in folder.glob(f"step-*/{MARK}")), default="")
        try:
            for name in reversed(self._names()):
                if name <= newest_here:
                    return
                if self._fs.exists(f"{self._root}/{name}/{MARK}"):
                    self._bring(name, folder)
                    return
        except OSError as error:
            log.warning("no checkpoint from %s: %s; going on without", self.url, error)

    def forget(self) -> None:
        """Delete all copies: the stage is published."""
        with contextlib.suppress(OSError):
            if self._fs.exists(self._root):
                self._fs.rm(self._root, recursive=True)

    def _names(self) -> list[str]:
        if not self._fs.exists(self._root):
            return []
        self._fs.invalidate_cache()
        found = [str(path).rstrip("/").rpartition("/")[2] for path in self._fs.ls(self._root, detail=False)]
        return sorted(name for name in found if name.startswith("step-"))

    def _bring(self, name: str, folder: Path) -> None:
        aside = folder / f".{name}.fetched.{os.getpid()}"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        try:
            for path in self._fs.ls(f"{self._root}/{name}", detail=False):
                self._fs.get_file(str(path), str(aside / str(path).rpartition("/")[2]))
            shutil.rmtree(folder / name, ignore_errors=True)
            aside.replace(folder / name)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
