"""Progress of a run: one bar for all of it on a terminal, with what is at work and the time left; plain lines in a pipe."""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from amlora_dist.evaluation.text_metrics import METRIC_NAMES
from pipelines.runs.outlook import Outlook, clock_text

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from rich.progress import Progress as RichProgress

    from pipelines.runs.outlook import StageSize

LINE_EVERY_S = 10.0
"""Seconds between two lines about steps, or rows that are scored, in a pipe."""


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

    def outline(self, stages: Sequence[StageSize]) -> None:
        """A run of these stages begins; none of them where it is not known yet which."""

    def stage(self, name: str, index: int, total: int) -> None:
        """A stage (or another piece of work) begins: ``index`` of ``total``, from 1."""

    def phase(self, name: str) -> None:
        """What the stage is at, where that is neither a step nor a score: ``reading rows``, ``publishing``."""

    def step(self, done: int, total: int, loss: float | None, tokens_per_second: float | None) -> None:
        """``done`` of ``total`` steps of the stage are done."""

    def rows(self, task: str, mode: str, done: int, total: int) -> None:
        """``done`` of ``total`` rows of one score are done; a score that is as before may come without."""

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

    def outline(self, stages: Sequence[StageSize]) -> None: ...

    def stage(self, name: str, index: int, total: int) -> None: ...

    def phase(self, name: str) -> None: ...

    def step(self, done: int, total: int, loss: float | None, tokens_per_second: float | None) -> None: ...

    def rows(self, task: str, mode: str, done: int, total: int) -> None: ...

    def score(self, score: Score) -> None:
        self.note(f"  {score}")

    def stage_done(self, result: Mapping[str, Any]) -> None: ...

    def note(self, text: str) -> None: ...

    def close(self) -> None: ...


class _Lines:
    """Plain lines without control characters, about steps and rows at most every ``LINE_EVERY_S`` seconds."""

    def __init__(self, stream: TextIO | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream, clock
        self._lock = threading.Lock()
        self._outlook = Outlook(clock)
        self._last = clock()

    def outline(self, stages: Sequence[StageSize]) -> None:
        with self._lock:
            self._outlook.outline(stages)

    def stage(self, name: str, index: int, total: int) -> None:
        with self._lock:
            self._outlook.stage(index)
            self._last = self._clock()
            self._write(", ".join([f"stage {index}/{total}: {name}", *self._left()]))

    def phase(self, name: str) -> None:
        with self._lock:
            self._outlook.other()

    def step(self, done: int, total: int, loss: float | None, tokens_per_second: float | None) -> None:
        with self._lock:
            self._outlook.step(done, total)
            if self._too_soon() and done < total:
                return
            parts = [f"  step {done}/{total}"]
            parts += [] if loss is None else [f"loss {loss:.4f}"]
            parts += [] if tokens_per_second is None else [f"{tokens_per_second:.0f} tokens/s"]
            self._tell(parts)

    def rows(self, task: str, mode: str, done: int, total: int) -> None:
        with self._lock:
            self._outlook.rows(task, mode, done)
            if done and not self._too_soon():
                self._tell([f"  scoring {task} ({mode}): {done}/{total} rows"])

    def score(self, score: Score) -> None:
        with self._lock:
            self._outlook.scored(score.task, score.mode, score.rows)
        self.note(f"  {score}")

    def stage_done(self, result: Mapping[str, Any]) -> None:
        """A note has shown it."""

    def note(self, text: str) -> None:
        with self._lock:
            self._write(text)

    def close(self) -> None:
        """Nothing to end: every line was complete."""

    def _too_soon(self) -> bool:
        return self._clock() - self._last < LINE_EVERY_S

    def _tell(self, parts: list[str]) -> None:
        self._last = self._clock()
        self._write(", ".join([*parts, *self._left()]))

    def _left(self) -> list[str]:
        left = self._outlook.left_s
        return [] if left is None else [f"{clock_text(left)} left for all"]

    def _write(self, line: str) -> None:
        print(line, file=self._stream or sys.stderr, flush=True)


class _Bar:
    """One bar of rich's for the whole run, with what is at work; notes are printed above it.

    It is full when the run has ended, and not before. Where the run's size is not known, it moves to and fro.
    """

    def __init__(self, console_width: int, stream: TextIO | None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as RichProgress
        from rich.table import Column

        self._lock = threading.Lock()
        self._outlook = Outlook()
        self._stage = "starting"
        narrow = Column(no_wrap=True, overflow="ellipsis", ratio=1)
        self._bar: RichProgress = RichProgress(
            TextColumn("[bold]{task.fields[stage]}", table_column=narrow),
            BarColumn(bar_width=max(6, min(30, console_width // 6))),
            TextColumn("{task.fields[share]}"),
            TextColumn("{task.fields[figures]}", table_column=Column(no_wrap=True)),
            TextColumn("[cyan]{task.fields[left]}", table_column=Column(no_wrap=True)),
            console=Console(file=stream) if stream is not None else Console(stderr=True),
            transient=True,
            expand=True,
        )
        self._task = self._bar.add_task("", total=None, stage=self._stage, share="", figures="", left="")
        self._bar.start()

    def outline(self, stages: Sequence[StageSize]) -> None:
        with self._lock:
            self._outlook.outline(stages)
            self._stage = "starting"
            self._show("preparing")

    def stage(self, name: str, index: int, total: int) -> None:
        with self._lock:
            self._stage = f"{index}/{total} {name}"
            self._outlook.stage(index)
            self._show("starting")

    def phase(self, name: str) -> None:
        with self._lock:
            self._outlook.other()
            self._show(name)

    def step(self, done: int, total: int, loss: float | None, tokens_per_second: float | None) -> None:
        figures = [] if loss is None else [f"loss {loss:.4f}"]
        figures += [] if tokens_per_second is None else [f"{tokens_per_second:.0f} tokens/s"]
        with self._lock:
            self._outlook.step(done, total)
            self._show(f"training {done}/{total}", "  ".join(figures))

    def rows(self, task: str, mode: str, done: int, total: int) -> None:
        with self._lock:
            self._outlook.rows(task, mode, done)
            self._show(f"scoring {task} ({mode})" + (f" {done}/{total}" if total else ""))

    def score(self, score: Score) -> None:
        with self._lock:
            self._outlook.scored(score.task, score.mode, score.rows)
        self.note(f"  {score}")

    def stage_done(self, result: Mapping[str, Any]) -> None:
        """A note has shown it."""

    def note(self, text: str) -> None:
        with self._lock:
            self._bar.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        with self._lock:
            self._bar.stop()

    def _show(self, doing: str, figures: str = "") -> None:
        from rich.markup import escape

        share, left = self._outlook.share, self._outlook.left_s
        self._bar.update(
            self._task,
            total=None if share is None else 1.0,
            completed=share or 0.0,
            stage=escape(f"{self._stage}: {doing}"),
            share="" if share is None else f"{share:.0%}",
            figures=figures,
            left="" if left is None else f"{clock_text(left)} left",
        )
