"""From a text to the token ids of its prompt, in the two formats that there have been.

**Format 1** (0.1) renders the whole prompt and tokenises it at once: what is around the text may change the text's own
tokens, a special token that a user typed is one, and the router pooled over question and options too.

**Format 2** tokenises the text by itself, with special tokens split into plain pieces, and cuts it to ``text_tokens``;
the prompt's ids are those of what is before the text, of the text, and of what is after it. So the text has the same ids
behind every question, and what a causal model makes of it is known before anybody knows the question: the router reads
the text alone, and its keys and values are kept while the routed task's question is appended.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from amlora_dist.errors import UserError
from amlora_dist.tasks.prompts import PromptTemplate
from amlora_dist.tasks.special_tokens import GUARD, plain_ids, special_tokens

DEFAULT_TEXT_TOKENS = 512
TEXT_MARK = "\ue000\ue001"
"""Replaces the text while the rest of a prompt is rendered: private-use characters, which no text of a prompt needs."""


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """How prompts become ids; a bank has one for life."""

    version: Literal[1, 2] = 2
    text_tokens: int = DEFAULT_TEXT_TOKENS
    """Format 2: most tokens of a text that are read at all, whatever the task; a task's ``max_length`` may keep fewer."""

    @property
    def text_alone(self) -> bool:
        """Whether the text is tokenised by itself, and the router reads nothing else."""
        return self.version == 2

    def values(self) -> dict[str, Any]:
        """What fingerprints and manifests say of it; nothing of format 1, which had no name."""
        return {} if self.version == 1 else {"format": self.version, "text_tokens": self.text_tokens}


@dataclass(frozen=True, slots=True)
class Around:
    """Ids before and after a text in one prompt, special tokens of the tokenizer included."""

    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """A prompt in format 2."""

    ids: tuple[int, ...]
    span: tuple[int, int] | None
    """Where the first tokens of the text are; None: the text was tokenised with the rest."""


def text_ids(texts: Sequence[str], tokenizer: Any, limit: int) -> list[tuple[int, ...]]:
    """Ids of texts alone, without special tokens of any kind, at most ``limit`` each."""
    return [tuple(ids[:limit]) for ids in plain_ids(tokenizer, texts)]


def special_ends(tokenizer: Any, encoder_decoder: bool) -> Around:
    """The special tokens that a tokenizer puts before and after everything; a causal prompt has none after it."""
    whole = tuple(tokenizer("x", verbose=False)["input_ids"])
    inner = tuple(tokenizer("x", add_special_tokens=False, verbose=False)["input_ids"])
    for start in range(len(whole) - len(inner) + 1):
        if whole[start : start + len(inner)] == inner:
            return Around(whole[:start], whole[start + len(inner) :] if encoder_decoder else ())
    return Around((), ())


class TextPrompts:
    """Prompts of one template in format 2.

    A template that shows the text changed, or more than once, has no place where the text's own ids could go: its
    prompts are tokenised whole, and nothing that was made of the text can be kept for them.

    Args:
        template: the task's, or the bank's; a question that a user asks in it is guarded (``special_tokens``).
        tokenizer: of the base model.
        encoder_decoder: whether prompts go to an encoder.
        where: the task, for messages.
    """

    def __init__(self, template: PromptTemplate, tokenizer: Any, encoder_decoder: bool, where: str) -> None:
        self._template, self._tokenizer, self._where = template, tokenizer, where
        self._ends = special_ends(tokenizer, encoder_decoder)
        self._by_row = "fields" in template.source
        self._fixed = None if self._by_row else self._around(None)

    def prompt(
        self, ids: tuple[int, ...], max_length: int, *, text: str, fields: Mapping[str, str] | None = None
    ) -> TextPrompt:
        """A prompt of at most ``max_length`` tokens: the text's last tokens go, nothing else.

        Args:
            ids: of the text, by ``text_ids``.
            max_length: tokens of the prompt.
            text: the text itself.
            fields: of the row, for templates that read them.

        Raises:
            UserError: no room for one token of the text.
        """
        around = self._around(fields) if self._by_row else self._fixed
        if around is None:
            return self._whole(text, fields, max_length)
        taken = len(around.before) + len(around.after)
        if max_length <= taken:
            raise self._no_room(taken, max_length)
        short = ids[: max_length - taken]
        return TextPrompt((*around.before, *short, *around.after), (len(around.before), len(around.before) + len(short)))

    def _around(self, fields: Mapping[str, str] | None) -> Around | None:
        given = {name: special_tokens(self._tokenizer).guarded(value) for name, value in (fields or {}).items()}
        before, mark, after = self._template.render_text(TEXT_MARK, fields=given).partition(TEXT_MARK)
        if not mark or TEXT_MARK in after:
            return None
        inner = [self._ids_of(part) if part else () for part in (before, after)]
        return Around((*self._ends.before, *inner[0]), (*inner[1], *self._ends.after))

    def _ids_of(self, words: str) -> tuple[int, ...]:
        """Of what is around the text: special tokens are the template's, but for those that are guarded."""
        if GUARD not in words:
            return _ids(self._tokenizer, words)
        pieces = special_tokens(self._tokenizer).pieces(words)
        return tuple(token for piece, plain in pieces for token in _ids(self._tokenizer, piece, split=plain))

    def _whole(self, text: str, fields: Mapping[str, str] | None, max_length: int) -> TextPrompt:
        """Cut the text, a share at a time, until the whole rendering fits."""
        short = text
        while True:
            words = self._template.render_text(short, fields=fields).replace(GUARD, "")
            inner = _ids(self._tokenizer, words, split=True)
            length = len(self._ends.before) + len(inner) + len(self._ends.after)
            if length <= max_length:
                return TextPrompt((*self._ends.before, *inner, *self._ends.after), None)
            if not short:
                raise self._no_room(length, max_length)
            short = short[: min(len(short) - 1, len(short) * max_length // length)]

    def _no_room(self, taken: int, max_length: int) -> UserError:
        return UserError(
            f"task {self._where!r}: max_length {max_length} is too small: the prompt has {taken} tokens without any text"
        )


def _ids(tokenizer: Any, text: str, *, split: bool = False) -> tuple[int, ...]:
    if split:
        return tuple(plain_ids(tokenizer, [text])[0])
    return tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
