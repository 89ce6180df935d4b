"""What people find in MLflow's pages next to the journal: a model for each version, the data of each task, descriptions.

Nothing is read back from here by any run. A store that lacks these parts of MLflow 3 gets the rest, and a warning.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from amlora_dist.digests import value_digest
from amlora_dist.registry import tags
from amlora_dist.registry.connection import StoreAwayError, StoreError
from amlora_dist.registry.how_scored import how_scored

if TYPE_CHECKING:
    from amlora_dist.registry.manifest import Manifest
    from amlora_dist.registry.store import Store
    from amlora_dist.registry.versions import Version

log = logging.getLogger(__name__)

VERSIONS_TAG = "mlflow.modelVersions"
"""Tag by which MLflow's pages link from a logged model to its registered versions."""
CONTEXT_TAG = "mlflow.data.context"
NOTE_TAG = "mlflow.note.content"
"""Tag that MLflow's pages show as a run's description."""
_DIGEST_LENGTH = 32
"""Signs of a data set's digest; MLflow takes 36 at most."""


@dataclass(frozen=True, slots=True)
class DataInput:
    """Rows that a run has read: one split of a task."""

    name: str
    """The task's."""
    digest: str
    """sha256 over the rows that are used."""
    rows: int
    context: str
    """``training`` or ``evaluation``."""
    source: Mapping[str, Any]
    """``{"path": HUB_ID, "revision": ...}`` of a Hub data set, ``{"uri": NAME}`` of others: no absolute path."""
    kind: str = "local"
    """MLflow's type of the source: ``hugging_face`` or ``local``."""


@dataclass(frozen=True, slots=True)
class TaskScore:
    """What a version answers right of a task's rows."""

    data: DataInput
    value: float


