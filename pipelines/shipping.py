"""What a job takes with it: the files of the working directory that ``.gitignore`` does not exclude, as one archive.

The archive is made here and not left to Ray, so that what is refused, named and shipped is one list; equal files make
an equal archive, which Ray then does not upload again.
"""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

from pathspec import GitIgnoreSpec

from amlora_dist.errors import UserError

MOST_BYTES = 100_000_000
NAMED = 5
NEVER = (".git", "__pycache__")


@dataclass(frozen=True, slots=True)
class Shipment:
    """Files below ``folder``, by path relative to it, with their sizes in bytes."""

    folder: Path
    files: dict[str, int]

    @property
    def size(self) -> int:
        return sum(self.files.values())


def collect(folder: Path) -> Shipment:
    """The files that would be shipped.

    Raises:
        UserError: there is no such folder, or its files are more than 100 MB; names the largest.
    """
    if not folder.is_dir():
        raise UserError(f"--working-dir: no folder {str(folder)!r}")
    files: dict[str, int] = {}
    _walk(folder, "", [], files)
    shipment = Shipment(folder, dict(sorted(files.items())))
    if shipment.size > MOST_BYTES:
        largest = sorted(files.items(), key=lambda item: -item[1])[:NAMED]
        told = ", ".join(f"{name} ({size / 1e6:,.1f} MB)" for name, size in largest)
        raise UserError(
            f"--working-dir: {folder} has {shipment.size / 1e6:,.0f} MB in {len(files)} files, at most"
            f" {MOST_BYTES / 1e6:.0f} MB are shipped; the largest are {told}. Name in .gitignore what the job does not need,"
            " and put data on shared storage"
        )
    return shipment


def _walk(folder: Path, below: str, ignoring: list[tuple[str, GitIgnoreSpec]], files: dict[str, int]) -> None:
    """Add the files of ``folder``; ``ignoring``: the ``.gitignore`` files above, with the folder each stands in."""
    rules = folder / ".gitignore"
    if rules.is_file():
        ignoring = [*ignoring, (below, GitIgnoreSpec.from_lines(rules.read_text(encoding="utf-8").splitlines()))]
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda e: e.name):
            name = f"{below}{entry.name}"
            inner = entry.is_dir(follow_symlinks=False)
            if entry.name in NEVER or _ignored(name + "/" * inner, ignoring):
                continue
            if inner:
                _walk(Path(entry.path), f"{name}/", ignoring, files)
            elif entry.is_file():
                files[name] = entry.stat().st_size


def _ignored(name: str, ignoring: list[tuple[str, GitIgnoreSpec]]) -> bool:
    """As git decides it: the innermost file that says anything about a path is right."""
    for below, spec in reversed(ignoring):
        said = spec.check_file(name.removeprefix(below)).include
        if said is not None:
            return bool(said)
    return False


def pack(shipment: Shipment, target: Path) -> None:
    """Write the archive; the same files with the same content give the same bytes."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name in shipment.files:
            source = shipment.folder / name
            entry = zipfile.ZipInfo(name)  # dated 1980: time of day is no content
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = (source.stat().st_mode & 0o777) << 16
            archive.writestr(entry, source.read_bytes())
