"""The files that a bank consists of, in one place: what is written, uploaded, fetched and checked follows from this list.

A new kind of file is one more line in ``bank_files``; whoever writes it puts it into the bank's folder before the manifest
is written (``bank_folder._write``), which lists it with size and sha256.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from amlora_dist.config.strict_yaml import read_document
from amlora_dist.digests import file_digest
from amlora_dist.errors import BankError, FaultsError
from amlora_dist.registry.card import EXAMPLE_FILE, LOADER
from amlora_dist.registry.manifest import FILE, ROUTER_FILE, FileEntry, Manifest, Stored

ADAPTER_MODEL, ADAPTER_CONFIG, ADAPTER_RECIPE = "adapter_model.safetensors", "adapter_config.json", "recipe.safetensors"
MLFLOW_FILE = "MLmodel"
README_FILE = "README.md"
SIGNATURE_FILE = "model.sig"
_ALLOWED = re.compile(
    rf"{re.escape(README_FILE)}|{re.escape(SIGNATURE_FILE)}|registered_model_meta|\.gitattributes|(.*/)?\.DS_Store"
    r"|\.cache/huggingface/.*|\.git/.*"
)
"""Beside the bank's own files: what people read, what MLflow, the Hub, git and Finder add, and no loader reads."""
MOST_MLMODEL = 1 << 20
"""Bytes."""
_FLAVOUR = {"loader_module", "config"}
"""What an ``MLmodel`` may say of its flavour: nothing that names code, an environment or data to load."""


@dataclass(frozen=True, slots=True)
class BankFile:
    """One file, by its path in the bank."""

    path: str
    kind: Literal["frame", "adapter", "router", "statistics"]
    stored: Stored | None = None
    """Where it is kept, if not with the version that is looked at."""


def bank_files(manifest: Manifest) -> list[BankFile]:
    """Every file that a loader of any kind reads, but for the manifest itself."""
    found = [BankFile(MLFLOW_FILE, "frame"), BankFile(EXAMPLE_FILE, "frame"), BankFile(ROUTER_FILE, "router")]
    for line in manifest.adapters:
        for name in (ADAPTER_CONFIG, ADAPTER_MODEL, ADAPTER_RECIPE):
            found.append(BankFile(f"{line.folder}/{name}", "adapter", _below(line.stored, name)))
    found += [BankFile(part.file, "statistics", part.stored) for part in manifest.statistics]
    return found


def entry_of(file: Path) -> FileEntry:
    """Size and sha256 of a file."""
    return FileEntry(sha256=file_digest(file), size=file.stat().st_size)


def is_allowed(path: str) -> bool:
    """Whether a file may lie next to the bank's own."""
    return _ALLOWED.fullmatch(path) is not None


def refuse_unknown(paths: Iterable[str], manifest: Manifest, where: str) -> None:
    """Refuse what the manifest does not name: somebody's loader may read it, and run it.

    Raises:
        BankError: names the file.
    """
    known = {FILE, *(file.path for file in bank_files(manifest))}
    for path in paths:
        if path not in known and not is_allowed(path):
            raise BankError(
                f"{where}/{path}: found a file that the manifest does not name, expected only what it names; "
                "remove it (banks hold no code and no pickle) or fetch the bank again"
            )


def fits(folder: Path, path: str, manifest: Manifest) -> bool:
    """Whether a file is there as the manifest lists it; of one that it does not list, whether it is there."""
    file, entry = folder / path, (manifest.files or {}).get(path)
    if not file.is_file() or file.is_symlink():
        return False
    return entry is None or (file.stat().st_size == entry.size and file_digest(file) == entry.sha256)


def check_file(folder: Path, path: str, manifest: Manifest, *, whole: bool) -> None:
    """Compare a file that is there with the manifest's list: its size, and (``whole``) its sha256.

    Raises:
        BankError: it differs; or it is an ``MLmodel`` of an old bank, which lists none, that names code.
    """
    file, entry = folder / path, (manifest.files or {}).get(path)
    if entry is None:
        if path == MLFLOW_FILE:
            _check_flavour(file)
        return
    size = file.stat().st_size
    if size != entry.size:
        raise BankError(f"{file}: found {size} bytes, the manifest has {entry.size}; fetch the bank again")
    if whole and (found := file_digest(file)) != entry.sha256:
        raise BankError(f"{file}: sha256: found {found}, the manifest has {entry.sha256}; fetch the bank again")


def _check_flavour(file: Path) -> None:
    if file.stat().st_size > MOST_MLMODEL:
        raise BankError(f"{file}: found {file.stat().st_size} bytes, expected at most {MOST_MLMODEL}; fetch the bank again")
    try:
        flavours = read_document(file).data.get("flavors")
    except FaultsError as error:
        raise BankError(f"{file}: found no YAML ({error.faults[0]}); fetch the bank again") from error
    own = flavours.get("python_function") if isinstance(flavours, dict) else None
    if not isinstance(own, dict) or len(flavours or ()) != 1 or own.get("loader_module") != LOADER or set(own) - _FLAVOUR:
        raise BankError(
            f"{file}: found another flavour than that of a bank, expected python_function with loader_module {LOADER} and"
            " no code; fetch the bank again"
        )


def _below(stored: Stored | None, name: str) -> Stored | None:
    if stored is None:
        return None
    return Stored(version_of=stored.version_of, run=stored.run, artifact_path=f"{stored.artifact_path}/{name}")
