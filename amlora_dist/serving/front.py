"""The door: who may come in, how much and how slowly. Knows nothing of banks, and imports nothing heavy.

It is in front of the app in every process, and again in the process that takes connections where that is another
one: there whole bodies wait for their turn, so that slow and large ones cost a replica nothing.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

AsgiMessage = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[AsgiMessage]]
Send = Callable[[AsgiMessage], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

GUARDED = "/v1/"
"""Paths that take texts, and may need a key, begin with this."""
ANY_HOST = "*"
LARGE_BYTES = 16_384
"""A body of more waits for its turn."""
LARGE_BYTES_PER_S = 4 * 1024 * 1024
"""Of large bodies, together: reading JSON keeps everybody waiting, and no model answers text that fast."""
LONGEST_TURN_S = 4.0
"""A large body that would wait longer is refused: it has to lie somewhere meanwhile."""
LINGER_S = 1.0
LINGER_BYTES = 16 * 1024 * 1024
"""A client that is still sending a body too large would miss the answer: so long, and so much, it may go on."""
CLOSE = (b"connection", b"close")


class Front:
    """Wraps an ASGI app; requests reach it with their whole body at hand.

    Args:
        app: wrapped.
        max_body_bytes: of a body; more is answered with 413.
        read_timeout_s: for a body to come; then 408.
        hosts: names that the ``Host`` header may have, ``*`` for all; None: a connection that came in at a loopback
            address must name it, or a page on the Web could have a browser read answers (DNS rebinding).
    """

    def __init__(self, app: App, *, max_body_bytes: int, read_timeout_s: float, hosts: Sequence[str] | None = None) -> None:
        self._app, self._most, self._read_s = app, max_body_bytes, read_timeout_s
        self._hosts = None if hosts is None else frozenset(map(str.lower, hosts))
        self._pace = Pace(LARGE_BYTES_PER_S, LONGEST_TURN_S)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = scope["headers"]
        if (host := self._stranger(scope)) is not None:
            message = f"host: found {host[:200]!r}, which is no name of this server; see --allow-host"
            await refuse(send, 403, message, "unknown_host", [CLOSE])
            return
        length = next((value for name, value in headers if name.lower() == b"content-length"), b"")
        try:
            if length.isdigit() and int(length[:20]) > self._most:
                raise OverflowError
            body = await asyncio.wait_for(_read(receive, self._most), self._read_s)
        except OverflowError:
            await _linger(receive)
            message = f"the body is larger than the {self._most} bytes that this server takes"
            await refuse(send, 413, message, "body_too_large", [CLOSE])
            return
        except (TimeoutError, asyncio.TimeoutError):
            await refuse(send, 408, f"the body did not come within {self._read_s:g} s", "timeout", [CLOSE])
            return
        if body is None:
            return  # the client has gone
        if (fault := _unlike_json(scope)) is not None:
            await refuse(send, 415, fault, "unsupported_media_type")
            return
        if len(body) > LARGE_BYTES and not await self._pace.turn(len(body)):
            message = "the server has too many large bodies to read; try again later"
            await refuse(send, 429, message, "too_many_bytes", [(b"retry-after", b"5")], kind="rate_limit_error")
            return
        given = False

        async def replay() -> AsgiMessage:
            nonlocal given
            if given:
                return await receive()  # waits for the client to go away
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)

    def _stranger(self, scope: MutableMapping[str, Any]) -> str | None:
        """A name that this server does not have and the client calls it by."""
        hosts, server = self._hosts, scope.get("server")
        address = str(server[0]).lower() if server else ""
        if hosts is None:
            if not is_loopback(address):
                return None
            hosts = frozenset()
        elif ANY_HOST in hosts:
            return None
        for name, value in scope["headers"]:
            if name.lower() == b"host":
                host = bare_host(value.decode("latin-1"))
                # The address that the connection came to is what probes of a cluster say, and no name to be misled by.
                if host not in hosts and host != address and not is_loopback(host):
                    return host
        return None


class Pace:
    """Lets so many bytes through in a second.

    Args:
        bytes_per_s: over time.
        most_s: that one may wait.
        clock: seconds, monotonic.
    """

    def __init__(self, bytes_per_s: float, most_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._most_s, self._clock = bytes_per_s, most_s, clock
        self._free_at = 0.0

    async def turn(self, size: int) -> bool:
        """Wait for the turn of so many bytes; False: it would be too long."""
        now = self._clock()
        start = max(now, self._free_at)
        if start - now > self._most_s:
            return False
        self._free_at = start + size / self._rate
        await asyncio.sleep(start - now)
        return True


def bare_host(header: str) -> str:
    """The name in a ``Host`` header, without its port."""
    host = header.strip().lower()
    if host.startswith("["):
        address, _, rest = host[1:].partition("]")
        return address if not rest or rest.startswith(":") else host
    return host.partition(":")[0].rstrip(".")


def is_loopback(host: str) -> bool:
    """Whether a name or address means the machine itself."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def refuse(
    send: Send,
    status: int,
    message: str,
    code: str,
    headers: Sequence[tuple[bytes, bytes]] = (),
    *,
    kind: str = "invalid_request_error",
) -> None:
    """Answer with an error in OpenAI's form."""
    body = error_json(message, code, kind)
    given = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *headers]
    await send({"type": "http.response.start", "status": status, "headers": given})
    await send({"type": "http.response.body", "body": body})


def error_json(message: str, code: str, kind: str) -> bytes:
    """An error in OpenAI's form."""
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}}).encode("ascii")


def _unlike_json(scope: MutableMapping[str, Any]) -> str | None:
    """What is wrong with the type of a body. Anything else than JSON a page on the Web may send without being asked."""
    if scope["method"] != "POST" or GUARDED not in scope["path"]:
        return None
    found = [value for name, value in scope["headers"] if name.lower() == b"content-type"]
    if found and all(value.partition(b";")[0].strip().lower() == b"application/json" for value in found):
        return None
    content_type = found[0].decode("latin-1")[:100] if found else None
    return f"content-type: found {content_type!r}, expected application/json"


async def _read(receive: Receive, most: int) -> bytes | None:
    """The whole body; None: the client went away. Raises OverflowError when it has more than ``most`` bytes."""
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            return None
        part = message.get("body", b"")
        size += len(part)
        if size > most:
            raise OverflowError
        parts.append(part)
        more = message.get("more_body", False)
    return b"".join(parts)


async def _linger(receive: Receive) -> None:
    """Let the client finish what it is sending, within bounds; nothing is kept."""

    async def drop() -> None:
        size = 0
        while size < LINGER_BYTES:
            message = await receive()
            size += len(message.get("body", b""))
            if message["type"] != "http.request" or not message.get("more_body", False):
                return

    try:
        await asyncio.wait_for(drop(), LINGER_S)
    except (TimeoutError, asyncio.TimeoutError):
        return
