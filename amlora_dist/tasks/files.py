"""Readers of files of rows, one for all who read rows: JSON lines, a JSON array, CSV, Parquet, saved data sets, lines.

They know files and streams, not tasks. A file is what its suffix says or what the caller says; a stream, or a file
without a suffix that tells, is what its first line says.
"""

from __future__ import annotations

import io
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from amlora_dist.errors import UserError, plain_reason
from amlora_dist.tasks import tables

Form = Literal["jsonl", "csv", "parquet", "text", "lines", "saved"]
"""``text``: every line is a text. ``lines``: so is every line but those that begin with ``{``, which are JSON objects.
``saved``: a folder of ``Dataset.save_to_disk``."""

SUFFIXES: dict[str, Form] = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv", ".parquet": "parquet",
}  # fmt: skip
LONGEST_LINE = 64 << 20
"""Bytes: a file without line ends is not taken into memory as a whole."""

_MARK = b"\xef\xbb\xbf"
_MAGIC = {
    b"\xff\xfe\0\0": "UTF-32 text", b"\0\0\xfe\xff": "UTF-32 text", b"\xfd7zXZ": "an xz archive",
    b"7z\xbc\xaf": "a 7z archive", b"\xd0\xcf\x11\xe0": "a spreadsheet or document of old",
    b"%PDF": "a PDF", b"ARROW1": "an Arrow file",
    b"Obj\x01": "an Avro file", b"ORC": "an ORC file", b"SQLite format 3\0": "an SQLite database",
    b"PAR1": "Parquet", b"\x1f\x8b": "a gzip archive", b"PK\x03\x04": "a zip archive (or a spreadsheet)",
    b"\xff\xfe": "UTF-16 text", b"\xfe\xff": "UTF-16 text", b"\x28\xb5\x2f\xfd": "a zstd archive", b"BZh": "a bzip2 archive",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row as its source has it. ``number`` counts rows of the file from 1; ``fault`` says what made it unreadable."""

    file: str
    number: int
    values: dict[str, Any]
    fault: str | None = None
    line: int | None = None
    """Where it begins in a file of lines, from 1."""

    @property
    def where(self) -> str:
        """File and line, for messages; the row's number where the file has no lines."""
        return f"{self.file}, row {self.number}" if self.line is None else f"{self.file}, line {self.line}"


@dataclass(frozen=True, slots=True)
class Fixes:
    """What a caller's users can do, for messages."""

    column: str
    """About a column that is not there."""
    form: str
    """About a file that is of another form."""


_WORDS = {b"ARROW1", b"ORC", b"PAR1", b"BZh"}
"""Those of them that a text may begin with, as with ORCHID: a file of that kind has other bytes right behind it."""
_NAME = re.compile(r"[^\W\d][\w-]*( [\w-]+){0,2}")
"""What may be the name of a column: up to three words, as no text has them behind a comma without a space."""

NumberedLine = tuple[int, str]
"""Number, from 1, and text with its end."""


def form_of(path: Path) -> Form | None:
    """What a file is by its suffix, or what a folder is; None where that does not tell."""
    if path.is_dir():
        return "saved"
    return SUFFIXES.get(path.suffix.lower())


def read_file(
    path: Path,
    form: Form,
    needed: Sequence[tables.Needed],
    asked: Sequence[str] | None,
    fixes: Fixes,
    records: str | None = None,
) -> Iterator[RawRow]:
    """Rows of a file, lazily.

    Args:
        path: of the file, or of the folder of a saved data set.
        form: how it is written.
        needed: columns that it must have. JSON lines are looked at to their end before one is missed.
        asked: columns that are read, of formats that keep columns apart; None: all.
        fixes: what to do, for the messages.
        records: of a file that is one JSON object: the keys, with points between them, that lead to its list of rows.

    Raises:
        UserError: it is not there or not of its form, or a column is missing. Names the file, and line or column.
    """
    if form == "parquet":
        yield from (RawRow(str(path), n, values) for n, values in tables.parquet_rows(path, needed, asked, fixes.column))
    elif form == "saved":
        yield from (RawRow(str(path), n, values) for n, values in tables.saved_rows(path, needed, asked, fixes.column))
    else:
        try:
            file = path.open("rb")
        except OSError as error:
            raise UserError(f"{path}: {plain_reason(error)}; give a file that can be read") from error
        with file:
            if path.suffix.lower() == ".json" and records is None:
                _refuse_one_object(path)
            lines = lines_of(file, str(path))
            if records is not None and form == "jsonl":
                yield from _record_rows("".join(text for _, text in lines), str(path), records, needed, fixes)
            else:
                yield from rows_of_lines(lines, str(path), form, needed, fixes)


def rows_of_lines(
    lines: Iterator[NumberedLine], name: str, form: Form, needed: Sequence[tables.Needed], fixes: Fixes, column: str = "text"
) -> Iterator[RawRow]:
    """Rows of what ``lines_of`` gives; a plain line becomes a row with ``column``. Otherwise as ``read_file``."""
    if form == "csv":
        for number, line, values, fault in tables.csv_rows(lines, name, needed, fixes.column):
            yield RawRow(name, number, values, fault, line)
    elif form == "jsonl":
        yield from _json_rows(lines, name, needed, fixes)
    elif form in ("text", "lines"):
        yield from _plain_rows(lines, name, column, fixes if form == "lines" else None)
    else:
        raise UserError(f"{name}: a stream cannot be read as {form}; give a file")


def sniffed(lines: Iterator[NumberedLine], name: str, column: str) -> tuple[Form, Iterator[NumberedLine]]:
    """What a stream is by its first line, and its lines from the first on.

    Raises:
        UserError: the form cannot be recognised: names what to give.
    """
    first: list[NumberedLine] = []
    for line in lines:
        first.append(line)
        if line[1].strip():
            break
    return _form_of_line(first[-1][1].strip() if first else "", name, column), itertools.chain(first, lines)


def _form_of_line(first: str, name: str, column: str) -> Form:
    if first.startswith("{"):
        return "lines"
    if re.match(r"\[\s*(\{|\]|$)", first):
        return "jsonl"
    if re.match(r"\[\s*[\"\[]", first) or _is_array(first):
        raise UserError(
            f"{name}, line 1: found {_short(first)}, a JSON array of something else than objects; write one JSON object a"
            " line, or one text a line, or give --format text"
        )
    cells = [cell.strip().strip('"') for cell in first.split(",")]
    names = [cell.strip('"') for cell in first.split(",")]
    if column in cells and len(cells) > 1:
        return "csv"
    if signs := tables.between(first, [column]):
        raise UserError(
            f"{name}, line 1: found cells between {signs}, expected CSV with commas, JSON lines or plain lines; write it"
            " with commas, or give --format text"
        )
    if cells == [column] or (len(cells) > 1 and all(map(_NAME.fullmatch, names))):
        raise UserError(
            f"{name}, line 1: found {_short(first)}, which may be the header of a CSV or a text; give --format csv (with"
            " --column NAME) or --format text"
        )
    return "lines"


def _is_array(line: str) -> bool:
    try:
        return isinstance(json.loads(line), list)
    except (ValueError, RecursionError):
        return False


# ---- lines ----------------------------------------------------------------------------------------------------


def lines_of(file: BinaryIO, name: str) -> Iterator[NumberedLine]:
    """Lines of UTF-8 text, as they come, without byte order marks in front: files with one that were joined have more.

    They end at newlines only: JSON text may hold other line separators.

    Raises:
        UserError: something else than UTF-8 text, or a zero byte in it; names the line.
    """
    number = 0
    while raw := file.readline(LONGEST_LINE + 1):
        number += 1
        while raw.startswith(_MARK):
            raw = raw[len(_MARK) :]
        if number == 1:
            for magic, what in _MAGIC.items():
                if raw.startswith(magic) and not (magic in _WORDS and _is_text(raw)):
                    raise UserError(f"{name}: not UTF-8 text but {what}; write it as UTF-8, or unpack it first")
        if len(raw) > LONGEST_LINE:
            raise UserError(f"{name}, line {number}: longer than {LONGEST_LINE >> 20} MiB; end each row with a newline")
        if (place := raw.find(b"\0")) >= 0:
            raise UserError(
                f"{name}, line {number}: not text but a zero byte (byte {place + 1} of it): UTF-16 without a mark, another"
                " kind of file, or the rest of one that was cut off; write it as UTF-8"
            )
        try:
            yield number, raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{name}: not UTF-8 text (line {number}, byte {error.start + 1} of it: {error.reason}); write it as UTF-8"
            ) from None


