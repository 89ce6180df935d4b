"""Named fields that a bank is asked: joined as its tasks' rows are, and given to the templates that read them.

Names say how a text is put together, and nothing else: it is routed by what it then says.
"""

from __future__ import annotations

from collections.abc import Mapping

from amlora_dist.errors import UserError
from amlora_dist.tasks.named_fields import checked_fields, fields_read, joined_fields
from amlora_dist.tasks.task_entry import TaskEntry
from amlora_dist.tasks.texts import NoTextError, text_of

Entries = Mapping[str, TaskEntry | None]


def joined_text(given: Mapping[str, str], entries: Entries, task: str | None) -> tuple[str, dict[str, str]]:
    """The text of named fields, and the fields as rows have them.

    Args:
        given: by name.
        entries: of the bank's tasks.
        task: named by the caller, which then says how fields are joined.

    Raises:
        UserError: what is no text; fields of no task of the bank; tasks that join them in different ways.
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
    if len(set(texts.values())) > 1:
        tasks = " and ".join(texts)
        raise UserError(f"fields: found {found}, which {tasks} join differently; name the task, or give the text itself")
    parts = next(iter(fitting.values()))
    return next(iter(texts.values())), {part.name: fields.get(part.name, "") for part in parts}


def fields_for(task: str | None, entries: Entries, text: str, fields: Mapping[str, str]) -> Mapping[str, str] | None:
    """What the template of a task may read of a text; None where it reads no fields.

    Raises:
        UserError: it reads fields that the text has not.
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
        raise UserError(
            f"task {task!r}: its prompt reads the fields {', '.join(names or sorted(needed))}, and the text has no"
            f" {', '.join(missing)}; give `fields` in place of the text"
        )
    return fields


def check_words(words: object, name: str, place: int, count: int) -> None:
    """Refuse what is no text. Raises UserError, which says which of so many it is."""
    try:
        text_of(words)
    except NoTextError as error:
        raise UserError(f"{name} {place + 1} of {count}: found {error}, expected a text") from None
    if not isinstance(words, str):
        raise UserError(f"{name} {place + 1} of {count}: found {type(words).__name__}, expected a text (str)")
