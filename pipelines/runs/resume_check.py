"""The same id goes on with the same configuration: what may differ between two starts, and what is refused."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from amlora_dist.base_model import meta_model, resolve_base
from amlora_dist.config.former_values import as_stored, completed
from amlora_dist.config.loading import RunConfig, flat, from_mapping, home, to_mapping
from amlora_dist.config.schema import CHANGES_NO_RESULT, keys_marked
from amlora_dist.errors import FaultsError, UserError
from amlora_dist.privacy import public_configuration

if TYPE_CHECKING:
    from amlora_dist.base_model import BaseModel
    from amlora_dist.methods.base import Method
    from amlora_dist.registry.manifest import Manifest
    from amlora_dist.registry.store import Store

IRRELEVANT = keys_marked(RunConfig, CHANGES_NO_RESULT)
"""Keys that may differ between two starts: they change no result."""
FREE_IN_RUN = (*IRRELEVANT, "search")
"""The same of a run, which does not read the search."""


OF_A_BANK = (
    "prompt_format", "router.keys", "router.depths", "router.max_text_tokens", "router.layer",
    "router.skip_tokens", "model.quantisation",
)  # fmt: skip
"""What a bank has one of for life: how its texts are read, and what its keys are of."""
AS_THE_BANK = (*OF_A_BANK, "router.label_keys", "adapters.targets", "adapters.layers", "training.learning_rate")
"""Keys that a run on a published bank takes from it, where its file does not name them."""
UNSETTLED: dict[str, Any] = {
    "dtype": "auto", "model.attention": "auto", "router.depths": None, "router.max_text_tokens": None,
    "training.learning_rate": "auto",
}  # fmt: skip
"""Keys that a run settles before it stores them, and the value that leaves it to the run: it is none that differs."""
RESOLVED = ("dtype", "model.attention", "training.learning_rate")
"""Keys whose value ``auto`` is replaced, in what is stored, by what it means where the run starts."""


def going_on(config: RunConfig, *, named: Collection[str], run_id: str = "", search_id: str = "") -> RunConfig:
    """The configuration of a start under an id that may exist: what the file does not name is what it was (`taken_up`).

    Args:
        config: as the file, the overrides and today's defaults give it.
        named: of ``named_keys``.
        run_id: of a run;
        search_id: or of a search.
    """
    from amlora_dist.registry import tags
    from amlora_dist.registry.store import Store

    uri = config.mlflow.tracking_uri
    if not uri and not os.environ.get("MLFLOW_TRACKING_URI") and not (home() / "mlflow.db").exists():
        return config  # nothing was ever run here, and a store is not made before the data have been looked at
    store = Store.open(home(), uri)
    wanted = {tags.KIND: "search", tags.SEARCH: search_id} if search_id else {tags.KIND: "sequence", tags.RUN_ID: run_id}
    found = store.find_runs(wanted)
    stored = store.load_json(found[-1].run, "config.json") if found else None
    if stored is not None:
        return taken_up(config, stored, named, free=IRRELEVANT if search_id else FREE_IN_RUN)
    return _on_parent(config, store, named) if config.parent is not None else config


def _on_parent(config: RunConfig, store: Store, named: Collection[str]) -> RunConfig:
    """A first start on a published bank: texts are read as the bank reads them and adapters lie where its do, unless the
    file says otherwise. What a bank was trained with is in its manifest, whoever trained it."""
    from amlora_dist.registry.manifest import FILE, parse_manifest

    version = store.resolve(str(config.parent))
    found = store.load_json(version.run, f"{version.artifact_path}/{FILE}")
    if found is None:
        return config  # who fetches the bank says what is missing
    others = flat(to_mapping(config)).keys() - set(AS_THE_BANK)
    stored = _of_its_manifest(config, parse_manifest(json.dumps(found), f"{version.uri}: {FILE}"))
    return taken_up(config, stored, {*named, *others})


def _of_its_manifest(config: RunConfig, manifest: Manifest) -> dict[str, Any]:
    """``config`` with what a bank's manifest says of how the bank was trained, among the keys ``AS_THE_BANK``."""
    known = flat(completed(manifest.training_configuration))
    if not {"adapters.targets", "adapters.layers"} <= known.keys():  # then its adapters say which layers they adapt
        found = adapted_by(manifest, resolve_base(config.model, home()), known.get("router.layer"))
        known |= {} if found is None else dict(zip(("adapters.targets", "adapters.layers"), found, strict=True))
    made = to_mapping(config)
    for key in AS_THE_BANK:
        if key in known:
            section, _, last = key.rpartition(".")
            (made[section] if section else made)[last] = known[key]
    return made


