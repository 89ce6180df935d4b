"""Rows that commands write: JSON lines or CSV, to standard output as they come, or to a file that appears when whole."""

from __future__ import annotations

import csv
import datetime
import decimal
import json
import math
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

from amlora_dist.errors import UserError, plain_reason
from amlora_dist.files import rename_synced
from amlora_dist.tasks.files import Form
from amlora_dist.tasks.texts import HALF, is_blank, kind_of, lone_surrogate

Written = Literal["jsonl", "csv"]
Write = Callable[[list[dict[str, Any]]], None]

_SUFFIXES: dict[str, Written] = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv", ".txt": "jsonl", ".log": "jsonl", "": "jsonl",
}  # fmt: skip
_FORMULA = "=+-@\u2212"
"""First characters by which spreadsheets take a cell for a formula; of their wide and small forms the plain ones."""
_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?")


@dataclass(frozen=True, slots=True)
class OutputTarget:
    """Where rows go, found to be possible.

    Attributes:
        path: None: standard output.
        device: it is no plain file, and written straight to.
        spreadsheet: cells that a spreadsheet would take for formulas are kept from it.
    """

    path: Path | None
    form: Written | None
    device: bool = False
    spreadsheet: bool = False

    def of(self, form: Form) -> Written:
        """How it is written, given how the input was.

        Raises:
            UserError: ``--spreadsheet`` and not CSV.
        """
        written = self.form or ("csv" if form == "csv" else "jsonl")
        if self.spreadsheet and written != "csv":
            raise UserError("--spreadsheet: found JSON lines to be written, expected CSV; give -o FILE.csv")
        return written


def checked_place(output: Path | None, source: str, *, spreadsheet: bool = False) -> OutputTarget:
    """See that a file can be written, before anything is loaded or computed.

    Raises:
        UserError: a folder, in a folder that is not there or cannot be written, the input itself, or a suffix of what
            is not written here.
    """
    if output is None or str(output) == "-":
        return OutputTarget(None, None, spreadsheet=spreadsheet)
    path = output.expanduser()
    try:
        target = path.resolve()  # what a link points at
    except (OSError, RuntimeError) as error:  # links in a circle
        raise UserError(f"--output: found {path}, expected a file ({plain_reason(error)}); name another one") from None
    if path.is_dir():
        raise UserError(f"--output: found the folder {path}, expected a file; name one in it, such as {path}/rows.jsonl")
    device = path.exists() and not path.is_file()
    form = None if device else _SUFFIXES.get(path.suffix.lower())
    if form is None and not device:
        raise UserError(f"--output: found suffix {path.suffix!r} of {path}, expected .jsonl or .csv; name such a file")
    if source != "-" and path.exists() and Path(source).expanduser().exists() and path.samefile(Path(source).expanduser()):
        raise UserError(f"--output: found {path}, which is the input, expected another file; name another one")
    folder = target.parent
    if not folder.is_dir():
        raise UserError(f"--output: found {path}, expected a file in a folder that is there; make {folder} first")
    if not os.access(path if device else folder, os.W_OK if device else os.W_OK | os.X_OK):
        raise UserError(f"--output: {path} cannot be written; name a file in a folder of yours")
    return OutputTarget(path if device else target, form, device, spreadsheet)


@contextmanager
def writer(place: OutputTarget, written: Written) -> Iterator[Write]:
    """Writes rows in the form that ``place.of`` says.

    CSV that goes to a file has the columns of all rows; of CSV on standard output the first row says them.

    Raises:
        UserError: a value that neither JSON nor CSV can hold, a full disk.
    """
    if place.path is None:
        yield _CsvWriter(sys.stdout, spreadsheet=place.spreadsheet) if written == "csv" else _Objects(sys.stdout)
        return
    if place.device:
        with place.path.open("w", encoding="utf-8", newline="") as file:
            yield _CsvWriter(file, spreadsheet=place.spreadsheet) if written == "csv" else _Objects(file)
        return
    tmp = place.path.with_name(f".{place.path.name[:50]}.{os.getpid()}")  # of a long name only its beginning
    rows = tmp.with_name(f"{tmp.name}.rows")
    try:
        with (rows if written == "csv" else tmp).open("w", encoding="utf-8", newline="") as file:
            write = _Objects(file)

            def guarded(given: list[dict[str, Any]]) -> None:
                with _as_user_error(place.path):
                    write(given)

            yield guarded
        with _as_user_error(place.path):
            if written == "csv":
                _as_table(rows, tmp, spreadsheet=place.spreadsheet)
            rename_synced(tmp, place.path)
    finally:
        tmp.unlink(missing_ok=True)
        rows.unlink(missing_ok=True)


@contextmanager
def _as_user_error(path: Path | None) -> Iterator[None]:
    """A full disk in one message."""
    try:
        yield
    except OSError as error:
        raise UserError(f"--output: {path} cannot be written: {plain_reason(error)}; make room, or name another") from error


