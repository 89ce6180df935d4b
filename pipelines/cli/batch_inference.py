"""``generate`` and ``classify``: rows in, the same rows with answers out, as they come."""

from __future__ import annotations

import csv
import itertools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from amlora_dist.errors import UserError
from amlora_dist.evaluation.field_columns import FieldColumns
from amlora_dist.evaluation.field_texts import MissingFieldsError, RefusedTextsError, may_refuse
from pipelines.cli.output import stdout_to_stderr
from pipelines.cli.row_input import Asked, InputRow, check_words, opened
from pipelines.cli.row_output import check_fields, checked_place, writer

if TYPE_CHECKING:
    from amlora_dist.evaluation.requests import Route
    from amlora_dist.inference.model import AMLoRAModel
    from amlora_dist.tasks.task_entry import TaskEntry

T = TypeVar("T")
R = TypeVar("R")
_END = object()
ROUTED = ("routed_to", "route", "abstention")
"""What a row says of its route."""


@dataclass(frozen=True, slots=True)
class Files:
    """What a command reads and writes: the options of the same names, and ``source`` (``-``: standard input)."""

    source: str = "-"
    output: Path | None = None
    column: str = "text"
    form: Asked = "auto"
    spreadsheet: bool = False


def answer_texts(
    bank: str, files: Files, batch_size: int, call: dict[str, Any], options: dict[str, Any]
) -> None:
    """``amlora generate``: adds ``answer``, ``ended`` and ``route`` to every row.

    A row that the task which it is routed to cannot be asked, for want of a field, is written with an ``error`` and without
    an answer; of banks with such tasks all rows have an ``error``.

    Raises:
        UserError: a row without text or fields, a task that the bank does not have, an unreadable file; after all rows are
            written, some that were not answered.
    """

    def work(model: AMLoRAModel, lines: Sequence[InputRow]) -> list[dict[str, Any]]:
        found = model.answer([line.request for line in lines], **_call(lines, call), batch_size=batch_size)
        return [{"answer": one.text, "ended": one.ended, **_routed(one.route)} for one in found]

    _run(bank, files, batch_size, call, options, work, ("answer", "ended", *ROUTED))


def classify_texts(
    bank: str, files: Files, batch_size: int, call: dict[str, Any], options: dict[str, Any]
) -> None:
    """``amlora classify``: adds ``label``, ``score`` and ``route`` to every row; errors as ``answer_texts``."""

    def work(model: AMLoRAModel, lines: Sequence[InputRow]) -> list[dict[str, Any]]:
        found = model.classify([line.request for line in lines], **_call(lines, call), batch_size=batch_size)
        return [
            {
                "label": one.label, "score": None if one.label is None else one.scores[one.label], **_routed(one.route),
                "foreign": None if one.foreign is None else round(one.foreign, 6),
            }
            for one in found
        ]

    _run(bank, files, batch_size, call, options, work, ("label", "score", *ROUTED, "foreign"))


def _run(
    bank: str,
    files: Files,
    batch_size: int,
    call: dict[str, Any],
    options: dict[str, Any],
    work: Callable[[AMLoRAModel, Sequence[InputRow]], list[dict[str, Any]]],
    added: Sequence[str],
) -> None:
    """Check the files, the rows and the tasks; only then load the model. ``added`` are the keys of what ``work`` finds."""
    place = checked_place(files.output, files.source, spreadsheet=files.spreadsheet)
    check_words("--question", call.get("question"))
    check_words("--label", *(call.get("labels") or ()))
    with opened(files.source, files.column, files.form) as rows:
        written = place.of(rows.form)
        with stdout_to_stderr():
            folder, tasks = bank_and_tasks(bank, options)
            entries = entries_of(folder)
        check_task(call.get("task"), tasks)
        rows.columns = FieldColumns(entries, call.get("task"))
        rows.check(tasks, partial(check_fields, form=written))
        with stdout_to_stderr():
            from amlora_dist.inference.model import AMLoRAModel

            model = AMLoRAModel.from_bank(folder, **options)
        refused: list[str] = []
        refusing = may_refuse(entries)
        with writer(place, written) as write:
            lines = rows.lines()
            for batch in chunks(lines, batch_size) if rows.again else drained(lines, batch_size):
                with stdout_to_stderr():
                    found, missing = apart(partial(work, model), batch)
                results = []
                for n, line in enumerate(batch):
                    if n in missing:
                        refused.append(f"{line.where}: {missing[n]}")
                        unknown = dict.fromkeys(added)
                        results.append({**unknown, "routed_to": missing[n].task, "error": str(missing[n])})
                    else:
                        results.append(found[n] | ({"error": None} if refusing else {}))
                write([_joined(line.fields, result) for line, result in zip(batch, results, strict=True)])
    if refused:
        raise UserError(f"{refused[0]} (rows without an answer: {len(refused)}, each with its `error`; the others have one)")


