"""Headless Chromium, driven over its DevTools protocol; nothing but the browser has to be installed."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import shutil
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

PROGRAM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--remote-debugging-port=0", "--window-size=900,900",
    "--hide-scrollbars",
]  # fmt: skip


class Page:
    """One tab."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._sent = 0
        self.complaints: list[str] = []
        """What the page wrote to the console as an error, and exceptions that nobody caught."""

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol and its result."""
        self._sent += 1
        await self._socket.send_json({"id": self._sent, "method": method, "params": parameters})
        while True:
            response = json.loads((await self._socket.receive(timeout=30)).data)
            if response.get("id") == self._sent:
                assert "error" not in response, response
                result: dict[str, Any] = response["result"]
                return result
            if response.get("method") == "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(response["params"]["exceptionDetails"])[:500])
            if response.get("method") == "Log.entryAdded" and response["params"]["entry"]["level"] == "error":
                self.complaints.append(response["params"]["entry"]["text"])

    async def value(self, expression: str) -> Any:
        """What a line of JavaScript gives."""
        response = await self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in response, response
        return response["result"].get("value")

    async def until(self, expression: str, deadline_s: float = 20) -> Any:
        """Wait until a line of JavaScript gives something true."""
        start = time.monotonic()
        while not (found := await self.value(expression)):
            assert time.monotonic() - start < deadline_s, f"waited {deadline_s} s for {expression}; {self.complaints}"
            await asyncio.sleep(0.05)
        return found

    async def picture(self, file: Path) -> None:
        """Write a PNG of what is shown."""
        response = await self.call("Page.captureScreenshot", format="png")
        file.write_bytes(base64.b64decode(response["data"]))


@contextlib.asynccontextmanager
async def opened(url: str, profile: Path) -> AsyncIterator[Page]:
    """A page that was loaded, in a browser of its own."""
    assert PROGRAM is not None
    browser = subprocess.Popen(
        [PROGRAM, *FLAGS, f"--user-data-dir={profile}", "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        port = profile / "DevToolsActivePort"
        start = time.monotonic()
        while not (port.is_file() and len(port.read_text().splitlines()) == 2):
            assert browser.poll() is None and time.monotonic() - start < 60, "Chromium did not start"
            await asyncio.sleep(0.05)
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port.read_text().splitlines()[0]}/json/list") as answer:
                tab = next(one for one in await answer.json() if one["type"] == "page")
            async with session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=2**26) as socket:
                page = Page(socket)
                for domain in ("Page", "Runtime", "Log"):
                    await page.call(f"{domain}.enable")
                await page.call("Page.navigate", url=url)
                await page.until("document.readyState === 'complete'")
                yield page
    finally:
        browser.terminate()
        try:
            browser.wait(timeout=20)
        except subprocess.TimeoutExpired:
            browser.kill()
            browser.wait(timeout=20)
