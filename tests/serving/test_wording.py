"""Text that comes token by token: what was shown is never taken back, and stops are never shown."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from amlora_dist.serving.detokenizer import Wording


def decode_bytes(tokens: object) -> str:
    return bytes(tokens).decode("utf-8", "replace").strip()  # type: ignore[call-overload]


@given(st.text(max_size=30), st.lists(st.text(min_size=1, max_size=3), max_size=3))
def test_pieces_add_up_and_end_before_the_first_stop(text: str, stops: list[str]) -> None:
    wording, pieces = Wording(decode_bytes, stops), []
    for token in text.encode():
        pieces.append(wording.grow(token))
        if wording.stopped:
            break
    pieces.append(wording.finish())
    assert "".join(pieces) == wording.text
    whole = decode_bytes(wording.tokens)
    places = [whole.find(stop) for stop in stops if stop in whole]
    assert wording.text == (whole[: min(places)] if places else whole)
    assert wording.stopped == bool(places)


def test_half_a_character_and_half_a_stop_are_held_back() -> None:
    wording = Wording(decode_bytes, ["END"])
    assert [wording.grow(byte) for byte in "ü".encode()] == ["", "ü"]
    assert [wording.grow(byte) for byte in b"ENx"] == ["", "", "ENx"]
    assert [wording.grow(byte) for byte in b"END"] == ["", "", ""]
    assert wording.stopped and wording.text == "üENx" and wording.finish() == ""
