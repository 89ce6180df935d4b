"""From a request's message to the messages that answer it; between the routes of the app and the engine."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from pydantic import BaseModel

from amlora_dist.errors import AmloraError, UserError
from amlora_dist.evaluation.requests import Query, Request, Route
from amlora_dist.serving import messages as wire
from amlora_dist.serving.bank import ServedBank
from amlora_dist.serving.jobs import Began, Classified, Ended, Piece, Sampling
from amlora_dist.serving.service import Exchange, Service
from amlora_dist.serving.token_scores import TokenScore
from amlora_dist.tasks.conversations import Turn, joined


@dataclass(frozen=True, slots=True)
class AnswerPart:
    """What is new of one text's answer."""

    text: str | None = None
    route: Route | None = None
    """Of the first part."""
    end: Ended | None = None
    """Of the last part."""
    scores: tuple[TokenScore, ...] = ()


ChunkMaker = Callable[[int, AnswerPart], wire.Completion | wire.ChatChunk]
"""Makes a chunk of a stream from the index of a text and what is new of it."""


class Writer:
    """One request for answers.

    Args:
        service: the server.
        asked: the request.
        texts: to answer, or the tokens of raw prompts.
        question: asked of them.
        raw: they are whole prompts.
        new_tokens: that the request allows; default: what the task needs that each text is routed to, of whole prompts what
            any task of the bank needs.
        top: how many likeliest tokens are named next to each of the answer's; None: no log probabilities.
        echo: whether the prompt comes back in front of its answer.
        turns: of the conversation that the one text is from.
        fields: that the one text is made of.

    Raises:
        UserError: beyond a limit, or a model that is not served.
    """

    def __init__(
        self,
        service: Service,
        asked: wire.Writing,
        texts: Sequence[str | list[int]],
        *,
        question: str | None,
        raw: bool,
        new_tokens: int | None,
        top: int | None = None,
        echo: bool = False,
        turns: tuple[Turn, ...] = (),
        fields: Mapping[str, str] | None = None,
    ) -> None:
        self.service, self.asked, self.texts, self.turns, self.fields = service, asked, texts, turns, fields or {}
        self.bank = service.bank
        self.task = service.task_of(self.bank, asked.model)
        self.question, self.top, self.echo = question, top, echo
        self.raw = raw or echo or not all(isinstance(text, str) for text in texts)
        service.check_texts([joined(turns)] if turns else texts, question)
        most = service.settings.max_new_tokens
        if new_tokens is not None and new_tokens > most:
            raise UserError(f"max_tokens: found {new_tokens}, expected at most {most}")
        self.new_tokens = new_tokens
        if new_tokens is None and self.raw:
            self.new_tokens = min(self.bank.answer_limit(self.task), most)
        self.sampling = Sampling(
            new_tokens=self.new_tokens or most,
            temperature=asked.temperature or 0.0,
            top_p=1.0 if asked.top_p is None else asked.top_p,
            seed=asked.seed,
            stops=asked.stops,
        )
        self.id, self.created = uuid.uuid4().hex, int(time.time())

    async def submit(self) -> Exchange:
        """Tokenise the texts and send them to the engine."""
        requests = await asyncio.to_thread(self._requests)
        return self.service.submit(self.bank, requests, self.sampling, stream=bool(self.asked.stream))

    def _requests(self) -> list[Request]:
        return [
            self.bank.to_generate(
                text, question=self.question, task=self.task, raw=self.raw, new_tokens=self.new_tokens,
                fields=self.fields, turns=self.turns, top=self.top, echo=self.echo and self.top is not None,
            )
            for text in self.texts
        ]

    def prompt_of(self, index: int) -> str:
        """What ``echo`` gives back of a text."""
        text = self.texts[index]
        return text if isinstance(text, str) else self.bank.words_of(text)

    async def answers(self) -> tuple[list[AnswerPart], wire.Usage]:
        """The whole answers, in the order of the texts."""
        exchange = await self.submit()
        begun: dict[int, Began] = {}
        ends: dict[int, Ended] = {}
        async for index, event in exchange.events():
            if isinstance(event, Began):
                begun[index] = event
            elif isinstance(event, Ended):
                ends[index] = event
        found = []
        for index in range(len(self.texts)):
            first, end = begun[index], ends[index]
            text = self.prompt_of(index) + end.text if self.echo else end.text
            found.append(AnswerPart(text, first.route, end, (*first.scores, *end.scores)))
        return found, self._counted(exchange, list(ends.values()), [first.route for first in begun.values()])

    async def stream(self, chunk: ChunkMaker) -> AsyncIterator[bytes]:
        """Server-sent events, beginning when the first text was read."""
        exchange = await self.submit()
        events = exchange.events()
        first = await anext(events)
        return self._events(exchange, first, events, chunk)

    async def _events(
        self, exchange: Exchange, first: tuple[int, Any], events: AsyncGenerator[tuple[int, Any], None], chunk: ChunkMaker
    ) -> AsyncIterator[bytes]:
        ends: list[Ended] = []
        routes: list[Route] = []

        def to_bytes(index: int, event: Any) -> bytes:
            if isinstance(event, Began):
                routes.append(event.route)
                text = self.prompt_of(index) if self.echo else None
                return server_sent(chunk(index, AnswerPart(text, event.route, scores=event.scores)))
            if isinstance(event, Ended):
                ends.append(event)
                return server_sent(chunk(index, AnswerPart(end=event)))
            assert isinstance(event, Piece)
            return server_sent(chunk(index, AnswerPart(event.text, scores=event.scores)))

        try:
            yield to_bytes(*first)
            async for index, event in events:
                yield to_bytes(index, event)
        except AmloraError as error:
            yield server_sent(error_body(error))
        finally:
            await events.aclose()  # a client that went away is not written for any longer
        usage = self._counted(exchange, ends, routes)
        options = self.asked.stream_options
        if len(ends) == len(self.texts) and options is not None and options.include_usage:
            last = chunk(0, AnswerPart())
            last.choices, last.usage = [], usage
            yield server_sent(last)
        yield b"data: [DONE]\n\n"

    def _counted(self, exchange: Exchange, ends: Sequence[Ended], routes: Any) -> wire.Usage:
        written = sum(end.tokens for end in ends)
        self.service.metrics.tokens(read=exchange.prompt_tokens, written=written)
        for route in routes:
            self.service.metrics.routed(route)
        return counted(exchange.prompt_tokens, written)

    def head(self, prefix: str) -> dict[str, Any]:
        """What all answers of a request have in common."""
        return {
            "id": f"{prefix}-{self.id}", "created": self.created, "model": self.bank.name,
            "system_fingerprint": self.bank.version,
        }  # fmt: skip

    def routing(self, route: Route | None) -> wire.RoutingWeights | None:
        """A route, where the request asks for it."""
        return None if route is None or not self.asked.routing else routing(route)


