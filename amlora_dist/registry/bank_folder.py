"""A bank as a folder: safetensors and JSON only, adapters in PEFT's own format, every check on the way in and out.

::

    manifest.json                              registry/manifest.py
    adapters/<k>-<task>/adapter_config.json    PEFT's
    adapters/<k>-<task>/adapter_model.safetensors
    adapters/<k>-<task>/recipe.safetensors     weights of the earlier adapters, and the selectors' dense layers
    router.safetensors                         what serving needs
    statistics/<k>-<task>.safetensors          what only continuation needs; may be absent
    MLmodel, input_example.json, README.md     for MLflow and for people
    model.sig                                  a signature, if there is one (registry/signing.py)

The adapter as PEFT loads it leaves the recipe out; a task's whole row is what ``registry/exports.py`` writes.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amlora_dist.digests import tensors_digest
from amlora_dist.errors import BankError
from amlora_dist.files import copy_file, new_folder
from amlora_dist.registry import card
from amlora_dist.registry.adapter_folder import (
    CONFIG_FILE,
    MODEL_FILE,
    check_digest,
    peft_config,
    read_adapter,
    write_adapter,
)
from amlora_dist.registry.bank_files import (
    MLFLOW_FILE,
    README_FILE,
    bank_files,
    check_file,
    entry_of,
    refuse_unknown,
)
from amlora_dist.registry.manifest import (
    FILE,
    ROUTER_FILE,
    SCHEMA_VERSION,
    AdapterEntry,
    Manifest,
    StatisticsEntry,
    Stored,
    read_manifest,
    replace,
)
from amlora_dist.registry.tensor_files import read_tensors, write_tensors, write_text
from amlora_dist.tasks.task_entry import TaskEntry

if TYPE_CHECKING:
    from torch import Tensor

    from amlora_dist.adapters.adapter import Adapter

log = logging.getLogger(__name__)

@dataclass(slots=True)
class Bank:
    """A bank in memory."""

    manifest: Manifest
    adapters: list[Adapter]
    router: dict[str, Tensor]
    """The router's tensors by name; with ``router_settings`` what ``router_from`` takes."""
    statistics: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Statistics by task; only those whose file was there."""

    @property
    def router_settings(self) -> dict[str, Any]:
        """Settings of the router, JSON values."""
        return self.manifest.router.settings


def adapter_entry(
    adapter: Adapter,
    index: int,
    *,
    training_fingerprint: str,
    parent: str | None,
    task_spec: TaskEntry | None = None,
) -> AdapterEntry:
    """The manifest's line for an adapter; ``parent`` is ``Manifest.parent_digest`` of the bank it was trained on."""
    adapter = dataclasses.replace(adapter, alpha=float(adapter.alpha))
    return AdapterEntry(
        index=index,
        task=adapter.task,
        rank=adapter.rank,
        alpha=adapter.alpha,
        targets=sorted(adapter.a),
        digest=adapter.digest(),
        training_fingerprint=training_fingerprint,
        parent=parent,
        stored=None,
        task_spec=task_spec,
    )


def statistics_entry(
    index: int, task: str, tensors: Mapping[str, Tensor], stored: Stored | None = None
) -> StatisticsEntry:
    """The manifest's line for the statistics of one task."""
    return StatisticsEntry(index=index, task=task, digest=tensors_digest(tensors), stored=stored)


def router_digest(tensors: Mapping[str, Tensor], kind: str, settings: Mapping[str, Any]) -> str:
    """sha256 over the router's tensors, kind and settings."""
    return tensors_digest(tensors, kind=kind, settings=dict(settings))


