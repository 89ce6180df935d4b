"""The HTTP app: OpenAI's completions and chat, classifications, models, health, metrics, a page to try it.

``build_app`` makes an ASGI app of a ``Service``; any ASGI server can run it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from amlora_dist import __version__
from amlora_dist.errors import AmloraError, UserError
from amlora_dist.serving import messages as wire
from amlora_dist.serving.alias_watcher import Follower
from amlora_dist.serving.answers import AnswerPart, Writer, cards, classify, error_body, named_fields, prompts_of, turns_of
from amlora_dist.serving.jobs import BusyError, EngineAwayError, LateError, StoppingError
from amlora_dist.serving.malformed import detail_of, unread
from amlora_dist.serving.metrics import CONTENT_TYPE
from amlora_dist.serving.middleware import Gatekeeper
from amlora_dist.serving.service import Service, UnknownModelError, unknown_model
from amlora_dist.serving.token_scores import chat_logprobs, completion_logprobs

STATUS: list[tuple[type[AmloraError], int, str, str | None]] = [
    (UnknownModelError, 404, "invalid_request_error", "model_not_found"),
    (UserError, 400, "invalid_request_error", None),
    (BusyError, 429, "rate_limit_error", "too_many_texts"),
    (StoppingError, 503, "server_error", "stopping"),
    (EngineAwayError, 503, "server_error", "engine_away"),
    (LateError, 504, "server_error", "timeout"),
]
"""Errors of this project: HTTP status, OpenAI's type and code; the first that fits."""
ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"description": "A key, a value or a limit; the message names it"},
    401: {"description": "No or wrong API key"},
    403: {"description": "Called by a name that is not this server's"},
    404: {"description": "No such model"},
    408: {"description": "The body came too slowly"},
    413: {"description": "The body is too large"},
    415: {"description": "The body is not application/json"},
    429: {"description": "Too many texts or bytes at once; try again later"},
    500: {"description": "A fault of the server"},
    503: {"description": "The server is shutting down, lost a replica, or its engine cannot be reached; try again later"},
    504: {"description": "The answer took longer than the server allows"},
}
EVENT = {
    "type": "object",
    "properties": {"data": {"type": "string", "description": "a chunk, or an error, as JSON; the last one is [DONE]"}},
    "required": ["data"],
}
STREAM: dict[str, Any] = {"text/event-stream": {"schema": EVENT}}
CSP = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"


class Message(JSONResponse):
    """JSON in ASCII: what a client wrote may come back in an error, and need not be valid Unicode."""

    def render(self, content: Any) -> bytes:
        """See Starlette."""
        return json.dumps(wire.sparse(content), allow_nan=False).encode("ascii")


