"""Moving banks between a folder and MLflow's artifacts, one checked file at a time."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from amlora_dist.digests import file_digest
from amlora_dist.errors import BankError, UserError
from amlora_dist.registry.adapter_folder import ADAPTER_FILES, CONFIG_FILE, read_adapter
from amlora_dist.registry.bank_folder import (
    check_files,
    read_bank,
    read_router,
    read_statistics,
    swap_in,
    write_frame,
)
from amlora_dist.registry.manifest import FILE, ROUTER_FILE, Manifest, Stored, read_manifest

if TYPE_CHECKING:
    from amlora_dist.registry.runs import Runs

log = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]
"""Called with (parts done, parts in all, name of the part)."""
Fetch = Callable[[str, "Stored | None", Path], None]
"""Brings one file, given its path in the bank and where it is stored, to a local path."""
PULL_DEADLINE_S = 1800.0
FRAME_FILES = (FILE, ROUTER_FILE, "MLmodel", "input_example.json", "README.md")


def own_files(manifest: Manifest, run: str) -> list[str]:
    """Paths of what a version stores itself: its frame, its router, and the parts whose storage is ``run``."""
    files = list(FRAME_FILES)
    for line in manifest.adapters:
        if line.stored is not None and line.stored.run == run:
            files += [f"{line.folder}/{name}" for name in (*ADAPTER_FILES, CONFIG_FILE)]
    return files + [part.file for part in manifest.statistics if part.stored is not None and part.stored.run == run]


def check_placement(manifest: Manifest, run: str, root: str) -> None:
    """Every part must say where it is stored, and what this version stores must say its own place.

    Raises:
        BankError: names the part.
    """
    parts = [(line.folder, line.stored) for line in manifest.adapters]
    parts += [(part.file, part.stored) for part in manifest.statistics]
    for path, stored in parts:
        if stored is None:
            raise BankError(f"{path}: has no storage in the manifest; give it Store.placement(...).of({path!r})")
        if stored.run == run and stored.artifact_path != f"{root}/{path}":
            raise BankError(f"{path}: stored: found {stored.artifact_path}, expected {root}/{path}")


def upload(runs: Runs, folder: Path, files: list[str], run: str, root: str) -> None:
    """Upload some files of a folder, and nothing else that lies there.

    Raises:
        BankError: a file that this version stores itself is not in the folder (statistics that were not given).
    """
    if missing := [path for path in files if not (folder / path).is_file()]:
        raise BankError(f"{folder / missing[0]}: missing; the manifest says that this version stores it itself")
    with tempfile.TemporaryDirectory(prefix=".upload.", dir=folder.parent) as name:
        aside = Path(name)
        for path in files:
            (aside / path).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(folder / path, aside / path)
            except OSError:  # another disk, or one without hard links
                shutil.copyfile(folder / path, aside / path)
        runs.log_artifacts(run, aside, root)


def read_back(runs: Runs, folder: Path, files: list[str], run: str, root: str) -> None:
    """Fetch what was uploaded and compare it byte for byte.

    Raises:
        BankError: a file is missing in the store or differs.
    """
    with tempfile.TemporaryDirectory(prefix=".readback.", dir=folder.parent) as aside:
        fetched = runs.download(run, root, Path(aside))
        for path in files:
            file = fetched / path if fetched else None
            if file is None or not file.is_file() or file_digest(file) != file_digest(folder / path):
                raise BankError(
                    f"{root}/{path} of run {run} is missing or differs after its upload; "
                    "check the disk of the artifact store"
                )


def check_referred(runs: Runs, manifest: Manifest, run: str, seen: set[Stored]) -> None:
    """See that the store has what this version refers to, so that nobody publishes what cannot be pulled.

    Args:
        runs: the store.
        manifest: of the version.
        run: keeps the version's own parts.
        seen: what this process has seen there before, which is not asked again; what is found is added.

    Raises:
        BankError: names the adapter and the run it should be in.
    """
    for line in manifest.adapters:
        stored = line.stored
        if stored is None or stored.run == run or stored in seen:
            continue
        if not runs.has_artifact(stored.run, f"{stored.artifact_path}/{ADAPTER_FILES[0]}"):
            raise BankError(
                f"{line.folder}: not in the store at run {stored.run}, {stored.artifact_path}; it came from another "
                "store: publish it here first by giving it this run's placement"
            )
        seen.add(stored)


def pull(
    runs: Runs,
    run: str,
    root: str,
    expected: str | None,
    dest: Path,
    *,
    statistics: bool = True,
    progress: Progress | None = None,
) -> Path:
    """Make ``dest`` the self-contained folder of a version; see ``Store.pull``.

    Args:
        runs: the store.
        run: the MLflow run that keeps the version's artifacts.
        root: the version's folder among them.
        expected: the manifest's digest as registered; None when it was not.
        dest: the folder to make.
        statistics: fetch what only continuation needs, too.
        progress: called before each part.
    """
    dest = dest.absolute()
    dest.parent.mkdir(parents=True, exist_ok=True)
    part = dest.with_name(f".{dest.name}.part")
    try:
        with FileLock(dest.with_name(f".{dest.name}.lock"), timeout=PULL_DEADLINE_S):
            manifest = _fetch_manifest(runs, run, root, expected, dest.parent)

            def fetch(path: str, stored: Stored | None, target: Path) -> None:
                here = Stored(version_of="bank", run=run, artifact_path=f"{root}/{path}")
                fetch_file(runs, path, stored or here, target)

            if dest.exists() and not (dest.is_dir() and not any(dest.iterdir())):
                return _already(dest, manifest, fetch, statistics=statistics)
            return assemble(manifest, part, dest, fetch, statistics=statistics, progress=progress)
    except Timeout as error:
        raise UserError(f"waited {PULL_DEADLINE_S:.0f} s for another process that pulls to {dest}") from error


def assemble(
    manifest: Manifest,
    part: Path,
    dest: Path,
    fetch: Fetch,
    *,
    statistics: bool,
    progress: Progress | None = None,
) -> Path:
    """Build a whole bank in ``part``, keeping what is already right there, check it and rename it to ``dest``.

    Args:
        manifest: of the version.
        part: working folder; survives an interruption.
        dest: must not exist, or be empty.
        fetch: brings one file.
        statistics: bring them too.
        progress: called before each part.
    """
    _prune(part, manifest)
    write_frame(part, manifest, manifest.adapters)
    wanted = manifest.statistics if statistics else []
    total = len(manifest.adapters) + len(wanted) + 1
    tell = progress or _silent
    for done, line in enumerate(manifest.adapters):
        tell(done, total, line.folder)
        if not _is_right(read_adapter, part, manifest, line):
            for name in ADAPTER_FILES:
                inside = _below(line.stored, name)
                fetch(f"{line.folder}/{name}", inside, part / line.folder / name)
            read_adapter(part, manifest, line)
    for done, entry in enumerate(wanted, start=len(manifest.adapters)):
        tell(done, total, entry.file)
        if not _is_right(read_statistics, part, entry):
            fetch(entry.file, entry.stored, part / entry.file)
            read_statistics(part, entry)
    tell(total - 1, total, ROUTER_FILE)
    if not _is_right(read_router, part, manifest):
        fetch(ROUTER_FILE, None, part / ROUTER_FILE)
    read_bank(part)
    swap_in(part, dest)
    tell(total, total, "done")
    return dest


def _fetch_manifest(runs: Runs, run: str, root: str, expected: str | None, near: Path) -> Manifest:
    with tempfile.TemporaryDirectory(prefix=".manifest.", dir=near) as aside:
        file = runs.download(run, f"{root}/{FILE}", Path(aside))
        if file is None:
            raise BankError(f"run {run} has no {root}/{FILE}; this version is no bank of amlora-dist, or was deleted")
        manifest = read_manifest(file.parent)
    if expected is not None and manifest.digest() != expected:
        raise BankError(
            f"{root}/{FILE} of run {run}: digest: found {manifest.digest()}, registered with {expected}; "
            "the artifact was changed after it was published"
        )
    return manifest


def fetch_file(runs: Runs, path: str, stored: Stored, target: Path) -> None:
    """Fetch one file of a bank to ``target``, whole or not at all.

    Raises:
        BankError: it is not where the manifest says.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch.", dir=target.parent) as aside:
        file = runs.download(stored.run, stored.artifact_path, Path(aside))
        if file is None or not file.is_file():
            raise BankError(
                f"{path}: not in the store at run {stored.run}, {stored.artifact_path}; was that run deleted?"
            )
        file.replace(target)


