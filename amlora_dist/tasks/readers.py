"""Readers of raw rows: Hub data sets, JSON lines, CSV, Parquet, package data. They know files, not tasks."""

from __future__ import annotations

import csv
import glob
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amlora_dist.errors import UserError
from amlora_dist.tasks.task import SourceSpec, TaskSpec, meant

BUILTIN_DATA = Path(__file__).with_name("demo")
_SUFFIXES = {".jsonl": "jsonl", ".json": "jsonl", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row as its source has it. ``number`` counts rows of the file from 1; ``fault`` says what made it unreadable."""

    file: str
    number: int
    values: dict[str, Any]
    fault: str | None = None


def read_split(spec: TaskSpec, split: str, *, mirror: Path | None) -> Iterator[RawRow] | None:
    """Raw rows of a split, lazily; None where the task has no such split (only ``dev`` may be missing).

    Raises:
        UserError: the file, data set or a column is missing, or a file is not of its format. Some of it only while
            the rows are taken.
    """
    if mirror is not None:
        path = mirror / f"{split}.jsonl"
        if split == "dev" and not path.is_file():
            return None
        return _read_files([path], "jsonl", ["text", "label"], spec)
    name: str | None = getattr(spec.splits, split)
    if name is None:
        return None
    if spec.source.kind == "hub":
        return _read_hub(spec, name)
    if spec.source.kind == "builtin":
        return _read_files([BUILTIN_DATA / name], "jsonl", needed_columns(spec), spec)
    return _read_files(_matches(name, spec), spec.source.format, needed_columns(spec), spec)


def needed_columns(spec: TaskSpec) -> list[str]:
    """Columns that every row of the source must have (those inside Jinja values are not looked into)."""
    columns = [part.column for part in spec.columns.text] + [spec.columns.label, spec.columns.answer]
    return [column for column in columns if column is not None]


def check_columns(needed: list[str], present: list[str], where: str) -> None:
    """Raises UserError naming the first column of ``needed`` that is not ``present``."""
    for column in needed:
        if column not in present:
            raise UserError(
                f"{where}: found no column {column!r}{meant(column, present)}, it has {', '.join(map(str, present))}; mend"
                " the data, or `columns` of the task"
            )


def _matches(pattern: str, spec: TaskSpec) -> list[Path]:
    if not glob.has_magic(pattern) or Path(pattern).is_file():
        return [Path(pattern)]
    root = Path(Path(pattern).anchor)
    paths = sorted(root.glob(Path(pattern).relative_to(root).as_posix()))
    if not paths:
        raise UserError(f"task {spec.name!r}: no file matches {pattern} ({spec.origin})")
    return paths


def _read_files(paths: list[Path], kind: str, needed: list[str], spec: TaskSpec) -> Iterator[RawRow]:
    for path in paths:
        if not path.is_file():
            raise UserError(f"task {spec.name!r}: file {path} does not exist ({spec.origin})")
        known = _SUFFIXES.get(path.suffix.lower()) if kind == "auto" else kind
        if known is None:
            raise UserError(f"{path}: unknown suffix {path.suffix!r}; use {', '.join(_SUFFIXES)}, or set source.format")
        reader = {"jsonl": _read_jsonl, "csv": _read_csv, "parquet": _read_parquet}[known]
        rows = list(reader(path, needed))
        if not rows:
            raise UserError(
                f"{path}: found no rows, expected those of task {spec.name!r}; put them there, or mend {spec.origin}"
            )
        yield from (rows[place] for place in _spaced(len(rows), spec.source))


def _spaced(count: int, source: SourceSpec) -> list[int]:
    """Places of the rows to read: all, or ``max_read`` of them evenly spaced (sets are often sorted by label)."""
    most = source.max_read
    if most is None or count <= most:
        return list(range(count))
    return [place * count // most for place in range(most)]


def _read_jsonl(path: Path, needed: list[str]) -> Iterator[RawRow]:
    seen: set[str] = set()
    number = 0
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            found = line.strip() if len(line) <= 60 else f"{line[:57]}..."
            raise UserError(
                f"{path}, line {number}: found {found!r}, expected one JSON object a line ({error.msg} at column"
                f" {error.colno}); mend the line, or set source.format"
            ) from None
        if not isinstance(values, dict):
            raise UserError(
                f"{path}, line {number}: found {type(values).__name__}, expected one JSON object a line; mend the line, or"
                " set source.format"
            )
        seen.update(values)
        yield RawRow(str(path), number, values)
    if number and seen:
        check_columns(needed, sorted(seen), str(path))


def _lines(path: Path) -> Iterator[str]:
    """Lines of a UTF-8 file, split at newlines only (JSON text may hold other line separators)."""
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}: {error.reason})") from None


def _read_csv(path: Path, needed: list[str]) -> Iterator[RawRow]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            check_columns(needed, list(reader.fieldnames or []), str(path))
            for number, values in enumerate(reader, start=1):
                # DictReader puts surplus cells under None and fills missing ones with None.
                uneven = None in values or any(value is None for value in values.values())
                fault = "a wrong number of cells" if uneven else None
                yield RawRow(str(path), number, {k: v for k, v in values.items() if k is not None}, fault)
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not CSV ({error})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}: {error.reason})") from None


def _read_parquet(path: Path, needed: list[str]) -> Iterator[RawRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            check_columns(needed, list(file.schema_arrow.names), str(path))
            number = 0
            for batch in file.iter_batches():
                for values in batch.to_pylist():
                    number += 1
                    yield RawRow(str(path), number, values)
    except pyarrow.ArrowInvalid as error:
        reason = " ".join(str(error).split())[:150]
        raise UserError(
            f"{path}: found {path.stat().st_size} bytes, expected Parquet ({reason}); write it again"
        ) from None


def _read_hub(spec: TaskSpec, split: str) -> Iterator[RawRow]:
    """Rows of a pinned Hub data set. Code of the data set is never run (``trust_remote_code`` is not passed)."""
    import datasets

    source = spec.source
    where = f"{source.repository}@{source.revision}" + (f" ({source.config})" if source.config else "")
    try:
        data = datasets.load_dataset(source.repository, source.config, split=split, revision=source.revision)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"task {spec.name!r}: Hub data set {where}, split {split!r} cannot be loaded: "
            f"{' '.join(str(error).split())[:300]} (offline? give `data_dir` with a local mirror)"
        ) from error
    check_columns(needed_columns(spec), data.column_names, where)
    for place in _spaced(len(data), source):
        yield RawRow(where, place + 1, data[place])
