"""The door alone: whom it lets in by name, and how it paces large bodies."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from amlora_dist.serving.front import Front, Pace, bare_host


def status_of(front: Front, host: bytes | None, address: str | None) -> int:
    """The status of a request that names ``host`` on a connection that came in at ``address``."""
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "GET", "path": "/", "headers": [] if host is None else [(b"Host", host)],
        "server": None if address is None else (address, 80),
    }  # fmt: skip
    asyncio.run(front(scope, receive, send))
    return int(sent[0]["status"])


async def app(_scope: Any, _receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


@pytest.mark.parametrize(
    ("hosts", "host", "address", "status"),
    [
        (None, b"evil.test", "127.0.0.1", 403), (None, b"evil.test", "::1", 403), (None, b"localhost:80", "::1", 200),
        (None, b"evil.test", "10.0.0.5", 200), (None, b"evil.test", None, 200), (None, None, "127.0.0.1", 200),
        (("a.example",), b"A.example:443", "10.0.0.5", 200), (("a.example",), b"b.example", "10.0.0.5", 403),
        (("a.example",), b"10.0.0.5:8000", "10.0.0.5", 200), (("a.example",), b"10.0.0.6", "10.0.0.5", 403),
        (("a.example",), b"127.0.0.1:8000", "127.0.0.1", 200), (("*",), b"evil.test", "127.0.0.1", 200),
    ],
)  # fmt: skip
def test_host_header_is_asked_for_at_loopback_and_where_names_are_given(
    hosts: tuple[str, ...] | None, host: bytes | None, address: str | None, status: int
) -> None:
    assert status_of(Front(app, max_body_bytes=100, read_timeout_s=5, hosts=hosts), host, address) == status


@pytest.mark.parametrize(
    ("header", "name"),
    [("A.b:80", "a.b"), ("[::1]:80", "::1"), ("[::1]", "::1"), ("a.b.", "a.b"), (" a ", "a"), ("[::1].evil", "[::1].evil")],
)
def test_a_host_is_bare_without_its_port(header: str, name: str) -> None:
    assert bare_host(header) == name


def test_large_bodies_take_turns_and_those_that_would_wait_too_long_go() -> None:
    async def turns() -> list[bool]:
        pace = Pace(1_000_000, 0.05, clock=lambda: 0.0)
        return [await pace.turn(size) for size in (20_000, 20_000, 20_000, 20_000, 1)]

    assert asyncio.run(turns()) == [True, True, True, False, False]
