"""Users' text is text: special tokens inside it are kept apart from those that a template writes.

A tokenizer splits the special tokens of a text into plain pieces, or none of them. Where a template's words and a user's
are one text, a guard is put into each special token of the user's before the template is rendered. Afterwards the template's
own special tokens are taken out of the text; what is between them is tokenised as plain text, without the guards.
"""

from __future__ import annotations

import re
from typing import Any

GUARD = "\ue000\ue002"
"""Private-use characters, which no text of a prompt needs."""


class SpecialTokens:
    """The special tokens of a tokenizer, by their text."""

    def __init__(self, tokenizer: Any) -> None:
        special = {str(token) for token in tokenizer.all_special_tokens}
        special |= {str(t) for t in getattr(tokenizer, "added_tokens_decoder", {}).values() if getattr(t, "special", False)}
        self.names = tuple(sorted((one for one in special if one), key=len, reverse=True))
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
