"""Text that comes token by token: what was shown is never taken back, and stops are never shown."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from amlora_dist.serving.detokenizer import Detokenizer


def decode_bytes(tokens: object) -> str:
    """As tokenizers do that strip in front; behind, a blank that comes and goes would be one that was shown already."""
    return bytes(tokens).decode("utf-8", "replace").lstrip()  # type: ignore[call-overload]


@given(st.text(max_size=30), st.lists(st.text(min_size=1, max_size=3), max_size=3))
@example("0\r\x85", [])
def test_pieces_add_up_and_end_before_the_first_stop(text: str, stops: list[str]) -> None:
    detokenizer, pieces = Detokenizer(decode_bytes, stops), []
    for token in text.encode():
        pieces.append(detokenizer.grow(token))
        if detokenizer.stopped:
            break
    pieces.append(detokenizer.finish())
    assert "".join(pieces) == detokenizer.text
    whole = decode_bytes(detokenizer.tokens)
    places = [whole.find(stop) for stop in stops if stop in whole]
    assert detokenizer.text == (whole[: min(places)] if places else whole)
    assert detokenizer.stopped == bool(places)


def test_half_a_character_and_half_a_stop_are_held_back() -> None:
    detokenizer = Detokenizer(decode_bytes, ["END"])
    assert [detokenizer.grow(byte) for byte in "ü".encode()] == ["", "ü"]
    assert [detokenizer.grow(byte) for byte in b"ENx"] == ["", "", "ENx"]
    assert [detokenizer.grow(byte) for byte in b"END"] == ["", "", ""]
    assert detokenizer.stopped and detokenizer.text == "üENx" and detokenizer.finish() == ""
