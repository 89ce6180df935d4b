"""A run's bank as versions of a registered model: what a new version's folder holds, and the adapters of published ones as
folders that workers can read."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import amlora_dist
from amlora_dist.adapters.statistics import TaskStatistics
from amlora_dist.digests import value_digest
from amlora_dist.errors import BankError
from amlora_dist.files import copy_file
from amlora_dist.registry import tags
from amlora_dist.registry.bank_folder import statistics_entry, write_version
from amlora_dist.registry.manifest import (
    AccuracyMatrix,
    AdapterEntry,
    BaseEntry,
    LearnedTask,
    Lineage,
    Manifest,
    RouterEntry,
    Stored,
    adapter_folder,
    read_manifest,
    statistics_file,
)
from amlora_dist.tasks.prompts import BANK_TEMPLATE
from amlora_dist.tasks.task_entry import task_entry
from amlora_dist.training.result import STATISTICS, Result, in_bank, is_whole, new_result, read_result
from amlora_dist.training.stage_spec import Parent

if TYPE_CHECKING:
    from torch import Tensor

    from amlora_dist.registry.store import Store
    from amlora_dist.registry.versions import Placement, Version
    from pipelines.runs.inputs import RunInputs
    from pipelines.runs.results import Matrices
    from pipelines.runs.stage_record import StageRecord

log = logging.getLogger(__name__)


class BankVersions:
    """Reads and writes them for one run; what was read once is kept.

    Args:
        store: which has them.
        storage: folder in which they lie.
    """

    def __init__(self, store: Store, storage: Path) -> None:
        self._store, self._storage = store, storage
        self._manifests: dict[str, Manifest] = {}
        self._statistics: dict[str, TaskStatistics] = {}

    def manifest_of(self, version: Version) -> Manifest:
        """The manifest of a published version."""
        if version.uri not in self._manifests:
            self._manifests[version.uri] = read_manifest(self._pulled(version))
        return self._manifests[version.uri]

    def keep(self, version: Version, manifest: Manifest) -> None:
        """Keep the manifest of a version that was just published."""
        self._manifests[version.uri] = manifest

    def at_hand(self, version: Version | None) -> Manifest | None:
        """The manifest of a version, if nothing need be read for it."""
        return None if version is None else self._manifests.get(version.uri)

    def materialise(self, version: Version) -> list[Parent]:
        """The adapters of a published version as folders that workers can read; fetched once."""
        pulled = self._pulled(version)
        manifest = read_manifest(pulled)
        return [self._materialised(pulled, manifest, line) for line in manifest.adapters]

    def newest(self, version: Version) -> Parent:
        """The newest adapter of a published version, as ``materialise``."""
        pulled = self._pulled(version)
        manifest = read_manifest(pulled)
        return self._materialised(pulled, manifest, manifest.adapters[-1])

    def _materialised(self, pulled: Path, manifest: Manifest, line: AdapterEntry) -> Parent:
        statistics = {part.index: part.digest for part in manifest.statistics}
        folder = parent_folder(self._storage, line, statistics.get(line.index))
        if not is_whole(folder):
            _copy_result(pulled, line, folder)
        return Parent(line.task, line.digest, str(folder))

    def copy_newest(self, version: Version, folder: Path) -> None:
        """Make ``folder`` what training left of a published version's stage."""
        pulled = self._pulled(version)
        _copy_result(pulled, read_manifest(pulled).adapters[-1], folder)

    def write(
        self,
        folder: Path,
        inputs: RunInputs,
        parents: Sequence[Parent],
        record: StageRecord,
        *,
        below: Version | None,
        placement: Placement,
        matrices: Matrices,
        about: Mapping[str, Any],
    ) -> Manifest:
        """Write the folder of a new version.

        Args:
            folder: to be made.
            inputs: of the run.
            parents: the bank's adapters, the new one last.
            record: of the stage. Files of the version that it is taken over from are referred to, not copied.
            below: this run's version before.
            placement: where the new version's files will be kept.
            matrices: of the run so far.
            about: ``run_id``, ``epoch``, ``training_configuration`` and ``plain_text`` of the manifest.
        """
        newest = read_result(Path(parents[-1].folder))
        before = None if below is None else self.manifest_of(below)
        index, spec = len(parents), inputs.specs.get(record.task)
        source, (stored, stored_statistics) = record.source, self._stored(placement, record, index)
        entry = replace(
            newest.entry,
            parent=before.parent_digest() if before else None,
            stored=stored,
            task_spec=None if spec is None else task_entry(spec),
            learned=_learned(inputs) if spec is None else None,
        )
        statistics = statistics_entry(index, record.task, newest.continuation(), stored_statistics)
        tensors, router = self._router(inputs, parents, newest)
        known = {} if before is None else dict(before.files or {})
        if source is not None:
            theirs = self.manifest_of(source)
            listed = theirs.files or {}
            known |= {path: listed[path] for path in in_bank(theirs.adapters[-1]).values() if path in listed}
        manifest = Manifest(
            base=BaseEntry.of(inputs.base),
            bank_template=BANK_TEMPLATE,
            method=inputs.config.method,
            adapters=[*(before.adapters if before else ()), entry],
            router=router,
            fan_in_fan_out=inputs.base.fan_in_fan_out,
            statistics=[*(before.statistics if before else ()), statistics],
            accuracy_matrix=AccuracyMatrix(
                tasks=inputs.tasks, accuracy=matrices.accuracy, ranked_accuracy=matrices.ranked_accuracy
            ),
            lineage=Lineage(
                parent=None if below is None else below.uri, reused_from=None if source is None else source.uri
            ),
            library_versions=library_versions(),
            files={path: one for path, one in known.items() if path.endswith(".safetensors")},  # that lie elsewhere
            stage=record.index,
            **about,
        )
        own = [] if record.original is not None else in_bank(entry).items()
        files = {path: Path(parents[-1].folder) / name for name, path in own if source is None or name == STATISTICS}
        self._statistics[parents[-1].folder] = newest.statistics
        return write_version(folder, manifest, record.run, tensors, files)

    def _router(
        self, inputs: RunInputs, parents: Sequence[Parent], newest: Result
    ) -> tuple[dict[str, Tensor], RouterEntry]:
        """Tensors and entry of the router of the whole bank."""
        method = inputs.method
        router = method.router([*(self._statistics_of(parent) for parent in parents[:-1]), newest.statistics])
        tensors = {} if router is None else router.tensors()
        kind, settings = method.layers.described(router)
        return tensors, RouterEntry(kind=kind, settings=settings, digest="0" * 64)

    def _statistics_of(self, parent: Parent) -> TaskStatistics:
        """Statistics of an earlier stage, read once: a publication costs the same at every stage."""
        if parent.folder not in self._statistics:
            self._statistics[parent.folder] = read_result(Path(parent.folder)).statistics
        return self._statistics[parent.folder]

    def _stored(
        self, placement: Placement, record: StageRecord, index: int
    ) -> tuple[Stored | None, Stored | None]:
        """Where the new adapter and its statistics are kept: with this version, or where another run has them."""
        adapter: Stored | None = placement.of(adapter_folder(index, record.task))
        statistics: Stored | None = placement.of(statistics_file(index, record.task))
        if record.source is not None:
            adapter = self.manifest_of(record.source).adapters[-1].stored
        if record.original is not None:
            statistics = self.manifest_of(record.original).statistics[-1].stored
        return adapter, statistics

    def _pulled(self, version: Version) -> Path:
        digest = version.tags.get(tags.MANIFEST_DIGEST, "")[:12]
        dest = self._storage / "banks" / f"{version.registered_model}-{version.number}-{digest}"
        dest.parent.mkdir(parents=True, exist_ok=True)
        try:
            return self._store.pull_version(version, dest)
        except BankError:
            if not dest.exists():
                raise
        log.warning("%s: the copy of %s is damaged: fetching it again", dest, version.uri)
        shutil.rmtree(dest, ignore_errors=True)
        return self._store.pull_version(version, dest)


def _learned(inputs: RunInputs) -> list[LearnedTask]:
    """The tasks of a run whose one stage is about all of them."""
    return [LearnedTask(task=name, task_spec=task_entry(inputs.specs[name])) for name in inputs.tasks]


def parent_folder(storage: Path, line: AdapterEntry, statistics: str | None) -> Path:
    """Where the storage has a published adapter for workers: an equal one may have other statistics in another bank."""
    return storage / "adapters" / value_digest([line.digest, statistics])


def _copy_result(bank: Path, line: AdapterEntry, folder: Path) -> None:
    """Make ``folder`` a stage's result again, of what a pulled bank has of it."""
    training = {"fingerprint": line.training_fingerprint, "seconds": 0.0, "tokens": 0, "losses": []}
    with new_result(folder, line, training) as tmp:
        for name, path in in_bank(line).items():
            copy_file(bank / path, tmp / name)


def library_versions() -> dict[str, str]:
    """Versions of this project and of the libraries that decide a result, by name."""
    from importlib.metadata import version

    names = ("torch", "transformers", "deepspeed", "ray", "mlflow", "safetensors")
    return {"amlora-dist": amlora_dist.__version__} | {name: version(name) for name in names}
