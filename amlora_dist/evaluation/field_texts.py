"""Named fields that a bank is asked: joined as its tasks' rows are, and given to the templates that read them.

Names say how a text is put together, and nothing else: it is routed by what it then says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from amlora_dist.errors import UserError
from amlora_dist.tasks.named_fields import checked_fields, fields_read, joined_fields
from amlora_dist.tasks.task_entry import TaskEntry
from amlora_dist.tasks.texts import NoTextError, text_of

if TYPE_CHECKING:
    from amlora_dist.evaluation.requests import Request

Entries = Mapping[str, TaskEntry | None]


class MissingFieldsError(UserError):
    """The prompt of a text's task reads fields that the text has not; ``task`` is the task."""

    def __init__(self, message: str, task: str) -> None:
        super().__init__(message)
        self.task = task


class RefusedTextsError(UserError):
    """Texts of one call that their tasks cannot be asked; the others of the call can be answered.

    ``refused`` says why, by place in the call from 0.
    """

    def __init__(self, refused: Mapping[int, MissingFieldsError], *, alone: bool) -> None:
        """``alone``: the call had one text, whose number would tell nobody anything."""
        place, more = min(refused), len(refused) - 1
        where = "" if alone else f"text {place + 1}: "
        super().__init__(f"{where}{refused[place]}" + (f" (and {more} more)" if more else ""))
        self.refused = dict(refused)

    def at(self, place: int, *, alone: bool) -> RefusedTextsError:
        """The same of the one text that was asked by itself, in the call that it belongs to."""
        return RefusedTextsError({place: next(iter(self.refused.values()))}, alone=alone)


def joined_text(given: Mapping[str, str], entries: Entries, task: str | None) -> tuple[str, dict[str, str]]:
    """The text of named fields, and the fields as rows have them.

    Args:
        given: by name.
        entries: of the bank's tasks.
        task: named by the caller, which then says how fields are joined.

    Raises:
        UserError: what is no text; fields of no task of the bank; tasks that join them in different ways, of which those
            count that have no other fields, if there are some.
    """
    fields = checked_fields(given)
    known = {name: entry.fields for name, entry in entries.items() if entry is not None and entry.fields}
    if task is not None:
        known = {name: parts for name, parts in known.items() if name == task}
    fitting = {name: parts for name, parts in known.items() if fields.keys() <= {part.name for part in parts}}
    found = ", ".join(fields)
    if not fitting:
        there = "; ".join(f"{name}: {', '.join(part.name for part in parts)}" for name, parts in known.items())
        expected = there or "a text: the bank says of no such task which fields its texts are made of"
        raise UserError(f"fields: found {found}, expected some of a task's ({expected})")
    texts = {name: joined_fields(fields, parts) for name, parts in fitting.items()}
    exact = {name: texts[name] for name, parts in fitting.items() if len(parts) == len(fields)} or texts
    if len(set(exact.values())) > 1:
        tasks = " and ".join(exact)
        raise UserError(f"fields: found {found}, which {tasks} join differently; name the task, or give the text itself")
    text = next(iter(exact.values()))
    names = [part.name for name, parts in fitting.items() if texts[name] == text for part in parts]
    return text, {name: fields.get(name, "") for name in names}


def fields_for(task: str | None, entries: Entries, text: str, fields: Mapping[str, str]) -> Mapping[str, str] | None:
    """What the template of a task may read of a text; None where it reads no fields.

    Raises:
        MissingFieldsError: it reads fields that the text has not.
    """
    entry = None if task is None else entries.get(task)
    needed = None if entry is None else fields_read(entry.template)
    if entry is None or needed is None or (entry.fields is None and not needed):  # a bank of before names no fields
        return None
    parts = entry.fields or []
    names = [part.name for part in parts]
    if not fields and len(parts) == 1 and not parts[0].label:
        fields = {parts[0].name: text}
    if missing := [name for name in sorted(needed) if name not in fields] or ([] if fields else names):
        raise MissingFieldsError(
            f"task {task!r}: its prompt reads the fields {', '.join(names or sorted(needed))}, and the text has no"
            f" {', '.join(missing)}; give `fields` in place of the text",
            str(task),
        )
    return {name: fields[name] for name in names} if names and {*names} <= fields.keys() else fields


def refuse_missing(requests: Sequence[Request], entries: Entries) -> None:
    """Raises RefusedTextsError where prompts of tasks read fields that texts have not."""
    refused: dict[int, MissingFieldsError] = {}
    for request in requests:
        try:
            fields_for(request.task, entries, request.text, request.fields)
        except MissingFieldsError as error:
            refused[request.place] = error
    if refused:
        raise RefusedTextsError(refused, alone=len(requests) == 1 and requests[0].place == 0)


def may_refuse(entries: Entries) -> bool:
    """Whether the prompt of any task reads fields that a plain text lacks."""
    for entry in entries.values():
        needed = None if entry is None else fields_read(entry.template)
        if entry is not None and needed is not None:
            parts = entry.fields or []
            if (parts or needed) and not (len(parts) == 1 and not parts[0].label):
                return True
    return False


def check_words(words: object, name: str, place: int, count: int) -> None:
    """Refuse what is no text. Raises UserError, which says which of so many it is."""
    try:
        text_of(words)
    except NoTextError as error:
        raise UserError(f"{name} {place + 1} of {count}: found {error}, expected a text") from None
    if not isinstance(words, str):
        raise UserError(f"{name} {place + 1} of {count}: found {type(words).__name__}, expected a text (str)")
