"""Pulling with what is there already: adapters that a bank nearby has are copied, only the rest is fetched."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from amlora_dist.errors import BankError
from amlora_dist.registry import tags
from amlora_dist.registry.adapter_folder import ADAPTER_FILES
from amlora_dist.registry.manifest import FILE, Manifest, read_manifest
from amlora_dist.registry.transfer import fetch_manifest, pull_place

if TYPE_CHECKING:
    from amlora_dist.registry.signing import Trust
    from amlora_dist.registry.store import Store
    from amlora_dist.registry.transfer import TransferProgress
    from amlora_dist.registry.versions import Version

log = logging.getLogger(__name__)


def pull_bank(
    store: Store,
    version: Version,
    dest: Path,
    *,
    nearby: Iterable[Path] = (),
    progress: TransferProgress | None = None,
    statistics: bool = True,
    trust: Trust | None = None,
) -> Path:
    """Make ``dest`` the self-contained folder of a version; as ``Store.pull_version``, which checks every part.

    Args:
        store: which has the version.
        version: to pull.
        dest: the folder to make.
        nearby: folders whose subfolders may be banks with the same adapters, next to the one that ``dest`` is in.
        progress: called with (parts done, parts in all, name).
        statistics: fetch what only the continuation of the bank needs, too; a signature is over them.
        trust: what is demanded of the bank.
    """
    dest = pull_place(dest)
    if not dest.exists() and version.artifact_path:
        _seed(dest.with_name(f".{dest.name}.part"), manifest_of(store, version), [dest.parent, *nearby])
    statistics = statistics or (trust is not None and trust.key is not None)
    check = None if trust is None else trust.check
    return store.pull_version(version, dest, progress, statistics=statistics, check=check)


def pull_home(store: Store, version: Version, banks: Path, trust: Trust | None = None) -> Path:
    """The folder of a version below ``banks``, pulled once and without statistics: what inference needs."""
    dest = banks / f"{version.registered_model}-{version.number}-{version.tags.get(tags.MANIFEST_DIGEST, '')[:12]}"
    return pull_bank(store, version, dest, statistics=False, trust=trust)


def manifest_of(store: Store, version: Version) -> Manifest:
    """A version's manifest, without anything else of it; errors as ``fetch_manifest``."""
    return fetch_manifest(store, version.run, version.artifact_path, version.tags.get(tags.MANIFEST_DIGEST))


def _seed(part: Path, manifest: Manifest, nearby: Iterable[Path]) -> None:
    """Copy adapters and statistics that other banks have to where the pull will look first; it checks their digests."""
    wanted = {line.digest: [(line.folder, name) for name in ADAPTER_FILES] for line in manifest.adapters}
    wanted |= {entry.digest: [("", entry.file)] for entry in manifest.statistics}
    targets = {digest: [Path(folder) / name for folder, name in parts] for digest, parts in wanted.items()}
    for bank in dict.fromkeys(folder for near in nearby if near.is_dir() for folder in sorted(near.iterdir())):
        if not targets:
            return
        if not (bank / FILE).is_file():
            continue
        with contextlib.suppress(BankError):  # not a bank, or a damaged one: nothing to take from it
            there = read_manifest(bank)
            parts = {line.digest: [Path(line.folder) / name for name in ADAPTER_FILES] for line in there.adapters}
            parts |= {entry.digest: [Path(entry.file)] for entry in there.statistics}
            for digest in targets.keys() & parts.keys():
                if all((bank / path).is_file() and not (bank / path).is_symlink() for path in parts[digest]):
                    for source, target in zip(parts[digest], targets.pop(digest), strict=True):
                        _copy(bank / source, part / target)


def _copy(source: Path, target: Path) -> None:
    if target.exists():
        return
    log.debug("%s: copied from %s", target, source)
    target.parent.mkdir(parents=True, exist_ok=True)
    tmp = target.with_name(f".fetch.{target.name}.{os.getpid()}")
    shutil.copyfile(source, tmp)
    tmp.replace(target)
