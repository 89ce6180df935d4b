"""What stands in front of the app: the API key, the size of bodies, the time they may take to come, the meters."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from amlora_dist.serving.service import Service

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

GUARDED = "/v1/"
"""Paths that need the key begin with this."""


def key_digest(key: str) -> str:
    """What is kept of an API key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


class Gatekeeper:
    """Wraps an ASGI app.

    Args:
        app: reached by what is let in, with the whole body at hand.
        service: whose limits and meters these are.
        key: ``key_digest`` of the API key; None: none is needed.
        paths: what the app knows; others are counted as one.
    """

    def __init__(self, app: App, service: Service, key: str | None, paths: frozenset[str]) -> None:
        self._app, self.service, self._key, self._paths = app, service, key, paths

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.monotonic(), 500

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._let_in(scope, receive, noting)
        finally:
            path = _path(scope)
            self.service.meters.answered(path if path in self._paths else "other", status, time.monotonic() - start)

    async def _let_in(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        if self._key is not None and _path(scope).startswith(GUARDED) and not self._knows(headers.get(b"authorization")):
            message = "no or wrong API key; send it as: Authorization: Bearer KEY"
            await _refuse(send, 401, message, "invalid_api_key", [(b"www-authenticate", b"Bearer")])
            return
        settings = self.service.settings
        length = headers.get(b"content-length", b"")
        body = b""
        try:
            if length.isdigit() and int(length[:20]) > settings.max_body_bytes:
                raise OverflowError
            body = await asyncio.wait_for(_read(receive, settings.max_body_bytes), settings.request_timeout_s)
        except OverflowError:
            message = f"the body is larger than the {settings.max_body_bytes} bytes that this server takes"
            await _refuse(send, 413, message, "body_too_large")
            return
        except (TimeoutError, asyncio.TimeoutError):
            await _refuse(send, 408, f"the body did not come within {settings.request_timeout_s:g} s", "timeout")
            return
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await receive()  # waits for the client to go away
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)

    def _knows(self, header: bytes | None) -> bool:
        kind, _, key = (header or b"").decode("latin-1").partition(" ")
        shown = hashlib.sha256(key.strip().encode("latin-1")).hexdigest()
        return kind.lower() == "bearer" and hmac.compare_digest(shown, self._key or "")


def _path(scope: MutableMapping[str, Any]) -> str:
    """The path below where the app is mounted."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


async def _read(receive: Receive, most: int) -> bytes:
    """The whole body. Raises OverflowError when it has more than ``most`` bytes."""
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            break
        part = message.get("body", b"")
        size += len(part)
        if size > most:
            raise OverflowError
        parts.append(part)
        more = message.get("more_body", False)
    return b"".join(parts)


async def _refuse(
    send: Send, status: int, message: str, code: str, headers: list[tuple[bytes, bytes]] | None = None
) -> None:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    body = json.dumps({"error": error}).encode()
    given = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *(headers or [])]
    await send({"type": "http.response.start", "status": status, "headers": given})
    await send({"type": "http.response.body", "body": body})
