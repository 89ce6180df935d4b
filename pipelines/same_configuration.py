"""The same id goes on with the same configuration: what may differ between two starts, and what is refused."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from amlora_dist.config import RunConfig, flat, from_mapping, home, to_mapping
from amlora_dist.errors import FaultsError, UserError

if TYPE_CHECKING:
    from amlora_dist.registry.store import Store

IRRELEVANT = (
    "workers", "min_workers", "placement", "storage", "data_dir", "mlflow", "deepspeed", "evaluation.batch_size", "name",
    "training.micro_batch_size", "training.checkpoint_every", "training.gradient_checkpointing",
    "training.cache_trunk", "training.cache_trunk_gb",
)  # fmt: skip
"""Keys that may differ between two starts: they change no result."""
FREE_IN_RUN = (*IRRELEVANT, "search")
"""The same of a run, which does not read the search."""
FREE_IN_SEARCH = (*IRRELEVANT, "search.max_concurrent", "search.retries", "search.gpus")
"""The same of a search."""


OF_THE_BANK = ("adapters.targets", "adapters.layers", "router.layer")
"""Keys in which a run has to agree with the bank that it goes on from."""
RESOLVED = ("model.attention",)
"""Keys whose value ``auto`` is replaced, before anything is stored, by what it means where the run starts."""


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
        return taken_up(config, stored, named, free=FREE_IN_SEARCH if search_id else FREE_IN_RUN)
    return _on_parent(config, store, named) if config.parent is not None else config


def _on_parent(config: RunConfig, store: Store, named: Collection[str]) -> RunConfig:
    """A first start on a published bank: adapters lie where the bank's do, unless the file says otherwise."""
    from amlora_dist.registry import tags

    run_id = store.resolve(str(config.parent)).run_id
    found = store.find_runs({tags.KIND: "sequence", tags.RUN_ID: run_id}) if run_id else []
    stored = store.load_json(found[-1].run, "config.json") if found else None
    if stored is None:  # a bank that was brought from elsewhere
        return config
    others = flat(to_mapping(config)).keys() - set(OF_THE_BANK)
    return taken_up(config, stored, {*named, *others})


def taken_up(
    config: RunConfig, stored: Mapping[str, Any], named: Collection[str], *, free: tuple[str, ...] = FREE_IN_RUN
) -> RunConfig:
    """``config`` with the values of ``stored`` for all keys that nobody named: new defaults change no old run.

    ``auto`` counts as not named where what it meant was stored in its place.
    """
    try:
        former = flat(to_mapping(from_mapping(dict(stored))))
    except FaultsError:
        return config  # it no longer fits this code; what differs is told by who compares
    made = to_mapping(config)
    asked = {key for key in named if not (key in RESOLVED and flat(made)[key] == "auto")}
    for key in flat(made):
        if key not in former or _free(key, free) or any(key == n or key.startswith(f"{n}.") for n in asked):
            continue
        *sections, last = key.split(".")
        inner = made
        for section in sections:
            inner = inner[section]
        inner[last] = former[key]
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
    if stored is not None and (told := differences(stored, mapping, free=free, grows=grows)):
        raise UserError(f"{name} exists with another configuration: {told}. Use another id, or undo that")


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
    with contextlib.suppress(FaultsError):
        stored = to_mapping(from_mapping(stored))  # what versions since then have added is at what was done then
    differing = sorted(
        key
        for key in flat(stored).keys() | flat(mapping).keys()
        if flat(stored).get(key) != flat(mapping).get(key)
        and not (grows and key == "tasks")
        and not _free(key, free)
    )
    before, now = list(stored.get("tasks", [])), list(mapping["tasks"])
    if grows and now[: len(before)] != before:
        differing.append(f"tasks (they may be appended to, the run has {len(before)}: {before})")
    return "; ".join(
        f"{key}: {flat(stored).get(key)!r} then, {flat(mapping).get(key)!r} now" if "(" not in key else key
        for key in differing
    )

