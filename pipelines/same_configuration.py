"""The same id goes on with the same configuration: what may differ between two starts, and what is refused."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from amlora_dist.config import from_mapping, to_mapping
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
        stored = to_mapping(from_mapping(stored))  # what this version of the code has added stands at its default
    differing = sorted(
        key
        for key in _flat(stored).keys() | _flat(mapping).keys()
        if _flat(stored).get(key) != _flat(mapping).get(key)
        and not (grows and key == "tasks")
        and not any(key == other or key.startswith(f"{other}.") for other in free)
    )
    before, now = list(stored.get("tasks", [])), list(mapping["tasks"])
    if grows and now[: len(before)] != before:
        differing.append(f"tasks (they may be appended to, the run has {len(before)}: {before})")
    return "; ".join(
        f"{key}: {_flat(stored).get(key)!r} then, {_flat(mapping).get(key)!r} now" if "(" not in key else key
        for key in differing
    )


def _flat(mapping: dict[str, Any], above: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, dict) and value:
            out |= _flat(value, f"{above}{key}.")
        else:
            out[f"{above}{key}"] = value
    return out
