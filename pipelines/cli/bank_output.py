"""What ``versions``, ``pull``, ``push``, ``diff``, ``alias``, ``verify`` and ``prune`` do."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from amlora_dist.config.loading import home
from amlora_dist.errors import BankError
from amlora_dist.registry import tags
from amlora_dist.registry.bank_folder import check_list, check_publishable, read_bank
from amlora_dist.registry.housekeeping import aliases, candidates, point_alias, remove
from amlora_dist.registry.hub import SCHEME, check_repository, parse_hub_uri, pull_from_hub, push_bank
from amlora_dist.registry.manifest import Manifest, read_manifest
from amlora_dist.registry.newest import newest
from amlora_dist.registry.pulling import manifest_of, pull_bank
from amlora_dist.registry.store import Store
from pipelines.cli.output import print_json, stdout_to_stderr
from pipelines.cli.tables import console_for
from pipelines.cluster.resources import check_folder

if TYPE_CHECKING:
    from amlora_dist.registry.signing import Trust
    from amlora_dist.registry.transfer import TransferProgress
    from amlora_dist.registry.versions import Version


def open_store(tracking_uri: str | None, *, reads: bool = False) -> Store:
    """The store of a command, that only ``reads`` or not, without a word of MLflow on standard output."""
    with stdout_to_stderr():
        return Store.open(home(), tracking_uri, reads=reads)


# ---- versions -------------------------------------------------------------------------------------------------


def show_models(tracking_uri: str | None, *, as_json: bool) -> None:
    """Print the registered models that hold banks, each with its aliases and its newest version that counts."""
    store = open_store(tracking_uri, reads=True)
    listed: list[dict[str, Any]] = []
    with stdout_to_stderr():
        for name in store.registered_models():
            good = store.counted_versions(name)
            if (last := newest(good)) is not None:
                listed.append({
                    "name": name, "versions": len(good), "newest": last.number, "task": last.tags.get(tags.TASK, ""),
                    "aliases": dict(aliases(store, name)),
                })  # fmt: skip
    if as_json:
        print_json(listed)
        return
    if not listed:
        print(f"no banks at {store.connection.shown}: amlora run CONFIG makes the first one", file=sys.stderr)
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("name", "versions", "newest", "its task", "aliases"):
        table.add_column(heading, overflow="fold")
    for one in listed:
        named = ", ".join(f"{alias}: {number}" for alias, number in one["aliases"].items())
        table.add_row(one["name"], str(one["versions"]), str(one["newest"]), one["task"], named)
    console_for().print(table)


def show_versions(name: str, tracking_uri: str | None, *, as_json: bool) -> None:
    """Print the versions of a registered model.

    Raises:
        UserError: there is no such model.
    """
    store = open_store(tracking_uri, reads=True)
    with stdout_to_stderr():
        listed = list(_version_lines(store, name))
    if as_json:
        print_json(listed)
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("version", "aliases", "tasks", "last task", "average", "run", "note"):
        table.add_column(heading, overflow="fold")
    for line in listed:
        score = line["average_accuracy"]
        table.add_row(
            str(line["version"]),
            ", ".join(line["aliases"]),
            str(len(line["tasks"])),
            line["tasks"][-1] if line["tasks"] else "",
            "" if score is None else f"{score:.3f}",
            line["run_id"],
            line["note"],
        )
    console_for().print(table)


def _version_lines(store: Store, name: str) -> Iterator[dict[str, Any]]:
    named = aliases(store, name)
    good = {version.number for version in store.counted_versions(name)}
    for version in store.versions(name):
        note = "" if version.number in good else "does not count: written by a driver that had lost its run"
        if reused := version.tags.get(tags.REUSED_FROM):
            again = tags.ADAPTER_OF in version.tags
            how = f"adapter reused from {reused}, statistics made again" if again else f"training reused from {reused}"
            note = note or how
        known: list[str] = []
        scores: dict[str, float] = {}
        try:
            manifest = manifest_of(store, version)
            known, scores = manifest.tasks, last_scores(manifest)
        except BankError as error:
            note = f"damaged: {error}"
        yield {
            "version": version.number,
            "aliases": [alias for alias, number in named.items() if number == version.number],
            "tasks": known,
            "average_accuracy": sum(scores.values()) / len(scores) if scores else None,
            "run_id": version.run_id,
            "counts": version.number in good,
            "note": note,
        }


def last_scores(manifest: Manifest) -> dict[str, float]:
    """Accuracy of the bank's own tasks after its last stage, as far as it was measured."""
    matrix = manifest.accuracy_matrix
    last = dict(zip(matrix.tasks, matrix.accuracy[-1], strict=True)) if matrix.accuracy else {}
    found = {task: last.get(task) for task in manifest.tasks}
    return {task: score for task, score in found.items() if score is not None}