def log_data(store: Store, run: str, inputs: Iterable[DataInput]) -> None:
    """Note which data a run has read, for its page and MLflow's search; again the same: nothing happens."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    listed = [
        DatasetInput(
            Dataset(one.name, one.digest[:_DIGEST_LENGTH], one.kind, json.dumps(dict(one.source)),
                    profile=json.dumps({"num_rows": one.rows, "sha256": one.digest})),
            [InputTag(CONTEXT_TAG, one.context)],
        )
        for one in inputs
    ]  # fmt: skip
    if listed:
        _optional("note the data of a run", lambda: store.connection.call(
            "note the data of a run", store.connection.client.log_inputs, run, datasets=listed
        ))  # fmt: skip


def log_model(
    store: Store, version: Version, manifest: Manifest, scores: Iterable[TaskScore], *, above: str, step: int, timestamp: int
) -> str | None:
    """Make a version a logged model with its parameters and scores, found again by its tag; MLflow's id of it.

    Args:
        store: which has the version.
        above: MLflow's id of the run above the version's, whose page leads to the version too.
        version: that was published.
        manifest: of the bank.
        scores: of the version, each about the data it was scored on.
        step: the stage's number.
        timestamp: milliseconds since 1970, of the metrics.
    """
    found: str | None = _optional(
        "make a version a logged model", lambda: _log_model(store, version, manifest, scores, above, step, timestamp)
    )
    return found


def _log_model(
    store: Store, version: Version, manifest: Manifest, scores: Iterable[TaskScore], above: str, step: int, timestamp: int
) -> str:
    from mlflow.entities import LoggedModelOutput, Metric

    connection = store.connection
    client, call = connection.client, connection.call
    experiment = call("read a run", client.get_run, version.run).info.experiment_id
    wanted = f"tags.`{tags.VERSION}` = '{version.uri}'"
    found = call("search logged models", client.search_logged_models, [experiment], filter_string=wanted)
    if found:
        model = found[0]
    else:
        named = [{"name": version.registered_model, "version": version.number}]
        last = manifest.adapters[-1]
        model = call(
            "create a logged model", client.create_logged_model, experiment,
            name=f"{_name(version.registered_model)}-v{version.number}", source_run_id=version.run, model_type="bank",
            tags={tags.VERSION: version.uri, tags.RUN_ID: version.run_id, VERSIONS_TAG: json.dumps(named)},
            params={
                "tasks": ", ".join(manifest.tasks)[:500], "adapters": str(len(manifest.adapters)), "method": manifest.method,
                "router": manifest.router.kind, "rank": str(last.rank), "alpha": f"{last.alpha:g}",
                "base_model": manifest.base.source, "load": f'AMLoRAModel.from_bank("{version.uri}")',
            },
        )  # fmt: skip
    model_id = str(model.model_id)
    if str(model.status) != "READY":
        call("finish a logged model", client.finalize_logged_model, model_id, "READY")
        for run in (version.run, above):
            call("link a logged model", client.log_outputs, run, models=[LoggedModelOutput(model_id, step)])
    there = {(metric.key, metric.value) for metric in model.metrics or []}
    metrics = [
        Metric(f"accuracy/{score.data.name}", score.value, timestamp, step, model_id=model_id,
               dataset_name=score.data.name, dataset_digest=score.data.digest[:_DIGEST_LENGTH], run_id=version.run)
        for score in scores
        if (f"accuracy/{score.data.name}", score.value) not in there
    ]  # fmt: skip
    if metrics:
        call("write a model's metrics", client.log_batch, version.run, metrics=metrics)
    return model_id


def described(store: Store, version: Version) -> bool:
    """Whether the page of a version has a description: the last thing that is recorded of it."""
    connection = store.connection
    found = connection.call(
        "read a version", connection.client.get_model_version, version.registered_model, str(version.number)
    )
    return bool(found.description)


def describe(store: Store, version: Version, manifest: Manifest) -> None:
    """Write what the pages of a registered model and of its version say: tasks, scores, how to load it."""
    connection, name = store.connection, version.registered_model
    client, call = connection.client, connection.call
    text = version_description(version, manifest)
    call("describe a version", client.update_model_version, name, str(version.number), text)
    model = call("read a registered model", client.get_registered_model, name)
    if not model.description:  # somebody may have written a better one
        call("describe a registered model", client.update_registered_model, name, model_description(name, manifest))


def describe_run(store: Store, run: str, text: str) -> None:
    """Write what the page of a run says below *Description*, unless somebody has written there.

    Args:
        store: which has the run.
        run: MLflow's id.
        text: Markdown.
    """
    there = store.run_tags(run)
    found = there.get(NOTE_TAG)
    if found == text or (found and value_digest(found)[:12] != there.get(tags.DESCRIBED)):
        return
    store.set_tags(run, {tags.DESCRIBED: value_digest(text)[:12], NOTE_TAG: text})


def version_description(version: Version, manifest: Manifest) -> str:
    """Markdown for the page of a version."""
    matrix = manifest.accuracy_matrix
    how = how_scored(manifest.training_configuration, manifest.method, manifest.plain_text)
    last = dict(zip(matrix.tasks, matrix.accuracy[-1], strict=True)) if matrix.accuracy else {}
    best = {
        task: max((value for row in matrix.accuracy if (value := row[place]) is not None), default=None)
        for place, task in enumerate(matrix.tasks)
    }
    lines = [
        f"{len(manifest.adapters)} tasks, stage {manifest.stage} of run `{manifest.run_id}`, method `{manifest.method}`.",
        "",
        "| task | accuracy now | best so far |", "|---|---|---|",
        *(f"| {task} | {_shown(last.get(task))} | {_shown(best.get(task))} |" for task in manifest.tasks),
        "",
        f"Accuracy: share of test rows whose {how.what} is right (of free text: the task's metric). {how.sentence}",
        "",
        "```python", "from amlora_dist import AMLoRAModel", f'model = AMLoRAModel.from_bank("{version.uri}")', "```",
        "",
        f"Base model `{manifest.base.source}`, sha256 `{manifest.base.digest[:12]}`. The data of each task are among the"
        " source run's data sets.",
    ]  # fmt: skip
    return "\n".join(lines)


def model_description(name: str, manifest: Manifest) -> str:
    """Markdown for the page of a registered model."""
    return "\n".join(
        [
            f"Banks of run `{manifest.run_id}` for `{manifest.base.source}`: a version a stage, each with an adapter more.",
            "",
            f"`{tags.CHAMPION}` is what is served, `{tags.CURRENT}` the newest: `amlora serve models:/{name}@champion`,"
            f" `amlora pull models:/{name}@{tags.CHAMPION}`, `amlora promote {name} VERSION --sample ROWS`.",
        ]
    )


def _optional(what: str, write: Any) -> Any:
    """Do what only pages need; None where the store cannot."""
    from mlflow.exceptions import MlflowException

    try:
        return write()
    except StoreAwayError:
        raise
    except (StoreError, MlflowException) as error:
        log.warning("MLflow: could not %s (%s); the run goes on without", what, str(error).partition("\n")[0][:200])
        return None


def _name(registered_model: str) -> str:
    """MLflow takes no / : . % \" ' in the name of a logged model."""
    return "".join("-" if sign in "/:.%\"'" else sign for sign in registered_model)


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