async def classify(service: Service, asked: wire.ClassificationRequest) -> wire.Classifications:
    """Labels for the texts of a request."""
    bank = service.bank
    task = service.task_of(bank, asked.model)
    named = named_fields(service, asked.fields, asked.model)
    texts = listed(asked.input or []) if named is None else [named.text]
    service.check_texts(texts, asked.question, asked.labels)

    def prepared() -> list[Request]:
        return [
            bank.to_classify(
                text, labels=asked.labels, question=asked.question, task=task, fields=named.fields if named else {}
            )
            for text in texts
        ]

    exchange = service.submit(bank, await asyncio.to_thread(prepared), None)
    made: dict[int, wire.ClassificationData] = {}
    async for index, event in exchange.events():
        if isinstance(event, Classified):
            found = event.found
            service.metrics.routed(found.route)
            made[index] = wire.ClassificationData(
                index=index, label=found.label, task=found.task, scores=found.scores, foreign=found.foreign,
                routing=routing(found.route) if asked.routing else None,
            )  # fmt: skip
    service.metrics.tokens(read=exchange.prompt_tokens, written=0)
    return wire.Classifications(
        id=f"classify-{uuid.uuid4().hex}", created=int(time.time()), model=bank.name, system_fingerprint=bank.version,
        data=[made[index] for index in range(len(texts))], usage=counted(exchange.prompt_tokens, 0),
    )  # fmt: skip


def named_fields(service: Service, fields: Mapping[str, str] | None, model: str | None) -> Query | None:
    """The text that is given in parts; None where it is not.

    Raises:
        UserError: fields of no task of the bank, or that its tasks join differently; a model that is not served.
    """
    if fields is None:
        return None
    return service.bank.model.prompter.query(fields, task=service.task_of(service.bank, model))


def cards(bank: ServedBank) -> list[wire.ModelCard]:
    """The bank and its tasks as models."""
    common: dict[str, Any] = {"created": bank.since, "version": bank.version}
    whole = wire.ModelCard(id=bank.name, **common)
    return [whole, *(
        wire.ModelCard(id=f"{bank.name}:{task}", parent=bank.name, task=task, labels=bank.described(task), **common)
        for task in bank.tasks
    )]  # fmt: skip


def turns_of(messages: Sequence[wire.ChatMessage]) -> list[Turn]:
    """The turns of a chat."""
    return [Turn("system" if one.role == "developer" else one.role, one.text) for one in messages]


def listed(given: str | list[str]) -> list[str]:
    """One text or several."""
    return [given] if isinstance(given, str) else given


def prompts_of(given: str | list[str] | list[int] | list[list[int]] | None) -> list[str | list[int]]:
    """One prompt or several, each a text or its tokens."""
    if given is None or isinstance(given, str):
        return [] if given is None else [given]
    if isinstance(given[0], int):
        return [given]
    return [*cast("list[str | list[int]]", given)]


def routing(route: Route) -> wire.RoutingWeights:
    """A route on the wire."""
    return wire.RoutingWeights(**route.to_mapping())


def counted(read: int, written: int) -> wire.Usage:
    """Counts of tokens on the wire."""
    return wire.Usage(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)


def server_sent(message: BaseModel) -> bytes:
    """One event of a stream."""
    return f"data: {json.dumps(wire.sparse(message.model_dump(mode='json')))}\n\n".encode()


def error_body(error: AmloraError | None, *, kind: str = "server_error", code: str | None = None) -> wire.ErrorBody:
    """An error on the wire; None: a fault of the server, which its log explains."""
    message = "a fault of the server; its log says more" if error is None else str(error)
    return wire.ErrorBody(error=wire.ErrorDetail(message=message, type=kind, code=code))
