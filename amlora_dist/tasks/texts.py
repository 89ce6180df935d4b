"""What may be given as a text: one answer for training, the command line, the server and MLflow.

``str()`` makes a text of anything, and a model then learns Python's notation of a list. Here only what a person would
write down the same way is taken; the rest is refused by its kind.
"""

from __future__ import annotations

import datetime
import decimal
import math
import numbers
import unicodedata
from collections.abc import Mapping

_KINDS: list[tuple[type | tuple[type, ...], str]] = [
    (Mapping, "a dictionary"),
    (list, "a list"),
    (tuple, "a list"),
    ((set, frozenset), "a set"),
    ((bytes, bytearray, memoryview), "bytes"),
    (datetime.date, "a date"),
    ((datetime.time, datetime.timedelta), "a time"),
    (decimal.Decimal, "a decimal number"),
]
HALF = "half of a character"
TAKEN = "a text, a whole number, true or false, or a finite number"
"""For messages: what ``text_of`` takes."""


class NoTextError(ValueError):
    """A value that is no text. The message is what was found (``a list``), for ``found ..., expected a text``."""


def text_of(value: object) -> str:
    """The text that a value means: itself, or a number or boolean as Python writes it.

    Raises:
        NoTextError: nothing (None), a list, a dictionary, bytes, a date, a number that is not finite, half of a
            character (a lone surrogate) in a text; or anything else that is not text, whole number, boolean or float.
    """
    if isinstance(value, str):
        if not value.isascii() and (place := lone_surrogate(value)) is not None:
            raise NoTextError(f"{HALF} (\\u{ord(value[place]):x}, at character {place + 1})")
        return str(value)
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, numbers.Integral):
        return _digits(int(value))
    if isinstance(value, numbers.Real):
        number = float(value)
        if not math.isfinite(number):
            raise NoTextError(f"{number}, which is not a finite number")
        return str(number)
    raise NoTextError(kind_of(value))


def kind_of(value: object) -> str:
    """What a value is, in words."""
    if value is None:
        return "nothing"
    for types, words in _KINDS:
        if isinstance(value, types):
            return words
    return f"a value of type {type(value).__name__}"


def lone_surrogate(text: str) -> int | None:
    """Place of the first half of a character, which no file, tokenizer or answer can hold; None where there is none."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return error.start
    return None


def is_blank(text: str) -> bool:
    """Whether a text has nothing in it that can be read: spaces, control characters, marks of order and width alone."""
    return all(one.isspace() or unicodedata.category(one) in ("Cc", "Cf") for one in text)


def _digits(number: int) -> str:
    try:
        return str(number)
    except ValueError:  # Python writes no number of more than some thousand digits
        raise NoTextError("a number of thousands of digits") from None
