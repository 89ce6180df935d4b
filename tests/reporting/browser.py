"""Headless Chromium on a page: what it prints to the console, what it asks the network for, how it looks.

Chromium is a system package (``apt-get install chromium``); ``AMLORA_CHROMIUM`` names it where it is elsewhere.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-extensions", "--hide-scrollbars", "--enable-logging=stderr",
    "--allow-file-access-from-files", "--disable-dev-shm-usage",
]  # fmt: skip
DEADLINE_S = 90


def chromium() -> str | None:
    """The program, or None."""
    return os.environ.get("AMLORA_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


@dataclass(frozen=True)
class Visit:
    """What a visit left behind."""

    console: list[str]
    requests: list[str]
    """Addresses that the page asked the network for."""
    dom: str


def visit(page: Path, folder: Path, *, picture: Path | None = None, width: int = 1200, height: int = 2400) -> Visit:
    """Open ``page`` in a new profile below ``folder``; take a ``picture`` (a .pdf is the printed page) if asked to."""
    log = folder / "net.json"
    how = "--dump-dom" if picture is None else f"--screenshot={picture}"
    if picture is not None and picture.suffix == ".pdf":
        how = f"--print-to-pdf={picture}"
    command = [
        str(chromium()), *FLAGS, f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}",
        f"--window-size={width},{height}", "--no-pdf-header-footer", how, page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=True)
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return Visit(console, requested(log), done.stdout)


def requested(log: Path) -> list[str]:
    """Addresses that a page asked the network for, from a net log; what the browser itself asks has no origin there."""
    events = json.loads(log.read_text(encoding="utf-8"))["events"]
    asked = [event["params"] for event in events if "url" in event.get("params", {}) and "initiator" in event["params"]]
    return sorted({str(one["url"]) for one in asked if one["initiator"] != "not an origin"})
