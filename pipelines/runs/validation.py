"""What is wrong with the places that a configuration names, found without a row, a weight or a process: for ``validate``."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from amlora_dist.config.loading import home, storage_of
from amlora_dist.errors import Fault, FoundFault, UserError
from amlora_dist.registry.connection import store_uri
from pipelines.cluster import resources

if TYPE_CHECKING:
    from amlora_dist.config.loading import RunConfig
    from amlora_dist.config.strict_yaml import KeyPath
    from amlora_dist.tasks.task import TaskSpec


T = TypeVar("T")


class Noted(Protocol):
    """Makes a check, and keeps what it refuses as a fault of a key."""

    def __call__(self, key: KeyPath, check: Callable[[], T]) -> T | None:
        """What the check gives; None where it refused."""


def place_faults(config: RunConfig, specs: list[TaskSpec]) -> dict[KeyPath, Fault]:
    """Every fault of the storage, of MLflow's address, and of a base model in a local folder: its architecture, the layers
    to adapt, its weights' names and shapes, its tokenizer, and what that makes of the tasks' labels and templates.

    A model of a package or of the Hub is looked at when a run starts.

    Args:
        config: sound in itself.
        specs: of its tasks.
    """
    found: dict[KeyPath, Fault] = {}

    def noted(key: KeyPath, check: Callable[[], T]) -> T | None:
        try:
            return check()
        except UserError as error:
            found[key] = FoundFault.of(error, ".".join(map(str, key)))
            return None

    noted(("storage",), lambda: resources.check_folder(storage_of(config)[0], "storage"))
    if config.mlflow.tracking_uri:
        noted(("mlflow", "tracking_uri"), lambda: _check_store(config.mlflow.tracking_uri))
    if os.path.isdir(config.model.source):
        _model_faults(config, specs, noted)
    return found


def _check_store(tracking_uri: str | None) -> None:
    """See that a store can be where it is said to be. Raises UserError; opens no store."""
    where, uri = store_uri(home(), tracking_uri)
    if uri.startswith("sqlite:///"):
        file = Path(uri.removeprefix("sqlite:///").partition("?")[0])
        resources.check_file(file, where)
        with contextlib.suppress(OSError), file.open("rb") as opened:
            if (first := opened.read(16)) and first != b"SQLite format 3\0":
                raise UserError(f"{where}: found {file}, which is no SQLite database; name another file")


def _model_faults(config: RunConfig, specs: list[TaskSpec], noted: Noted) -> None:
    from amlora_dist.base_model import check_tokenizer, check_weights, described_base, load_tokenizer, meta_model
    from amlora_dist.methods import method_for
    from pipelines.runs.inputs import settled_format
    from pipelines.runs.model_checks import check_targets, check_task, checked_router_layer

    source, path = ("model", "source"), Path(config.model.source).resolve()
    if (base := noted(source, lambda: described_base(config.model, path))) is None:
        return
    if (model := noted((*source, "architecture"), lambda: meta_model(base))) is not None:
        settings = config.stage_settings()
        if noted(("router", "layer"), lambda: checked_router_layer(settings, model)) is None:
            settings = replace(settings, router=replace(settings.router, layer=None))
        noted(("adapters", "targets"), lambda: check_targets(method_for(settings), model))
        noted((*source, "weights"), lambda: check_weights(base, model))
    if (tokenizer := noted((*source, "tokenizer"), lambda: load_tokenizer(base.path))) is None:
        return
    if model is not None:
        size = int(model.get_input_embeddings().weight.shape[0])
        noted((*source, "tokens"), lambda: check_tokenizer(base, tokenizer, size))
    for number, spec in enumerate(specs):

        def of_task(spec: TaskSpec = spec) -> None:
            if spec.open_format or spec.chat:
                spec = settled_format(spec, base, config.prompt_format)
            if spec.label_texts or spec.chat:
                check_task(spec, [], tokenizer, base.encoder_decoder)

        noted(("tasks", number), of_task)