# ---- pull, alias, verify, prune -------------------------------------------------------------------------------


def pull_to(
    uri: str, dest: Path | None, tracking_uri: str | None, *, statistics: bool, trust: Trust | None = None
) -> str:
    """Pull a version, or a repository of the Hub; says where it lies."""
    if dest is not None:
        check_folder(dest, "DEST")
    if uri.startswith(SCHEME):
        repository, _ = parse_hub_uri(uri)
        check = None if trust is None else trust.check
        whole = statistics or (trust is not None and trust.key is not None)
        with stdout_to_stderr(), _bar() as progress:
            dest = dest or Path(repository.rpartition("/")[2])
            folder = pull_from_hub(uri, dest, progress=progress, statistics=whole, check=check)
        return f"{uri} is in {folder}"
    store = open_store(tracking_uri, reads=True)
    with stdout_to_stderr(), _bar() as progress:
        version = store.resolve(uri)
        dest = dest or Path(f"{version.registered_model.replace(' ', '_')}-{version.number}")
        folder = pull_bank(
            store, version, dest, nearby=[home() / "banks"], progress=progress, statistics=statistics, trust=trust
        )
    return f"{version.uri} is in {folder}"


def push(
    bank: str, repository: str, tracking_uri: str | None, *, public: bool, base_model: str | None, statistics: bool
) -> str:
    """Push a bank to a repository of the Hub; says where it is.

    Raises:
        UserError: see ``push_bank``.
    """
    options: dict[str, Any] = {"public": public, "base_model": base_model, "statistics": statistics}
    check_repository(repository)
    if not bank.startswith("models:"):
        with stdout_to_stderr():
            return f"{bank} is at {push_bank(Path(bank).expanduser(), repository, **options)}"
    store = open_store(tracking_uri, reads=True)
    with stdout_to_stderr():
        version = store.resolve(bank)
        with _fetched(store, version) as folder:
            return f"{version.uri} is at {push_bank(folder, repository, **options)}"


def point(name: str, number: int, alias: str, tracking_uri: str | None, trust: Trust | None = None) -> str:
    """Move an alias, if the version is what is demanded; says from where."""
    store = open_store(tracking_uri)
    with stdout_to_stderr():
        if trust is not None:
            check_stored(store, store.resolve(f"models:/{name}/{number}"), trust)
        before = aliases(store, name).get(alias)
        version = point_alias(store, name, number, alias)
    moved = f" (before: version {before})" if before not in (None, number) else ""
    return f"models:/{name}@{alias} is {version.uri}{moved}"


def check_stored(store: Store, version: Version, trust: Trust) -> None:
    """See that a version, as the store has it, is what is demanded.

    Raises:
        BankError: it is not.
    """
    if trust.any:
        with _fetched(store, version, trust):
            pass


def verify_bank(bank: str, tracking_uri: str | None) -> str:
    """Check every part of a bank; says what was checked.

    Raises:
        BankError: what is wrong.
    """
    if not bank.startswith("models:"):
        return _verified(Path(bank).expanduser(), bank)
    store = open_store(tracking_uri, reads=True)
    with stdout_to_stderr():
        version = store.resolve(bank)
        with _fetched(store, version) as folder:
            return _verified(folder, version.uri)


def sign_bank(bank: str, key: Path, tracking_uri: str | None) -> str:
    """Sign a bank's folder, or a version: its signature then lies with it in the store; says where.

    Raises:
        BankError: it is not good as it is.
    """
    from amlora_dist.registry.signing import sign

    if not bank.startswith("models:"):
        folder = Path(bank).expanduser()
        check_list(folder, read_bank(folder).manifest, whole=True)
        return f"{sign(folder, key)} signs {folder}"
    store = open_store(tracking_uri)
    with stdout_to_stderr():
        version = store.resolve(bank)
        with _fetched(store, version) as folder:
            file = sign(folder, key)
            with tempfile.TemporaryDirectory(prefix="signature-") as tmp:
                shutil.copyfile(file, Path(tmp) / file.name)
                store.log_artifacts(version.run, Path(tmp), version.artifact_path)
    return f"{version.uri} is signed ({file.name} among its artifacts)"


@contextmanager
def _fetched(store: Store, version: Version, trust: Trust | None = None) -> Iterator[Path]:
    """The whole folder of a version, as the store has it: not ``pull_bank``, which takes copies nearby."""
    place = home() / "cache"
    place.mkdir(parents=True, exist_ok=True)
    check = None if trust is None else trust.check
    with _bar() as progress, tempfile.TemporaryDirectory(prefix="verify-", dir=place) as tmp:
        yield store.pull_version(version, Path(tmp) / "bank", progress, check=check)