def adapted_by(manifest: Manifest, base: BaseModel, router_layer: Any) -> tuple[list[str], str] | None:
    """``adapters.targets`` and ``adapters.layers`` that select what a bank's adapters adapt; None where none do.

    Args:
        manifest: of the bank.
        base: its base model.
        router_layer: ``router.layer``, as it was configured.
    """
    from amlora_dist.adapters.targets import default_router_layer, settings_of_paths

    model = meta_model(base)
    layer = router_layer if isinstance(router_layer, int) else default_router_layer(model)
    return settings_of_paths(model, manifest.adapters[-1].targets, layer) if manifest.adapters else None


def taken_up(
    config: RunConfig, stored: Mapping[str, Any], named: Collection[str], *, free: tuple[str, ...] = FREE_IN_RUN
) -> RunConfig:
    """``config`` with the values of ``stored`` for all keys that nobody named: new defaults change no old run.

    ``auto`` counts as not named where what it meant was stored in its place.
    """
    try:
        former = flat(to_mapping(from_mapping(dict(stored))))
    except FaultsError:
        return config  # it no longer fits this code; who compares says what differs
    made = to_mapping(config)
    asked = {key for key in named if not (key in RESOLVED and flat(made)[key] == "auto")}
    for key in flat(made):
        if key not in former or _free(key, free) or any(key == n or key.startswith(f"{n}.") for n in asked):
            continue
        *sections, last = key.split(".")
        inner = made
        for section in sections:
            inner = inner[section]
        inner[last] = as_stored(stored, key, former[key])  # what replaces it may hang on what was named
    return from_mapping(made)


def _free(key: str, free: tuple[str, ...]) -> bool:
    return any(key == other or key.startswith(f"{other}.") for other in free)


def refuse_other_configuration(
    store: Store,
    wanted: dict[str, str],
    mapping: dict[str, Any],
    name: str,
    *,
    free: tuple[str, ...] = FREE_IN_RUN,
    grows: bool = True,
) -> None:
    """The same id goes on with the same configuration, but for what changes no result.

    Args:
        store: which has the configuration of the start before, in the run that carries the tags ``wanted``.
        wanted: tags of that run.
        mapping: the configuration now.
        name: what a message calls it.
        free: keys that may differ.
        grows: whether tasks may be appended.

    Raises:
        UserError: another key differs; names it.
    """
    found = store.find_runs(wanted)
    stored = store.load_json(found[-1].run, "config.json") if found else None
    if stored is not None and (differing := differences(stored, mapping, free=free, grows=grows)):
        raise UserError(f"{name} exists with another configuration: {differing}. Use another id, or undo that")


def differences(
    stored: dict[str, Any], mapping: dict[str, Any], *, free: tuple[str, ...] = FREE_IN_RUN, grows: bool = False
) -> str:
    """What two configurations differ in, but for what changes no result, in words; empty if they do not.

    Args:
        stored: the earlier one, as any version of this project wrote it.
        mapping: the configuration now.
        free: keys that may differ.
        grows: whether tasks may be appended.
    """
    written = stored
    with contextlib.suppress(FaultsError):
        stored = to_mapping(from_mapping(stored))  # what versions since then have added is at what was done then
    stored, mapping = public_configuration(stored), public_configuration(mapping)  # older code kept paths
    then, now = flat(stored), flat(mapping)
    differing = sorted(
        key
        for key in then.keys() | now.keys()
        if then.get(key) != now.get(key)
        and not (key in UNSETTLED and now.get(key) == UNSETTLED[key])
        and not (key == "dtype" and then.get(key) == "auto")  # 0.1 noted what it meant with the data
        and not (grows and key == "tasks")
        and not _free(key, free)
    )
    before, after = list(stored.get("tasks", [])), list(mapping["tasks"])
    if grows and after[: len(before)] != before:
        differing.append(f"tasks (they may be appended to, the run has {len(before)}: {before})")
    return "; ".join(
        key if "(" in key else f"{key}: {as_stored(written, key, then.get(key))!r} then, {now.get(key)!r} now"
        for key in differing
    )


def refuse_other_data(
    store: Store, places: Sequence[dict[str, str]], facts: dict[str, Any], file: str, name: str, *, allow: bool,
    again: str = "train again what has changed",
) -> bool:
    """The same id goes on with the same rows, prompts and base model: others would train its stages again, one after the
    other, as if nothing were there.

    Args:
        store: which has the facts of the start before.
        places: tags of the run that has them, or else of another one.
        facts: ``RunInputs.facts`` now.
        file: the artifact that holds those of then.
        name: what a message calls the id.
        allow: go on all the same.
        again: what that does, for the message.

    Returns:
        Whether something differs.

    Raises:
        UserError: something differs; names each with both digests.
    """
    changed: list[str] = []
    for wanted in places:
        found = store.find_runs(wanted)
        stored = store.load_json(found[-1].run, file) if found else None
        if isinstance(stored, dict):
            changed = _other_data(stored, facts)
            break
    if changed and not allow:
        raise UserError(
            f"{name} was begun with other data: {'; '.join(changed)}. Undo that, use another id, or {again} with"
            " --allow-changed-data (until a run's last stage is there, its `current` stays at the bank of then)"
        )
    return bool(changed)


