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
from amlora_dist.files import make_folders, rename_synced, sync_files, write_bytes
from amlora_dist.registry.adapter_folder import ADAPTER_FILES, CONFIG_FILE, read_adapter
from amlora_dist.registry.bank_files import (
    README_FILE,
    SIGNATURE_FILE,
    BankFile,
    bank_files,
    check_file,
    fits,
    refuse_unknown,
)
from amlora_dist.registry.bank_folder import (
    check_files,
    read_bank,
    read_router,
    read_statistics,
    write_frame,
)
from amlora_dist.registry.manifest import FILE, MAX_BYTES, ROUTER_FILE, FileEntry, Manifest, Stored, read_manifest
from amlora_dist.registry.tensor_files import write_text

if TYPE_CHECKING:
    from amlora_dist.registry.runs import Runs

log = logging.getLogger(__name__)

TransferProgress = Callable[[int, int, str], None]
"""Called with (parts done, parts in all, name of the part)."""
Fetch = Callable[[str, "Stored | None", Path], None]
"""Brings one file, given its path in the bank and where it is stored, to a local path."""
PULL_DEADLINE_S = 1800.0


def own_files(manifest: Manifest, run: str) -> list[str]:
    """Paths of what a version stores itself: its frame, its router, and the parts whose storage is ``run``."""
    kept = [file.path for file in bank_files(manifest) if file.kind in _WITH_VERSION or _keeps(file, run)]
    return [FILE, README_FILE, *kept]


_WITH_VERSION = ("frame", "router")


def _keeps(file: BankFile, run: str) -> bool:
    return file.stored is not None and file.stored.run == run


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
        tmp = Path(name)
        for path in files:
            (tmp / path).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(folder / path, tmp / path)
            except OSError:  # another disk, or one without hard links
                shutil.copyfile(folder / path, tmp / path)
        runs.log_artifacts(run, tmp, root)


def read_back(runs: Runs, folder: Path, files: list[str], run: str, root: str) -> None:
    """Fetch what was uploaded and compare it byte for byte.

    Raises:
        BankError: a file is missing in the store or differs.
    """
    with tempfile.TemporaryDirectory(prefix=".readback.", dir=folder.parent) as tmp:
        fetched = runs.download(run, root, Path(tmp))
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
        if ADAPTER_FILES[0] not in runs.artifact_sizes(stored.run, stored.artifact_path):
            raise BankError(
                f"{line.folder}: not in the store at run {stored.run}, {stored.artifact_path}; it came from another "
                "store: publish it here first by giving it this run's placement"
            )
        seen.add(stored)


def missing_files(runs: Runs, manifest: Manifest, run: str, root: str, seen: set[Stored]) -> list[BankFile]:
    """What the store no longer has of a version, or has with another size: somebody deleted it, or its disk lost it.

    Args:
        runs: the store.
        manifest: of the version.
        run: keeps the version's own parts.
        root: their folder among its artifacts.
        seen: parts that were whole when they were looked at before, as in ``check_referred``.
    """
    own = runs.artifact_sizes(run, root)
    known: dict[str, dict[str, int]] = {}
    lost: list[BankFile] = []
    for file in bank_files(manifest):
        entry = (manifest.files or {}).get(file.path)
        if file.stored is None or (file.stored.run, file.stored.artifact_path) == (run, f"{root}/{file.path}"):
            size = own.get(file.path)
        elif file.stored in seen:
            continue
        else:
            above, _, name = file.stored.artifact_path.rpartition("/")
            if f"{file.stored.run}/{above}" not in known:
                known[f"{file.stored.run}/{above}"] = runs.artifact_sizes(file.stored.run, above)
            size = known[f"{file.stored.run}/{above}"].get(name)
        if size is None or (entry is not None and size != entry.size):
            lost.append(file)
        elif file.stored is not None:
            seen.add(file.stored)
    return lost


