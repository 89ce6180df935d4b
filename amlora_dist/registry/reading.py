"""MLflow read without MLflow: what commands that only look at a store ask for, in a tenth of a second.

``import mlflow`` takes two CPU seconds (its judges, gateway, pandas, SQLAlchemy), more than everything else that such a
command does. ``ReadingClient`` answers the few questions of this project's that read, straight from the tables of a SQLite
store or over a server's own REST API, with what MLflow's client would answer. It vouches for no more than that: whatever
it does not know (another kind of store, a table with other columns, a filter or a method that is not here, an error of any
kind) is asked of MLflow's own client, which is then imported, and which answers, or raises, as always.
"""

from __future__ import annotations

import contextlib
import http.client
import math
import re
import shutil
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

ACTIVE = "active"
PROMPT = "mlflow.prompt.is_prompt"
"""Tag of what MLflow keeps among registered models and is none."""


class UnknownError(Exception):
    """Not a question that is answered here: MLflow's client is asked."""


# ---- answers, with the names that MLflow's entities have --------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Experiment:
    experiment_id: str
    name: str
    lifecycle_stage: str


@dataclass(frozen=True, slots=True)
class StoredRunInfo:
    run_id: str
    run_name: str
    experiment_id: str
    status: str
    artifact_uri: str
    lifecycle_stage: str


@dataclass(frozen=True, slots=True)
class RunValues:
    tags: dict[str, str]
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True)
class Run:
    info: StoredRunInfo
    data: RunValues


@dataclass(frozen=True, slots=True)
class MetricValue:
    key: str
    value: float
    timestamp: int
    step: int


@dataclass(frozen=True, slots=True)
class RegisteredModel:
    name: str
    tags: dict[str, str]
    aliases: dict[str, str]


@dataclass(frozen=True, slots=True)
class ModelVersion:
    name: str
    version: str
    run_id: str | None
    source: str | None
    description: str | None
    tags: dict[str, str]


@dataclass(frozen=True, slots=True)
class ArtifactEntry:
    """A file or folder among the artifacts of a run."""

    path: str
    is_dir: bool
    file_size: int | None


class ResultPage(list[Any]):
    """Results, and the token of those that follow; None: there are none."""

    def __init__(self, found: Iterable[Any] = (), token: str | None = None) -> None:
        super().__init__(found)
        self.token = token


# ---- where they come from ---------------------------------------------------------------------------------------


class Reader(Protocol):
    """Answers, or raises ``UnknownError`` (or what its storage raises) where MLflow is to be asked."""

    def search_experiments(self) -> ResultPage: ...

    def get_experiment_by_name(self, name: str) -> Experiment: ...

    def get_run(self, run_id: str) -> Run: ...

    def search_runs(
        self, experiment_ids: Sequence[str], filter_string: str, *, order_by: Sequence[str], page_token: str | None
    ) -> ResultPage: ...

    def search_registered_models(
        self, filter_string: str | None, *, max_results: int, page_token: str | None
    ) -> ResultPage: ...

    def search_model_versions(
        self, filter_string: str | None, *, max_results: int, page_token: str | None
    ) -> ResultPage: ...

    def get_registered_model(self, name: str) -> RegisteredModel: ...

    def get_metric_history(self, run_id: str, key: str) -> list[MetricValue]: ...

    def artifacts(self, artifact_uri: str) -> Artifacts: ...


class Artifacts(Protocol):
    """The artifacts of one run."""

    def list_artifacts(self, path: str | None = None) -> list[ArtifactEntry]: ...

    def download_artifacts(self, artifact_path: str, dst_path: str) -> str: ...


NAMES = frozenset(name for name in vars(Reader) if not name.startswith("_")) - {"artifacts"}
TROUBLE = (UnknownError, sqlite3.Error, OSError, http.client.HTTPException, ValueError, KeyError, TypeError)
"""After which MLflow's client is asked: it knows what the trouble is called."""


