"""Signals while a stage works: a checkpoint first, then the exit code that the signal asks for."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from amlora_dist.training.failures import StoppedError
from amlora_dist.training.loop import STOP_FILE

log = logging.getLogger(__name__)

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


@dataclass(slots=True)
class Stops:
    """Signals that came while a stage was at work."""

    begun: bool = False
    """Whether the stage has reported a step or a score: something to wait for."""
    received: list[int] = field(default_factory=list)

    def end_what_has_not_begun(self) -> None:
        """Called often.

        Raises:
            StoppedError: a signal came before there was anything that a checkpoint would keep, such as while workers start.
        """
        if self.received and not self.begun:
            raise StoppedError("stopped before a step was done; the same run id goes on from here")


@contextlib.contextmanager
def stops_handled(folder: Path) -> Iterator[Stops]:
    """Inside, the first SIGINT or SIGTERM lets the stage in ``folder`` finish its step, checkpoint and stop.

    Set ``begun`` of what it yields when the stage has begun; before, ``end_what_has_not_begun`` ends it. The second SIGINT
    interrupts at once.

    Raises:
        StoppedError: with exit code 130 or 143, after the checkpoint.
    """
    stop = folder / STOP_FILE
    stop.unlink(missing_ok=True)
    stops = Stops()
    if threading.current_thread() is not threading.main_thread():
        yield stops  # signals go to the main thread; a trial of a search is stopped by its search
        return
    received = stops.received

    def handle(number: int, frame: FrameType | None) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)
        what = "checkpoint after this step, then stop" if stops.begun else "no step was done yet, stopping now"
        log.warning("signal %s: %s", signal.Signals(number).name, what)
        stop.touch()

    before = {number: signal.signal(number, handle) for number in EXIT_CODES}
    try:
        yield stops
    except StoppedError as error:
        error.exit_code = EXIT_CODES[signal.Signals(received[0])] if received else error.exit_code
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        stop.unlink(missing_ok=True)
    if received:
        stopped = StoppedError("stopped between two steps; the same run id goes on from here")
        stopped.exit_code = EXIT_CODES[signal.Signals(received[0])]
        raise stopped
