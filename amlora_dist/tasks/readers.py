"""Raw rows of a task's splits: from files, the Hub, a mirror of it, or the package. How files are read: ``files``."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from pathlib import Path

from amlora_dist.errors import UserError
from amlora_dist.tasks.conversations import known_columns
from amlora_dist.tasks.files import SUFFIXES, Fixes, Form, RawRow, form_of, read_file
from amlora_dist.tasks.prompts import variables_of
from amlora_dist.tasks.tables import check_columns, dataset_rows, saved_fault
from amlora_dist.tasks.task import SourceSpec, TaskSpec

BUILTIN_DATA = Path(__file__).with_name("demo")
_FORMS: dict[str, Form] = {"jsonl": "jsonl", "csv": "csv", "parquet": "parquet"}
MENDS = Fixes("fix the data, or `columns` of the task", "set source.format")


def read_split(spec: TaskSpec, split: str, *, mirror: Path | None) -> Iterator[RawRow] | None:
    """Raw rows of a split, lazily; None where the task has no such split (only ``dev`` may be missing).

    ``mirror``: the folder that stands in for the Hub, or holds the files of a suite.

    Raises:
        UserError: the file, data set or a column is missing, or a file is not of its format. Some of it only while
            the rows are taken.
    """
    name: str | None = getattr(spec.splits, split)
    if mirror is not None and spec.source.kind == "data_dir":
        return None if name is None else _read_files([mirror / name], spec.source.format, needed_columns(spec), spec)
    if mirror is not None:
        path = mirror / f"{split}.jsonl"
        if split == "dev" and not path.is_file():
            return None
        needed = needed_columns(spec) if spec.columns.conversational else ["text", "label"]
        return _read_files([path], "jsonl", needed, spec)
    if name is None:
        return None
    if spec.source.kind == "hub":
        return _read_hub(spec, name)
    if spec.source.kind == "builtin":
        return _read_files([BUILTIN_DATA / name], "jsonl", needed_columns(spec), spec)
    return _read_files(_matches(name, spec), spec.source.format, needed_columns(spec), spec)


def needed_columns(spec: TaskSpec) -> list[str]:
    """Columns that every row of the source must have (those inside Jinja values are not looked into)."""
    named = spec.columns
    columns = [part.column for part in named.text] + [named.label, named.answer]
    columns += [named.messages, named.conversations, named.prompt, named.completion, named.instruction, named.output]
    return [column for column in columns if column is not None]


def asked_columns(spec: TaskSpec, needed: list[str]) -> list[str]:
    """``needed`` and what the task's Jinja values read: no other column of a source is looked at."""
    values = [part.value for part in spec.columns.text if part.value is not None]
    more = known_columns() if spec.columns.auto else [spec.columns.input] if spec.columns.input else []
    return list(dict.fromkeys([*needed, *more, *(name for value in values for name in variables_of(value))]))


def _matches(pattern: str, spec: TaskSpec) -> list[Path]:
    if not glob.has_magic(pattern) or Path(pattern).is_file():
        return [Path(pattern)]
    root = Path(Path(pattern).anchor)
    paths = sorted(root.glob(Path(pattern).relative_to(root).as_posix()))
    if not paths:
        raise UserError(f"task {spec.name!r}: no file matches {pattern} ({spec.origin})")
    return paths


def split_fault(path: Path) -> str:
    """What is wrong with a local file or folder that a split names, without reading rows; empty where nothing is."""
    if path.is_dir():
        return f"found {fault}" if (fault := saved_fault(path)) else ""
    return "" if path.is_file() else "does not exist"


def _read_files(paths: list[Path], kind: str, needed: list[str], spec: TaskSpec) -> Iterator[RawRow]:
    for path in paths:
        if fault := split_fault(path):
            raise UserError(f"task {spec.name!r}: file {path}{':' * path.is_dir()} {fault} ({spec.origin})")
        known = form_of(path) if kind == "auto" or path.is_dir() else _FORMS[kind]
        if known is None:
            raise UserError(f"{path}: unknown suffix {path.suffix!r}; use {', '.join(SUFFIXES)}, or set source.format")
        rows = list(read_file(path, known, needed, asked_columns(spec, needed), MENDS, spec.source.records))
        if not rows:
            raise UserError(
                f"{path}: found no rows, expected those of task {spec.name!r}; put them there, or fix {spec.origin}"
            )
        yield from (rows[place] for place in _spaced(len(rows), spec.source))


def _spaced(count: int, source: SourceSpec) -> list[int]:
    """Places of the rows to read: all, or ``max_read`` of them evenly spaced (sets are often sorted by label)."""
    most = source.max_read
    if most is None or count <= most:
        return list(range(count))
    return [place * count // most for place in range(most)]


def _read_hub(spec: TaskSpec, split: str) -> Iterator[RawRow]:
    """Rows of a pinned Hub data set. Code of the data set is never run (``trust_remote_code`` is not passed)."""
    import datasets

    source = spec.source
    part = source.config or source.files
    where = f"{source.repository}@{source.revision}" + (f" ({part})" if part else "")
    try:
        data = datasets.load_dataset(
            source.repository, source.config, data_files=source.files, split=split, revision=source.revision
        )
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"task {spec.name!r}: Hub data set {where}, split {split!r} cannot be loaded: "
            f"{' '.join(str(error).split())[:300]} (offline? give `data_dir` with a local mirror)"
        ) from error
    needed = needed_columns(spec)
    check_columns(needed, data.column_names, where, MENDS.column)
    asked = asked_columns(spec, needed)
    columns = [name for name in data.column_names if name in asked]
    for place, values in dataset_rows(data, columns, where, _spaced(len(data), source)):
        yield RawRow(where, place + 1, values)