def _verified(folder: Path, name: str) -> str:
    bank = read_bank(folder)
    check_list(folder, bank.manifest, whole=True)
    check_publishable(bank.manifest, bank.adapters)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    parts = f"{len(bank.adapters)} adapters, router, {len(bank.statistics)} of {len(bank.adapters)} statistics"
    return f"{name}: good; {parts}, {size} bytes, digest {bank.manifest.digest()}"


def prune_versions(
    name: str, numbers: Sequence[int] | None, tracking_uri: str | None, *, yes: bool
) -> Iterator[str]:
    """Delete versions, or say what would be deleted and what has to stay.

    Raises:
        UserError: a version that was named has to stay.
    """
    store = open_store(tracking_uri)
    with stdout_to_stderr():
        found = candidates(store, name, numbers)
        free = [one for one in found if not one.reasons]
        if yes:
            remove(store, found if numbers else free)
    for one in found:
        if one.reasons:
            yield f"{one.version.uri} stays: {'; '.join(one.reasons)}"
    for one in free:
        counts = "" if one.counts else " (does not count)"
        yield f"{one.version.uri}{counts} {'deleted' if yes else 'would be deleted; add --yes'}"
    if not found:
        yield f"models:/{name}: every version counts; name the versions to delete"


# ---- diff -----------------------------------------------------------------------------------------------------


def show_difference(first: str, second: str, tracking_uri: str | None, *, as_json: bool) -> None:
    """Print what two banks differ in."""
    with stdout_to_stderr():
        before, after = (_manifest(bank, tracking_uri) for bank in (first, second))
    found = difference(before, after)
    if as_json:
        print_json(found)
        return
    console = console_for()
    console.print(f"{first} -> {second}")
    for key in ("base", "prompt", "router"):
        console.print(f"  {key:9} {found[key]}")
    for task, change in found["adapters"].items():
        scores = found["scores"].get(task)
        shown = "" if scores is None else f"  accuracy {_fraction(scores[0])} -> {_fraction(scores[1])}"
        console.print(f"  {task}: {change}{shown}", markup=False)


def difference(before: Manifest, after: Manifest) -> dict[str, Any]:
    """What two banks differ in: ``base``, ``prompt``, ``router`` as words, ``adapters`` and ``scores`` by task."""
    old = {line.task: line for line in before.adapters}
    new = {line.task: line for line in after.adapters}
    adapters: dict[str, str] = {}
    for task in [*old, *(task for task in new if task not in old)]:
        if task not in new:
            adapters[task] = "removed"
        elif task not in old:
            adapters[task] = f"added (adapter {new[task].index}, rank {new[task].rank})"
        elif old[task].digest == new[task].digest:
            adapters[task] = "same adapter"
        else:
            adapters[task] = f"another adapter (rank {old[task].rank} -> {new[task].rank})"
    scores_before, scores_after = last_scores(before), last_scores(after)
    same_base = before.base.identity == after.base.identity
    return {
        "base": "the same" if same_base else f"{before.base.source} -> {after.base.source}",
        "prompt": "the same" if before.bank_template == after.bank_template else "another template",
        "router": _router_difference(before, after),
        "adapters": adapters,
        "scores": {
            task: [scores_before.get(task), scores_after.get(task)]
            for task in adapters
            if task in scores_before or task in scores_after
        },
    }


def _router_difference(before: Manifest, after: Manifest) -> str:
    if before.router.digest == after.router.digest:
        return "the same"
    old, new = before.router.settings, after.router.settings
    names = [key for key in sorted(old.keys() | new.keys()) if key != "tasks" and old.get(key) != new.get(key)]
    plain = [key for key in names if not any(isinstance(one.get(key), (list, dict)) for one in (old, new))]
    changed = [f"{key} {old.get(key)} -> {new.get(key)}" for key in plain]
    if tables := [key for key in names if key not in plain]:  # of every task or label: too long to read
        changed.append(f"other {', '.join(tables)}")
    kind = before.router.kind if before.router.kind == after.router.kind else f"{before.router.kind} -> {after.router.kind}"
    return "; ".join([kind, *changed]) if changed else f"{kind}, other keys"


def _manifest(bank: str, tracking_uri: str | None) -> Manifest:
    if not bank.startswith("models:"):
        return read_manifest(Path(bank).expanduser())
    store = Store.open(home(), tracking_uri, reads=True)
    return manifest_of(store, store.resolve(bank))


def _fraction(score: float | None) -> str:
    return "-" if score is None else f"{score:.3f}"


# ---- what all need --------------------------------------------------------------------------------------------


@contextmanager
def _bar() -> Iterator[TransferProgress | None]:
    """A bar of parts on standard error where that is a terminal; nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    with Bar(BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), console=console, transient=True) as bar:
        task = bar.add_task("looking", total=None)
        yield lambda done, total, name: bar.update(task, completed=done, total=total, description=name)