def write_bank(
    folder: Path,
    manifest: Manifest,
    adapters: list[Adapter],
    router: Mapping[str, Tensor],
    statistics: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Manifest:
    """Write a whole bank: all of it next to ``folder`` first, read back, then renamed into place.

    An existing ``folder`` is replaced. The router's digest in ``manifest`` is computed here, so a draft may hold any.

    Returns:
        The manifest as written.

    Raises:
        BankError: what is given does not agree with the manifest, or could not be read back.
    """
    _check_given(manifest, adapters)
    given = statistics or {}

    def write_parts(tmp: Path) -> None:
        for line, adapter in zip(manifest.adapters, adapters, strict=True):
            write_adapter(tmp / line.folder, adapter.tensors())
        for part in manifest.statistics:
            if part.task in given:
                write_tensors(tmp / part.file, given[part.task])

    return _write(folder, manifest, manifest.adapters, router, write_parts, read_bank)


def write_version(
    folder: Path, manifest: Manifest, run: str, router: Mapping[str, Tensor], files: Mapping[str, Path]
) -> Manifest:
    """Write what a version about to be published stores itself, however many adapters it refers to; as ``write_bank``.

    Args:
        folder: for ``Store.publish``.
        manifest: of the whole bank.
        run: the MLflow run that will keep the version's artifacts.
        router: the bank's.
        files: those of adapters and statistics whose ``stored`` is that run, by their paths in the bank; they are copied.
    """

    def write_parts(tmp: Path) -> None:
        for path, file in files.items():
            copy_file(file, tmp / path)

    own = [line for line in manifest.adapters if f"{line.folder}/{MODEL_FILE}" in files]
    return _write(folder, manifest, own, router, write_parts, lambda tmp: read_version(tmp, run))


def _write(
    folder: Path,
    manifest: Manifest,
    adapters: Sequence[AdapterEntry],
    router: Mapping[str, Tensor],
    write_parts: Callable[[Path], None],
    read: Callable[[Path], object],
) -> Manifest:
    settings = manifest.router.settings
    entry = dataclasses.replace(manifest.router, digest=router_digest(router, manifest.router.kind, settings))
    manifest = replace(manifest, router=entry)
    with new_folder(folder, replace=True) as tmp:
        write_frame(tmp, manifest, adapters)
        write_parts(tmp)
        write_tensors(tmp / ROUTER_FILE, router)
        manifest = _listed(tmp, manifest)
        write_text(tmp / FILE, manifest.to_json())
        read(tmp)
    return manifest


def _listed(folder: Path, manifest: Manifest) -> Manifest:
    """The manifest with every file of the bank: those that lie in the folder as they are, the others as it has them."""
    before, files = manifest.files or {}, {}
    for file in bank_files(manifest):
        if (folder / file.path).is_file():
            files[file.path] = entry_of(folder / file.path)
        elif file.path in before:
            files[file.path] = before[file.path]
    return replace(manifest, files=files, schema_version=SCHEMA_VERSION)


def write_frame(folder: Path, manifest: Manifest, adapters: Sequence[AdapterEntry]) -> None:
    """Write what follows from the manifest alone: README.md, MLflow's configuration and PEFT's of some adapters."""
    for line in adapters:
        config = json.dumps(peft_config(manifest, line), indent=1, sort_keys=True) + "\n"
        write_text(folder / line.folder / CONFIG_FILE, config)
    write_text(folder / MLFLOW_FILE, card.mlmodel(manifest))
    write_text(folder / card.EXAMPLE_FILE, card.input_example(manifest))
    write_text(folder / README_FILE, card.readme(manifest))


def read_bank(folder: Path, *, statistics: bool = True) -> Bank:
    """Read a whole bank from a folder, without MLflow.

    Args:
        folder: as ``write_bank`` or ``Store.pull`` left it.
        statistics: read the statistics too, as far as their files are there.

    Raises:
        BankError: anything missing, damaged, unexpected or leading out of the folder; the message names the file,
            the key, what was found and what was expected.
    """
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    adapters = [read_adapter(folder, manifest, line) for line in manifest.adapters]
    _check_widths(folder, adapters)
    found: dict[str, dict[str, Tensor]] = {}
    for part in manifest.statistics if statistics else []:
        if (folder / part.file).exists():
            found[part.task] = read_statistics(folder, part)
    router = read_router(folder, manifest)
    check_list(folder, manifest)
    return Bank(manifest=manifest, adapters=adapters, router=router, statistics=found)


def read_version(folder: Path, run: str) -> tuple[Manifest, list[Adapter]]:
    """Read what ``run`` is about to publish, with the checks of ``read_bank``; parts stored elsewhere may be absent.

    Returns:
        The manifest, and the adapters that lie in the folder.
    """
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    lines = [
        line
        for line in manifest.adapters
        if line.stored is None or line.stored.run == run or (folder / line.folder).exists()
    ]
    adapters = [read_adapter(folder, manifest, line) for line in lines]
    _check_widths(folder, adapters)
    for part in manifest.statistics:
        if (folder / part.file).exists():
            read_statistics(folder, part)
    read_router(folder, manifest)
    check_list(folder, manifest)
    return manifest, adapters


def read_router(folder: Path, manifest: Manifest) -> dict[str, Tensor]:
    """Read the router's tensors and compare their digest."""
    tensors = read_tensors(folder / ROUTER_FILE)
    found = router_digest(tensors, manifest.router.kind, manifest.router.settings)
    check_digest(folder / ROUTER_FILE, found, manifest.router.digest)
    return tensors


def read_statistics(folder: Path, part: StatisticsEntry) -> dict[str, Tensor]:
    """Read the statistics of one task and compare their digest."""
    tensors = read_tensors(folder / part.file)
    check_digest(folder / part.file, tensors_digest(tensors), part.digest)
    return tensors


def check_publishable(manifest: Manifest, adapters: Iterable[Adapter]) -> None:
    """Refuse what loads but was never trained or gathered: an adapter that adds nothing.

    Under ZeRO-3 an adapter saved without gathering is empty or zero although training looked fine (peft#2892). Where the
    bank answers by its keys alone, adapters are meant to add nothing.

    Raises:
        BankError: every B of an adapter is zero and the bank would answer by it, or the bank has no adapter.
    """
    if not manifest.adapters:
        raise BankError("a bank without adapters is not published; train at least one stage")
    lines = {line.task: line for line in manifest.adapters}
    answer = manifest.training_configuration.get("answer")
    by_keys = isinstance(answer, dict) and answer.get("evidence") == "keys"
    for adapter in () if by_keys else adapters:
        line = lines[adapter.task]
        silent = [module for module, b in adapter.b.items() if not bool(b.any())]
        if len(silent) == len(adapter.b):
            raise BankError(
                f"{line.folder}: every B is zero, expected a trained adapter; it was saved before training or without "
                "gathering (ZeRO-3): train the stage again"
            )
        if silent:
            log.warning("%s: B is zero in %d of %d modules: %s", line.folder, len(silent), len(adapter.b), silent[:3])


def check_files(folder: Path, manifest: Manifest) -> None:
    """Refuse links that lead out, and files that the manifest does not know.

    Raises:
        BankError: names the file.
    """
    root = folder.resolve()
    names = []
    for path in sorted(folder.rglob("*")):
        if not path.resolve().is_relative_to(root):
            raise BankError(f"{path}: a link that leads out of the bank, to {path.resolve()}; fetch the bank again")
        if not path.is_dir():
            names.append(path.relative_to(folder).as_posix())
    refuse_unknown(names, manifest, str(folder))


def check_list(folder: Path, manifest: Manifest, *, whole: bool = False) -> None:
    """Compare the files that are there with the manifest's list.

    What other programs read (``MLmodel``, PEFT's configuration) is compared byte for byte; of tensors the size, for what is
    read of them is under a digest of its own, unless ``whole``.

    Raises:
        BankError: names the file.
    """
    for file in bank_files(manifest):
        path = folder / file.path
        if path.is_file():
            check_file(folder, file.path, manifest, whole=whole or not path.name.endswith(".safetensors"))


def _check_given(manifest: Manifest, adapters: list[Adapter]) -> None:
    if len(adapters) != len(manifest.adapters):
        raise BankError(f"{len(adapters)} adapters given, the manifest has {len(manifest.adapters)}")
    for line, adapter in zip(manifest.adapters, adapters, strict=True):
        found = adapter_entry(adapter, line.index, training_fingerprint=line.training_fingerprint, parent=line.parent)
        if found.digest != line.digest:
            raise BankError(
                f"{line.folder}: digest: found {found.digest}, the manifest has {line.digest}; "
                "the adapter is not the one its entry was made for"
            )


def _check_widths(folder: Path, adapters: list[Adapter]) -> None:
    """All adapters of one module must have its d_in and d_out."""
    seen: dict[str, tuple[int, int, str]] = {}
    for adapter in adapters:
        for module, a in adapter.a.items():
            widths = (a.shape[1], adapter.b[module].shape[0])
            known = seen.setdefault(module, (*widths, adapter.task))
            if known[:2] != widths:
                raise BankError(
                    f"{folder}: {module}: adapter {adapter.task} is (d_in, d_out) {widths}, adapter {known[2]} is "
                    f"{known[:2]}; they belong to different base models"
                )
