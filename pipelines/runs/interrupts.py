"""Signals while a stage works: a checkpoint first, then the exit code that the signal asks for."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from amlora_dist.training.failures import StoppedError
from amlora_dist.training.loop import STOP_FILE

log = logging.getLogger(__name__)

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


@contextlib.contextmanager
def stops_handled(folder: Path) -> Iterator[None]:
    """Inside, the first SIGINT or SIGTERM lets the stage in ``folder`` finish its step, checkpoint and stop.

    The second SIGINT interrupts at once.

    Raises:
        StoppedError: with exit code 130 or 143, after the checkpoint.
    """
    stop = folder / STOP_FILE
    stop.unlink(missing_ok=True)
    if threading.current_thread() is not threading.main_thread():
        yield  # signals go to the main thread; a trial of a search is stopped by its search
        return
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)
        log.warning("signal %s: checkpoint after this step, then stop", signal.Signals(number).name)
        stop.touch()

    before = {number: signal.signal(number, handle) for number in EXIT_CODES}
    try:
        yield
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
