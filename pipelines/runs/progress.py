"""Progress of a run: a bar with loss, tokens per second and time left on a terminal, plain lines in a pipe."""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from amlora_dist.evaluation.text_metrics import METRIC_NAMES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from rich.progress import Progress as RichProgress

LINE_EVERY_S = 10.0
"""Seconds between two lines about steps in a pipe."""


@dataclass(frozen=True, slots=True)
class Score:
    """One score: of a task's rows, answered by the bank so far."""

    task: str
    mode: str
    """``router``: as served; ``untrained``: the base model; ``oracle``: told the task; ``own``, ``without...``."""
    metric: str
    """As the task's file names it."""
    value: float
    rows: int
    reused: int = 0
    """Rows whose answer held from an earlier score."""

    def __str__(self) -> str:
        before = f", {self.reused} of them answered as before" if self.reused else ""
        return f"{self.mode:9} {self.task}: {METRIC_NAMES[self.metric]} {self.value:.3f} ({self.rows} rows{before})"


class Progress(Protocol):
    """What a run tells about itself while it goes on. Calls may come from several threads."""

    def stage(self, name: str, index: int, total: int) -> None:
        """A stage (or another piece of work) begins: ``index`` of ``total``, from 1."""

    def step(self, done: int, total: int, loss: float | None, tokens_per_second: float | None) -> None:
        """``done`` of ``total`` steps of the stage are done."""

    def score(self, score: Score) -> None:
        """Rows were scored."""

    def stage_done(self, result: Mapping[str, Any]) -> None:
        """A stage was published; ``result`` is the run's so far, as ``amlora run --json`` prints it."""

    def note(self, text: str) -> None:
        """Something worth a line: what was reused, where things are."""

    def close(self) -> None:
        """The run is over; may be called twice."""


def progress_for(stream: TextIO | None = None) -> Progress:
    """A bar where ``stream`` (default: standard error) is a terminal that can move its cursor, lines elsewhere."""
    from rich.console import Console

    console = Console(file=stream) if stream is not None else Console(stderr=True)
    if console.is_terminal and not console.is_dumb_terminal:
        return _Bar(console_width=console.width, stream=stream)
    return _Lines(stream)


class Silent:
    """Tells nobody anything; a score is a line to who listens to lines."""

    def stage(self, name: str, index: int, total: int) -> None: ...

    def step(self, done: int, total: int, loss: float | None, tokens_per_second: float | None) -> None: ...

    def score(self, score: Score) -> None:
        self.note(f"  {score}")

    def stage_done(self, result: Mapping[str, Any]) -> None: ...

    def note(self, text: str) -> None: ...

    def close(self) -> None: ...


class _Lines:
    """Plain lines without control characters, about steps at most every ``LINE_EVERY_S`` seconds."""

    def __init__(self, stream: TextIO | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream, clock
        self._lock = threading.Lock()
        self._started = self._last = clock()
        self._first_done: int | None = None

    def stage(self, name: str, index: int, total: int) -> None:
        with self._lock:
            self._started = self._last = self._clock()
            self._first_done = None
            self._write(f"stage {index}/{total}: {name}")

    def step(self, done: int, total: int, loss: float | None, tokens_per_second: float | None) -> None:
        with self._lock:
            now = self._clock()
            if self._first_done is None:
                self._first_done, self._started = done, now
            if now - self._last < LINE_EVERY_S and done < total:
                return
            self._last = now
            parts = [f"  step {done}/{total}"]
            parts += [] if loss is None else [f"loss {loss:.4f}"]
            parts += [] if tokens_per_second is None else [f"{tokens_per_second:.0f} tokens/s"]
            covered = done - self._first_done
            if covered > 0 and done < total:
                parts.append(f"{_clock_text((now - self._started) / covered * (total - done))} left")
            self._write(", ".join(parts))

    def score(self, score: Score) -> None:
        self.note(f"  {score}")

    def stage_done(self, result: Mapping[str, Any]) -> None:
        """A note has shown it."""

    def note(self, text: str) -> None:
        with self._lock:
            self._write(text)

    def close(self) -> None:
        """Nothing to end: every line was complete."""

    def _write(self, line: str) -> None:
        print(line, file=self._stream or sys.stderr, flush=True)


class _Bar:
    """One bar of rich's for the stage at work; notes are printed above it."""

    def __init__(self, console_width: int, stream: TextIO | None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._lock = threading.Lock()
        self._bar: RichProgress = RichProgress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=max(10, min(40, console_width // 4))),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=Console(file=stream) if stream is not None else Console(stderr=True),
            transient=True,
        )
        self._task = self._bar.add_task("starting", total=None, figures="")
        self._bar.start()

    def stage(self, name: str, index: int, total: int) -> None:
        with self._lock:
            self._bar.remove_task(self._task)
            self._task = self._bar.add_task(f"{index}/{total} {name}", total=None, figures="")

    def step(self, done: int, total: int, loss: float | None, tokens_per_second: float | None) -> None:
        figures = [] if loss is None else [f"loss {loss:.4f}"]
        figures += [] if tokens_per_second is None else [f"{tokens_per_second:.0f} tokens/s"]
        with self._lock:
            self._bar.update(self._task, completed=done, total=total, figures="  ".join(figures))

    def score(self, score: Score) -> None:
        self.note(f"  {score}")

    def stage_done(self, result: Mapping[str, Any]) -> None:
        """A note has shown it."""

    def note(self, text: str) -> None:
        with self._lock:
            self._bar.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        with self._lock:
            self._bar.stop()


def _clock_text(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
