"""An HTTP server on a free port whose answers a test gives."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[str, dict[str, Any]], "tuple[int, str] | None"]
"""Status and body of a request, by its path and JSON (empty for GET); None: the connection is closed without any."""


@contextlib.contextmanager
def answering(answer: Answer) -> Iterator[str]:
    """The server's address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._say(answer(self.path, {}))

        def do_POST(self) -> None:
            self._say(answer(self.path, json.loads(self.rfile.read(int(self.headers["content-length"])))))

        def _say(self, found: tuple[int, str] | None) -> None:
            if found is None:
                self.close_connection = True
                return
            status, body = found[0], found[1].encode()
            with contextlib.suppress(OSError):  # who asked has given up
                self.send_response(status)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, *_words: Any) -> None:
            """Nothing on standard error."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)