class ReadingClient:
    """Has the methods of ``MlflowClient``: those that are known here are answered here, until one of them fails.

    Args:
        reader: answers.
        mlflow: makes MLflow's own client, for all else.
    """

    def __init__(self, reader: Reader, mlflow: Callable[[], Any]) -> None:
        self._reader: Reader | None = reader
        self._make = mlflow
        self._mlflow: Any = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        reader = self._reader
        if name not in NAMES or reader is None:
            return getattr(self._whole(), name)
        ours = getattr(reader, name)

        def answered(*given: Any, **named: Any) -> Any:
            try:
                return ours(*given, **named)
            except TROUBLE:
                return getattr(self._whole(), name)(*given, **named)

        return answered

    def repository(self, artifact_uri: str, mlflow: Callable[[], Any]) -> Any:
        """What lists and fetches the artifacts below ``artifact_uri``; ``mlflow`` makes MLflow's, for what is not known."""
        if self._reader is None:
            return mlflow()
        try:
            return _Either(self._reader.artifacts(artifact_uri), mlflow)
        except TROUBLE:
            return mlflow()

    def _whole(self) -> Any:
        if self._mlflow is None:
            self._mlflow, self._reader = self._make(), None
        return self._mlflow


class _Either:
    """Artifacts as they are known here; what fails, or writes, is MLflow's."""

    def __init__(self, ours: Artifacts, mlflow: Callable[[], Any]) -> None:
        self._ours, self._make = ours, mlflow

    def list_artifacts(self, path: str | None = None) -> list[Any]:
        try:
            return list(self._ours.list_artifacts(path))
        except TROUBLE:
            return list(self._make().list_artifacts(path))

    def download_artifacts(self, artifact_path: str, dst_path: str) -> str:
        try:
            return self._ours.download_artifacts(artifact_path, dst_path)
        except TROUBLE:
            return str(self._make().download_artifacts(artifact_path, dst_path))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._make(), name)


def checked_path(path: str) -> str:
    """A path below a run's artifacts, or part of one, that leads nowhere else."""
    if path.startswith("/") or "\\" in path or any(part in ("", ".", "..") for part in path.split("/")):
        raise UnknownError(path)
    return path


# ---- filters ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Filter:
    """``name = 'X' and tags.`KEY` = 'VALUE'``, or ``name LIKE 'X%'``: the filters that this project writes."""

    name: str | None = None
    prefix: str | None = None
    tags: dict[str, str] = field(default_factory=dict)


_PART = re.compile(
    r"(?P<name>name) = '(?P<is>[^'%]*)'|name LIKE '(?P<like>[^'%]*)%'|tags\.`(?P<key>[^`]+)` = '(?P<value>[^']*)'"
)


def parsed_filter(text: str | None) -> Filter:
    """Of a filter's text. Raises UnknownError where it says more than is understood here."""
    name, prefix, tags = None, None, dict[str, str]()
    for part in re.split(r"(?<=') and (?=name|tags)", text) if text else ():
        match = _PART.fullmatch(part)
        if match is None:
            raise UnknownError(text)
        if match["key"]:
            tags[match["key"]] = match["value"]
        elif match["name"]:
            name = match["is"]
        else:
            prefix = match["like"]
    return Filter(name, prefix, tags)


# ---- the embedded store -----------------------------------------------------------------------------------------

_COLUMNS = {
    "experiments": {"experiment_id", "name", "lifecycle_stage"},
    "runs": {"run_uuid", "name", "experiment_id", "status", "artifact_uri", "lifecycle_stage", "start_time"},
    "tags": {"key", "value", "run_uuid"},
    "latest_metrics": {"key", "value", "is_nan", "run_uuid"},
    "metrics": {"key", "value", "timestamp", "step", "is_nan", "run_uuid"},
    "registered_models": {"name"},
    "registered_model_tags": {"key", "value", "name"},
    "registered_model_aliases": {"alias", "version", "name"},
    "model_versions": {"name", "version", "run_id", "source", "description", "current_stage"},
    "model_version_tags": {"key", "value", "name", "version"},
}
"""What is read of MLflow's tables."""
_SHARED = {"experiments", "registered_models", "registered_model_tags", "registered_model_aliases", "model_versions",
           "model_version_tags"}  # fmt: skip
