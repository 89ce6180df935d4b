"""Rows of files and data frames whose text is made of named fields: what the command line and MLflow's loader read them by.

A row brings its fields by name in ``fields``, as an HTTP request does, or each in a column of its name. A row with a text is
its text, whatever else it has: its columns may mean anything. Only tasks whose prompts read fields, which cannot be asked a
text alone, take them next to it: where they say the same, or where the text's column is one of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from amlora_dist.errors import UserError
from amlora_dist.evaluation.field_texts import Entries, joined_text
from amlora_dist.tasks.named_fields import WHOLE, FieldEntry, fields_read, joined_fields
from amlora_dist.tasks.texts import TAKEN, NoTextError, is_blank, kind_of, text_of

FIELDS = "fields"
"""The key of a row that holds a text's fields by name."""


@dataclass(frozen=True, slots=True)
class FieldColumns:
    """How a bank's tasks make texts of fields."""

    entries: Entries = field(default_factory=dict)
    """Of the bank's tasks."""
    task: str | None = None
    """Of all rows, where their caller names one; else each row may."""
    own: bool = False
    """Rows are as their task was trained on: if all of its fields are columns, they are the text, whatever else is there."""

    @property
    def names(self) -> list[str]:
        """Of all columns that may be fields."""
        return list(dict.fromkeys(name for names in self._known(self.task).values() for name in names))

    @property
    def shown(self) -> str:
        """The fields of each task, for messages; empty where no task has any."""
        return "; ".join(f"{task}: {', '.join(names)}" for task, names in self._known(self.task).items())

    def of(
        self, values: Mapping[str, Any], column: str, text: str | None, task: str | None = None
    ) -> tuple[str, dict[str, str]] | None:
        """A row's text and the fields that it is made of; None where it brings none.

        Args:
            values: of the row by column.
            column: of the text.
            text: of that column; None where it has no words.
            task: that the row names.

        Raises:
            UserError: a text next to ``fields`` that are ``meant``; fields that are not all there, of no task or of several,
                or that are no text.
        """
        task = self.task or task
        if text is not None and self.meant(values, column, task):
            raise UserError(f"fields: found some next to a text in {column!r}, expected one of them; leave one out")
        try:
            named = self._by_name(values, column) if text is None else None
            if named is None:
                known = self._known(task, beside=text is not None)
                named = self._in_columns(values, column, text, known)
            if named is None:
                return None
            joined = joined_text(named, self.entries, task)[0]
        except UserError:
            if text is None or self.own:
                raise
            return None
        same = text is None or self.own or column in named or joined == text.strip()
        return (joined, named) if same else None

    def meant(self, values: Mapping[str, Any], column: str = "", task: str | None = None) -> bool:
        """Whether a row that has something else to ask also has, in ``fields``, what a task reads by these names; else they
        are nobody's business here.

        Args:
            values: of the row by column.
            column: of the text.
            task: that the row names.
        """
        given = None if column == FIELDS else values.get(FIELDS)
        if not isinstance(given, Mapping):
            return False
        names = {str(name) for name, value in given.items() if value is not None}
        return bool(names) and any(names <= {*known} for known in self._known(self.task or task, beside=True).values())

    def _known(self, task: str | None, *, beside: bool = False) -> dict[str, list[str]]:
        """Names of fields by task; ``beside`` a text of those alone that take them there."""
        return {
            name: [part.name for part in entry.fields] for name, entry in self.entries.items()
            if entry is not None and entry.fields and task in (None, name)
            and (not beside or self.own or fields_read(entry.template) is not None)
        }  # fmt: skip

    @staticmethod
    def _by_name(values: Mapping[str, Any], column: str) -> dict[str, str] | None:
        """What ``fields`` holds of a row without a text."""
        given = None if column == FIELDS else values.get(FIELDS)
        if isinstance(given, Mapping):  # a table's structure has every name in all rows, some without value
            named = {str(name): _words(value, str(name)) for name, value in given.items() if value is not None}
            return None if given and not named else named
        if given is not None and not (isinstance(given, str) and is_blank(given)):
            found = repr(given[:20]) if isinstance(given, str) else kind_of(given)
            raise UserError(f"fields: found {found}, expected texts by name; give an object, or each field in a column")
        return None

    def _in_columns(
        self, values: Mapping[str, Any], column: str, text: str | None, known: Mapping[str, Sequence[str]]
    ) -> dict[str, str] | None:
        """The fields of the task whose fields are all there as columns; of several tasks the one's that has words in most of
        them, if it has the others' too."""
        whole: dict[str, dict[str, str]] = {}
        partly = None
        for task, names in known.items():
            lacking = [name for name in names if name not in values]
            if text is not None and (lacking or not (self.own or _meant(column, names))):
                continue
            found = {name: words for name in names if not is_blank(words := _words(values.get(name), name))}
            if lacking and found:
                partly = partly or (
                    f"fields: found {', '.join(found)} of those of {task} and no {', '.join(lacking)}, expected all (without"
                    " words where a row has none) or a text; add the column"
                )
            elif found and (text is None or self.own or found.keys() - {column}):
                whole[task] = found
        if not whole and partly:
            raise UserError(partly)
        if not whole:
            return None
        most = max(whole.values(), key=len)
        same = [task for task, found in whole.items() if found == most]
        ways = {joined_fields(most, parts) for task in same if (parts := self._parts(task))}
        if len(ways) > 1 or any(not found.items() <= most.items() for found in whole.values()):
            tasks = "; ".join(f"{task}: {', '.join(found)}" for task, found in whole.items())
            raise UserError(f"fields: found those of several tasks ({tasks}), expected one task's; name it in `task`")
        return {name: most.get(name, "") for name in max((known[task] for task in same), key=len)}

    def _parts(self, task: str) -> Sequence[FieldEntry]:
        entry = self.entries[task]
        return [] if entry is None else entry.fields or []


def _meant(column: str, names: Sequence[str]) -> bool:
    """Whether ``names`` may be meant though there is a text in ``column``: it is one of them, or nobody named it."""
    return len(names) > 1 and (column in names or column == WHOLE)


def _words(value: object, name: str) -> str:
    """Of a field; empty where it has nothing."""
    try:
        return "" if value is None else text_of(value).strip()
    except NoTextError as error:
        raise UserError(f"fields: {name!r}: found {error}, expected a text ({TAKEN})") from None
