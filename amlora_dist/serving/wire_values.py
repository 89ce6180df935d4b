"""Kinds of values that requests have, and how much of each is taken."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo
from pydantic_core import PydanticCustomError

from amlora_dist.serving.settings import MOST_TEXTS
from amlora_dist.tasks.texts import is_blank

MOST_TURNS = 1024
"""Of a conversation, and parts of one turn."""
MOST_LABELS = 1000
MOST_TOKENS = 1 << 18
"""Of a prompt that is given in tokens."""
MOST_FIELDS = 64
"""Of one text."""
MOST_LIKELY = 20
"""Tokens that are named next to each."""


def boolean(value: object) -> object:
    """Refuse what is no boolean, though Python may find it equal to one."""
    if not isinstance(value, bool):
        raise PydanticCustomError("bool_type", "Input should be a valid boolean")
    return value


def writable(value: str) -> str:
    """Half of a pair of surrogates is no character: no tokenizer takes it. Pydantic checks only where it counts."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError(
            "string_unicode", "Input should be a valid unicode string, found a lone surrogate in it"
        ) from None
    return value


def at_most(most: int) -> BeforeValidator:
    """Counts before anybody looks at the items: half a million wrong ones are one error, not as many."""

    def checked(value: object) -> object:
        if isinstance(value, (list, dict)) and len(value) > most:
            expected = f"expected at most {most}" if most else "expected none: this server does without"
            raise PydanticCustomError(
                "too_long", "found {found} items, {expected}", {"found": len(value), "expected": expected}
            )
        return value

    return BeforeValidator(checked)


def counted_prompt(value: object) -> object:
    """As ``at_most``, of texts or of tokens."""
    most = MOST_TOKENS if isinstance(value, list) and value and isinstance(value[0], int) else MOST_TEXTS
    if isinstance(value, list) and len(value) > most:
        raise PydanticCustomError(
            "too_long", "found {found} items, expected at most {expected}", {"found": len(value), "expected": most}
        )
    return value


Words = Annotated[str, AfterValidator(writable)]
Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[list[Text], Field(min_length=1, fail_fast=True)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
# A bare Literal takes whatever Python finds equal: 0.0 for False, true for 1.
One = Annotated[int, Field(ge=1, le=1)]
Zero = Annotated[float, Field(ge=0, le=0)]
Off = Annotated[Literal[False], BeforeValidator(boolean)]
Boolean = Annotated[bool, BeforeValidator(boolean)]
Tokens = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1, fail_fast=True)]
TokenLists = Annotated[list[Tokens], Field(min_length=1, fail_fast=True)]
NoItems = Annotated[list[None], Field(max_length=0), at_most(0)]
NoEntries = Annotated[dict[str, None], Field(max_length=0), at_most(0)]
Ignored = Annotated[str, Field(max_length=4096)]
"""What clients may send and nothing depends on."""
TagName = Annotated[str, Field(max_length=64)]
"""The key of an entry of metadata."""
Fields = Annotated[dict[TagName, Words], at_most(MOST_FIELDS)]
"""A text in parts, by name."""


def absent(value: object, info: ValidationInfo) -> object:
    """Next to fields a text with no words is none: clients send it where they must send some text."""
    if info.data.get("fields") is None or not (isinstance(value, str) or (isinstance(value, list) and len(value) <= 1)):
        return value
    texts = [one.get("content") if isinstance(one, dict) else one for one in (value if isinstance(value, list) else [value])]
    if not all(isinstance(text, str) and is_blank(text) for text in texts):
        return value
    return [] if info.field_name == "messages" else None


def text_or_fields(value: object, info: ValidationInfo) -> object:
    """A text is there, or fields in place of it, which are checked before."""
    if "fields" in info.data:
        named = info.data["fields"] is not None
        if not value and not named:
            raise PydanticCustomError("missing", "Field required (or `fields`, its parts by name)")
        if value and named:
            raise PydanticCustomError("value_error", "found a text and `fields`, expected one of them")
    return value
