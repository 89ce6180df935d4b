"""``generate`` and ``classify``: texts in (JSON lines, CSV, plain lines), answers out, as they come."""

from __future__ import annotations

import csv
import itertools
import json
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from amlora_dist.errors import UserError
from pipelines.quiet import standard_output_kept

if TYPE_CHECKING:
    from amlora_dist.evaluation.requests import Route
    from amlora_dist.model import AMLoRAModel

Form = Literal["jsonl", "csv", "text"]
Write = Callable[[list[dict[str, Any]]], None]

CSV_FIELD_BYTES = 16 << 20
_END = object()


@dataclass(frozen=True, slots=True)
class Line:
    """One row of the input: all its fields, and where it stands."""

    where: str
    fields: dict[str, Any]
    text: str


def answer_texts(
    bank: str, source: str, output: Path | None, column: str, batch_size: int, call: dict[str, Any], options: dict[str, Any]
) -> None:
    """``amlora generate``: adds ``answer``, ``ended`` and ``route`` to every row.

    Raises:
        UserError: a row without text, a task that the bank does not have, an unreadable file.
    """

    def work(model: AMLoRAModel, lines: Sequence[Line]) -> list[dict[str, Any]]:
        found = model.answer([line.text for line in lines], **_call(lines, call), batch_size=batch_size)
        return [{"answer": one.text, "ended": one.ended, **_routed(one.route)} for one in found]

    _run(bank, source, output, column, batch_size, options, work)


def classify_texts(
    bank: str, source: str, output: Path | None, column: str, batch_size: int, call: dict[str, Any], options: dict[str, Any]
) -> None:
    """``amlora classify``: adds ``label``, ``score`` and ``route`` to every row; errors as ``answer_texts``."""

    def work(model: AMLoRAModel, lines: Sequence[Line]) -> list[dict[str, Any]]:
        found = model.classify([line.text for line in lines], **_call(lines, call), batch_size=batch_size)
        return [
            {"label": one.label, "score": None if one.label is None else one.scores[one.label], **_routed(one.route)}
            for one in found
        ]

    _run(bank, source, output, column, batch_size, options, work)


def _run(
    bank: str,
    source: str,
    output: Path | None,
    column: str,
    batch_size: int,
    options: dict[str, Any],
    work: Callable[[AMLoRAModel, Sequence[Line]], list[dict[str, Any]]],
) -> None:
    from amlora_dist.model import AMLoRAModel

    stream = source == "-"
    form = _form(Path(source)) if not stream else "jsonl"
    with _opened(source) as file:
        with standard_output_kept():
            model = AMLoRAModel.from_bank(bank, **options)
        name = "standard input" if stream else source
        lines = read_lines(file, form, name, column)
        with _writer(output, form) as write:
            for batch in drained(lines, batch_size) if stream else chunks(lines, batch_size):
                with standard_output_kept():
                    found = work(model, batch)
                write([_joined(line.fields, result) for line, result in zip(batch, found, strict=True)])


def read_lines(file: TextIO, form: Form, name: str, column: str) -> Iterator[Line]:
    """Rows of an open file; in ``jsonl`` a line that does not begin with ``{`` is a plain text.

    Raises:
        UserError: a line that is no JSON object, or a row without ``column``; names file and line.
    """
    if form == "csv":
        csv.field_size_limit(CSV_FIELD_BYTES)
        reader = csv.DictReader(file)
        if column not in (reader.fieldnames or ()):
            there = ", ".join(reader.fieldnames or ()) or "none"
            raise UserError(f"{name}: no column {column!r}, it has {there}; name the one with the text: --column")
        for row in reader:
            yield _line(f"{name}, line {reader.line_num}", row, column)
        return
    for number, content in enumerate(file, start=1):
        where, content = f"{name}, line {number}", content.strip()
        if not content:
            continue
        if form == "text" or not content.startswith("{"):
            yield Line(where, {column: content}, content)
            continue
        try:
            value = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON ({error})") from error
        yield _line(where, value, column)


def _line(where: str, fields: dict[str, Any], column: str) -> Line:
    text = fields.get(column)
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where}: {column}: found {text!r}, expected a text (--column names another key)")
    return Line(where, fields, text)


