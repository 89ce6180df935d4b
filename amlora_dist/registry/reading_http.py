"""A tracking server read over its REST API, without MLflow's client (see ``reading``).

Nothing is repeated and nothing is explained here: an answer other than 200 (a login of another kind, a proxy, a server that
has gone) is an error, after which MLflow's own client asks again, with all that it can.
"""

from __future__ import annotations

import base64
import json
import os
import posixpath
import shutil
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlencode, urlsplit, urlunsplit

from amlora_dist.registry.reading import (
    ArtifactEntry,
    Experiment,
    LocalArtifacts,
    MetricValue,
    ModelVersion,
    RegisteredModel,
    ResultPage,
    Run,
    RunValues,
    StoredRunInfo,
    UnknownError,
    checked_path,
)

DEADLINE_S = 60.0
MOST_EXPERIMENTS = 1000
"""That MLflow's client lists, too."""
MOST_RUNS = 1000
MOST_MEASUREMENTS = 25_000
LOGIN = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
WORKSPACES = ("MLFLOW_WORKSPACE", "MLFLOW_ENABLE_WORKSPACES")
"""Variables by which MLflow's client asks for one part of a server."""


class HttpReader:
    """A tracking server.

    Args:
        uri: its address, with user and password in it or in MLflow's variables.

    Raises:
        UnknownError: it is asked in another way than here.
    """

    def __init__(self, uri: str) -> None:
        if any(os.environ.get(name) for name in WORKSPACES):
            raise UnknownError("workspaces")
        parts = urlsplit(uri)
        user, password = unquote(parts.username or ""), unquote(parts.password or "")
        if (user or password) and any(os.environ.get(name) for name in LOGIN):
            raise UnknownError("a login in the address and another in the environment")
        user = os.environ.get("MLFLOW_TRACKING_USERNAME") or user
        password = os.environ.get("MLFLOW_TRACKING_PASSWORD") or password
        token = os.environ.get("MLFLOW_TRACKING_TOKEN")
        self._root = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", ""))
        self._login: str | None = None
        if user and password:
            code = base64.b64encode(f"{user}:{password}".encode()).decode()
            self._login = f"Basic {code}"
        elif token:
            self._login = f"Bearer {token}"

    def search_experiments(self) -> ResultPage:
        found = self._post("experiments/search", {"max_results": MOST_EXPERIMENTS, "view_type": "ACTIVE_ONLY"})
        return ResultPage((_experiment(one) for one in found.get("experiments", [])), found.get("next_page_token") or None)

    def get_experiment_by_name(self, name: str) -> Experiment:
        return _experiment(self._get("experiments/get-by-name", experiment_name=name)["experiment"])

    def get_run(self, run_id: str) -> Run:
        return _run(self._get("runs/get", run_id=run_id)["run"])

    def search_runs(
        self, experiment_ids: Sequence[str], filter_string: str, *, order_by: Sequence[str],
        page_token: str | None = None,
    ) -> ResultPage:  # fmt: skip
        found = self._post(
            "runs/search",
            {
                "experiment_ids": list(experiment_ids), "filter": filter_string, "run_view_type": "ACTIVE_ONLY",
                "max_results": MOST_RUNS, "order_by": list(order_by), **_token(page_token),
            },
        )  # fmt: skip
        return ResultPage((_run(one) for one in found.get("runs", [])), found.get("next_page_token") or None)

    def search_registered_models(
        self, filter_string: str | None = None, *, max_results: int, page_token: str | None = None
    ) -> ResultPage:
        found = self._get(
            "registered-models/search", max_results=max_results, **_filter(filter_string), **_token(page_token)
        )
        return ResultPage(map(_model, found.get("registered_models", [])), found.get("next_page_token") or None)

    def search_model_versions(
        self, filter_string: str | None = None, *, max_results: int, page_token: str | None = None
    ) -> ResultPage:
        found = self._get(
            "model-versions/search", max_results=max_results, **_filter(filter_string), **_token(page_token)
        )
        return ResultPage(map(_version, found.get("model_versions", [])), found.get("next_page_token") or None)

    def get_registered_model(self, name: str) -> RegisteredModel:
        return _model(self._get("registered-models/get", name=name)["registered_model"])

    def get_metric_history(self, run_id: str, key: str) -> list[MetricValue]:
        found = self._get("metrics/get-history", run_id=run_id, metric_key=key, max_results=MOST_MEASUREMENTS)
        if found.get("next_page_token"):
            raise UnknownError(key)
        return [
            MetricValue(one["key"], float(one["value"]), int(one["timestamp"]), int(one.get("step", 0)))
            for one in found.get("metrics", [])
        ]

    def artifacts(self, artifact_uri: str) -> LocalArtifacts | ServedArtifacts:
        parts = urlsplit(artifact_uri)
        if parts.scheme != "mlflow-artifacts":
            return LocalArtifacts(artifact_uri)
        if parts.netloc:
            raise UnknownError(artifact_uri)
        return ServedArtifacts(self, unquote(parts.path).strip("/"))

    def asked(self, path: str, content: Mapping[str, Any] | None = None) -> Any:
        """The open answer of the server. Raises OSError where it is none."""
        body = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(f"{self._root}/api/2.0/{path}", data=body, headers={"Accept": "application/json"})
        if body is not None:
            request.add_header("Content-Type", "application/json")
        if self._login is not None:  # not for whoever the server sends us on to
            request.add_unredirected_header("Authorization", self._login)
        return urllib.request.urlopen(request, timeout=DEADLINE_S)

    def _get(self, path: str, **values: Any) -> dict[str, Any]:
        with self.asked(f"mlflow/{path}?{urlencode(values)}") as answer:
            return _mapping(json.load(answer))

    def _post(self, path: str, content: Mapping[str, Any]) -> dict[str, Any]:
        with self.asked(f"mlflow/{path}", content) as answer:
            return _mapping(json.load(answer))


