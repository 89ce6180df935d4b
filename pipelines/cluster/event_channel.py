"""A line between a stage's workers and its driver where they share no folder: events one way, the wish to stop the other.

What the line carries lies in files of the stage's folder at both ends, so that following a stage, stopping it and telling
why it ended is one thing, with a shared folder and without.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

Event = dict[str, Any]

ERROR_EVENT = "error"
POLL_S = 0.5
DEADLINE_S = 30.0
"""Of one question over the line."""


class Line:
    """The actor in the middle; it lives on the driver's node, and dies with the driver."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._stop = False

    def tell(self, event: Event) -> None:
        """A worker's word."""
        self._events.append(event)

    def take(self, stop: bool) -> list[Event]:
        """The driver's question: what was said since the last one; ``stop`` goes the other way."""
        self._stop = self._stop or stop
        events, self._events = self._events, []
        return events

    def stopped(self) -> bool:
        """A worker's question."""
        return self._stop


@contextlib.contextmanager
def line_to(folder: Path, events: Path, error: Path) -> Iterator[Any]:
    """The driver's end: appends what comes to ``events``, an error becomes the file ``error``; the handle for workers."""
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from amlora_dist.training.checkpoint import write_text
    from amlora_dist.training.loop import STOP_FILE

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    line = ray.remote(num_cpus=0)(Line).options(scheduling_strategy=here).remote()
    ended = threading.Event()

    def take() -> None:
        found = ray.get(line.take.remote((folder / STOP_FILE).exists()), timeout=DEADLINE_S)
        with events.open("a", encoding="utf-8") as file:
            for event in found:
                if event.get("kind") == ERROR_EVENT:
                    write_text(error, json.dumps(event))
                else:
                    file.write(json.dumps(event) + "\n")

    def follow() -> None:
        while True:
            last = ended.wait(POLL_S)
            try:
                take()
            except (RayError, OSError) as fault:
                log.warning("no word from the workers (%s)", fault)
            if last:
                return

    thread = threading.Thread(target=follow, name="line", daemon=True)
    thread.start()
    try:
        yield line
    finally:
        ended.set()
        thread.join(timeout=2 * DEADLINE_S)
        ray.kill(line)


class WorkersEnd:
    """A worker's end of the line, or of none."""

    def __init__(self, line: Any, folder: Path) -> None:
        from amlora_dist.training.loop import STOP_FILE

        self._line, self._stop = line, folder / STOP_FILE

    def tell(self, event: Event, *, wait: bool = False) -> None:
        """Say it to the driver; ``wait`` until it has come, because this process is about to end."""
        if self._line is None:
            return
        import ray
        from ray.exceptions import RayError

        with contextlib.suppress(RayError):  # the driver is gone: nobody listens
            said = self._line.tell.remote(event | {"time": time.time()})
            if wait:
                ray.get(said, timeout=DEADLINE_S)

    def listen(self) -> None:
        """From now on, in a thread: when the driver wants the stage to stop, put the stop file there."""
        if self._line is not None:
            self._stop.unlink(missing_ok=True)  # of an earlier attempt on this node
            threading.Thread(target=self._listen, name="line", daemon=True).start()

    def _listen(self) -> None:
        import ray
        from ray.exceptions import RayError

        pause = threading.Event()
        while not pause.wait(POLL_S):
            with contextlib.suppress(RayError, OSError):  # an answer that is late is asked for again
                if ray.get(self._line.stopped.remote(), timeout=DEADLINE_S):
                    self._stop.touch()
                    return
