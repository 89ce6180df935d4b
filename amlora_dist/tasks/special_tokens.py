"""Users' text is text: special tokens inside it are kept apart from those that a template writes.

A tokenizer splits the special tokens of a text into plain pieces, or none of them. Where a template's words and a user's
are one text, a guard is put into each special token of the user's before the template is rendered. Afterwards the template's
own special tokens are taken out of the text; what is between them is tokenised as plain text, without the guards.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

GUARD = "\ue000\ue002"
"""Private-use characters, which no text of a prompt needs."""


class SpecialTokens:
    """The special tokens of a tokenizer, by their text."""

    def __init__(self, tokenizer: Any) -> None:
        special = {str(token) for token in tokenizer.all_special_tokens}
        special |= {str(t) for t in getattr(tokenizer, "added_tokens_decoder", {}).values() if getattr(t, "special", False)}
        self.names = tuple(sorted((one for one in special if one), key=len, reverse=True))
        known = {tokenizer.convert_tokens_to_ids(name) for name in self.names if len(name) > 1}
        self.ids = frozenset(known - {None, getattr(tokenizer, "unk_token_id", None)})
        """Without that of unknown words, which any text may have, and those of single characters."""
        any_of_them = "|".join(map(re.escape, self.names)) or r"(?!)"
        self._any = re.compile(any_of_them)
        self._unguarded = re.compile(f"(?:{any_of_them})(?!{GUARD})")

    def guarded(self, text: str) -> str:
        """A user's text with a guard in each special token that it holds."""
        while GUARD in text:
            text = text.replace(GUARD, "")
        return self._any.sub(lambda found: found[0][:1] + GUARD + found[0][1:], text)

    def pieces(self, text: str) -> list[tuple[str, bool]]:
        """The special tokens of a rendered text that are not guarded, by themselves, and the texts between them without
        their guards: pieces with true are plain, nothing in them is special."""
        if GUARD not in text:
            return [(text, False)]
        out: list[tuple[str, bool]] = []
        start = 0
        for found in self._unguarded.finditer(text):
            out += [(text[start : found.start()].replace(GUARD, ""), True), (found[0], False)]
            start = found.end()
        out.append((text[start:].replace(GUARD, ""), True))
        return [piece for piece in out if piece[0]]

    def parts(self, text: str) -> list[str]:
        """A user's text cut inside each special token that it holds."""
        cuts = [0, *(found.start() + 1 for found in self._any.finditer(text)), len(text)]
        return [text[start:end] for start, end in pairwise(cuts) if start < end]


_KNOWN: WeakKeyDictionary[Any, SpecialTokens] = WeakKeyDictionary()


def special_tokens(tokenizer: Any) -> SpecialTokens:
    """Those of a tokenizer, looked up once."""
    found = _KNOWN.get(tokenizer)
    if found is None:
        found = _KNOWN[tokenizer] = SpecialTokens(tokenizer)
    return found


def plain_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids of texts in which nothing is special.

    A tokenizer of one-piece words (T5's) has its special tokens among the words, and finds them in plain text too: such a
    text is read in parts.
    """
    if not texts:
        return []
    special = special_tokens(tokenizer)

    def read(some: Sequence[str]) -> list[list[int]]:
        options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        return [list(ids) for ids in tokenizer(list(some), **options)["input_ids"]]

    return [
        ids if special.ids.isdisjoint(ids) else [token for part in read(special.parts(text)) for token in part]
        for text, ids in zip(texts, read(texts), strict=True)
    ]
