"""Connections have deadlines: for a request's head, for its answer, for doing nothing.

uvicorn closes a connection that idles between two requests, and no other: not one that sends its head a byte at a time,
sends nothing at all, or does not read its answer. ``closing`` makes of uvicorn's protocol one that does.
"""

from __future__ import annotations

import asyncio
from typing import Any

from amlora_dist.serving.settings import ServeSettings

MOST_HEAD = 65_536
"""Bytes of a request's head."""
MARGIN_S = 60.0
"""An answer's last bytes have so much longer to be read than the request may take."""


def closing(protocol: Any, *, read_s: float, work_s: float) -> Any:
    """A class of uvicorn's protocols that keeps deadlines.

    Args:
        protocol: ``H11Protocol`` or ``HttpToolsProtocol``.
        read_s: for a head to come, from the connection or its first byte on.
        work_s: for a request from its head to the last byte of its answer.
    """

    class Closing(protocol):
        """Closes what is late, whatever state it is in."""

        _timer: asyncio.TimerHandle | None = None
        _state = "head"
        _head_bytes = 0

        def connection_made(self, transport: Any) -> None:
            """See asyncio."""
            super().connection_made(transport)
            self._enter("head", read_s)

        def connection_lost(self, exc: Exception | None) -> None:
            """See asyncio."""
            self._stop_timer()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            """See asyncio."""
            before = self.cycle
            super().data_received(data)
            if self.transport is None or self.transport.is_closing():
                return
            if self.cycle is not None and not self.cycle.response_complete:
                if self.cycle is not before or self._state != "work":
                    self._enter("work", work_s)
                return
            if self._state != "head":
                self._enter("head", read_s)
            self._head_bytes += len(data)
            if self._head_bytes > MOST_HEAD:
                self._close()

        def on_response_complete(self) -> None:
            """Called by uvicorn when an answer is out."""
            super().on_response_complete()
            if self.transport.is_closing():
                return
            if self.cycle.response_complete:
                self._enter("idle", self.timeout_keep_alive + read_s)
            else:  # the next one had come already
                self._enter("work", work_s)

        def handle_websocket_upgrade(self, *args: Any) -> None:
            """From here on it is another protocol's."""
            self._stop_timer()
            super().handle_websocket_upgrade(*args)
            self._stop_timer()

        def _enter(self, state: str, seconds: float) -> None:
            self._stop_timer()
            self._state, self._head_bytes = state, 0
            self._timer = self.loop.call_later(seconds, self._close)

        def _stop_timer(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _close(self) -> None:
            self._stop_timer()
            self.transport.abort()  # not close(): it would wait for a client that does not read

    return Closing


def http_protocol(settings: ServeSettings) -> Any:
    """What ``uvicorn.run(build_app(...), http=...)`` takes."""
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    return closing(AutoHTTPProtocol, read_s=settings.read_timeout_s, work_s=settings.request_timeout_s + MARGIN_S)