def _is_text(line: bytes) -> bool:
    try:
        return line.decode("utf-8").strip().replace("\t", " ").isprintable()
    except UnicodeDecodeError:
        return False


def _plain_rows(lines: Iterator[NumberedLine], name: str, column: str, objects: Fixes | None) -> Iterator[RawRow]:
    for number, line in lines:
        text = line.strip()
        if objects is not None and text.startswith("{"):
            yield RawRow(name, number, _object(text, name, number, objects), line=number)
        elif text:
            yield RawRow(name, number, {column: text}, line=number)


# ---- JSON -----------------------------------------------------------------------------------------------------


def _json_rows(lines: Iterator[NumberedLine], name: str, needed: Sequence[tables.Needed], fixes: Fixes) -> Iterator[RawRow]:
    seen: set[str] = set()
    for number, line in lines:
        if not line.strip():
            continue
        # A line that is an array by itself, in a file of objects, is a fault of that line.
        if not seen and re.match(r"\s*\[\s*(\{|\]|$)", line):
            rows = _array_rows(line + "".join(text for _, text in lines), name, number)
        else:
            rows = iter([RawRow(name, number, _object(line, name, number, fixes), line=number)])
        for row in rows:
            seen.update(row.values)
            yield row
    if seen:
        tables.check_columns(needed, sorted(seen), name, fixes.column)


