"""A text of named fields: the parts of a row below each other, each behind its neutral label, and templates that read them.

Training, scoring and serving join fields here, so that a text is the same string wherever it was put together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated

from jinja2 import TemplateSyntaxError, nodes
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from amlora_dist.config.schema import did_you_mean
from amlora_dist.errors import Fault, UserError
from amlora_dist.tasks.sandbox import PromptEnvironment
from amlora_dist.tasks.texts import NoTextError, is_blank, text_of

if TYPE_CHECKING:
    from amlora_dist.tasks.task import TaskSpec

_Name = Annotated[str, Field(max_length=2000)]
WHOLE = "text"
"""The one field of a conversation: what the user said last."""


@dataclass(config=ConfigDict(extra="forbid"), frozen=True)
class FieldEntry:
    """One part of a text."""

    name: _Name
    label: _Name = ""
    """Shown in front of it with a colon; empty: the part alone."""


def parts_of(spec: TaskSpec) -> list[FieldEntry]:
    """The parts of a task's texts, in their order."""
    if spec.columns.conversational:
        return [FieldEntry(WHOLE)]
    return [
        FieldEntry(
            part.column or part.marker.lower() or f"field{number}",
            part.marker if part.marker and (part.neutral or spec.field_markers == "keep") else "",
        )
        for number, part in enumerate(spec.columns.text, start=1)
    ]


def joined_fields(fields: Mapping[str, str], parts: Sequence[FieldEntry]) -> str:
    """Fields as one text; those that are empty are left out."""
    shown = [(part, value) for part in parts if (value := fields.get(part.name, ""))]
    return "\n".join(f"{part.label}: {value}" if part.label else value for part, value in shown)


@lru_cache(maxsize=256)
def fields_read(source: str) -> frozenset[str] | None:
    """Names of the fields that a template must be given; None where it reads no fields, or is not valid.

    A template that says what it does without a field (``default``, ``is defined``, a loop over all) must be given some.
    """
    try:
        tree = PromptEnvironment().parse(source)
    except (TemplateSyntaxError, SyntaxError, ValueError, OverflowError, RecursionError, MemoryError):
        return None
    if not any(name.name == "fields" for name in tree.find_all(nodes.Name)):
        return None
    found = set()
    for node in tree.find_all((nodes.Getattr, nodes.Getitem)):
        assert isinstance(node, (nodes.Getattr, nodes.Getitem))
        if not isinstance(node.node, nodes.Name) or node.node.name != "fields":
            continue
        if isinstance(node, nodes.Getattr) and not hasattr(dict, node.attr):
            found.add(node.attr)
        elif isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
            found.add(str(node.arg.value))
    return frozenset() if "default" in source or "defined" in source else frozenset(found)


def unknown_fields(source: str, spec: TaskSpec) -> list[Fault]:
    """Faults of a task's template that reads fields which its rows have not."""
    there = [part.name for part in parts_of(spec)]
    missing = sorted((fields_read(source) or frozenset()) - {*there})
    expected = f"one of the row's fields: {', '.join(there)}"
    return [Fault("prompt.template", f"the field {name!r}", expected, did_you_mean(name, there)) for name in missing]


def checked_fields(given: Mapping[str, str]) -> dict[str, str]:
    """Named fields of a caller.

    Raises:
        UserError: none, or one that is no text; all are empty.
    """
    found = {}
    for name, value in given.items():
        try:
            if not isinstance(value, str) or not isinstance(name, str):
                raise NoTextError(type(value).__name__)
            found[name] = text_of(value).strip()
        except NoTextError as error:
            raise UserError(f"fields: {name!r}: found {error}, expected a text") from None
    if all(map(is_blank, found.values())):
        raise UserError("fields: found no words, expected some in at least one of them")
    return found
