"""What a job takes with it: the files of the working directory that git keeps or would add, as one archive.

The archive is made here and not left to Ray, so that what is refused, named and shipped is one list; equal files make
an equal archive, which Ray then does not upload again.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from amlora_dist.errors import UserError

MOST_BYTES = 100_000_000
NAMED = 5
NEVER = frozenset({".git", ".amlora", "__pycache__"})
"""Nobody's cargo: history, what this machine's own runs have written, and compiled code."""
IGNORE_FILE = ".gitignore"
GIT_DEADLINE_S = 120
OF_A_HOOK = frozenset({"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"})
"""Variables by which git tells what it runs of another repository than that of the folder."""


@dataclass(frozen=True, slots=True)
class Shipment:
    """Files below ``folder``, by path relative to it, with their sizes in bytes."""

    folder: Path
    files: dict[str, int]

    @property
    def size(self) -> int:
        return sum(self.files.values())


def collect(folder: Path) -> Shipment:
    """The files that would be shipped: those that git keeps or would add, in a repository or as if the folder were one.
    Links are followed, and so are repositories inside of it.

    Raises:
        UserError: there is no such folder, it has ignore files and git is not installed, or its files are more than
            100 MB; names the largest.
    """
    if not folder.is_dir():
        raise UserError(f"--working-dir: no folder {str(folder)!r}")
    try:
        files = {name: (folder / name).stat().st_size for name in sorted(_files(folder.resolve(), ()))}
    except OSError as error:
        raise UserError(f"--working-dir: cannot read {error.filename}: {error.strerror}") from error
    shipment = Shipment(folder, files)
    if shipment.size > MOST_BYTES:
        largest = sorted(files.items(), key=lambda item: -item[1])[:NAMED]
        listed = ", ".join(f"{name} ({size / 1e6:,.1f} MB)" for name, size in largest)
        raise UserError(
            f"--working-dir: {folder} has {shipment.size / 1e6:,.0f} MB in {len(files)} files, at most"
            f" {MOST_BYTES / 1e6:.0f} MB are shipped; the largest are {listed}. Name in .gitignore what the job does not"
            " need, and put data on shared storage"
        )
    return shipment


def _files(folder: Path, above: tuple[Path, ...]) -> Iterator[str]:
    """Paths of files below ``folder``; ``above``: the folders whose links led here, so that a circle ends."""
    for name in _listed(folder):
        path = folder / name
        if NEVER & set(Path(name).parts):
            continue
        if path.is_dir():  # a link, or a repository of its own
            place = path.resolve()
            if place == path or not (place in above or path.is_relative_to(place)):
                yield from (f"{name.rstrip('/')}/{inner}" for inner in _files(place, (*above, folder)))
        elif path.is_file():
            yield name


def _listed(folder: Path) -> set[str]:
    """Files, links, and repositories of their own below ``folder``, but for those that ignore files name."""
    root = next((place for place in (folder, *folder.parents) if (place / ".git").exists()), folder)
    try:
        kept = _git(folder, "ls-files", "-co", "--exclude-standard")
        # An ignored folder that is asked for all the same is read as if it were none.
        ignored = bool(kept is not None and _git(folder, "check-ignore", "--no-index", "--stdin", given=["."]))
        found = kept or set()
        if kept is None or ignored:
            root = folder if ignored else root
            with _repository() as made:
                found |= _git(
                    folder, f"--git-dir={made}/.git", f"--work-tree={root}", "ls-files", "-o", "--exclude-standard"
                ) or set()  # fmt: skip
        links = {name for name in found if (folder / name).is_symlink() and (folder / name).is_dir()}
        return found - _ignored_folders(root, folder, links) if links else found
    except FileNotFoundError:
        return _without_git(folder)
    except subprocess.SubprocessError as error:
        raise UserError(f"--working-dir: git has not listed {folder} ({error}); is it much too large?") from error


def _ignored_folders(root: Path, folder: Path, links: set[str]) -> set[str]:
    """Links that would be ignored if they were the folders that they lead to: to git a link is a file, and a rule such as
    ``data/`` none of its business. So it is asked in a repository that has the ignore files and nothing else."""
    with _repository() as made:
        below = folder.relative_to(root)
        for place in {parent for name in links for parent in (below / name).parents}:
            if (root / place / IGNORE_FILE).is_file():
                (made / place).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(root / place / IGNORE_FILE, made / place / IGNORE_FILE)
        asked = {f"{(below / name).as_posix()}/x": name for name in links}
        found = _git(made, "check-ignore", "--no-index", "--stdin", given=asked)
    return {asked[name] for name in found or ()}


@contextlib.contextmanager
def _repository() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="amlora-git-") as tmp:
        _run(["git", "init", "-q", tmp]).check_returncode()
        yield Path(tmp)


def _git(folder: Path, *command: str, given: Iterable[str] = ()) -> set[str] | None:
    """What a command of git that takes ``-z`` lists in ``folder``; None where it fails."""
    done = _run(["git", "-C", str(folder), *command, "-z"], os.fsencode("\0".join(given)))
    if closed := [line for line in os.fsdecode(done.stderr).splitlines() if "could not open directory" in line]:
        raise UserError(f"--working-dir: git: {closed[0]}")
    return None if done.returncode else set(filter(None, os.fsdecode(done.stdout).split("\0")))


def _run(command: list[str], given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    environment = {key: value for key, value in os.environ.items() if key not in OF_A_HOOK} | {"LC_ALL": "C"}
    return subprocess.run(command, env=environment, input=given, capture_output=True, timeout=GIT_DEADLINE_S)


def _without_git(folder: Path) -> set[str]:
    """All files and links, where no ignore file would have to be read."""

    def refuse(error: OSError) -> None:
        raise error

    found = set()
    for at, folders, files in os.walk(folder, onerror=refuse):
        if IGNORE_FILE in files:
            raise UserError(
                f"--working-dir: {Path(at) / IGNORE_FILE} says what is not shipped, and git, which reads it, is not"
                " installed: install it, or take the file away"
            )
        folders[:] = [name for name in folders if name not in NEVER]
        links = [name for name in folders if (Path(at) / name).is_symlink()]
        found |= {(Path(at) / name).relative_to(folder).as_posix() for name in (*files, *links)}
    return found


def pack(shipment: Shipment, target: Path, more: Mapping[str, bytes] | None = None) -> None:
    """Write the archive, with ``more`` files by name; the same files with the same content give the same bytes."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, content in (more or {}).items():
            archive.writestr(zipfile.ZipInfo(name), content)
        for name in (name for name in shipment.files if name not in (more or {})):
            source = shipment.folder / name
            try:
                content, mode = source.read_bytes(), source.stat().st_mode
            except OSError as error:
                raise UserError(f"--working-dir: cannot read {source}: {error.strerror}") from error
            entry = zipfile.ZipInfo(name)  # dated 1980: time of day is no content
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = (mode & 0o777) << 16
            archive.writestr(entry, content)
