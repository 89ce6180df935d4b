"""The app behind a real socket, in a thread of the tests' own process."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from amlora_dist.serving.app import build_app
from amlora_dist.serving.bank import ServedBank
from amlora_dist.serving.connections import http_protocol
from amlora_dist.serving.engine_interface import EngineMaker
from amlora_dist.serving.middleware import key_digest
from amlora_dist.serving.service import Service
from amlora_dist.serving.settings import ServeSettings


class Running:
    """A server at work."""

    def __init__(self, service: Service, url: str) -> None:
        self.service, self.url = service, url
        self.client = httpx.Client(base_url=url, timeout=30)

    def post(self, path: str, **body: Any) -> httpx.Response:
        """A request with a JSON body."""
        return self.client.post(path, json=body)

    def good(self, path: str, **body: Any) -> dict[str, Any]:
        """The answer to a request that must succeed."""
        answer = self.post(path, **body)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found


@contextlib.contextmanager
def running(
    bank: ServedBank | Path,
    *,
    key: str | None = None,
    hosts: tuple[str, ...] | None = None,
    engine: EngineMaker | None = None,
    **limits: Any,
) -> Iterator[Running]:
    """Serve a bank at a free port."""
    served = bank if isinstance(bank, ServedBank) else ServedBank.load(bank, "words", device="cpu")
    service = Service(served, ServeSettings(**limits), engine)
    app = build_app(service, key=None if key is None else key_digest(key), hosts=hosts)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        protocol = http_protocol(service.settings)
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on", http=protocol))
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        start = time.monotonic()
        while not server.started:
            assert thread.is_alive() and time.monotonic() - start < 30, "the server did not start"
            time.sleep(0.01)
        try:
            yield Running(service, f"http://127.0.0.1:{listener.getsockname()[1]}")
        finally:
            server.should_exit = True
            thread.join(timeout=60)
            assert not thread.is_alive()


def events(answer: httpx.Response) -> list[str]:
    """Data of a stream's events."""
    assert answer.headers["content-type"].startswith("text/event-stream")
    return [part.removeprefix("data: ") for part in answer.text.split("\n\n") if part]
