"""One more task for a bank that exists: the run that learns it on top of the newest version, configured as the bank was."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amlora_dist.config.loading import RunConfig, expanded, from_mapping, home, with_values
from amlora_dist.config.strict_yaml import parse_value
from amlora_dist.errors import FaultsError, UserError
from amlora_dist.registry import tags
from amlora_dist.registry.store import Store
from amlora_dist.tasks.task import TaskDefaults, TaskSpec, resolve_task
from pipelines.runs.run_ids import checked_run_id

if TYPE_CHECKING:
    from amlora_dist.registry.manifest import Manifest


_OWN = ("parent", "tasks")
"""Keys of the run that the command's arguments decide."""


@dataclass(frozen=True, slots=True)
class Extension:
    """What ``amlora add`` will run, and whose answers it will compare."""

    parent: str
    """``models:/NAME/VERSION`` that the stage is trained on."""
    config: RunConfig
    run_id: str
    task: TaskSpec
    known: list[TaskSpec] = field(default_factory=list)
    """Tasks of the bank whose rows are at hand."""
    absent: list[str] = field(default_factory=list)
    """Tasks of the bank whose rows are not."""


def plan_extension(
    bank: str,
    task: str,
    overrides: Sequence[str] = (),
    *,
    run_id: str | None = None,
    check: Sequence[str] = (),
    tracking_uri: str | None = None,
) -> Extension:
    """The run that teaches a bank one more task.

    Args:
        bank: a run's id, a registered model's name, ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``.
        task: a task's name or YAML.
        overrides: ``key.path=value`` of the run; everything else is as the bank was trained, in this process.
        run_id: of the run; default: the bank's name and the task's. One that exists goes on, on the version it began with.
        check: names or YAMLs of tasks of the bank whose rows are not where its run found them.
        tracking_uri: of the store.

    Raises:
        UserError: no such bank or task; the bank has the task; it was not made by a run, or its base model is not here.
        FaultsError: a fault of the task's file or of an override.
    """
    from amlora_dist.inference.loading import pulled, resolve_bank_base
    from amlora_dist.registry.manifest import read_manifest

    values = dict(_value(text) for text in expanded(list(overrides)))
    store = Store.open(home(), tracking_uri)
    spec = resolve_task(task, base_dir=Path.cwd(), defaults=TaskDefaults())
    parent = _version(store, bank)
    name = checked_run_id(run_id or f"{parent.split('/')[1]}-{spec.name.rpartition('/')[2]}")
    parent = _begun(store, name) or parent
    manifest = read_manifest(pulled(parent, tracking_uri)[1])
    if spec.name in manifest.tasks:
        raise UserError(f"{parent} knows task {spec.name!r} already; give the new one another `name`, or take another bank")
    base = resolve_bank_base(manifest.base, None)
    mapping = dict(manifest.training_configuration)
    mapping |= {"name": name, "tasks": [task], "parent": parent, "registered_model": None, "workers": 0, "min_workers": None}
    mapping.pop("search", None)
    mapping["model"] = {**mapping.get("model", {}), "source": base.source, "revision": base.revision}
    mapping["evaluation"] = {**mapping.get("evaluation", {}), "also": []}
    try:
        config = from_mapping(mapping)
    except FaultsError as error:
        raise UserError(
            f"{parent} was not trained by a run as this version knows them ({error.faults[0]}); write a run's YAML with"
            f" parent: {parent}"
        ) from error
    config.mlflow.tracking_uri = tracking_uri
    config = with_values(config, values)
    known = {one.name: one for one in _at_hand([*_references(manifest, tracking_uri), *check], config)}  # what is given wins
    for one in check:
        if resolve_task(one, base_dir=Path.cwd(), defaults=TaskDefaults()).name not in manifest.tasks:
            raise UserError(f"--check: found {one!r}, which is no task of {parent}; it has {', '.join(manifest.tasks)}")
    own = [known[one] for one in manifest.tasks if one in known]
    return Extension(parent, config, name, spec, own, [one for one in manifest.tasks if one not in known])


def _version(store: Store, bank: str) -> str:
    """The newest version of a run or a registered model, or the one that a URI means."""
    if bank.startswith("models:"):
        return store.resolve(bank).uri
    if bank not in store.registered_models():
        found = store.find_runs({tags.KIND: "sequence", tags.RUN_ID: bank})
        if not found and (Path(bank).expanduser() / "manifest.json").is_file():
            raise UserError(f"{bank}: found a folder, expected a run's id or models:/NAME@ALIAS; add to its version")
        stored = store.load_json(found[-1].run, "config.json") if found else None
        bank = str((stored or {}).get("registered_model") or bank)
    return store.resolve(f"models:/{bank}/latest").uri


def _begun(store: Store, run_id: str) -> str | None:
    """The version that a run of this id began on."""
    found = store.find_runs({tags.KIND: "sequence", tags.RUN_ID: run_id})
    stored = store.load_json(found[-1].run, "config.json") if found else None
    parent: str | None = None if stored is None else stored.get("parent")
    return parent


def _value(text: str) -> tuple[str, Any]:
    path, sign, value = text.partition("=")
    if not sign:
        raise UserError(f"command line: found {text!r}, expected KEY.PATH=VALUE, such as training.epochs=3")
    if re.split(r"[.\[]", path)[0] in _OWN:
        raise UserError(f"command line: {path}: found a value, expected none: BANK-OR-RUN and TASK say it; leave it out")
    try:
        return path, parse_value(value)
    except ValueError as error:
        raise UserError(f"command line: {path}: found {value!r}, expected a YAML value ({error}); quote it") from None


def _references(manifest: Manifest, tracking_uri: str | None) -> list[Any]:
    """How the runs that made a bank named its tasks: its own run, and those below it that can be asked."""
    from amlora_dist.inference.loading import pulled
    from amlora_dist.registry.manifest import read_manifest

    found: list[Any] = []
    configuration = manifest.training_configuration
    for _ in manifest.tasks:
        found += configuration.get("tasks", [])
        parent = configuration.get("parent")
        if not parent:
            break
        try:
            configuration = read_manifest(pulled(str(parent), tracking_uri)[1]).training_configuration
        except UserError:
            break  # pruned, or of another store
    return found


def _at_hand(references: Sequence[Any], config: RunConfig) -> list[TaskSpec]:
    """Tasks whose rows can be read without the network."""
    found = []
    for reference in references:
        try:
            spec = resolve_task(reference, data_dir=config.data_dir, base_dir=Path.cwd(), defaults=config.task_defaults)
        except UserError:
            continue
        if spec.source.kind != "hub" or config.data_dir is not None:
            found.append(spec)
    return found
