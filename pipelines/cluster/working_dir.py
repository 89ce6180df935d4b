"""What a job takes with it: the files of the working directory that ``.gitignore`` does not exclude, as one archive.

The archive is made here and not left to Ray, so that what is refused, named and shipped is one list; equal files make
an equal archive, which Ray then does not upload again.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from amlora_dist.errors import UserError
from pipelines.cluster.gitignore import Rules, excluded

MOST_BYTES = 100_000_000
NAMED = 5
NEVER = (".git", ".amlora", "__pycache__")
"""Nobody's cargo: history, what this machine's own runs have written, and compiled code."""


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
    inside, root = folder.resolve(), _root(folder)
    places = [place for place in (*reversed(inside.parents), inside) if place.is_relative_to(root)]
    outer_rules = [rules for place in places[:-1] if (rules := Rules.of(place, _below(root, place)))]
    below = _below(root, inside)
    try:
        _walk(folder, below, outer_rules, files, (inside,))
    except OSError as error:
        raise UserError(f"--working-dir: cannot read {error.filename}: {error.strerror}") from error
    files = {name.removeprefix(below): size for name, size in files.items()}
    shipment = Shipment(folder, dict(sorted(files.items())))
    if shipment.size > MOST_BYTES:
        largest = sorted(files.items(), key=lambda item: -item[1])[:NAMED]
        listed = ", ".join(f"{name} ({size / 1e6:,.1f} MB)" for name, size in largest)
        raise UserError(
            f"--working-dir: {folder} has {shipment.size / 1e6:,.0f} MB in {len(files)} files, at most"
            f" {MOST_BYTES / 1e6:.0f} MB are shipped; the largest are {listed}. Name in .gitignore what the job does not"
            " need, and put data on shared storage"
        )
    return shipment


def _root(folder: Path) -> Path:
    """The repository that ``folder`` lies in, whose ignore files speak of it too; itself where there is none."""
    inside = folder.resolve()
    return next((place for place in (inside, *inside.parents) if (place / ".git").exists()), inside)


def _below(root: Path, folder: Path) -> str:
    """What paths in ``folder`` begin with, seen from ``root``."""
    return "" if folder == root else f"{folder.relative_to(root).as_posix()}/"


def _walk(folder: Path, below: str, outer_rules: list[Rules], files: dict[str, int], above: tuple[Path, ...]) -> None:
    """Add the files of ``folder``; ``outer_rules``: of the ignore files above; ``above``: the folders on the way, so
    that a link to one of them ends there."""
    if rules := Rules.of(folder, below):
        outer_rules = [*outer_rules, rules]
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda e: e.name):
            name = f"{below}{entry.name}"
            inner = entry.is_dir()
            if entry.name in NEVER or excluded(name, inner, outer_rules):
                continue
            if inner:
                place = Path(entry.path).resolve()
                if place not in above:
                    _walk(Path(entry.path), f"{name}/", outer_rules, files, (*above, place))
            elif entry.is_file():
                files[name] = entry.stat().st_size


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
