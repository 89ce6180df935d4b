"""A home is a folder that can be moved and copied: MLflow's notes of where artifacts lie follow it.

MLflow keeps the place of every experiment's and run's artifacts as an absolute path. Of the embedded store they all lie
below ``HOME/artifacts``; when a home is opened, whatever says otherwise (because the folder was moved, copied or restored
from a backup, or is mounted elsewhere) is set right before anything is read or written. A copy so never writes to where
it was copied from, and MLflow's own programs find what is there.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from pathlib import Path, PurePath
from urllib.parse import unquote, urlsplit

from amlora_dist.registry import tags

log = logging.getLogger(__name__)

DATABASE, ARTIFACTS = "mlflow.db", "artifacts"
_COLUMNS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
    ("logged_models", "artifact_location"),
)
"""Where MLflow's tables hold a place of artifacts; what one of its versions does not have is passed over."""


def home_of(file: Path, home: Path) -> Path:
    """The home that a SQLite store belongs to: the folder it lies in, where that is one; else ``home``."""
    own = file.parent
    return own if file.name == DATABASE and (own / ARTIFACTS).is_dir() else home


def settle(file: Path, home: Path) -> list[str]:
    """Set the places of artifacts in ``home/mlflow.db`` right; the caller holds its lock.

    Args:
        file: the store.
        home: it belongs to.

    Returns:
        The folders that the places named before; none where nothing was to be done.

    Raises:
        sqlite3.Error: the file is no database, or stays locked.
    """
    if file != home / DATABASE or not file.is_file():
        return []
    with contextlib.closing(sqlite3.connect(file, timeout=60, isolation_level=None)) as connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if "experiments" not in tables:
            return []
        found = connection.execute("SELECT name, artifact_location, experiment_id FROM experiments").fetchall()
        runs = "SELECT DISTINCT experiment_id FROM runs JOIN tags USING (run_uuid) WHERE substr(key, 1, ?) = ?"
        ours = {number for (number,) in connection.execute(runs, (len(tags.PREFIX), tags.PREFIX))}
        roots = {_other_root(name, place, home, number in ours) for name, place, number in found}
        old = sorted(root for root in roots if root is not None)
        if not old:
            return []
        connection.execute("BEGIN IMMEDIATE")
        for table, column in _COLUMNS:
            if table in tables and column in {row[1] for row in connection.execute(f"PRAGMA table_info({table})")}:
                for root in old:
                    connection.execute(
                        f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",
                        (f"{home / ARTIFACTS}/", len(root) + 2, len(root) + 1, f"{root}/"),
                    )
        connection.execute("COMMIT")
    for root in old:
        log.warning(
            "%s: this home was in %s before (moved, copied or restored); the paths in its store are corrected",
            home, PurePath(_path(root)).parent,
        )  # fmt: skip
    return old


def own_place(place: str, home: Path) -> str:
    """Where artifacts of a run of this project lie in ``home``, whatever its store says: who opens the same folder by
    another path (a container's mount) sets the places of all to that, while somebody writes by this one."""
    parts = PurePath(_path(place)).parts
    if not _is_remote(place) and len(parts) > 4 and parts[-4] == ARTIFACTS and parts[-1] == "artifacts":
        return str(home.joinpath(ARTIFACTS, *parts[-3:]))
    return place


def _other_root(name: str, place: str | None, home: Path, ours: bool) -> str | None:
    """The artifact root that an experiment of this project names, if it is not this home's; as it is written. One that has
    none of this project's runs, and lies where it says, is somebody's own."""
    root, slash, last = (place or "").rpartition("/")
    here = str(home / ARTIFACTS)
    if not slash or _is_remote(root) or PurePath(_path(root)).name != ARTIFACTS or root == here:
        return None
    named = last == name.replace(" ", "_") and not Path(_path(place or "")).is_dir()
    return root if ours or named or (home / ARTIFACTS / last).is_dir() else None


def _is_remote(place: str) -> bool:
    return "://" in place and not place.startswith("file:")


def _path(place: str) -> str:
    return unquote(urlsplit(place).path) if place.startswith("file:") else place