def check_stored(runs: Runs, manifest: Manifest, run: str, root: str) -> bool:
    """Look at a version's whole folder in the store: nothing there that the manifest does not name, every file of its size,
    and what MLflow reads before any code of ours runs as it was published.

    Returns:
        Whether the version is signed.

    Raises:
        BankError: names the file.
    """
    sizes = runs.artifact_sizes(run, root)
    where = f"run {run}, {root}"
    refuse_unknown(sizes, manifest, where)
    for path in own_files(manifest, run):
        entry = (manifest.files or {}).get(path)
        if path != README_FILE and path not in sizes:
            raise BankError(f"{where}/{path}: not in the store; was it deleted?")
        if entry is not None and sizes[path] != entry.size:
            raise BankError(f"{where}/{path}: found {sizes[path]} bytes, the manifest has {entry.size}: it was changed")
    with tempfile.TemporaryDirectory(prefix="amlora-frame-") as tmp:
        for file in bank_files(manifest):
            if file.kind == "frame" and sizes[file.path] <= MAX_BYTES:
                runs.download(run, f"{root}/{file.path}", Path(tmp))
                check_file(Path(tmp) / root, file.path, manifest, whole=True)
    return SIGNATURE_FILE in sizes


def pull(
    runs: Runs,
    run: str,
    root: str,
    expected: str | None,
    dest: Path,
    *,
    statistics: bool = True,
    progress: TransferProgress | None = None,
    check: Callable[[Path], None] | None = None,
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
        check: as in ``assemble``.
    """
    dest = pull_place(dest)
    part = dest.with_name(f".{dest.name}.part")
    try:
        with FileLock(dest.with_name(f".{dest.name}.lock"), timeout=PULL_DEADLINE_S):
            manifest = fetch_manifest(runs, run, root, expected)
            signed = check_stored(runs, manifest, run, root)

            def fetch(path: str, stored: Stored | None, target: Path) -> None:
                here = Stored(version_of="bank", run=run, artifact_path=f"{root}/{path}")
                fetch_file(runs, path, stored or here, target, (manifest.files or {}).get(path))

            def checked(folder: Path) -> None:
                if signed:
                    _fetch_signature(runs, run, root, folder)
                if check is not None:
                    check(folder)

            if dest.exists() and not (dest.is_dir() and not any(dest.iterdir())):
                _already(dest, manifest, fetch, statistics=statistics)
                file = dest / SIGNATURE_FILE
                before = file.read_bytes() if file.is_file() else None
                try:
                    checked(dest)
                except BankError:
                    if before is not None:
                        write_bytes(file, before)  # the one that lay here stays
                    raise
                return dest

            return assemble(
                manifest, part, dest, fetch, statistics=statistics, progress=progress, check=checked
            )
    except Timeout as error:
        raise UserError(f"waited {PULL_DEADLINE_S:.0f} s for another process that pulls to {dest}") from error


def pull_place(dest: Path) -> Path:
    """Where a bank is pulled to, with a folder above it: what a link points at, so that the link stays.

    Raises:
        UserError: a disk is mounted there, over which nothing can be renamed.
    """
    dest = dest.resolve()
    if dest.is_mount() and not any(dest.iterdir()):
        raise UserError(f"{dest}: a disk is mounted there, expected a folder that can be made; give {dest / 'bank'}, say")
    make_folders(dest.parent)
    return dest


def assemble(
    manifest: Manifest,
    part: Path,
    dest: Path,
    fetch: Fetch,
    *,
    statistics: bool,
    progress: TransferProgress | None = None,
    check: Callable[[Path], None] | None = None,
) -> Path:
    """Build a whole bank in ``part``, keeping what is already right there, check it and rename it to ``dest``.

    Args:
        manifest: of the version.
        part: working folder; survives an interruption.
        dest: must not exist, or be empty.
        fetch: brings one file.
        statistics: fetch them too.
        progress: called before each part.
        check: called with the whole folder before it becomes ``dest``; raises what it has against it.
    """
    _prune(part, manifest)
    write_frame(part, manifest, manifest.adapters)
    write_text(part / FILE, manifest.to_json())
    wanted = manifest.statistics if statistics else []
    total = len(manifest.adapters) + len(wanted) + 1
    tell = progress or _silent
    files = bank_files(manifest)
    for file in files:
        if file.kind == "frame":
            _fetch_file(file, part, manifest, fetch)
    by_folder: dict[str, list[BankFile]] = {}
    for file in files:
        by_folder.setdefault(file.path.rpartition("/")[0], []).append(file)
    for done, line in enumerate(manifest.adapters):
        tell(done, total, line.folder)
        right = _is_right(read_adapter, part, manifest, line)
        for file in by_folder[line.folder]:
            _fetch_file(file, part, manifest, fetch, refetch=not right and not file.path.endswith(CONFIG_FILE))
        read_adapter(part, manifest, line)
    for done, entry in enumerate(wanted, start=len(manifest.adapters)):
        tell(done, total, entry.file)
        right = _is_right(read_statistics, part, entry)
        _fetch_file(BankFile(entry.file, "statistics", entry.stored), part, manifest, fetch, refetch=not right)
        read_statistics(part, entry)
    tell(total - 1, total, ROUTER_FILE)
    right = _is_right(read_router, part, manifest)
    _fetch_file(BankFile(ROUTER_FILE, "router"), part, manifest, fetch, refetch=not right)
    read_bank(part)
    if check is not None:
        check(part)
    rename_synced(part, dest)
    tell(total, total, "done")
    return dest


def _fetch_file(file: BankFile, part: Path, manifest: Manifest, fetch: Fetch, *, refetch: bool = False) -> None:
    """Fetch a file that is not there as the manifest lists it; one that it does not list, with ``refetch``."""
    listed = file.path in (manifest.files or {})
    if (listed and not fits(part, file.path, manifest)) or (not listed and refetch):
        fetch(file.path, file.stored, part / file.path)


def fetch_manifest(runs: Runs, run: str, root: str, expected: str | None) -> Manifest:
    """The manifest in a version's folder ``root``, with the digest ``expected`` if that was registered.

    Raises:
        BankError: it is not there, damaged, or another one than was registered.
    """
    with tempfile.TemporaryDirectory(prefix="amlora-manifest-") as tmp:
        file = runs.download(run, f"{root}/{FILE}", Path(tmp), most=MAX_BYTES)
        if file is None:
            raise BankError(f"run {run} has no {root}/{FILE}; this version is no bank of amlora-dist, or was deleted")
        manifest = read_manifest(file.parent)
    if expected is not None and manifest.digest() != expected:
        raise BankError(
            f"{root}/{FILE} of run {run}: digest: found {manifest.digest()}, registered with {expected}; "
            "the artifact was changed after it was published"
        )
    return manifest


def _fetch_signature(runs: Runs, run: str, root: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".fetch.", dir=folder.parent) as tmp:
        file = runs.download(run, f"{root}/{SIGNATURE_FILE}", Path(tmp), most=MAX_BYTES)
        if file is not None:
            file.replace(folder / SIGNATURE_FILE)
            sync_files(folder, [SIGNATURE_FILE])


def fetch_file(runs: Runs, path: str, stored: Stored, target: Path, entry: FileEntry | None = None) -> None:
    """Fetch one file of a bank to ``target``, whole or not at all.

    Raises:
        BankError: it is not where the manifest says; or it is not the one of ``entry``, which is seen before it is fetched
            where its size differs.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch.", dir=target.parent) as tmp:
        size = None if entry is None else entry.size
        file = runs.download(stored.run, stored.artifact_path, Path(tmp), exactly=size)
        if file is None or not file.is_file():
            raise BankError(
                f"{path}: not in the store at run {stored.run}, {stored.artifact_path}; was that run deleted?"
            )
        if entry is not None and (found := file_digest(file)) != entry.sha256:
            raise BankError(
                f"{path}: sha256: found {found} in the store at run {stored.run}, {stored.artifact_path}, the manifest has"
                f" {entry.sha256}: it was changed after it was published"
            )
        file.replace(target)


def _already(dest: Path, manifest: Manifest, fetch: Fetch, *, statistics: bool) -> Path:
    """``dest`` may be there already when it is this very bank; statistics that it lacks are added."""
    if not (dest / FILE).is_file() or read_manifest(dest).digest() != manifest.digest():
        raise UserError(f"{dest}: holds something else than this version; give another folder or remove it first")
    try:
        for entry in manifest.statistics if statistics else []:
            if not (dest / entry.file).exists():
                fetch(entry.file, entry.stored, dest / entry.file)
                sync_files(dest, [entry.file])
        read_bank(dest)
    except BankError as error:
        raise BankError(f"{error}\n{dest} was pulled before and is damaged: remove it and pull again") from error
    return dest


def _prune(part: Path, manifest: Manifest) -> None:
    """Remove from the working folder what belongs to another version, or is half a file of an interrupted pull."""
    part.mkdir(parents=True, exist_ok=True)
    keep = {file.path for file in bank_files(manifest)}
    for path in sorted(part.rglob("*"), reverse=True):
        if path.is_symlink() or path.is_file():
            name = path.relative_to(part).as_posix()
            if name not in keep or not fits(part, name, manifest):
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
