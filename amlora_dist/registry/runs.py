"""The journal of runs in MLflow: one run for a sequence, one nested run for each stage, found again by their tags."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amlora_dist.errors import BankError, UserError
from amlora_dist.files import sync_files, write_bytes
from amlora_dist.registry import tags
from amlora_dist.registry.connection import Connection, StoreError, is_code, mlflow_errors

_METRICS_PER_CALL = 500
_PARENT = "mlflow.parentRunId"
_NAME = "mlflow.runName"
UI = "http://127.0.0.1:5000"
"""Where ``mlflow ui`` serves, unless configured otherwise."""
RESULT = "result.json"
"""Artifact of the run of a sequence: its result so far."""
TRAINING = {"mlflow.experimentKind": "custom_model_development"}
"""Tag of an experiment by which MLflow's page opens with its training runs, and not with traces of a chat program."""


@dataclass(frozen=True, slots=True)
class RunInfo:
    """A run of MLflow."""

    run: str
    """MLflow's id."""
    name: str
    status: str
    tags: dict[str, str]
    metrics: dict[str, float]
    """Last value of each."""


class Runs:
    """Runs, metrics and artifacts; ``Store`` adds versions."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._client = connection.client
        self._call = connection.call
        self._repositories: dict[str, Any] = {}

    # ---- runs -------------------------------------------------------------------------------------------------

    def parent_run(
        self, registered_model: str, run_id: str, config: Mapping[str, Any], *, below: str | None = None
    ) -> str:
        """The MLflow run of a sequence: found again by its tag and set to RUNNING, or created.

        It is in the experiment of its registered model, or nested ``below`` another run, such as a search's trial.

        The resolved configuration is stored as ``config.json`` (again on resumption: tasks may have been appended)
        and, for MLflow's tables, flattened into parameters, which MLflow keeps as they were first written.

        Raises:
            UserError: the registered model belongs to another run id.
        """
        self._own(registered_model, run_id)
        wanted = {tags.KIND: "sequence", tags.RUN_ID: run_id}
        if below is None:
            experiment = self._experiment(registered_model)
        else:
            experiment = self._call("read a run", self._client.get_run, below).info.experiment_id
            wanted[_PARENT] = below
        run = self._find_or_create(experiment, run_id, wanted, params=_flat(config))
        self.log_json(run, "config.json", dict(config))
        return run

    def stage_run(self, parent: str, stage: str, fingerprint: str) -> str:
        """The MLflow run of one stage, nested below ``parent``: found again by fingerprint, or created.

        Args:
            parent: what ``parent_run`` returned.
            stage: its name, as people read it ("2 agnews").
            fingerprint: training fingerprint.
        """
        above = self._call("read a run", self._client.get_run, parent)
        wanted = {
            tags.KIND: "stage",
            tags.RUN_ID: above.data.tags.get(tags.RUN_ID, ""),
            tags.STAGE: stage,
            tags.TRAINING_FINGERPRINT: fingerprint,
            _PARENT: parent,
        }
        return self._find_or_create(above.info.experiment_id, stage, wanted)

    def search_run(self, registered_model: str, search_id: str, champion: str, config: Mapping[str, Any]) -> str:
        """The MLflow run of a search, found again or created; ``config`` as in ``parent_run``.

        Args:
            registered_model: where the winner, run id ``champion``, is published.
            search_id: names the search.

        Raises:
            UserError: the registered model belongs to another run id.
        """
        self._own(registered_model, champion)
        wanted = {tags.KIND: "search", tags.SEARCH: search_id, tags.RUN_ID: search_id}
        run = self._find_or_create(self._experiment(registered_model), search_id, wanted, params=_flat(config))
        self.log_json(run, "config.json", dict(config))
        return run

    def trial_run(self, search_run: str, search_id: str, number: int, values: Mapping[str, Any]) -> str:
        """The MLflow run of a trial, below its search's: found again or created, with the values as parameters."""
        experiment = self._call("read a run", self._client.get_run, search_run).info.experiment_id
        wanted = {tags.KIND: "trial", tags.SEARCH: search_id, tags.TRIAL: str(number), _PARENT: search_run}
        return self._find_or_create(experiment, f"trial {number}", wanted, params=_flat(values))

    def close_open_runs(self, inside: str) -> int:
        """Close as KILLED whatever is still RUNNING in the experiment of run ``inside``, but that run; how many."""
        experiment = self._call("read a run", self._client.get_run, inside).info.experiment_id
        found = [run for run in self._search_runs([experiment], {}) if run.status == "RUNNING" and run.run != inside]
        for run in found:
            self.end_run(run.run, "KILLED")
        return len(found)

    def grouping_run(self, kind: str, name: str) -> str:
        """The MLflow run of something above runs, such as a ``comparison``: found again by kind and name, or created."""
        wanted = {tags.KIND: kind, tags.RUN_ID: name}
        return self._find_or_create(self._experiment(f"amlora {kind}s"), name, wanted)

    def result_of(self, run_id: str) -> tuple[str, dict[str, Any]]:
        """MLflow's id of the run of a sequence, and its result as far as it has come.

        Raises:
            UserError: no such run, or it has none.
        """
        found = self.find_runs({tags.KIND: "sequence", tags.RUN_ID: run_id})
        if not found:
            known = sorted({run.tags.get(tags.RUN_ID, "?") for run in self.find_runs({tags.KIND: "sequence"})})
            raise UserError(f"no run {run_id!r} at {self.connection.shown}; there are: {', '.join(known) or 'none'}")
        result: dict[str, Any] | None = self.load_json(found[-1].run, RESULT)
        if not result:
            raise UserError(f"run {run_id!r} has not finished a stage yet: there is nothing to show")
        return found[-1].run, result

    def find_runs(self, wanted: Mapping[str, str], *, registered_model: str | None = None) -> list[RunInfo]:
        """Runs that carry all of these tags, the oldest first; of one registered model's experiment or of all."""
        if registered_model is None:
            found = self._call("list experiments", self._client.search_experiments)
            experiments = [experiment.experiment_id for experiment in found]
        else:
            found_one = self._call("find an experiment", self._client.get_experiment_by_name, registered_model)
            experiments = [found_one.experiment_id] if found_one else []
        return self._search_runs(experiments, wanted) if experiments else []

    def end_run(self, run: str, status: str) -> None:
        """Close a run: FINISHED, FAILED or KILLED."""
        self._call("end a run", self._client.set_terminated, run, status=status)

    def set_tags(self, run: str, values: Mapping[str, str]) -> None:
        """Set tags of a run."""
        from mlflow.entities import RunTag

        pairs = [RunTag(key, value) for key, value in values.items()]
        self._call("tag a run", self._client.log_batch, run, tags=pairs)

    # ---- metrics and artifacts --------------------------------------------------------------------------------

    def log_metrics_batch(self, run: str, metrics: Iterable[tuple[str, float, int, int]]) -> None:
        """Write metrics in few calls; each is (key, value, step, milliseconds since 1970)."""
        from mlflow.entities import Metric

        rows = [Metric(key, value, timestamp, step) for key, value, step, timestamp in metrics]
        for start in range(0, len(rows), _METRICS_PER_CALL):
            part = rows[start : start + _METRICS_PER_CALL]
            self._call("write metrics", self._client.log_batch, run, metrics=part)

    def run_tags(self, run: str) -> dict[str, str]:
        """Tags of a run."""
        return dict(self._call("read a run", self._client.get_run, run).data.tags)

    def add_metrics(self, run: str, metrics: Iterable[tuple[str, float, int, int]]) -> None:
        """``log_metrics_batch`` of what the run does not have: a key, step and value are there once."""
        wanted = list(metrics)
        there = self._call("read a run", self._client.get_run, run).data.metrics
        known = {
            (key, step, value)
            for key in {key for key, *_ in wanted} & there.keys()
            for step, value, _ in self.metric_history(run, key)
        }
        self.log_metrics_batch(run, [one for one in wanted if (one[0], one[2], one[1]) not in known])

    def page_of(self, run: str) -> str:
        """Address of a run's page in MLflow: of the tracking server, or as ``mlflow ui`` serves it.

        MLflow's pages open as for chat programs, where nothing leads to the registry, unless the address says otherwise.
        """
        experiment = self._call("read a run", self._client.get_run, run).info.experiment_id
        shown = self.connection.shown.rstrip("/")
        server = shown if shown.startswith(("http://", "https://")) else UI
        return f"{server}/#/experiments/{experiment}/runs/{run}?workflowType=machine_learning"

    def metric_history(self, run: str, key: str) -> list[tuple[int, float, int]]:
        """(step, value, milliseconds) of a metric, by step."""
        history = self._call("read metrics", self._client.get_metric_history, run, key)
        return sorted((m.step, m.value, m.timestamp) for m in history)

    def log_artifacts(self, run: str, folder: Path, artifact_path: str | None = None) -> None:
        """Upload a folder's files below ``artifact_path``; on a disk of ours, so that they outlive a loss of power."""
        repository = self._repository(run)
        self._call("upload artifacts", repository.log_artifacts, str(folder), artifact_path)
        if (place := _local(repository)) is not None:
            names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
            sync_files(place / (artifact_path or ""), names, above=5)  # up to the home, whose every folder may be new

    def log_json(self, run: str, artifact_path: str, value: Any) -> None:
        """Write a JSON value as an artifact; what was there is replaced."""
        text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False)
        repository = self._repository(run)
        if (place := _local(repository)) is not None:
            self._call("write an artifact", write_bytes, place / artifact_path, text.encode())
            return
        with tempfile.TemporaryDirectory() as name:
            above, _, last = artifact_path.rpartition("/")
            (Path(name) / last).write_text(text, encoding="utf-8")
            self._call("write an artifact", repository.log_artifact, str(Path(name) / last), above or None)

    def load_json(self, run: str, artifact_path: str) -> Any:
        """Read a JSON artifact; None when there is none."""
        with tempfile.TemporaryDirectory() as tmp:
            file = self.download(run, artifact_path, Path(tmp))
            return None if file is None else json.loads(file.read_text(encoding="utf-8"))

    def download(
        self, run: str, artifact_path: str, folder: Path, *, most: int | None = None, exactly: int | None = None
    ) -> Path | None:
        """Fetch one artifact (a file, or a folder with all below it) to ``folder/artifact_path``; None: not there.

        Args:
            run: MLflow's id.
            artifact_path: below the run's artifacts.
            folder: where to.
            most: bytes that the file may have at most.
            exactly: bytes that it must have.

        Raises:
            BankError: the store says that it has another size; nothing was fetched.
        """
        folder.mkdir(parents=True, exist_ok=True)
        above = artifact_path.rpartition("/")[0]
        found = next((entry for entry in self._listed(run, above or None) if entry.path == artifact_path), None)
        if found is None:
            return None
        size = int(found.file_size or 0)
        if (most is not None and size > most) or (exactly is not None and size != exactly):
            expected = f"at most {most}" if exactly is None else f"{exactly}"
            raise BankError(
                f"{artifact_path} of run {run}: found {size} bytes in the store, expected {expected}: it was changed"
            )
        try:
            fetched = self._call(
                f"fetch {artifact_path} of run {run}",
                self._repository(run).download_artifacts, artifact_path, str(folder),
            )  # fmt: skip
        except mlflow_errors() as error:
            if is_code(error, "RESOURCE_DOES_NOT_EXIST"):
                return None
            raise
        return Path(fetched)

    def has_artifact(self, run: str, artifact_path: str) -> bool:
        """Whether a run has an artifact file (or folder) of this path."""
        above = artifact_path.rpartition("/")[0]
        return any(entry.path == artifact_path for entry in self._listed(run, above or None))

    def artifact_sizes(self, run: str, artifact_path: str) -> dict[str, int]:
        """Every file below a folder of a run's artifacts, by its path in that folder, with its size in bytes."""
        found: dict[str, int] = {}
        folders = [artifact_path]
        while folders:
            for entry in self._listed(run, folders.pop()):
                if entry.is_dir:
                    folders.append(entry.path)
                else:
                    found[entry.path.removeprefix(f"{artifact_path}/")] = int(entry.file_size or 0)
        return found

    def delete_artifacts(self, run: str, artifact_path: str) -> None:
        """Delete a folder of a run's artifacts, or a file."""
        self._call("delete artifacts", self._repository(run).delete_artifacts, artifact_path)

    def _listed(self, run: str, artifact_path: str | None) -> list[Any]:
        try:
            return list(self._call("list artifacts", self._repository(run).list_artifacts, artifact_path))
        except mlflow_errors() as error:
            if is_code(error, "RESOURCE_DOES_NOT_EXIST"):
                return []
            raise

    def _repository(self, run: str) -> Any:
        if run not in self._repositories:
            info = self._call("read a run", self._client.get_run, run).info
            self._repositories[run] = self.connection.repository(info.artifact_uri)
        return self._repositories[run]

    # ---- inside -----------------------------------------------------------------------------------------------

    def _own(self, registered_model: str, run_id: str) -> None:
        """Create the registered model for this run id, or see that it is its own."""
        from mlflow.exceptions import MlflowException

        check_model_name(registered_model)
        try:
            self._call(
                "create a registered model",
                self._client.create_registered_model,
                registered_model,
                tags={tags.RUN_ID: run_id},
            )
        except MlflowException as error:
            if not is_code(error, "RESOURCE_ALREADY_EXISTS"):
                raise
            model = self._call("read a registered model", self._client.get_registered_model, registered_model)
            owner = model.tags.get(tags.RUN_ID)
            if owner != run_id:
                whose = f"run {owner!r}" if owner else "something that is no run of this project"
                raise UserError(
                    f"registered_model: {registered_model!r} belongs to {whose}, this is run {run_id!r}; "
                    "runs never share one: choose another registered_model or go on with that run id"
                ) from error

    def _experiment(self, name: str) -> str:
        """Id of the experiment of a registered model, created on first use."""
        from mlflow.exceptions import MlflowException

        root = self.connection.artifacts
        try:
            location = f"{root}/{name.replace(' ', '_')}" if root else None
            return str(
                self._call(
                    "create an experiment", self._client.create_experiment, name, artifact_location=location, tags=TRAINING
                )
            )
        except MlflowException as error:
            if not is_code(error, "RESOURCE_ALREADY_EXISTS"):
                raise
        found = self._call("find an experiment", self._client.get_experiment_by_name, name)
        if found is None or found.lifecycle_stage != "active":
            raise StoreError(
                f"MLflow experiment {name!r} was deleted; restore it (mlflow experiments restore) or choose another "
                "registered_model"
            )
        return str(found.experiment_id)

    def _find_or_create(
        self, experiment: str, name: str, wanted: Mapping[str, str], params: Mapping[str, str] | None = None
    ) -> str:
        from mlflow.entities import Param

        if found := self._search_runs([experiment], wanted):
            self._call("reopen a run", self._client.update_run, found[0].run, status="RUNNING")
            return found[0].run
        created = self._call("create a run", self._client.create_run, experiment, tags={**wanted, _NAME: name})
        run = str(created.info.run_id)
        pairs = [Param(key, value) for key, value in (params or {}).items()]
        for start in range(0, len(pairs), 100):
            self._call("write parameters", self._client.log_batch, run, params=pairs[start : start + 100])
        return run

    def _search_runs(self, experiments: list[str], wanted: Mapping[str, str]) -> list[RunInfo]:
        text = " and ".join(f"tags.`{key}` = '{_quoted(value)}'" for key, value in wanted.items())
        found, token = [], None
        while True:
            page = self._call(
                "search runs",
                self._client.search_runs,
                experiments,
                text,
                order_by=["attributes.start_time ASC"],
                page_token=token,
            )
            found += [
                RunInfo(r.info.run_id, r.info.run_name or "", r.info.status, dict(r.data.tags), dict(r.data.metrics))
                for r in page
            ]
            token = page.token
            if not token:
                return found