def apart(
    ask: Callable[[list[T]], list[R]], given: Sequence[T], batch_size: int | None = None
) -> tuple[dict[int, R], dict[int, MissingFieldsError]]:
    """What a bank answers, and why some texts cannot be asked, by place: they keep no other from its answer.

    Args:
        ask: raises RefusedTextsError where some cannot be asked.
        given: to ask.
        batch_size: texts of one call, of which the others are asked again where one is refused; default: all.
    """
    found, refused = dict[int, R](), dict[int, MissingFieldsError]()
    size = batch_size or len(given) or 1
    for start in range(0, len(given), size):
        places = list(range(start, min(start + size, len(given))))
        while places:
            try:
                found |= zip(places, ask([given[place] for place in places]), strict=True)
                break
            except RefusedTextsError as error:
                refused |= {places[n]: why for n, why in error.refused.items()}
                places = [place for place in places if place not in refused]
    return found, refused


def entries_of(folder: Path) -> dict[str, TaskEntry]:
    """What a bank says of each task that it has learned, where it does."""
    from amlora_dist.registry.manifest import read_manifest

    return {task: entry for task, entry in read_manifest(folder).learned.items() if entry is not None}


def bank_and_tasks(bank: str, options: dict[str, Any]) -> tuple[Path, list[str]]:
    """Folder of a bank, pulled if it is a version, and its tasks."""
    from amlora_dist.registry.manifest import read_manifest

    if bank.startswith("models:"):
        from amlora_dist.inference.loading import pulled

        folder = pulled(bank, options.get("tracking_uri"))[1]
    else:
        folder = Path(bank).expanduser()
    return folder, read_manifest(folder).tasks


def check_task(task: str | None, tasks: Sequence[str]) -> None:
    """Raises UserError where a bank with these tasks lacks the one that ``--task`` names."""
    if task is not None and task not in tasks:
        raise UserError(f"--task: found {task!r}, the bank's tasks are {', '.join(tasks)}")


def chunks(lines: Iterable[InputRow], size: int) -> Iterator[list[InputRow]]:
    """Batches of ``size`` lines."""
    iterator = iter(lines)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def drained(lines: Iterable[InputRow], size: int) -> Iterator[list[InputRow]]:
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
        batch: list[InputRow] = []
        item = waiting.get()
        while isinstance(item, InputRow):
            batch.append(item)
            if len(batch) == size:
                break
            try:
                item = waiting.get_nowait()
            except queue.Empty:
                break
        if not isinstance(item, InputRow):
            ending = item
        if batch:
            yield batch
    if isinstance(ending, UserError):
        raise ending
    if isinstance(ending, Exception):
        raise UserError(f"standard input: {ending}") from ending


def _call(lines: Sequence[InputRow], call: dict[str, Any]) -> dict[str, Any]:
    """The call's options, with ``task`` and ``question`` of each row where the command line names none."""
    given = dict(call)
    for key in ("task", "question"):
        if given.get(key) is None:
            given[key] = [line.option(key) for line in lines]
    return given


def _routed(route: Route) -> dict[str, Any]:
    weights = {task: round(weight, 6) for task, weight in route.tasks.items() if weight}
    return dict(zip(ROUTED, (route.task, weights, round(route.abstention, 6)), strict=True))


def _joined(fields: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """The row with its result; a field of the input that has a result's name stays as ``input_<name>``, or with one
    ``input_`` more where the row has that, too."""
    names = {key: key for key in fields if key not in result}
    taken = {*fields, *result}
    for key in fields.keys() & result.keys():
        names[key] = f"input_{key}"
        while names[key] in taken:
            names[key] = f"input_{names[key]}"
        taken.add(names[key])
    return {names[key]: value for key, value in fields.items()} | result