def _other_data(stored: dict[str, Any], facts: dict[str, Any]) -> list[str]:
    """What differs, in words; of what only one of the two has noted nothing is known."""
    found = []
    base = [one.get("base", {}).get("digest") for one in (stored, facts)]
    if None not in base and base[0] != base[1]:
        found.append(f"model.source: digest {_short(base[0])} then, {_short(base[1])} now")
    dtype = [one.get("dtype") for one in (stored, facts)]
    if None not in dtype and dtype[0] != dtype[1]:
        found.append(f"dtype: {dtype[0]} then, {dtype[1]} now (name it: dtype={dtype[0]})")
    then, now = stored.get("tasks", {}), facts["tasks"]
    for task in [task for task in now if task in then]:
        rows = [one[task].get("digests", {}) for one in (then, now)]
        counts = [one[task].get("rows", {}) for one in (then, now)]
        for split in [split for split in rows[1] if rows[0].get(split) not in (None, rows[1][split])]:
            each = [f"{count.get(split, '?')} rows, digest {_short(row[split])}" for count, row in zip(counts, rows)]  # noqa: B905
            found.append(f"task {task!r}, split {split}: {each[0]} then; {each[1]} now")
        for key, called in (("prompt", "prompt"), ("labels", "labels"), ("metric", "metric")):
            before, after = then[task].get(key), now[task].get(key)
            if key in then[task] and key in now[task] and before != after:
                words = f" ({_short(before)} then, {_short(after)} now)" if _short(before) != _short(after) else ""
                found.append(f"task {task!r}: other {called}{words}")
    return found


def _short(value: Any) -> str:
    text = str(value.get("template", value)) if isinstance(value, dict) else str(value)
    return text[:12] if len(text) == 64 else text[:60]



def check_rule_of_bank(config: RunConfig, stored: Mapping[str, Any], uri: str) -> None:
    """See that a stage added to a published bank reads texts as the bank does.

    Args:
        config: of the run, resolved.
        stored: the bank's training configuration, as any version of this project wrote it.
        uri: of the bank.

    Raises:
        UserError: it does not; says which keys to set.
    """
    then, now = flat(completed(stored)), flat(to_mapping(config))
    odd = [key for key in OF_A_BANK if key in then and then[key] != now.get(key)]
    if odd:
        found = ", ".join(f"{key} {now.get(key)!r}" for key in odd)
        fix = " ".join(f"{key}={json.dumps(then[key])}" for key in odd)
        raise UserError(f"parent: found {found}, expected those of {uri}, which a bank has for life; give the run {fix}")


def check_layers_of_bank(
    config: RunConfig, manifest: Manifest, uri: str, base: BaseModel, method: Method
) -> None:
    """See that a stage added to a published bank adapts the layers that the bank's adapters adapt.

    Words that differ may mean the same layers: these are compared, on the model without its weights.

    Args:
        config: of the run, resolved.
        manifest: of the bank.
        uri: of the bank.
        base: the base model of both.
        method: of the run.

    Raises:
        UserError: it does not; says which keys to set.
    """
    keys = ("adapters.targets", "adapters.layers")
    then, now = flat(completed(manifest.training_configuration)), flat(to_mapping(config))
    odd = [key for key in keys if then.get(key) != now[key]]
    if not odd or not manifest.adapters:
        return
    from amlora_dist.adapters.targets import default_router_layer

    model, layer = meta_model(base), config.router.layer
    layer = default_router_layer(model) if layer is None else layer
    if {one.path for one in method.layers.targets(model, config.adapters, layer)} == set(manifest.adapters[-1].targets):
        return
    if not set(keys) <= then.keys() and (found := adapted_by(manifest, base, layer)) is not None:
        then |= dict(zip(keys, found, strict=True))
    differing = ", ".join(f"{key} {now[key]!r}" for key in odd)
    fix = " ".join(f"{key}={json.dumps(then[key], separators=(',', ':'))}" for key in keys if key in then)
    how = f"give the run {fix}" if fix else "no settings select them: start without a parent, or take another bank"
    raise UserError(f"parent: found {differing}, expected the layers that {uri} adapts, which a bank has for life; {how}")
