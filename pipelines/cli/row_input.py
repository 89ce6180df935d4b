"""Rows that commands are given: a file or standard input, read as training reads its rows, and checked beforehand."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from amlora_dist.errors import UserError, plain_reason
from amlora_dist.evaluation.field_columns import FIELDS, FieldColumns
from amlora_dist.evaluation.field_texts import fields_for, joined_text
from amlora_dist.tasks.conversations import (
    FIRST_COLUMNS,
    BadTurnsError,
    Turn,
    is_conversation,
    last_user,
    waiting_turns,
)
from amlora_dist.tasks.files import (
    SUFFIXES,
    Fixes,
    Form,
    NumberedLine,
    RawRow,
    buffered,
    form_of,
    lines_of,
    read_file,
    rows_of_lines,
    sniffed,
)
from amlora_dist.tasks.tables import UNEVEN, Needed
from amlora_dist.tasks.texts import TAKEN, NoTextError, is_blank, text_of

Asked = Literal["auto", "jsonl", "csv", "parquet", "text"]
"""What ``--format`` takes."""

OPEN_SUFFIXES = ("", ".txt", ".log", ".text")
"""Files that are what their first line says."""
TEXT = "text"
"""The column of the text, if nobody names another; rows without it may be conversations."""
MENDS = Fixes("name the one with the text: --column", "give --format")


@dataclass(frozen=True, slots=True)
class InputRow:
    """One row of the input: all its fields, and where it is."""

    where: str
    fields: dict[str, Any]
    text: str
    """Of a conversation: the user's last turn."""
    turns: tuple[Turn, ...] = ()
    """Of a conversation: all of it up to the answer."""
    answer: str | None = None
    """Of a conversation: the right answer, where the row has it."""
    named: Mapping[str, str] = field(default_factory=dict)
    """Of a text that is made of named fields: these. ``text`` is what they are joined to."""

    @property
    def request(self) -> str | Mapping[str, str] | tuple[Turn, ...]:
        """What a bank is asked."""
        return self.turns or self.named or self.text

    def option(self, key: str) -> str | None:
        """The row's own ``task`` or ``question``; None where it has none, and where a field of its text has that name."""
        value = None if key in self.named else self.fields.get(key)
        return None if value is None else _text(value, self.where, key, "leave the key out, or give a text") or None


class RowInput:
    """Rows of a file or of standard input.

    Attributes:
        form: how they are written.
        again: whether they can be read a second time.
        columns: of the fields that texts may be made of, by the bank that is asked.
    """

    def __init__(self, name: str, form: Form, column: str, source: Path | Iterator[NumberedLine]) -> None:
        self.name, self.form, self.column = name, form, column
        self.columns = FieldColumns()
        self._source = source
        self.again = isinstance(source, Path)

    def lines(self, asked: Sequence[str] | None = None) -> Iterator[InputRow]:
        """The rows, as they come; ``asked`` columns alone where the form keeps columns apart.

        Raises:
            UserError: a row that cannot be read or has no text; names file and line.
        """
        needed = _needed(self.form, self.column, self.columns)
        shown = self.columns.shown if self.column == TEXT else ""
        mends = replace(MENDS, column=f"{MENDS.column}; or the fields of a task, written so: {shown}") if shown else MENDS
        if isinstance(self._source, Path):
            rows = _file_rows(self._source, self.form, self.column, needed, asked, mends)
        else:
            rows = rows_of_lines(self._source, self.name, self.form, needed, mends, self.column)
        for row in rows:
            yield _line(row, self.column, self.columns)

    def check(self, tasks: Sequence[str], writable: Callable[[dict[str, Any], str], None]) -> None:
        """Read all rows once, if they can be read again.

        Args:
            tasks: those that rows may name.
            writable: raises UserError where a row's fields, from a place in the input, cannot be written again.

        Raises:
            UserError: as ``lines``, or a row names another task or one that it lacks fields for, or cannot be written.
        """
        for line in self.lines() if self.again else ():
            writable(line.fields, line.where)
            task = line.option("task")
            line.option("question")
            if task is not None and task not in tasks:
                raise UserError(f"{line.where}: task: found {task!r}, the bank's tasks are {', '.join(tasks)}")
            try:
                self._check_asked(line, self.columns.task or task)
            except UserError as error:
                raise UserError(f"{line.where}: {error}") from None

    def _check_asked(self, line: InputRow, task: str | None) -> None:
        """Raises UserError where the prompt of the task that a row is for reads fields which the row has not."""
        entries = self.columns.entries
        whole = joined_text(line.named, entries, task)[1] if line.named else {}
        fields_for(task, entries, line.text, whole)


@contextmanager
def opened(source: str, column: str, asked: Asked = "auto") -> Iterator[RowInput]:
    """The rows of a file, or of standard input (``-``).

    Raises:
        UserError: there is no such file, or its form cannot be recognised. Names what to give.
    """
    if not column:
        raise UserError("--column: found '', expected the key or column of the text")
    if source == "-":
        yield _stream(buffered(sys.stdin), "standard input", column, asked)
        return
    path = Path(source).expanduser()
    try:
        there = path.is_file() or path.is_dir()
    except OSError as error:  # a name that is too long
        raise UserError(f"{_short(source)}: {plain_reason(error)}; give a file, or - for standard input") from error
    if there:
        form = _form(path, column, asked)
        yield RowInput(source, form, column, path)
        return
    try:
        file = path.open("rb")  # a pipe: it is read once
    except (OSError, ValueError) as error:
        raise UserError(f"{_short(source)}: {plain_reason(error)}; give a file, or - for standard input") from error
    with file:
        yield _stream(file, source, column, asked)