def build_app(
    service: Service, *, key: str | None = None, follower: Follower | None = None, hosts: Sequence[str] | None = None
) -> Gatekeeper:
    """The app. Its lifespan starts and stops the service, and who follows its alias.

    Args:
        service: to answer from.
        key: ``key_digest`` of the API key that ``/v1/`` needs; None: none.
        follower: of the service, if the bank is an alias.
        hosts: names that clients may call this server by, ``*`` for any; None: any, but only those of loopback on a
            connection that came in there.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        service.start()
        if follower is not None:
            follower.start()
        try:
            yield
        finally:
            if follower is not None:
                follower.stop()
            await asyncio.to_thread(service.stop)

    app = FastAPI(title="amlora-dist", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.service = service
    errors = {status: {**entry, "model": wire.ErrorBody} for status, entry in ERRORS.items() if key or status != 401}
    add_v1(app, service, errors)
    add_rest(app, service)
    app.add_exception_handler(AmloraError, _refused)
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _fault)
    app.openapi = lambda: _schema(app, secured=key is not None)  # type: ignore[method-assign]
    paths = frozenset(getattr(route, "path", "") for route in app.routes)
    return Gatekeeper(app, service, key, paths, hosts)


def add_v1(app: FastAPI, service: Service, errors: dict[int | str, dict[str, Any]]) -> None:
    """The routes that answer texts."""

    @app.get("/v1/models", responses={401: errors[401]} if 401 in errors else {})
    async def models() -> wire.ModelList:
        """The bank, and each of its tasks as a model of its own."""
        return wire.ModelList(data=cards(service.bank))

    @app.get("/v1/models/{model:path}", responses={n: errors[n] for n in (401, 404) if n in errors})
    async def model(model: str) -> wire.ModelCard:
        """One of them."""
        for card in cards(service.bank):
            if card.id == model:
                return card
        raise unknown_model(service.bank, model)

    @app.post(
        "/v1/completions",
        response_model=wire.Completion,
        responses={200: {"content": STREAM, "description": "Answers; with `stream` server-sent events"}, **errors},
    )
    async def completions(asked: wire.CompletionRequest) -> Response:
        """Answer texts."""
        named = named_fields(service, asked.fields, asked.model)
        if named is not None and (asked.raw or asked.echo):
            raise UserError("fields: found some with raw or echo, expected a prompt: what is read as it is has no parts")
        writer = Writer(
            service, asked, prompts_of(asked.prompt) if named is None else [named.text], question=asked.question,
            raw=asked.raw, new_tokens=asked.max_tokens, top=asked.logprobs, echo=bool(asked.echo),
            fields=None if named is None else named.fields,
        )  # fmt: skip
        head, seen = writer.head("cmpl"), dict.fromkeys(range(len(writer.texts)), 0)

        def chunk(index: int, part: AnswerPart) -> wire.Completion:
            reason: Any = None if part.end is None else part.end.reason
            logprobs = None
            if part.scores:
                logprobs = completion_logprobs(part.scores, writer.bank.word_of, seen[index])
                seen[index] += sum(map(len, logprobs.tokens))
            choice = wire.CompletionChoice(
                index=index, text=part.text or "", finish_reason=reason, logprobs=logprobs,
                routing=writer.routing(part.route),
            )  # fmt: skip
            return wire.Completion(**head, choices=[choice])

        if asked.stream:
            return StreamingResponse(await writer.stream(chunk), media_type="text/event-stream")
        found, usage = await writer.answers()
        choices = [chunk(index, part).choices[0] for index, part in enumerate(found)]
        return _message(wire.Completion(**head, choices=choices, usage=usage))

    @app.post(
        "/v1/chat/completions",
        response_model=wire.ChatCompletion,
        responses={200: {"content": STREAM, "description": "The answer; with `stream` server-sent events"}, **errors},
    )
    async def chat(asked: wire.ChatRequest) -> Response:
        """Answer a conversation."""
        talk = named_fields(service, asked.fields, asked.model)
        if talk is None:
            talk = service.bank.model.prompter.asked(turns_of(asked.messages), asked.route_by or "turn")
        limit = asked.max_completion_tokens or asked.max_tokens
        top = (asked.top_logprobs or 0) if asked.logprobs else None
        writer = Writer(
            service, asked, [talk.text], question=talk.question, raw=False, new_tokens=limit, top=top, turns=talk.turns,
            fields=talk.fields,
        )  # fmt: skip
        head = writer.head("chatcmpl")

        def logprobs(part: AnswerPart) -> wire.ChatLogprobs | None:
            return chat_logprobs(part.scores, writer.bank.word_of) if part.scores else None

        def chunk(index: int, part: AnswerPart) -> wire.ChatChunk:
            first = part.route is not None
            delta = wire.Delta(role="assistant" if first else None, content="" if first else part.text)
            reason: Any = None if part.end is None else part.end.reason
            choice = wire.ChatChunkChoice(
                index=index, delta=delta, finish_reason=reason, logprobs=logprobs(part), routing=writer.routing(part.route)
            )
            return wire.ChatChunk(**head, choices=[choice])

        if asked.stream:
            return StreamingResponse(await writer.stream(chunk), media_type="text/event-stream")
        (part,), usage = await writer.answers()
        reason: Any = None if part.end is None else part.end.reason
        message = wire.AssistantMessage(content=part.text or "")
        choice = wire.ChatChoice(
            index=0, message=message, finish_reason=reason, logprobs=logprobs(part), routing=writer.routing(part.route)
        )
        return _message(wire.ChatCompletion(**head, choices=[choice], usage=usage))

    @app.post("/v1/classifications", response_model=wire.Classifications, responses=errors)
    async def classifications(asked: wire.ClassificationRequest) -> Response:
        """Label texts."""
        return _message(await classify(service, asked))


def add_rest(app: FastAPI, service: Service) -> None:
    """Health, metrics and the page."""

    @app.get("/healthz", response_model=wire.Health, responses={503: {"model": wire.Health, "description": "It cannot"}})
    async def healthz() -> Response:
        """Whether the server can answer."""
        found = {"status": service.status, "model": service.bank.name, "version": service.bank.version}
        return Message(found, status_code=200 if service.status == "ok" else 503)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(service.metrics.page(), media_type=CONTENT_TYPE)

    @app.get("/", response_class=HTMLResponse)
    async def page() -> Response:
        """A page to try a text on and see how it is routed."""
        text = resources.files("amlora_dist.serving").joinpath("page.html").read_text(encoding="utf-8")
        return HTMLResponse(text, headers={"content-security-policy": CSP, "x-content-type-options": "nosniff"})


def _message(body: Any) -> Message:
    return Message(body.model_dump(mode="json"))


def _refusal(status: int, body: wire.ErrorBody, headers: dict[str, str] | None = None) -> Message:
    return Message(body.model_dump(mode="json"), status_code=status, headers=headers)


async def _refused(_request: Request, error: Exception) -> Response:
    for kind, status, name, code in STATUS:
        if isinstance(error, kind):
            return _refusal(
                status, error_body(error, kind=name, code=code), {"retry-after": "1"} if status in (429, 503) else None
            )
    assert isinstance(error, AmloraError)
    return _refusal(500, error_body(error))


async def _malformed(_request: Request, error: Exception) -> Response:
    """All that is wrong with a body, in OpenAI's form; what was found is not repeated."""
    assert isinstance(error, RequestValidationError)
    return _refusal(400, wire.ErrorBody(error=detail_of(error.errors())))


async def _http(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 400:  # FastAPI's own, of a body that it cannot parse
        return _refusal(400, wire.ErrorBody(error=unread()))
    detail = wire.ErrorDetail(message=str(error.detail), type="invalid_request_error")
    return _refusal(error.status_code, wire.ErrorBody(error=detail), dict(error.headers or {}))


async def _fault(_request: Request, _error: Exception) -> Response:
    return _refusal(500, error_body(None))


def _schema(app: FastAPI, *, secured: bool) -> dict[str, Any]:
    """The OpenAPI schema, of what this app really says: bodies that do not fit are answered with 400, not 422."""
    if app.openapi_schema is None:
        found = get_openapi(title=app.title, version=app.version, routes=app.routes)
        for path, operations in found["paths"].items():
            for operation in operations.values():
                operation["responses"].pop("422", None)
                if secured and path.startswith("/v1/"):
                    operation["security"] = [{"key": []}]
        schemas = found["components"]["schemas"]
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        if secured:
            found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        app.openapi_schema = found
    return app.openapi_schema
