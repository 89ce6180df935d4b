"""Progress that records its calls, and does something at a step."""

from __future__ import annotations

from collections.abc import Callable

from pipelines.runs.progress import Silent


def interrupt() -> None:
    """As the second Ctrl-C does: at once."""
    raise KeyboardInterrupt


class Watching(Silent):
    """Records the calls; does ``then`` ``after`` so many steps."""

    def __init__(self, after: int = -1, then: Callable[[], None] = interrupt) -> None:
        self.left, self.then, self.lines = after, then, list[str]()

    def note(self, text: str) -> None:
        self.lines.append(text)

    def step(self, done: int, total: int, loss: float | None, tokens_per_second: float | None) -> None:
        self.left -= 1
        if not self.left:
            self.then()
