"""In Ray Serve's proxy: whatever Ray says or does not say, clients read an error in OpenAI's form."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from amlora_dist.serving.settings import ServeSettings
from pipelines.cluster.relay import OPTIONS_VARIABLE, Relay, environment, middlewares

SSE = [(b"content-type", b"text/event-stream")]
TEXT = [(b"content-type", b"text/plain; charset=utf-8")]


def relayed(messages: list[dict[str, Any]], path: str = "/v1/completions") -> list[dict[str, Any]]:
    """What comes out where Ray's proxy says this."""
    sent: list[dict[str, Any]] = []

    async def ray(_scope: Any, _receive: Any, send: Any) -> None:
        for message in messages:
            await send(message)

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(Relay(ray)({"type": "http", "path": path, "headers": []}, None, send))  # type: ignore[arg-type]
    return sent


def start(status: int, headers: Any) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": headers}


def body(text: bytes, *, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": text, "more_body": more}


@pytest.mark.parametrize(
    ("messages", "status", "retry"),
    [([], 503, True), ([start(500, TEXT), body(b"Internal Server Error")], 503, True),
     ([start(503, TEXT), body(b"Deployment is unavailable")], 503, True), ([start(404, TEXT), body(b"Path")], 503, True),
     ([start(429, TEXT), body(b"too many")], 429, True), ([start(408, TEXT), body(b"Request x timed out")], 504, False)],
)  # fmt: skip
def test_a_replica_that_dies_is_an_error_in_openais_form(messages: list[Any], status: int, retry: bool) -> None:
    first, second = relayed(messages)
    headers = dict(first["headers"])
    assert first["status"] == status and headers[b"content-type"] == b"application/json"
    assert (b"retry-after" in headers) is retry
    assert set(json.loads(second["body"])["error"]) == {"message", "type", "param", "code"}


def test_a_stream_that_is_cut_ends_with_an_error() -> None:
    *_, last = relayed([start(200, SSE), body(b"data: {}\n\n", more=True)])
    assert json.loads(last["body"].removeprefix(b"data: "))["error"]["code"] == "replica_lost"
    assert not last.get("more_body", False)


@pytest.mark.parametrize(
    "messages",
    [[start(200, SSE), body(b"data: [DONE]\n\n", more=True), body(b"")], [start(200, TEXT), body(b"figures")],
     [start(400, [(b"content-type", b"application/json")]), body(b"{}")]],
)  # fmt: skip
def test_what_the_app_says_is_left_as_it_is(messages: list[Any]) -> None:
    assert relayed(messages) == messages
    own = [start(503, TEXT), body(b"DRAINING")]
    assert relayed(own, path="/-/healthz") == own


def test_the_proxy_gets_its_limits_and_a_protocol_with_deadlines(monkeypatch: pytest.MonkeyPatch) -> None:
    import uvicorn.protocols.http.auto as auto

    monkeypatch.setattr(auto, "AutoHTTPProtocol", auto.AutoHTTPProtocol)  # put back afterwards
    before = auto.AutoHTTPProtocol
    found = environment(ServeSettings(max_body_bytes=5000, read_timeout_s=3), ("models.example",))
    monkeypatch.setenv(OPTIONS_VARIABLE, found[OPTIONS_VARIABLE])
    inner, outer = middlewares()
    assert inner.cls is Relay and issubclass(auto.AutoHTTPProtocol, before) and auto.AutoHTTPProtocol is not before
    assert outer.kwargs == {"max_body_bytes": 5000, "read_timeout_s": 3, "hosts": ["models.example"]}