def _already(dest: Path, manifest: Manifest, fetch: Fetch, *, statistics: bool) -> Path:
    """``dest`` may stand there already when it is this very bank; statistics that it lacks are added."""
    if not (dest / FILE).is_file() or read_manifest(dest).digest() != manifest.digest():
        raise UserError(f"{dest}: holds something else than this version; give another folder or remove it first")
    try:
        for entry in manifest.statistics if statistics else []:
            if not (dest / entry.file).exists():
                fetch(entry.file, entry.stored, dest / entry.file)
        read_bank(dest)
    except BankError as error:
        raise BankError(f"{error}\n{dest} was pulled before and is damaged: remove it and pull again") from error
    return dest


def _prune(part: Path, manifest: Manifest) -> None:
    """Remove from the working folder what belongs to another version, or is half a file of an interrupted pull."""
    part.mkdir(parents=True, exist_ok=True)
    keep = {ROUTER_FILE} | {entry.file for entry in manifest.statistics}
    keep |= {f"{line.folder}/{name}" for line in manifest.adapters for name in ADAPTER_FILES}
    for path in sorted(part.rglob("*"), reverse=True):
        if path.is_symlink() or path.is_file():
            if path.is_symlink() or path.relative_to(part).as_posix() not in keep:
                path.unlink()
        elif path.name.startswith(".fetch."):
            shutil.rmtree(path)
    check_files(part, manifest)


def _is_right(read: Callable[..., object], *args: object) -> bool:
    """Whether a part is there and reads with the right digest."""
    with contextlib.suppress(BankError):
        read(*args)
        return True
    return False


def _silent(done: int, total: int, name: str) -> None:
    log.debug("part %d of %d: %s", done, total, name)


def _below(stored: Stored | None, name: str) -> Stored | None:
    if stored is None:
        return None
    return Stored(version_of=stored.version_of, run=stored.run, artifact_path=f"{stored.artifact_path}/{name}")