def chunks(lines: Iterable[Line], size: int) -> Iterator[list[Line]]:
    """Batches of ``size`` lines."""
    iterator = iter(lines)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def drained(lines: Iterable[Line], size: int) -> Iterator[list[Line]]:
    """Batches of what has come in, ``size`` at most: a line is never kept waiting for the next one.

    Raises:
        UserError: what reading a line raised, after the lines before it.
    """
    waiting: queue.Queue[Any] = queue.Queue(maxsize=4 * size)

    def read() -> None:
        try:
            for line in lines:
                waiting.put(line)
            waiting.put(_END)
        except (UserError, OSError, ValueError, csv.Error) as error:
            waiting.put(error)

    threading.Thread(target=read, daemon=True, name="amlora-stdin").start()
    ending: Any = None
    while ending is None:
        batch: list[Line] = []
        item = waiting.get()
        while isinstance(item, Line):
            batch.append(item)
            if len(batch) == size:
                break
            try:
                item = waiting.get_nowait()
            except queue.Empty:
                break
        if not isinstance(item, Line):
            ending = item
        if batch:
            yield batch
    if isinstance(ending, UserError):
        raise ending
    if isinstance(ending, Exception):
        raise UserError(f"standard input: {ending}") from ending


def _call(lines: Sequence[Line], call: dict[str, Any]) -> dict[str, Any]:
    """The call's options, with ``task`` and ``question`` of each row where the command line names none."""
    given = dict(call)
    for key in ("task", "question"):
        if given.get(key) is None:
            given[key] = [_text_or_none(line, key) for line in lines]
    return given


def _text_or_none(line: Line, key: str) -> str | None:
    value = line.fields.get(key)
    if value is not None and not isinstance(value, str):
        raise UserError(f"{line.where}: {key}: found {value!r}, expected a text")
    return value or None


def _routed(route: Route) -> dict[str, Any]:
    weights = {task: round(weight, 6) for task, weight in route.tasks.items() if weight}
    return {"routed_to": route.task, "route": weights, "abstention": round(route.abstention, 6)}


def _joined(fields: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """The row with its result; a field of the input that has a result's name stays as ``input_<name>``."""
    return {f"input_{key}" if key in result else key: value for key, value in fields.items()} | result


def _form(path: Path) -> Form:
    forms: dict[str, Form] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv", ".txt": "text"}
    form = forms.get(path.suffix.lower())
    if form is None:
        raise UserError(f"{path}: found suffix {path.suffix!r}, expected one of {', '.join(forms)}")
    return form


@contextmanager
def _opened(source: str) -> Iterator[TextIO]:
    if source == "-":
        yield sys.stdin
        return
    try:
        file = Path(source).expanduser().open(encoding="utf-8-sig", newline="")
    except OSError as error:
        raise UserError(f"{source}: {error.strerror}; give a file, or - for standard input") from error
    with file:
        try:
            yield file
        except UnicodeDecodeError as error:
            raise UserError(f"{source}: not UTF-8 ({error})") from error


@contextmanager
def _writer(output: Path | None, form: Form) -> Iterator[Write]:
    """Writes rows: to standard output as they come, or to a file that appears when all of them are in it."""
    if output is None:
        yield _rows_to(sys.stdout, form)
        return
    as_csv = output.suffix.lower() == ".csv"
    aside = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        with aside.open("w", encoding="utf-8", newline="") as file:
            yield _rows_to(file, "csv" if as_csv else "jsonl")
        aside.replace(output)
    finally:
        aside.unlink(missing_ok=True)


def _rows_to(file: TextIO, form: Form) -> Write:
    table: list[csv.DictWriter[str]] = []

    def as_json(rows: list[dict[str, Any]]) -> None:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        file.flush()

    def as_csv(rows: list[dict[str, Any]]) -> None:
        if not table:
            table.append(csv.DictWriter(file, list(rows[0]), restval="", extrasaction="ignore", lineterminator="\n"))
            table[0].writeheader()
        plain = [{k: json.dumps(v) if isinstance(v, (dict, list)) else v for k, v in row.items()} for row in rows]
        table[0].writerows(plain)
        file.flush()

    return as_csv if form == "csv" else as_json