class ServedArtifacts:
    """Artifacts that the server hands out itself."""

    def __init__(self, reader: HttpReader, root: str) -> None:
        self._reader, self._root = reader, root

    def list_artifacts(self, path: str | None = None) -> list[ArtifactEntry]:
        place = posixpath.join(self._root, checked_path(path)) if path else self._root
        with self._reader.asked(f"mlflow-artifacts/artifacts?{urlencode({'path': place})}") as answer:
            files = _mapping(json.load(answer)).get("files", [])
        found = []
        for one in files:
            name = checked_path(str(one["path"]))
            size = one.get("file_size")
            whole = posixpath.join(path, name) if path else name
            found.append(ArtifactEntry(whole, bool(one.get("is_dir")), None if size is None else int(size)))
        # A server lists a file as the only thing in itself.
        if path and len(found) == 1 and not found[0].is_dir and found[0].path == f"{path}/{posixpath.basename(path)}":
            return []
        return sorted(found, key=lambda entry: entry.path)

    def download_artifacts(self, artifact_path: str, dst_path: str) -> str:
        to = Path(dst_path) / checked_path(artifact_path)
        inside = self.list_artifacts(artifact_path)
        for entry in inside:
            self.download_artifacts(entry.path, dst_path)
        if not inside:
            to.parent.mkdir(parents=True, exist_ok=True)
            whole = quote(posixpath.join(self._root, artifact_path))
            with self._reader.asked(f"mlflow-artifacts/artifacts/{whole}") as answer, to.open("wb") as file:
                shutil.copyfileobj(answer, file)
                if answer.length:
                    raise UnknownError(f"{artifact_path}: {answer.length} bytes are missing")
        return str(to)


def _filter(text: str | None) -> dict[str, str]:
    return {"filter": text} if text else {}


def _token(token: str | None) -> dict[str, str]:
    return {"page_token": token} if token else {}


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UnknownError(str(value)[:200])
    return value


def _pairs(found: Sequence[Mapping[str, str]] | None) -> dict[str, str]:
    return {one["key"]: one.get("value", "") for one in found or []}


def _experiment(one: Mapping[str, Any]) -> Experiment:
    return Experiment(str(one["experiment_id"]), one["name"], one.get("lifecycle_stage", ""))


def _run(one: Mapping[str, Any]) -> Run:
    info, data = one["info"], one.get("data", {})
    return Run(
        StoredRunInfo(
            info["run_id"], info.get("run_name", ""), str(info["experiment_id"]), info["status"],
            info.get("artifact_uri", ""), info.get("lifecycle_stage", ""),
        ),
        RunValues(_pairs(data.get("tags")), {m["key"]: float(m["value"]) for m in data.get("metrics", [])}),
    )  # fmt: skip


def _model(one: Mapping[str, Any]) -> RegisteredModel:
    aliases = {found["alias"]: str(found["version"]) for found in one.get("aliases", [])}
    return RegisteredModel(one["name"], _pairs(one.get("tags")), aliases)


def _version(one: Mapping[str, Any]) -> ModelVersion:
    return ModelVersion(
        one["name"], str(one["version"]), one.get("run_id") or None, one.get("source"), one.get("description"),
        _pairs(one.get("tags")),
    )  # fmt: skip