"""Tables of which a row belongs to a workspace, where MLflow has those."""
_DELETED = "Deleted_Internal"


class SqliteReader:
    """A store in a SQLite file: MLflow's own tables, read in a connection that cannot write.

    Args:
        file: with MLflow's tables in it.

    Raises:
        UnknownError: they are not there, or not as they are known here; or several workspaces share them.
        sqlite3.Error: the file is no database.
    """

    def __init__(self, file: Path) -> None:
        if not file.is_file():
            raise UnknownError(str(file))
        self._file = file
        for table, columns in _COLUMNS.items():
            there = {str(row[1]) for row in self._rows(f"PRAGMA table_info({table})")}
            if not columns <= there:
                raise UnknownError(f"{table}: {sorted(columns - there)}")
            if table in _SHARED and "workspace" in there:
                others = f"SELECT 1 FROM {table} WHERE workspace <> 'default' LIMIT 1"
                if self._rows(others):
                    raise UnknownError(f"{table}: workspaces")

    def search_experiments(self) -> ResultPage:
        return ResultPage(self._experiments("lifecycle_stage = ?", ACTIVE))

    def get_experiment_by_name(self, name: str) -> Experiment:
        found = self._experiments("name = ?", name)
        if not found:
            raise UnknownError(name)
        return found[0]

    def get_run(self, run_id: str) -> Run:
        found = self._runs("run_uuid = ?", [run_id])
        if not found:
            raise UnknownError(run_id)
        return found[0]

    def search_runs(
        self, experiment_ids: Sequence[str], filter_string: str, *, order_by: Sequence[str],
        page_token: str | None = None,
    ) -> ResultPage:  # fmt: skip
        wanted = parsed_filter(filter_string)
        if list(order_by) != ["attributes.start_time ASC"] or page_token or wanted.name or wanted.prefix:
            raise UnknownError(filter_string)
        where = f"lifecycle_stage = ? AND experiment_id IN ({', '.join('?' for _ in experiment_ids)})"
        values: list[Any] = [ACTIVE, *map(int, experiment_ids)]
        for key, value in wanted.tags.items():
            where += " AND run_uuid IN (SELECT run_uuid FROM tags WHERE key = ? AND value = ?)"
            values += [key, value]
        return ResultPage(self._runs(where, values))

    def search_registered_models(
        self, filter_string: str | None = None, *, max_results: int, page_token: str | None = None
    ) -> ResultPage:
        wanted = parsed_filter(filter_string)
        if page_token or wanted.tags:
            raise UnknownError(filter_string)
        where, values = "1", list[Any]()
        if wanted.name is not None:
            where, values = "name = ?", [wanted.name]
        if wanted.prefix is not None:
            where, values = "substr(name, 1, ?) = ?", [len(wanted.prefix), wanted.prefix]
        return ResultPage(model for model in self._models(where, values) if PROMPT not in model.tags)

    def search_model_versions(
        self, filter_string: str | None = None, *, max_results: int, page_token: str | None = None
    ) -> ResultPage:
        wanted = parsed_filter(filter_string)
        if page_token or wanted.prefix is not None:
            raise UnknownError(filter_string)
        where, values = "current_stage <> ?", list[Any]([_DELETED])
        if wanted.name is not None:
            where, values = f"{where} AND name = ?", [*values, wanted.name]
        for key, value in wanted.tags.items():
            where += (
                " AND EXISTS (SELECT 1 FROM model_version_tags t WHERE t.name = model_versions.name"
                " AND t.version = model_versions.version AND t.key = ? AND t.value = ?)"
            )
            values += [key, value]
        found = self._rows(
            f"SELECT name, version, run_id, source, description FROM model_versions WHERE {where} ORDER BY name, version",
            values,
        )
        return ResultPage(
            ModelVersion(name, str(number), run or None, source, description, self._tags_of(name, number))
            for name, number, run, source, description in found
        )

    def get_registered_model(self, name: str) -> RegisteredModel:
        found = self._models("name = ?", [name])
        if not found:
            raise UnknownError(name)
        return found[0]

    def get_metric_history(self, run_id: str, key: str) -> list[MetricValue]:
        found = self._rows(
            "SELECT value, timestamp, step, is_nan FROM metrics WHERE run_uuid = ? AND key = ?", [run_id, key]
        )
        return [MetricValue(key, math.nan if nan else value, when, step) for value, when, step, nan in found]

    def artifacts(self, artifact_uri: str) -> LocalArtifacts:
        return LocalArtifacts(artifact_uri)

    def _experiments(self, where: str, value: str) -> list[Experiment]:
        found = self._rows(f"SELECT experiment_id, name, lifecycle_stage FROM experiments WHERE {where}", [value])
        return [Experiment(str(number), name, stage) for number, name, stage in found]

    def _runs(self, where: str, values: Sequence[Any]) -> list[Run]:
        columns = "run_uuid, name, experiment_id, status, artifact_uri, lifecycle_stage"
        found = self._rows(f"SELECT {columns} FROM runs WHERE {where} ORDER BY start_time, run_uuid", values)
        return [
            Run(StoredRunInfo(run, name or "", str(experiment), status, uri or "", stage), RunValues(self._run_tags(run),
                self._metrics(run)))
            for run, name, experiment, status, uri, stage in found
        ]  # fmt: skip

    def _run_tags(self, run: str) -> dict[str, str]:
        return dict(self._rows("SELECT key, value FROM tags WHERE run_uuid = ?", [run]))

    def _metrics(self, run: str) -> dict[str, float]:
        found = self._rows("SELECT key, value, is_nan FROM latest_metrics WHERE run_uuid = ?", [run])
        return {key: math.nan if nan else value for key, value, nan in found}

    def _tags_of(self, name: str, number: int) -> dict[str, str]:
        return dict(
            self._rows("SELECT key, value FROM model_version_tags WHERE name = ? AND version = ?", [name, number])
        )

    def _models(self, where: str, values: Sequence[Any]) -> list[RegisteredModel]:
        tags, aliases = (
            "SELECT key, value FROM registered_model_tags WHERE name = ?",
            "SELECT alias, version FROM registered_model_aliases WHERE name = ?",
        )
        return [
            RegisteredModel(
                name, dict(self._rows(tags, [name])), {alias: str(n) for alias, n in self._rows(aliases, [name])}
            )
            for (name,) in self._rows(f"SELECT name FROM registered_models WHERE {where} ORDER BY name", values)
        ]

    def _rows(self, statement: str, values: Sequence[Any] = ()) -> list[Any]:
        with contextlib.closing(sqlite3.connect(self._file, timeout=60)) as connection:
            connection.execute("PRAGMA query_only = ON")
            return connection.execute(statement, values).fetchall()


class LocalArtifacts:
    """Artifacts in a folder. Raises UnknownError where they are somewhere else."""

    def __init__(self, artifact_uri: str) -> None:
        place = unquote(urlsplit(artifact_uri).path) if artifact_uri.startswith("file:///") else artifact_uri
        if not place.startswith("/"):
            raise UnknownError(artifact_uri)
        self._root = Path(place)

    def list_artifacts(self, path: str | None = None) -> list[ArtifactEntry]:
        folder = self._root / checked_path(path) if path else self._root
        if not folder.is_dir():
            return []
        found = sorted(folder.iterdir())
        return [
            ArtifactEntry(one.relative_to(self._root).as_posix(), one.is_dir(), None if one.is_dir() else one.stat().st_size)
            for one in found
        ]

    def download_artifacts(self, artifact_path: str, dst_path: str) -> str:
        source, to = self._root / checked_path(artifact_path), Path(dst_path) / artifact_path
        to.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, to, dirs_exist_ok=True)
        else:
            shutil.copyfile(source, to)
        return str(to)
