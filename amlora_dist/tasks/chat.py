"""Conversations to token ids, by the tokenizer's own chat template.

The template decides what is around a turn, where the assistant's answer begins (its generation prompt) and what ends it.
Which tokens are the assistant's is found by comparing prefixes: the conversation up to an answer, rendered with the
generation prompt, must be the beginning of the conversation with the answer. That needs no markers in the template, and a
template that does not do so, or ends a turn by another token than the tokenizer's end of sequence, is refused with the
reason (`ChatTemplate.fault`).

Only the template's special tokens are special: those in a turn's text are split into plain pieces.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from amlora_dist.errors import UserError
from amlora_dist.tasks.chat_sandbox import TooMuchError, render_chat
from amlora_dist.tasks.conversations import Turn, last_user
from amlora_dist.tasks.prompt_format import TextPrompt
from amlora_dist.tasks.prompts import PromptTemplate
from amlora_dist.tasks.special_tokens import GUARD, special_tokens
from amlora_dist.tasks.task import TaskSpec

TODAY = "26 Jul 2024"
"""The date for templates that write it (Llama 3.1's own constant): ids must not change from day to day."""
FIXED_DATE = f"{{% macro strftime_now(form) %}}{TODAY}{{% endmacro %}}"


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation in text and in token ids."""

    text: str
    """As the template wrote it, special tokens in a turn's text guarded."""
    ids: tuple[int, ...]
    ends: tuple[int, ...]
    """The character of ``plain`` at which each token ends; empty without a fast tokenizer."""

    @property
    def plain(self) -> str:
        """The text without guards."""
        return self.text.replace(GUARD, "")

    def tokens_of(self, words: str) -> tuple[int, int] | None:
        """The tokens that hold the last place of ``words``; None where they are not there."""
        place = self.plain.rfind(words) if words and self.ends else -1
        return None if place < 0 else (self.first(place), self.first(place + len(words) - 1) + 1)

    def first(self, place: int) -> int:
        """The token that holds a character."""
        return next(token for token, end in enumerate(self.ends) if end > place)


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: with a ``chat_template``.

    Raises:
        UserError: it has none.
    """

    def __init__(self, tokenizer: Any) -> None:
        if (source := _default_template(tokenizer)) is None:
            raise UserError(
                "prompt.format: found chat, but the model's tokenizer has no chat template; use an instruct model, add"
                " chat_template.jinja to the model's folder, or set prompt.format: classic"
            )
        self._tokenizer = tokenizer
        self._source = FIXED_DATE + source if "strftime_now" in source else source
        self._variables = {"tools": None, "documents": None, **tokenizer.special_tokens_map, "date_string": TODAY}
        self._end = tokenizer.eos_token_id
        self._special = special_tokens(tokenizer)
        self._options: dict[str, Any] = {"enable_thinking": False}
        if self.fault(all_turns=False):  # a template that has its thinking block some other way
            self._options = {}

    @property
    def end_id(self) -> int:
        """The token that ends a turn of the assistant."""
        return int(self._end)

    def fault(self, *, all_turns: bool) -> str | None:
        """Why no masks can be made of this template; None where they can.

        Args:
            all_turns: whether every turn of the assistant is learned, not the last one alone.
        """
        talk = [Turn("user", "w1 w2"), Turn("assistant", "w3"), Turn("user", "w4"), Turn("assistant", "w5")]
        try:
            for count in (2, 4):
                self.split(talk[:count], all_turns=all_turns)
            rendered = self.render(talk[:3]).plain
        except UserError as error:
            return str(error)
        return None if "w4" in rendered else "the chat template does not hold the user's words as they were given"

    def render(self, turns: Sequence[Turn], *, open_ended: bool = True) -> Rendered:
        """A conversation by the template.

        Args:
            turns: all of it.
            open_ended: with the template's generation prompt, behind which the assistant answers.

        Raises:
            UserError: the template refuses the turns, with its reason.
        """
        words = [{"role": turn.role, "content": self._special.guarded(turn.text)} for turn in turns]
        values = {**self._variables, **self._options, "messages": words, "add_generation_prompt": open_ended}
        text = render_chat(self._source, values)
        return Rendered(text, *self._tokens(text))

    def split(self, turns: Sequence[Turn], *, all_turns: bool) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Prompt and answer of a conversation whose last turn is the assistant's.

        Returns:
            ids up to the answer; ids of the answer, the end of turn last; and, of ``all_turns``, 1 for each of the prompt's
            last tokens that is learned too, from the first such on.

        Raises:
            UserError: the template changes what is before an answer once the answer is there, or ends it by another
                token than the tokenizer's end of sequence.
        """
        prompt, whole = self.render(turns[:-1]), self.render(turns, open_ended=False)
        rest = self._behind(prompt, whole)
        answer = whole.ids[len(prompt.ids) :]
        if whole.ids[: len(prompt.ids)] != prompt.ids:  # tokens join over the seam, which they cannot when a model answers
            answer = self._tokens(rest)[0]
        earlier = self._earlier(turns, prompt) if all_turns else ()
        return prompt.ids, answer[: self._end_of_turn(answer, 0)], earlier

    def _earlier(self, turns: Sequence[Turn], prompt: Rendered) -> tuple[int, ...]:
        """1 for the tokens of the assistant's turns before the last."""
        if not prompt.ends:
            raise UserError("prompt.train_on: found all, which needs a fast tokenizer (tokenizer.json); expected last")
        mask = [0] * len(prompt.ids)
        for place, turn in enumerate(turns[:-1]):
            if turn.role == "assistant":
                before = self.render(turns[:place])
                self._behind(before, prompt)
                start = prompt.first(len(before.plain))
                stop = self._end_of_turn(prompt.ids, start)
                mask[start:stop] = [1] * (stop - start)
        return tuple(mask[mask.index(1) :]) if 1 in mask else ()

    @staticmethod
    def _behind(before: Rendered, whole: Rendered) -> str:
        """What the template writes behind a prompt."""
        if not whole.text.startswith(before.text):
            raise UserError(
                "the chat template changes what is before an answer once the answer is there (thinking that it"
                " takes out of earlier turns, for one), so that the answer's tokens cannot be separated from the rest"
            )
        return whole.text[len(before.text) :]

    def _end_of_turn(self, ids: tuple[int, ...], start: int) -> int:
        """The place behind the end of the turn that begins at ``start``."""
        if self._end in ids[start:]:
            return ids.index(self._end, start) + 1
        found = next((name for token in ids[start:] if (name := self._name(token)) in self._special.names), None)
        raise UserError(
            f"the chat template ends the assistant's turn by {found or 'no special token'}, and answers end by the"
            f" tokenizer's eos_token, which is {self._tokenizer.eos_token}; "
            + (f"set eos_token to {found} in the model's tokenizer_config.json" if found else "use another template")
        )

    def _name(self, token: int) -> str:
        return str(self._tokenizer.convert_ids_to_tokens(token))

    def _tokens(self, text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids of what the template wrote, and where each ends."""
        ids: list[int] = []
        ends: list[int] = []
        length = 0
        for piece, plain in self._special.pieces(text):
            more, places = self._plain(piece) if plain else self._encoded(piece, split=False)
            ids += more
            ends += [length + place for place in places]
            length += len(piece)
        return tuple(ids), tuple(ends)

    def _plain(self, text: str) -> tuple[list[int], list[int]]:
        """As ``special_tokens.plain_ids``, with places."""
        ids, ends = self._encoded(text, split=True)
        if self._special.ids.isdisjoint(ids):
            return ids, ends
        ids, ends, length = [], [], 0
        for part in self._special.parts(text):
            more, places = self._encoded(part, split=True)
            ids += more
            ends += [length + place for place in places]
            length += len(part)
        return ids, ends

    def _encoded(self, text: str, *, split: bool) -> tuple[list[int], list[int]]:
        """Ids, and the character at which each token ends (none without a fast tokenizer)."""
        more: dict[str, Any] = {"split_special_tokens": True} if split else {}
        if not getattr(self._tokenizer, "is_fast", False):
            return list(self._tokenizer(text, add_special_tokens=False, verbose=False, **more)["input_ids"]), []
        found = self._tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True, **more)
        return list(found["input_ids"]), [end for _, end in found["offset_mapping"]]


class ChatPrompts:
    """Prompts of one task in the chat format: its template's words are the user's last turn.

    Args:
        template: the task's, or the bank's.
        chat: of the tokenizer.
        system: the system's turn of conversations that have none; None: none.
        where: the task, for messages.
    """

    def __init__(self, template: PromptTemplate, chat: ChatTemplate, system: str | None, where: str) -> None:
        self._template, self._chat, self._system, self._where = template, chat, system, where

    def prompt(
        self, turns: Sequence[Turn], max_length: int, *, fields: Mapping[str, str] | None = None
    ) -> tuple[TextPrompt, list[Turn]]:
        """A prompt of at most ``max_length`` tokens, and the turns that it holds.

        Of a conversation that is too long the earliest turns go, but the system's; then the end of the user's last turn.

        Args:
            turns: up to the answer; one of them is the user's.
            max_length: tokens of the prompt.
            fields: of the row, for templates that read them.

        Raises:
            UserError: no room for a word of the user's, or a template that refuses the turns.
        """
        remaining = list(turns)
        if self._system is not None and not any(turn.role == "system" for turn in remaining):
            remaining.insert(0, Turn("system", self._system))
        text = remaining[last_user(remaining)].text
        user_text = text
        while True:
            asked = self._asked(remaining, user_text, fields)
            try:
                found = self._chat.render(asked)
            except TooMuchError:  # templates may take steps for every pair of turns: half of them take a quarter
                if len(fewer := _without_earliest(remaining, 0.5)) == len(remaining):
                    raise
                remaining = fewer
                continue
            if len(found.ids) <= max_length:
                return TextPrompt(found.ids, found.tokens_of(user_text.strip())), asked
            shorter = _without_earliest(remaining)
            if len(shorter) < len(remaining):
                remaining = shorter
            elif user_text:
                user_text = user_text[: min(len(user_text) - 1, len(user_text) * max_length // len(found.ids))]
            else:
                raise UserError(
                    f"task {self._where!r}: max_length {max_length} is too small: the prompt has {len(found.ids)} tokens"
                    " without any text"
                )

    def _asked(self, turns: list[Turn], user_text: str, fields: Mapping[str, str] | None) -> list[Turn]:
        place = last_user(turns)
        words = self._template.render_text(user_text, fields=fields)
        return [*turns[:place], Turn("user", words), *turns[place + 1 :]]


def _default_template(tokenizer: Any) -> str | None:
    """Source of a tokenizer's chat template; None where it has none, or several without a default."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        return str(tokenizer.get_chat_template())
    except ValueError:
        return None


def answer_ids(chat: ChatTemplate, text: str) -> tuple[int, ...]:
    """Ids of an answer behind a generation prompt, without the end of turn."""
    return chat.split([Turn("user", "w1"), Turn("assistant", text)], all_turns=False)[1][:-1]


def settled(spec: TaskSpec, tokenizer: Any, *, encoder_decoder: bool) -> TaskSpec:
    """The task with a format of its prompts that is decided: ``chat`` or ``classic``, for ``auto``.

    Raises:
        UserError: ``chat`` was asked for, and this tokenizer has no template from which masks can be made.
    """
    if not spec.open_format and not spec.chat:
        return spec
    reason = _refusal(spec, tokenizer, encoder_decoder=encoder_decoder)
    if spec.chat and reason is not None:
        raise UserError(f"{spec.origin or f'task {spec.name!r}'}: prompt.format: found chat, {reason}")
    wanted = spec.chat or (spec.free_text and reason is None)
    return replace(spec, prompt=replace(spec.prompt, format="chat" if wanted else "classic"))


def _refusal(spec: TaskSpec, tokenizer: Any, *, encoder_decoder: bool) -> str | None:
    """Why a task cannot have the chat format; None where it can."""
    if encoder_decoder:
        return "expected classic: an encoder-decoder has no chat template"
    if _default_template(tokenizer) is None:
        return "but the model's tokenizer has no chat template; use an instruct model, or set prompt.format: classic"
    fault = ChatTemplate(tokenizer).fault(all_turns=spec.prompt.train_on == "all")
    return None if fault is None else f"but {fault}; or set prompt.format: classic" + (
        " (or prompt.train_on: last)" if spec.prompt.train_on == "all" else ""
    )


def _without_earliest(turns: list[Turn], share: float = 0.0) -> list[Turn]:
    """Without the first turns up to the user's next one, or up to a share of the user's; the same where only one of the
    user's is left."""
    users = [place for place, turn in enumerate(turns) if turn.role == "user"]
    if len(users) < 2:
        return turns
    first = users[max(1, int(len(users) * share))]
    return [turn for place, turn in enumerate(turns) if place >= first or turn.role == "system"]

