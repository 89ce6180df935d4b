"""What is taken as a text, and what is not: nowhere does Python's notation of a value become one."""

from __future__ import annotations

import datetime
import decimal
from typing import Any

import numpy
import pytest

from amlora_dist.config.schema import meant
from amlora_dist.tasks.texts import NoTextError, is_blank, text_of


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("red", "red"), ("", ""), ("\U0001f600 é", "\U0001f600 é"), (7, "7"), (True, "True"), (1.5, "1.5"), (2.0, "2.0"),
        (numpy.int64(7), "7"), (numpy.float32(1.5), "1.5"), (numpy.str_("red"), "red"),
    ],
)  # fmt: skip
def test_text_numbers_and_booleans_are_taken(value: Any, text: str) -> None:
    assert text_of(value) == text
    assert type(text_of(value)) is str


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (None, "nothing"),
        (["red"], "a list"),
        (("red",), "a list"),
        ({"a": "red"}, "a dictionary"),
        ({"red"}, "a set"),
        (b"red", "bytes"),
        (bytearray(b"red"), "bytes"),
        (float("nan"), "nan, which is not a finite number"),
        (float("-inf"), "-inf, which is not a finite number"),
        (numpy.float32("nan"), "nan, which"),
        ("a \ud83d b", r"half of a character (\ud83d, at character 3)"),
        ("\udc00", "half of a character"),
        pytest.param(10**5000, "a number of thousands of digits", id="digits"),
        (1j, "a value of type complex"),
        (decimal.Decimal("1.5"), "a decimal number"),
        (datetime.datetime(2026, 1, 1), "a date"),
        (datetime.timedelta(1), "a time"),
        (numpy.array(["red"]), "a value of type ndarray"),
        (object(), "a value of type object"),
    ],
)
def test_what_is_no_text_is_refused_by_its_kind(value: Any, found: str) -> None:
    with pytest.raises(NoTextError) as caught:
        text_of(value)
    assert found in str(caught.value)


@pytest.mark.parametrize("text", ["", " \n", "\u00a0\u3000", "\u200b\ufeff", "\u202e", "\x00", "\u200d"])
def test_a_text_of_which_nothing_can_be_read_is_blank(text: str) -> None:
    assert is_blank(text) and not is_blank(f"{text}a") and not is_blank(f"{text}\U0001f600")


def test_a_label_in_other_code_points_is_reported_as_that() -> None:
    assert meant("cafe\u0301", ["tea", "caf\u00e9"]) == (
        " (it looks like 'caf\u00e9', which is written with other code points: 'caf\\xe9'; write both in NFC)"
    )
    assert meant("caffe", ["tea", "caf\u00e9"]) == " (did you mean 'caf\u00e9'?)"