def _object(line: str, name: str, number: int, fixes: Fixes) -> dict[str, Any]:
    where, expected, fix = f"{name}, line {number}", "expected one JSON object a line", f"fix the line, or {fixes.form}"
    value = _parsed(line.strip(), where, expected, fix)
    if not isinstance(value, dict):
        raise UserError(f"{where}: found {type(value).__name__}, {expected}; {fix}")
    return value


def _array_rows(text: str, name: str, line: int) -> Iterator[RawRow]:
    """Rows of a JSON array of objects; they have numbers and no lines."""
    fix = "fix the array, or write one JSON object a line"
    value = _parsed(text, f"{name}, line {line}", "expected a JSON array of objects", fix)
    if not isinstance(value, list):
        raise UserError(f"{name}, line {line}: found {type(value).__name__}, expected a JSON array of objects; {fix}")
    yield from _item_rows(value, name, fix)


def _record_rows(
    text: str, name: str, records: str, needed: Sequence[tables.Needed], fixes: Fixes
) -> Iterator[RawRow]:
    """Rows of the list below these keys of one JSON object."""
    fix = "fix `records`"
    value = _parsed(text, name, "expected one JSON object with a list of rows in it", "fix the file")
    for key in records.split("."):
        if not isinstance(value, dict) or key not in value:
            there = ", ".join(map(str, value)) if isinstance(value, dict) else f"a {type(value).__name__}"
            raise UserError(f"{name}: records: found no key {key!r} on the way {records!r}, there is {there}; {fix}")
        value = value[key]
    if not isinstance(value, list):
        raise UserError(f"{name}: records: found {type(value).__name__} at {records!r}, expected a list of objects; {fix}")
    rows = list(_item_rows(value, name, f"{fix}, or the file"))
    if rows:
        tables.check_columns(needed, sorted({key for row in rows for key in row.values}), name, fixes.column)
    yield from rows


def _refuse_one_object(path: Path) -> None:
    """Raises UserError where a ``.json`` file is one object with lists of rows inside; says how to name them."""
    with path.open("rb") as file:
        first = file.readline(LONGEST_LINE).lstrip(_MARK).strip()
    if not first.startswith(b"{") or path.stat().st_size > LONGEST_LINE:
        return
    try:
        found = lists_of_rows(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        return
    if found:
        raise UserError(
            f"{path}: found one JSON object with a list of rows inside, expected a list or one object a line; set"
            f" source.records: {' or '.join(found[:3])}"
        )


def lists_of_rows(text: str) -> list[str]:
    """Where in one JSON object lists of objects are, as ``records`` names them; at most three keys deep."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return []
    return list(_lists_below(value, ())) if isinstance(value, dict) else []


def _lists_below(value: dict[str, Any], above: tuple[str, ...]) -> Iterator[str]:
    for key, inner in value.items():
        if not re.fullmatch(r"[^.\s]+", key):
            continue  # no `records` can say it
        if isinstance(inner, list) and inner and all(isinstance(one, dict) for one in inner):
            yield ".".join((*above, key))
        elif isinstance(inner, dict) and len(above) < 2:
            yield from _lists_below(inner, (*above, key))


def _item_rows(items: list[Any], name: str, fix: str) -> Iterator[RawRow]:
    for number, item in enumerate(items, start=1):
        if not isinstance(item, dict):
            raise UserError(f"{name}, row {number}: found {type(item).__name__}, expected a JSON object; {fix}")
        yield RawRow(name, number, item)


def _parsed(text: str, where: str, expected: str, fix: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_once)
    except _TwiceError as error:
        raise UserError(f"{where}: found the key {str(error)!r} twice in one object, expected it once; {fix}") from None
    except json.JSONDecodeError as error:
        place = f"{error.msg} at column {error.colno}" if error.lineno == 1 else f"{error.msg}, line {error.lineno} of it"
        raise UserError(f"{where}: found {_short(text)}, {expected} ({place}); {fix}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; a thousand brackets
        reason = "brackets too deep in each other" if isinstance(error, RecursionError) else "a number that is too long"
        raise UserError(f"{where}: found {reason}, {expected}; {fix}") from None


class _TwiceError(ValueError):
    """A key that is twice in one object."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise _TwiceError(next(name for name in names if names.count(name) > 1))
    return made


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def buffered(file: Any) -> BinaryIO:
    """The bytes of standard input, or of what stands in for it in a test."""
    binary = getattr(file, "buffer", None)
    return io.BytesIO(file.read().encode("utf-8", "surrogatepass")) if binary is None else binary
