"""One version of a bank as a server holds it: what a request may ask of it, and the passes that answer requests.

A request keeps the version it came to from its first token to its last, whatever is served by then.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Generator, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amlora_dist.errors import UserError
from amlora_dist.evaluation.decoding import Prefilled, picked
from amlora_dist.evaluation.requests import Classification, Request, Route, routes
from amlora_dist.inference.model import AMLoRAModel
from amlora_dist.serving.token_scores import TokenScore, of_prompt, scored
from amlora_dist.tasks.conversations import Turn


@dataclass(frozen=True, slots=True)
class Chosen:
    """A label that answers a text."""

    text: str
    tokens: int
    scores: list[TokenScore]
    """Of its tokens, where the request asks for them."""


class Started(NamedTuple):
    """Requests whose prompts were read."""

    state: Prefilled
    """What decoding goes on from."""
    routes: list[Route]
    answers: list[Chosen | None]
    """Those that are there already, where the task that a text is routed to has labels."""
    scores: list[list[TokenScore]]
    """Of each prompt's own tokens, where the request asks for them."""


class ServedBank:
    """A model with its names.

    Args:
        model: the bank in its base model.
        name: what clients call it, whatever the version.

    Raises:
        UserError: a name with a colon, which would part it from a task's.
    """

    def __init__(self, model: AMLoRAModel, name: str) -> None:
        check_name(name)
        self.model, self.name = model, name
        self.version = model.uri or f"{name}-{model.bank.manifest.digest()[:12]}"
        """``models:/NAME/NUMBER``; of a folder its name and the beginning of its digest."""
        self.since = int(time.time())
        """When it was loaded, seconds since 1970."""
        self.eos_id = model.decoder.eos_id
        self.decode = model.prompter.decode
        self.words_of = model.prompter.words_of
        """Tokens as they are in text, special ones too."""
        self.word_of = functools.lru_cache(1 << 14)(self._word)
        """The same of one token."""
        self.answer_limit = model.prompter.answer_limit
        """New tokens that a task's answers may need; of None, those of any task."""
        self.limit_of = model.prompter.limit_of
        """New tokens of an answer that is written for a request that was routed."""

    @classmethod
    def load(cls, bank: str | Path, name: str | None = None, **options: Any) -> ServedBank:
        """Load a bank; ``options`` as for ``AMLoRAModel.from_bank``, which says what can go wrong."""
        return cls(AMLoRAModel.from_bank(bank, **options), name or default_name(bank))

    @property
    def tasks(self) -> list[str]:
        """In the order in which they were learned."""
        return self.model.tasks

    def described(self, task: str) -> list[str] | None:
        """Labels of a task; None where its answers are free text, or the bank does not describe it."""
        entry = self.model.prompter.entries[task]
        return None if entry is None else entry.labels

    def to_generate(
        self,
        text: str | Sequence[int],
        *,
        question: str | None = None,
        task: str | None = None,
        raw: bool = False,
        new_tokens: int | None = None,
        turns: tuple[Turn, ...] = (),
        top: int | None = None,
        echo: bool = False,
        fields: Mapping[str, str] | None = None,
    ) -> Request:
        """A text on its way to an answer, tokenised.

        Args:
            text: or the tokens of a raw prompt.
            question: in place of the task's own.
            task: named by the caller.
            raw: it is the prompt.
            new_tokens: of the answer at most; default: what the task needs that the text is routed to.
            turns: of the conversation that it is the last of.
            top: how many likeliest tokens are named next to each; None: no log probabilities.
            echo: whether the prompt's own tokens are scored too.
            fields: that the text is made of, by name.

        Raises:
            UserError: an empty text, an unknown task, no room for the prompt; an encoder-decoder that should score its
                prompt.
        """
        if echo and self.model.base.encoder_decoder:
            raise UserError("echo: found true, but an encoder-decoder says nothing of its prompt; expected false")
        tokens = None if isinstance(text, str) else text
        (request,) = self.model.requests(text if isinstance(text, str) else "", question=question, task=task)
        request.raw, request.turns, request.top, request.echo = raw, turns, top, echo
        request.new_tokens, request.fields = new_tokens, fields or {}
        if tokens is None:
            self._tokenise(request)
        else:
            self.model.prompter.take(request, tokens, new_tokens=self.limit_of(request))
        return request

    def _tokenise(self, request: Request) -> None:
        """The whole prompt; of a text that is yet to be routed the text, and its prompt by the bank's template as an
        estimate of what it will come to."""
        if self.model.answering is None or request.raw:
            self.model.former.prepare([request])
        else:
            self.model.prompter.read([request])
            self.model.prompter.ask(request, new_tokens=request.new_tokens or 1)

    def to_classify(
        self,
        text: str,
        *,
        labels: Sequence[str] | None = None,
        question: str | None = None,
        task: str | None = None,
        fields: Mapping[str, str] | None = None,
    ) -> Request:
        """A text on its way to a label.

        Raises:
            UserError: as ``to_generate``; labels that are the same to the tokenizer; a task without labels.
        """
        (request,) = self.model.requests(text, question=question, task=task)
        request.fields = fields or {}
        if labels is not None:
            request.labels = tuple(dict.fromkeys(labels))
            self.model.prompter.plan(request.labels, task)
        elif task is not None:
            self.model.labels_of(task)
        self._tokenise(request)
        return request

    def group(self, request: Request) -> Hashable:
        """Requests of one group can share passes: all plain texts, unless the layers' own selectors gate some of them;
        raw prompts."""
        return self.model.mixture.router is None and request.gate is None, request.raw

    def begin(self, requests: Sequence[Request]) -> Started:
        """Read the texts and prompts of requests of one group."""
        answering = self.model.answering
        if answering is None or requests[0].raw:
            scores: list[list[TokenScore]] = [[] for _ in requests]
            echoes = any(request.echo for request in requests)
            state, gate_BT = self.model.prefill(requests, partial(self._echo, requests, scores) if echoes else None)
            answers = self._answers(state, requests, self.model.chosen(state, requests))
            return Started(state, routes(gate_BT, self.tasks, self.model.rows_TN), answers, scores)
        begun = answering.begin(requests)
        answers = self._answers(begun.state, begun.requests, answering.choose(begun))
        return Started(begun.state, begun.routes, answers, [[] for _ in requests])

    def _answers(
        self, state: Prefilled, requests: Sequence[Request], labels: Sequence[str | None]
    ) -> list[Chosen | None]:
        """The labels that were chosen as answers; None where one is to be written."""
        answers: list[Chosen | None] = []
        for row, (request, text) in enumerate(zip(requests, labels, strict=True)):
            if text is None:
                answers.append(None)
                continue
            (ids,) = self.model.prompter.labels([text], chat=self.model.prompter.is_chat(request.task))
            label_scores = [] if request.top is None else self._of_label(state, row, ids, request.top)
            answers.append(Chosen(text, len(ids), label_scores))
        return answers

    def _echo(self, requests: Sequence[Request], scores: list[list[TokenScore]], logits_BSV: Tensor) -> None:
        """What the model thought of the prompts' own tokens, but for places that it learned."""
        learned = self.model.prompter.prefix.tokens
        for row, request in enumerate(requests):
            if request.echo:
                tokens = request.tokens[learned:]
                scores[row] += of_prompt(logits_BSV[row, -len(tokens) :], tokens, request.top or 0)

    def _of_label(self, state: Prefilled, row: int, ids: Sequence[int], top: int) -> list[TokenScore]:
        """What the model thought of the words of a label that was chosen; one pass more, where they are several."""
        first_1V = state.logits[row : row + 1]
        if len(ids) == 1:
            return scored(first_1V, ids, top)
        fed = torch.tensor([ids[:-1]], device=state.logits.device)
        later_SV = self.model.decoder.advance(picked(state, [row]), fed)[0]
        return scored(torch.cat([first_1V, later_SV]), ids, top)

    def _word(self, token: int) -> str:
        return self.words_of([token])

    def advance(self, state: Prefilled, tokens_B1: Tensor) -> None:
        """One more token for each row; ``state`` then has the scores of the one after it."""
        state.logits = self.model.decoder.advance(state, tokens_B1)[:, -1]

    def classify(self, requests: Sequence[Request]) -> Generator[int, None, list[Classification]]:
        """Labels for the texts of different callers, in few passes, with a stop after each: yields its tokens."""
        for place, request in enumerate(requests):
            request.place = place
        return self.model.classifying(requests, len(requests))

    def labels_of(self, request: Request) -> tuple[str, ...]:
        """Those that a text will be compared with; of a text that is yet to be routed the most that it may be."""
        if request.labels is not None:
            return request.labels
        if self.model.former.ranks(request, to_classify=True):
            return self.model.former.plain.labels
        found: list[list[str]] = [self.described(task) or [] for task in ([request.task] if request.task else self.tasks)]
        most: list[str] = max(found, key=len, default=[])
        return tuple(most)


def check_name(name: str) -> None:
    """Refuse a name that cannot be part of ``NAME:TASK``. Raises UserError."""
    if not name or ":" in name:
        raise UserError(f"name: found {name!r}, expected one without a colon (clients write NAME:TASK); give --name")


def default_name(bank: str | Path) -> str:
    """What clients call a bank: its registered model, or its folder's name."""
    if str(bank).startswith("models:"):
        from amlora_dist.registry.versions import parse_uri

        return parse_uri(str(bank))[0]
    return Path(bank).expanduser().resolve().name