def _short(source: str) -> str:
    return source if len(source) <= 200 else f"{source[:197]}..."


def _stream(file: BinaryIO, name: str, column: str, asked: Asked) -> RowInput:
    lines = lines_of(file, name)
    form: Form
    if asked == "auto":
        form, lines = sniffed(lines, name, column)
    elif asked == "parquet":
        raise UserError(f"--format: found parquet for {name}, expected the form of a stream; give a file")
    else:
        form = cast("Form", asked)
    return RowInput(name, form, column, lines)


def _form(path: Path, column: str, asked: Asked) -> Form:
    found = form_of(path)
    if found == "saved" or asked == "auto":
        if found is not None:
            return found
        if path.suffix.lower() not in OPEN_SUFFIXES:
            known = ", ".join([*SUFFIXES, ".txt"])
            raise UserError(f"{path}: found suffix {path.suffix!r}, expected one of {known}; or give --format")
        with path.open("rb") as file:
            return sniffed(lines_of(file, str(path)), str(path), column)[0]
    return cast("Form", asked)


def _file_rows(
    path: Path, form: Form, column: str, needed: Sequence[Needed], asked: Sequence[str] | None, mends: Fixes
) -> Iterator[RawRow]:
    if form in ("text", "lines"):
        with path.open("rb") as file:
            yield from rows_of_lines(lines_of(file, str(path)), str(path), form, (), mends, column)
    else:
        yield from read_file(path, form, needed, asked, mends)


def _needed(form: Form, column: str, columns: FieldColumns) -> Sequence[Needed]:
    """Columns of the header. A JSON line may have keys of its own, so each is asked for its text."""
    if form in ("jsonl", "text", "lines"):
        return ()
    fields = [FIELDS, *columns.names] if columns.names else []
    return ((column, *FIRST_COLUMNS, *fields),) if column == TEXT else (column,)


def _line(row: RawRow, column: str, columns: FieldColumns) -> InputRow:
    if row.fault is not None:
        expected = "as many as the header has" if row.fault == UNEVEN else "a row that can be read"
        fix = "put a cell with a comma or a line break in quotes" if row.fault == UNEVEN else "take the line away"
        raise UserError(f"{row.where}: found {row.fault}, expected {expected}; {fix}")
    given = row.values.get(column)
    listed = is_conversation(given)
    formed = column == TEXT and column not in row.values and any(row.values.get(name) is not None for name in FIRST_COLUMNS)
    if not listed and not formed:
        return _text_row(row, column, columns)
    if columns.meant(row.values):
        raise UserError(f"{row.where}: fields: found some next to a conversation, expected one of them; leave one out")
    try:
        turns, answer = waiting_turns(row.values, column if listed else None)
    except BadTurnsError as error:
        raise UserError(f"{row.where}: found {error}; fix the row, or leave it out") from None
    return InputRow(row.where, row.values, turns[last_user(turns)].text, turns, answer)


def _text_row(row: RawRow, column: str, columns: FieldColumns) -> InputRow:
    """A row of a text, or of the fields that one is made of."""
    given = row.values.get(column)
    text = None if given is None or (isinstance(given, str) and is_blank(given)) else text_in(row.values, row.where, column)
    task = row.values.get("task")
    try:
        found = columns.of(row.values, column, text, task if isinstance(task, str) and task else None)
    except UserError as error:
        raise UserError(f"{row.where}: {error}") from None
    if found is not None:
        return InputRow(row.where, row.values, found[0], named=found[1])
    return InputRow(row.where, row.values, text_in(row.values, row.where, column, columns.shown) if text is None else text)


def text_in(fields: Mapping[str, Any], where: str, column: str, shown: str = "") -> str:
    """The text of a row. Raises UserError where it has none, or only spaces; names the row, and the fields ``shown`` that
    there may be in its place."""
    fix = "--column names another key" + (f", and a task's fields may be there instead: {shown}" if shown else "")
    text = _text(fields.get(column), where, column, fix)
    if is_blank(text):
        raise UserError(f"{where}: {column}: found {text[:20]!r}, expected a text with words; leave the row out ({fix})")
    return text


def check_words(option: str, *given: str | None) -> None:
    """Raises UserError where a text of the command line is none, or has no words; what was not given is passed over."""
    for text in given:
        if text is not None and is_blank(_text(text, "command line", option, "write it in UTF-8")):
            raise UserError(f"{option}: found {text[:20]!r}, expected a text with words; give some, or leave it out")


def _text(value: object, where: str, key: str, fix: str) -> str:
    try:
        return text_of(value)
    except NoTextError as error:
        raise UserError(f"{where}: {key}: found {error}, expected a text ({TAKEN}); {fix}") from None
