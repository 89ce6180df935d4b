"""Looking after versions: aliases, what refers to what, and removing what nothing refers to."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from amlora_dist.errors import BankError, UserError
from amlora_dist.registry import leases, tags
from amlora_dist.registry.connection import is_code, mlflow_errors
from amlora_dist.registry.pulling import manifest_of
from amlora_dist.registry.runs import check_model_name

if TYPE_CHECKING:
    from amlora_dist.registry.manifest import Manifest
    from amlora_dist.registry.store import Store
    from amlora_dist.registry.versions import Version

log = logging.getLogger(__name__)


@dataclass(slots=True)
class RemovalCandidate:
    """A version that may be removed, and what speaks against it."""

    version: Version
    counts: bool
    """False: written by a driver that had lost its run."""
    damage: str = ""
    """Why its manifest cannot be read, if it cannot."""
    reasons: list[str] = field(default_factory=list)
    """Why it has to stay; empty: it can go."""


def aliases(store: Store, registered_model: str) -> dict[str, int]:
    """Aliases of a registered model and the version each points at.

    Raises:
        UserError: there is no such registered model.
    """
    check_model_name(registered_model)
    connection = store.connection
    try:
        model = connection.call(
            "read a registered model", connection.client.get_registered_model, registered_model
        )
    except mlflow_errors() as error:
        if is_code(error, "RESOURCE_DOES_NOT_EXIST"):
            known = ", ".join(store.registered_models()) or "none"
            raise UserError(f"no registered model {registered_model!r} at {connection.shown}; there are: {known}") from None
        raise
    return {alias: int(number) for alias, number in sorted(model.aliases.items())}


def check_alias(alias: str) -> None:
    """Refuse an alias that is not for people to move, or that MLflow does not take.

    Raises:
        UserError: says which.
    """
    if alias.lower() in (tags.CURRENT, tags.LATEST):  # some databases do not tell cases apart
        raise UserError(f"alias: {alias!r} follows the newest version by itself; take another name, such as champion")
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{0,99}", alias) or re.fullmatch(r"[vV][0-9]+", alias):
        raise UserError(f"alias: found {alias!r}, expected letters, digits, _ and -, and not a version number (v3)")


def point_alias(store: Store, registered_model: str, number: int, alias: str) -> Version:
    """Point an alias at a version that counts.

    Raises:
        UserError: no such version, or an alias that is not for people to move.
    """
    check_alias(alias)
    version = store.resolve(f"models:/{registered_model}/{number}")
    store.set_alias(registered_model, alias, version)
    return version


def crown_first(store: Store, version: Version, guard: Callable[[], None]) -> int:
    """Give the alias ``champion`` to the version that a complete run ends with, where its registered model never had one.

    A model is noted to have had one, so that an alias which a person has deleted is not set again.

    Args:
        store: which has the version.
        version: the run's last.
        guard: called right before each write.

    Returns:
        The number of the version that has the alias now; 0 where none has.
    """
    name, connection = version.registered_model, store.connection
    model = connection.call("read a registered model", connection.client.get_registered_model, name)
    there = model.aliases.get(tags.CHAMPION)
    if there is None and tags.FIRST_CHAMPION in model.tags:
        return 0
    if there is None:
        store.set_alias(name, tags.CHAMPION, version, guard)
        there = str(version.number)
    if tags.FIRST_CHAMPION not in model.tags:
        guard()
        connection.call(
            "tag a registered model", connection.client.set_registered_model_tag, name, tags.FIRST_CHAMPION, there
        )
    return int(there)


def candidates(store: Store, registered_model: str, numbers: Sequence[int] | None = None) -> list[RemovalCandidate]:
    """Versions to remove with what speaks against each: an alias, another version that refers to its storage or whose
    manifest cannot be read (nobody knows what it refers to, until it is deleted itself), a run at work.

    Neither another damaged version nor the alias ``current``, which moves on to the newest one left, keeps a damaged one.

    Args:
        store: which has them.
        registered_model: whose versions.
        numbers: of the versions; None: those that do not count (written by drivers that had lost their run).

    Raises:
        UserError: no such model or version.
    """
    named = aliases(store, registered_model)
    versions = store.versions(registered_model)
    counted = {version.number for version in store.counted_versions(registered_model)}
    if numbers is None:
        wanted = [version for version in versions if version.number not in counted]
    else:
        there = {version.number: version for version in versions}
        if missing := sorted(set(numbers) - there.keys()):
            raise UserError(f"models:/{registered_model}: no version {missing[0]}; there are {sorted(there)}")
        wanted = [there[number] for number in sorted(set(numbers))]
    leaving = {version.uri for version in wanted}
    references, unknown = _references(store, leaving)
    found = []
    for version in wanted:
        own = [alias for alias, number in named.items() if number == version.number]
        one = RemovalCandidate(version, version.number in counted, _damage(store, version))
        one.reasons += [f"alias {alias!r} points at it" for alias in own if alias != tags.CURRENT or not one.damage]
        users = sorted(uri for uri, parts in references.items() if uri not in leaving and parts(version))
        one.reasons += [f"{uri} keeps parts there" for uri in users]
        one.reasons += [] if one.damage else unknown  # else two damaged versions would keep each other for ever
        if (state := leases.read_state(store.lease_entries, leases.RUN_KEY + version.run_id)) and not state.released:
            one.reasons.append(f"run {version.run_id!r} is held by a driver (or died without letting go: run it again)")
        found.append(one)
    return found


def remove(store: Store, chosen: Sequence[RemovalCandidate]) -> None:
    """Delete versions and what they store; first the versions, so that nobody finds half of one.

    Raises:
        UserError: one of them has to stay; nothing is deleted.
    """
    if needed := [one for one in chosen if one.reasons]:
        raise UserError(f"{needed[0].version.uri} has to stay: {'; '.join(needed[0].reasons)}; nothing was deleted")
    connection = store.connection
    for one in chosen:
        version = one.version
        connection.call(
            "delete a version", connection.client.delete_model_version, version.registered_model, str(version.number)
        )
        log.info("deleted %s", version.uri)
    for one in chosen:
        _delete_artifacts(store, one.version)
    for registered_model in {one.version.registered_model for one in chosen if one.damage}:
        store.ensure_current(registered_model, lambda: None, backwards=True)


def _delete_artifacts(store: Store, version: Version) -> None:
    if version.artifact_path:
        store.delete_artifacts(version.run, version.artifact_path)


def _references(store: Store, leaving: set[str]) -> tuple[dict[str, Callable[[Version], bool]], list[str]]:
    """For every version that stays, whether it keeps parts in the storage of a given one; and of those whose manifest
    cannot be read, that nobody knows, and the way out."""
    found: dict[str, Callable[[Version], bool]] = {}
    unknown: list[str] = []
    for name in store.registered_models():
        for version in store.versions(name):
            if version.uri in leaving or not version.artifact_path:
                continue
            try:
                found[version.uri] = _uses(manifest_of(store, version), version)
            except BankError as error:
                unknown.append(
                    f"{version.uri} may keep parts there, for its manifest cannot be read ({_first_line(error)}): fix it,"
                    f" or delete it first with `amlora prune {name} {version.number} --yes`"
                )
    return found, unknown


def _damage(store: Store, version: Version) -> str:
    if not version.artifact_path:
        return ""
    try:
        manifest_of(store, version)
    except BankError as error:
        return _first_line(error)
    return ""


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _uses(manifest: Manifest, own: Version) -> Callable[[Version], bool]:
    parts = [line.stored for line in manifest.adapters] + [part.stored for part in manifest.statistics]
    places = {(part.run, part.artifact_path) for part in parts if part is not None}

    def uses(other: Version) -> bool:
        below = f"{other.artifact_path}/"
        same_folder = (own.run, own.artifact_path) == (other.run, other.artifact_path)
        return same_folder or any(run == other.run and path.startswith(below) for run, path in places)

    return uses
