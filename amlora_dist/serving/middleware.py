"""What is in front of the app: the door (``front``), the API key, the metrics."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import MutableMapping, Sequence
from typing import Any

from amlora_dist.serving.front import GUARDED, App, AsgiMessage, Front, Receive, Send, refuse
from amlora_dist.serving.service import Service


def key_digest(key: str) -> str:
    """What is kept of an API key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


class Gatekeeper:
    """Wraps an ASGI app.

    Args:
        app: reached by what is let in, with the whole body at hand.
        service: whose limits and metrics these are.
        key: ``key_digest`` of the API key; None: none is needed.
        paths: what the app knows; others are counted as one.
        hosts: as for ``Front``.
    """

    def __init__(
        self, app: App, service: Service, key: str | None, paths: frozenset[str], hosts: Sequence[str] | None = None
    ) -> None:
        self._app, self.service, self._key, self._paths = app, service, key, paths
        settings = service.settings
        read_s = min(settings.read_timeout_s, settings.request_timeout_s)
        self._front = Front(self._let_in, max_body_bytes=settings.max_body_bytes, read_timeout_s=read_s, hosts=hosts)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._front(scope, receive, send)
            return
        start, status = time.monotonic(), 500

        async def noting(message: AsgiMessage) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._front(scope, receive, noting)
        finally:
            path = _path(scope)
            self.service.metrics.answered(path if path in self._paths else "other", status, time.monotonic() - start)

    async def _let_in(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._key is not None and _path(scope).startswith(GUARDED):
            headers = {name.lower(): value for name, value in scope["headers"]}
            if not self._knows(headers.get(b"authorization")):
                message = "no or wrong API key; send it as: Authorization: Bearer KEY"
                await refuse(send, 401, message, "invalid_api_key", [(b"www-authenticate", b"Bearer")])
                return
        await self._app(scope, receive, send)

    def _knows(self, header: bytes | None) -> bool:
        kind, _, key = (header or b"").decode("latin-1").partition(" ")
        shown = hashlib.sha256(key.strip().encode("latin-1")).hexdigest()
        return kind.lower() == "bearer" and hmac.compare_digest(shown, self._key or "")


def _path(scope: MutableMapping[str, Any]) -> str:
    """The path below where the app is mounted."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))
