"""Rows of tables: CSV, Parquet, and data sets that ``Dataset.save_to_disk`` wrote. Used through ``files``."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from amlora_dist.config.schema import did_you_mean
from amlora_dist.errors import UserError

CELL_BYTES = 64 << 20
"""Longest cell of a CSV: a quote that is never closed does not take a whole large file into memory."""
UNEVEN = "a wrong number of cells"
AGAIN = "the header again"
BATCH_ROWS = 1024
NAMED = 20
"""Columns that a message lists; a table may have thousands."""
_JSON = re.compile(r"\{\s*(\"|\}|$)|\[\s*([\"{\[\]]|$)")
"""How a line of JSON begins; the name of a column may be in brackets."""


Needed = str | tuple[str, ...]
"""A column, or several of which one will do; the first of them is named where none is there."""


def check_columns(needed: Iterable[Needed], present: Sequence[str], where: str, fix: str) -> None:
    """Raises UserError naming the first column of ``needed`` that is not ``present``."""
    for one in needed:
        names = (one,) if isinstance(one, str) else one
        column = names[0]
        if not any(name in present for name in names):
            hint = did_you_mean(column, present)
            more = f" and {len(present) - NAMED} more" if len(present) > NAMED else ""
            there = (", ".join(_short(str(name)) for name in present[:NAMED]) or "none") + more
            raise UserError(
                f"{where}: found no column {column!r}{f' ({hint})' if hint else ''}, it has {there}; {fix}"
            )


def check_once(present: Sequence[str], where: str) -> None:
    """Raises UserError naming a column that is there twice: one of the two would be lost."""
    seen: set[str] = set()
    for column in present:
        if column in seen:
            raise UserError(f"{where}: found the column {column!r} twice, expected each once; give them different names")
        seen.add(column)


def between(header: str, needed: Sequence[Needed]) -> str:
    """What separates the cells of a header that is not written with commas, if one of the columns is in it."""
    wanted = {name for one in needed for name in ((one,) if isinstance(one, str) else one)}
    for sign, word in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
        cells = [cell.strip().strip('"') for cell in header.split(sign)]
        if len(cells) > 1 and any(cell in wanted for cell in cells):
            return word
    return ""


# ---- CSV ------------------------------------------------------------------------------------------------------


def csv_rows(
    lines: Iterator[tuple[int, str]], name: str, needed: Sequence[Needed], fix: str
) -> Iterator[tuple[int, int, dict[str, Any], str | None]]:
    """Number (from 1), line, values and fault of each row behind the header.

    Raises:
        UserError: not CSV, a quote that is never closed (with its line), no header, a column that is missing or there
            twice.
    """
    csv.field_size_limit(CELL_BYTES)
    record: list[tuple[int, str]] = []  # the lines of the row that is being read

    def fed() -> Iterator[str]:
        for number, line in lines:
            for piece in re.split(r"(?<=\r)(?!\n)", line) if "\r" in line[:-2] else (line,):
                record.append((number, piece))
                yield piece

    reader = csv.reader(fed(), strict=True)
    header: list[str] | None = None
    count = 0
    while True:
        record.clear()
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            if header is None:
                _refuse_header(record[0][1], (), f"{name}, line {record[0][0]}", needed)
            raise UserError(_csv_fault(error, record, name)) from None
        if not cells:
            continue
        if header is None:
            header = cells
            where = f"{name}, line {record[0][0]}"
            _refuse_header("".join(text for _, text in record), cells, where, needed)
            check_once(header, where)
            check_columns(needed, header, name, fix)
            continue
        count += 1
        fault = None if len(cells) == len(header) else UNEVEN
        if cells == header and len(header) > 1:  # files that were put one behind the other
            fault = AGAIN
        yield count, record[0][0], dict(zip(header, cells, strict=False)), fault
    if header is None and needed:
        raise UserError(f"{name}: found no header, expected a first line with the names of the columns; {fix}")


def _refuse_header(line: str, cells: Sequence[str], where: str, needed: Sequence[Needed]) -> None:
    """Raises UserError where a first line is no header of a CSV: it is written otherwise, or is something else.

    Args:
        line: as it is in the file.
        cells: of it; none where it cannot be read as CSV.
        where: file and line.
        needed: columns, one of which a header has.
    """
    if line.startswith("sep=") and len(line.strip()) == 5:
        raise UserError(f"{where}: found {line.strip()!r}, expected the names of the columns; take the line away")
    wanted = {name for one in needed for name in ((one,) if isinstance(one, str) else one)}
    if wanted & set(cells):
        return
    if _JSON.match(line):
        raise UserError(f"{where}: found JSON, expected the names of the columns; name the file .jsonl, or give its format")
    if signs := between(line.strip(), needed):
        raise UserError(f"{where}: found cells between {signs}, expected commas; write it with commas")


def _short(name: str) -> str:
    return name if len(name) <= 60 else f"{name[:57]}..."


def _csv_fault(error: csv.Error, record: list[tuple[int, str]], name: str) -> str:
    line = record[0][0] if record else 1
    endless = "unexpected end of data" in str(error) or "field larger" in str(error)
    opened = _open_quote(record) if endless else None
    if opened is not None:
        return f"{name}, line {opened}: found a quote that is never closed, expected CSV; close it, or double it in a text"
    return f"{name}, line {line}: not CSV ({error}); put a cell with a comma, a quote or a line break in quotes"


def _open_quote(record: list[tuple[int, str]]) -> int | None:
    """Line of the quote that is open at the end of a row that was cut off."""
    opened: int | None = None
    for number, text in record:
        for quotes in re.finditer('"+', text):
            # Outside quotes only one at the beginning of a cell opens. Inside, a pair is one quote of the text, and what
            # is left over closes.
            left = len(quotes[0])
            if opened is None:
                if quotes.start() and text[quotes.start() - 1] != ",":
                    continue
                opened, left = number, left - 1
            if left % 2:
                opened = None
    return opened


# ---- Parquet and saved data sets ------------------------------------------------------------------------------


def parquet_rows(
    path: Path, needed: Sequence[Needed], asked: Sequence[str] | None, fix: str
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number (from 1) and values of each row; columns that are not ``asked`` for are not read.

    Raises:
        UserError: not Parquet, a missing column, or a column that cannot be read; names file and column.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        size = f"found {path.stat().st_size} bytes, " if path.is_file() else ""
        raise UserError(f"{path}: {size}expected Parquet ({_reason(error)}); write it again") from None
    with file:
        present = list(file.schema_arrow.names)
        check_once(present, str(path))
        check_columns(needed, present, str(path), fix)
        columns = [name for name in present if asked is None or name in asked]

        def batches(chosen: list[str]) -> Iterator[Any]:
            # A column of a structure is named by its root: a dot would choose one of its fields.
            yield from file.iter_batches(batch_size=BATCH_ROWS, columns=chosen)

        count = 0
        for batch in _careful(batches, columns, path):
            values = {name: _column(batch.column(name).to_pylist, name, path) for name in columns}
            for place in range(batch.num_rows):
                count += 1
                yield count, {name: values[name][place] for name in columns}


def _careful(batches: Callable[[list[str]], Iterator[Any]], columns: list[str], path: Path) -> Iterator[Any]:
    """Batches of some columns; where that fails, each column is read by itself, to name the one at fault."""
    import pyarrow

    try:
        yield from batches(columns)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        for name in columns:
            _column(partial(list, batches([name])), name, path)
        raise UserError(f"{path}: cannot be read ({_reason(error)}); write it again") from None


def _column(read: Callable[[], list[Any]], name: str, path: Path | str) -> list[Any]:
    """Values of a column. Far timestamps, text that is not UTF-8 and torn pages come out here."""
    import pyarrow

    try:
        return read()
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, LookupError) as error:
        raise UserError(
            f"{path}: column {name!r} cannot be read ({_reason(error)}); write the file again, or leave the column out"
        ) from None


def is_saved(path: Path) -> bool:
    """Whether a folder holds one split that ``Dataset.save_to_disk`` wrote."""
    return (path / "state.json").is_file() and (path / "dataset_info.json").is_file()


def saved_fault(path: Path) -> str:
    """What is wrong with a folder that is named as a file of rows, and the fix; empty where it is a saved split."""
    if is_saved(path):
        return ""
    if (path / "dataset_dict.json").is_file():
        inside = sorted(one.name for one in path.iterdir() if is_saved(one))
        found = ", ".join(inside) or "none that is whole"
        return f"a folder of DatasetDict.save_to_disk with the splits {found}; name one of them, {path}/NAME"
    return "a folder that Dataset.save_to_disk did not write; name its files, such as NAME/*.jsonl"


def saved_rows(
    path: Path, needed: Sequence[Needed], asked: Sequence[str] | None, fix: str
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number (from 1) and values of each row of a folder that ``Dataset.save_to_disk`` wrote.

    Raises:
        UserError: it is another kind of folder, it is damaged, a column is missing or cannot be read.
    """
    if fault := saved_fault(path):
        raise UserError(f"{path}: found {fault}")
    import datasets
    import pyarrow

    try:
        data = datasets.load_from_disk(str(path))
    except (
        pyarrow.ArrowException, OSError, ValueError, TypeError, LookupError, AttributeError,
        datasets.exceptions.DatasetsError,
    ) as error:  # fmt: skip
        raise UserError(f"{path}: cannot be read as a saved data set ({_reason(error)}); save it again") from None
    present = list(data.column_names)
    check_columns(needed, present, str(path), fix)
    columns = [name for name in present if asked is None or name in asked]
    for name in columns:
        # Arrow takes the offsets of a file as they are, and reads past the end of memory where they are wrong.
        _column(partial(_validated, data, name), name, path)
    for place, values in dataset_rows(data, columns, path, range(len(data))):
        yield place + 1, values


def dataset_rows(
    data: Any, columns: Sequence[str], where: Path | str, places: Sequence[int]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Place and values of rows of a ``datasets.Dataset``. Raises UserError naming the column that cannot be read."""
    alone = {name: data.select_columns([name]) for name in columns}
    for start in range(0, len(places), BATCH_ROWS):
        part = list(places[start : start + BATCH_ROWS])
        values = {name: _column(partial(_values, alone[name], part, name), name, where) for name in columns}
        for at, place in enumerate(part):
            yield place, {name: values[name][at] for name in columns}


def _validated(data: Any, name: str) -> list[Any]:
    data.data.column(name).validate(full=True)
    return []


def _values(data: Any, places: list[int], name: str) -> list[Any]:
    return list(data[places][name])


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:150] or type(error).__name__