def _as_table(rows: Path, dest: Path, *, spreadsheet: bool) -> None:
    """Make a CSV of JSON lines, with the keys of all of them as columns."""
    columns: dict[str, None] = {}
    with rows.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            columns |= dict.fromkeys(json.loads(line))
    with rows.open(encoding="utf-8", newline="\n") as file, dest.open("w", encoding="utf-8", newline="") as out:
        write = _CsvWriter(out, list(columns), spreadsheet=spreadsheet)
        for line in file:
            write([json.loads(line)])


class _Objects:
    """Writes a JSON object a line."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._encoding = file, file.encoding or "utf-8"

    def __call__(self, rows: list[dict[str, Any]]) -> None:
        self._file.writelines(
            _encodable(_json(row, ensure_ascii=False), row, self._encoding) for row in rows
        )
        self._file.flush()


def _encodable(text: str, row: dict[str, Any], encoding: str) -> str:
    """A line of JSON; with escapes where it holds half a character, or one that the output's encoding lacks."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = _json(row)
    return text + "\n"


def _json(row: dict[str, Any], *, ensure_ascii: bool = True) -> str:
    """A row as JSON. It has no word for NaN and infinity: they become null, as in JavaScript and pandas."""
    try:
        return json.dumps(row, default=_plain, allow_nan=False, ensure_ascii=ensure_ascii)
    except ValueError:
        return json.dumps(_finite(row), default=_plain, allow_nan=False, ensure_ascii=ensure_ascii)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(value: object) -> str:
    """What JSON has no word for and CSV would write the same way."""
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return str(value)
    raise UserError(f"found {kind_of(value)} in a column of the input, which cannot be written; leave that column out")


def check_fields(fields: dict[str, Any], where: str, *, form: Written) -> None:
    """Raises UserError where a row has a value that cannot be written again; names the row and the column."""
    for column, value in fields.items():
        try:
            json.dumps(value, default=_plain)
        except UserError as error:
            raise UserError(f"{where}: column {column!r}: {error}") from None
        if form == "csv" and any(isinstance(one, str) and lone_surrogate(one) is not None for one in (column, value)):
            raise UserError(f"{where}: column {column!r}: found {HALF}, expected text; fix the row, or write JSON lines")


class _CsvLines:
    """Takes the rows of ``csv.writer``. With CR LF as their end it puts quotes around a cell with a CR, as it must."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> None:
        self._file.write(text.removesuffix("\r\n") + "\n")


class _CsvWriter:
    """Writes CSV; its columns are those given, or the first row's."""

    def __init__(self, file: TextIO, columns: Sequence[str] = (), *, spreadsheet: bool) -> None:
        self._file, self._spreadsheet = file, spreadsheet
        # Other signs than commas part cells too where somebody has set that; in quotes they do not.
        quotes: Literal[0, 2] = csv.QUOTE_NONNUMERIC if spreadsheet else csv.QUOTE_MINIMAL
        self._writer = csv.writer(_CsvLines(file), lineterminator="\r\n", quoting=quotes)
        self._columns: list[str] = []
        if columns:
            self._begin(columns)

    def __call__(self, rows: list[dict[str, Any]]) -> None:
        if rows and not self._columns:
            self._begin(list(rows[0]))
        for row in rows:
            if more := [key for key in row if key not in self._columns]:
                raise UserError(f"found the column {more[0]!r} in a later row only; give -o FILE.csv, which waits for all")
            self._write([row.get(key) for key in self._columns])
        self._file.flush()

    def _begin(self, columns: Sequence[str]) -> None:
        self._columns = list(columns)
        self._write(self._columns)

    def _write(self, values: Sequence[Any]) -> None:
        cells = ["" if value is None else _cell(value) for value in values]
        try:
            self._writer.writerow([_text_cell(cell) for cell in cells] if self._spreadsheet else cells)
        except UnicodeEncodeError as error:
            raise UserError(
                f"found {error.object[error.start : error.end]!a}, which CSV in {self._file.encoding} cannot hold;"
                " write JSON lines, or -o FILE.csv"
            ) from None


def _cell(value: Any) -> Any:
    if isinstance(value, (dict, list)):
        return json.dumps(value, default=_plain)
    return value if isinstance(value, (str, int, float)) else _plain(value)


def _text_cell(cell: Any) -> Any:
    """A cell that a spreadsheet shows as the text that it is; numbers stay numbers."""
    if not isinstance(cell, str) or _NUMBER.fullmatch(cell):
        return cell
    seen = next((sign for sign in cell if not is_blank(sign)), "")  # spreadsheets pass over what cannot be seen
    formula = cell[:1] in ("\t", "\r", "\n") or (seen != "" and unicodedata.normalize("NFKC", seen) in _FORMULA)
    return f"'{cell}" if formula else cell
