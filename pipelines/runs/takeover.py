"""Before a published stage is taken over, the store is asked whether it still has it; what is gone and lies in the storage
is put back where it was."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from amlora_dist.digests import tensors_digest
from amlora_dist.errors import BankError, UserError
from amlora_dist.files import copy_file
from amlora_dist.registry import tags
from amlora_dist.registry.bank_files import BankFile, fits
from amlora_dist.registry.bank_folder import write_frame
from amlora_dist.registry.pulling import manifest_of
from amlora_dist.registry.transfer import missing_files
from amlora_dist.training.result import STATISTICS, Result, in_bank, read_result, renew
from pipelines.runs.bank_versions import parent_folder

if TYPE_CHECKING:
    from amlora_dist.registry.manifest import AdapterEntry, Manifest
    from amlora_dist.registry.store import Store
    from amlora_dist.registry.versions import Version

log = logging.getLogger(__name__)


def first_there(store: Store, versions: Sequence[Version], storage: Path) -> Version | None:
    """The first of some versions of which the store still has everything; as ``is_there``."""
    return next((version for version in versions if is_there(store, version, storage)), None)


def is_there(store: Store, version: Version, storage: Path) -> bool:
    """Whether the store has all of a version, its own parts and those it refers to; what is gone is repaired, if it can be.

    Args:
        store: which has registered it.
        version: that is about to be taken over.
        storage: folder of trained stages and of banks that were pulled.
    """
    try:
        manifest = manifest_of(store, version)
        lost = missing_files(store, manifest, version.run, version.artifact_path, store.seen)
    except BankError as error:
        log.warning("%s is not taken over: %s", version.uri, error)
        return False
    if not lost:
        return True
    places = ", ".join(file.path for file in lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
    with tempfile.TemporaryDirectory(prefix="repair-", dir=_made(storage / "publishing")) as name:
        made = Path(name)
        _write_parts(made, manifest, lost, storage)
        for folder in _pulled_banks(version, storage):
            for file in lost:
                if not fits(made, file.path, manifest) and _is_listed(manifest, file) and fits(folder, file.path, manifest):
                    copy_file(folder / file.path, made / file.path)
        if missing := [file.path for file in lost if not fits(made, file.path, manifest)]:
            log.warning(
                "%s is not taken over: the store has lost %s, and the storage has no %s", version.uri, places, missing[0]
            )
            return False
        for file in lost:
            _put_back(store, version, made, file)
    store.seen.clear()  # what other versions were seen with is looked at again
    log.warning("%s: the store had lost %s; put back from %s", version.uri, places, storage.name)
    return True


def _write_parts(made: Path, manifest: Manifest, lost: list[BankFile], storage: Path) -> None:
    """What follows from the manifest, and what the storage has of the stages that are concerned."""
    wanted = {file.path for file in lost}
    write_frame(made, manifest, manifest.adapters)
    statistics = {part.index: part.digest for part in manifest.statistics}
    for line in manifest.adapters:
        paths = in_bank(line)
        if not wanted.intersection(paths.values()):
            continue
        for folder, result in _results(line, statistics.get(line.index), storage):
            if tensors_digest(result.continuation()) != statistics.get(line.index):
                del paths[STATISTICS]
            for name, path in paths.items():
                copy_file(folder / name, made / path)
            break


def _results(line: AdapterEntry, statistics: str | None, storage: Path) -> Iterator[tuple[Path, Result]]:
    """The trained stage of an adapter, as far as the storage has it."""
    stage, parent = storage / "stages" / line.training_fingerprint / "trained", parent_folder(storage, line, statistics)
    for folder in (stage, parent, parent.with_name(line.digest)):  # the last is where parents were before
        if folder.is_dir():
            try:
                renew(folder, line.index)
                result = read_result(folder)
            except (BankError, UserError) as error:
                log.warning("%s: passed over: %s", folder, error)
                continue
            if result.adapter.digest() == line.digest:
                yield folder, result


def _pulled_banks(version: Version, storage: Path) -> list[Path]:
    """Copies of the version that lie in the storage."""
    digest = version.tags.get(tags.MANIFEST_DIGEST, "")[:12]
    return [storage / "banks" / f"{version.registered_model}-{version.number}-{digest}"]


def _is_listed(manifest: Manifest, file: BankFile) -> bool:
    """A file without a digest of its own is not taken from a folder that anybody may have changed."""
    return file.path in (manifest.files or {})


def _put_back(store: Store, version: Version, made: Path, file: BankFile) -> None:
    run = version.run if file.stored is None else file.stored.run
    place = f"{version.artifact_path}/{file.path}" if file.stored is None else file.stored.artifact_path
    with tempfile.TemporaryDirectory(prefix="file-", dir=made.parent) as name:
        above, _, last = place.rpartition("/")
        copy_file(made / file.path, Path(name) / last)
        store.log_artifacts(run, Path(name), above or None)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
