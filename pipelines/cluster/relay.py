"""What runs in Ray Serve's proxy, the process that takes connections: the door, deadlines, errors in OpenAI's form.

Ray Serve calls ``middlewares`` there, because ``pipelines.cluster.serve`` names it in the environment before Ray starts.
"""

from __future__ import annotations

import json
import os
from collections.abc import MutableMapping, Sequence
from typing import Any

from amlora_dist.serving.connections import MARGIN_S, closing
from amlora_dist.serving.front import App, AsgiMessage, Front, Receive, Send, error_json, refuse
from amlora_dist.serving.settings import ServeSettings

CALLBACK_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
CALLBACK = "pipelines.cluster.relay:middlewares"
OPTIONS_VARIABLE = "AMLORA_SERVE_FRONT"
RETRY: Sequence[tuple[bytes, bytes]] = ((b"retry-after", b"1"),)
LOST = "the replica that had this request is gone; Ray Serve starts another one: try again"
NOBODY = "the server is starting or stopping; try again later"


def environment(settings: ServeSettings, hosts: Sequence[str] | None) -> dict[str, str]:
    """What the proxy must find in its environment; nothing in it is secret."""
    options = {
        "max_body_bytes": settings.max_body_bytes,
        "read_timeout_s": min(settings.read_timeout_s, settings.request_timeout_s),
        "work_s": settings.request_timeout_s + MARGIN_S,
        "hosts": None if hosts is None else list(hosts),
    }
    return {CALLBACK_VARIABLE: CALLBACK, OPTIONS_VARIABLE: json.dumps(options)}


def middlewares() -> list[Any]:
    """For Ray Serve: what to put around its own app, the innermost first."""
    import uvicorn.protocols.http.auto as auto
    from starlette.middleware import Middleware

    options = json.loads(os.environ[OPTIONS_VARIABLE])
    work_s = options.pop("work_s")
    # Ray Serve lets nobody choose uvicorn's protocol, which it finds by this name; this process serves nothing else.
    auto.AutoHTTPProtocol = closing(auto.AutoHTTPProtocol, read_s=options["read_timeout_s"], work_s=work_s)
    return [Middleware(Relay), Middleware(Front, **options)]


class Relay:
    """Wraps Ray Serve's proxy: what it reports itself, or leaves out when a replica dies, becomes an error as ours are."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http" or scope["path"].startswith("/-/"):
            await self._app(scope, receive, send)
            return
        began = ended = streams = replaced = False

        async def relayed(message: AsgiMessage) -> None:
            nonlocal began, ended, streams, replaced
            if message["type"] == "http.response.start":
                began = True
                kind = dict(message.get("headers", [])).get(b"content-type", b"")
                streams = kind.startswith(b"text/event-stream")
                if message["status"] >= 400 and not kind.startswith(b"application/json"):
                    replaced = True
                    await self._replace(message["status"], send)
                    return
            elif message["type"] == "http.response.body":
                ended = not message.get("more_body", False)
            if not replaced:
                await send(message)

        await self._app(scope, receive, relayed)
        if not began:
            await refuse(send, 503, LOST, "replica_lost", RETRY, kind="server_error")
        elif streams and not ended:
            event = b"data: " + error_json(LOST, "replica_lost", "server_error") + b"\n\n"
            await send({"type": "http.response.body", "body": event})

    @staticmethod
    async def _replace(status: int, send: Send) -> None:
        if status == 429:
            await refuse(send, 429, NOBODY, "too_many_texts", RETRY, kind="rate_limit_error")
        elif status == 408:
            await refuse(send, 504, "the answer took longer than the server allows", "timeout", kind="server_error")
        else:
            await refuse(send, 503, NOBODY if status == 404 else LOST, "unavailable", RETRY, kind="server_error")
