"""Tokens to text while they come: what can be shown already, and where a stop sequence ends it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"
"""A character whose bytes are not all there yet decodes to this."""


class Detokenizer:
    """The text of one answer as it grows. What ``grow`` and ``finish`` return adds up to ``text``.

    Args:
        decode: token ids to text.
        stops: sequences that end the answer and are no part of it.
        live: whether anybody reads along; if not, and nothing can stop it, all text comes from ``finish``.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = (), *, live: bool = True) -> None:
        self._decode, self._stops = decode, tuple(stops)
        self._live = live or bool(stops)
        self._longest = max(map(len, self._stops), default=0)
        self.tokens: list[int] = []
        self.text = ""
        """What was shown."""
        self.stopped = False
        """A stop sequence came."""

    def grow(self, token: int) -> str:
        """Take one token; returns the text that it makes certain."""
        self.tokens.append(token)
        return self._show(last=False) if self._live else ""

    def finish(self) -> str:
        """No more tokens come; returns what was held back."""
        return "" if self.stopped else self._show(last=True)

    def _show(self, *, last: bool) -> str:
        whole = self._decode(self.tokens)
        # What was shown holds no beginning of a stop sequence: only the tail behind it is looked at.
        begin = max(0, len(self.text) - self._longest)
        places = [place for stop in self._stops if (place := whole.find(stop, begin)) >= 0]
        if places:
            self.stopped = True
            certain = whole[: min(places)]
        elif last:
            certain = whole
        else:
            certain = whole.rstrip(UNFINISHED)
            certain = certain[: len(certain) - self._beginning_of_stop(certain)]
        if not certain.startswith(self.text):
            # The tokenizer changed its mind about text already shown: nothing of that can be taken back.
            certain = self.text + certain[len(self.text) :] if last else self.text
        new = certain[len(self.text) :]
        self.text = certain
        return new

    def _beginning_of_stop(self, text: str) -> int:
        """Characters at the end of ``text`` that may be the beginning of a stop sequence."""
        tail = text[max(0, len(text) - self._longest + 1) :]
        first = len(tail)
        for stop in self._stops:
            place = tail.find(stop[0], max(0, len(tail) - len(stop) + 1))
            while 0 <= place < first and not stop.startswith(tail[place:]):
                place = tail.find(stop[0], place + 1)
            first = min(first, place) if place >= 0 else first
        return len(tail) - first