def _local(repository: Any) -> Path | None:
    """The folder of artifacts on a disk of ours."""
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

    return Path(repository.artifact_dir) if type(repository) is LocalArtifactRepository else None


def check_model_name(name: str) -> None:
    """Refuse names of registered models that MLflow, a file name or a search filter could not carry."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_. -]{0,119}", name) or name.startswith(tags.PREFIX):
        raise UserError(
            f"registered_model: found {name!r}, expected 1 to 120 letters, digits, '_', '.', '-' or spaces, starting "
            f"with a letter or digit and not with {tags.PREFIX!r}"
        )


def _quoted(value: str) -> str:
    if "'" in value:
        raise UserError(f"found {value!r}, expected a text without quotes: MLflow cannot search for it")
    return value


def _flat(value: Any, path: str = "") -> dict[str, str]:
    """``{"a": {"b": 1}}`` as ``{"a.b": "1"}``; values cut to what MLflow's tables show."""
    if isinstance(value, Mapping):
        pairs: dict[str, str] = {}
        for key, inner in value.items():
            pairs |= _flat(inner, f"{path}.{key}" if path else str(key))
        return pairs
    text = value if isinstance(value, str) else json.dumps(value)
    return {re.sub(r"[^A-Za-z0-9_. /-]", "_", path)[:250]: text[:500]}
