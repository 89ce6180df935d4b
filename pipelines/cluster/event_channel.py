"""The channel between a run's driver and its workers: plans and the wish to stop go down, events come up.

It is the one way in every placement, whether driver and workers share folders or not. Questions wait in the actor until
there is an answer, so that nobody polls.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.runs.executor import Event

log = logging.getLogger(__name__)

WAIT_S = 20.0
"""For which a question waits in the channel for its answer, before it is asked again."""
DEADLINE_S = 30.0
"""Of one question, on top."""
CLOSING = "closing"


class EventChannel:
    """The actor in the middle; it lives on the driver's node, and dies with the driver."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._number, self._plan = 0, ""
        self._stop = 0
        self._changed = asyncio.Condition()

    async def tell(self, event: Event) -> None:
        """A worker's word."""
        self._events.append(event)
        await self._notify()

    async def take(self) -> list[Event]:
        """The driver's question: what came since the last one."""
        await self._until(lambda: bool(self._events))
        events, self._events = self._events, []
        return events

    async def hand_out(self, number: int, plan: str) -> None:
        """The driver's word: the plan of stage ``number``, from 1; an empty one is the end."""
        self._number, self._plan = number, plan
        await self._notify()

    async def plan(self, after: int) -> tuple[int, str] | None:
        """A worker's question: the plan behind number ``after``; None if there is none yet."""
        await self._until(lambda: self._number > after)
        return (self._number, self._plan) if self._number > after else None

    async def stop(self, number: int) -> None:
        """The driver's word: stage ``number`` should stop at its next step."""
        self._stop = number
        await self._notify()

    async def stopped(self, number: int) -> bool:
        """A worker's question."""
        await self._until(lambda: self._stop >= number)
        return self._stop >= number

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _until(self, true: Callable[[], bool]) -> None:
        async def wait() -> None:
            async with self._changed:
                await self._changed.wait_for(true)

        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(wait(), WAIT_S)


class DriverEnd:
    """The driver's end: makes the channel and hands on what comes, in a thread.

    Args:
        workers: how many there are.
        on_event: takes events, one after another.
    """

    def __init__(self, workers: int, on_event: Callable[[Event], None]) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor: Any = ray.remote(num_cpus=0, max_concurrency=1000 + 4 * workers)(EventChannel)
        self.handle: Any = actor.options(scheduling_strategy=here).remote()
        self._on_event = on_event
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="events", daemon=True)
        self._thread.start()

    def hand_out(self, number: int, plan: str) -> None:
        """Give all workers the plan of a stage; an empty one ends them. Does not wait: the channel may still be starting."""
        self.handle.hand_out.remote(number, plan)

    def stop(self, number: int) -> None:
        """Tell rank 0 that a stage should stop."""
        self.handle.stop.remote(number)

    def close(self) -> None:
        """Hand on what has come until now, and end the channel."""
        import ray
        from ray.exceptions import RayError

        self._ended.set()
        with contextlib.suppress(RayError):
            self._ask(self.handle.tell.remote({"kind": CLOSING}))  # behind all events
            self._thread.join(timeout=DEADLINE_S)
        ray.kill(self.handle)

    def abandon(self) -> None:
        """End the channel at once. Workers that are still at a stage end when they ask for the next one."""
        import ray

        self._ended.set()
        ray.kill(self.handle)
        self._thread.join(timeout=DEADLINE_S)

    @staticmethod
    def _ask(reference: Any) -> Any:
        import ray

        return ray.get(reference, timeout=WAIT_S + DEADLINE_S)

    def _follow(self) -> None:
        from ray.exceptions import RayError

        while True:
            try:
                events = self._ask(self.handle.take.remote())
            except RayError as fault:
                if self._ended.is_set():
                    return
                log.warning("no word from the workers (%s)", fault)
                self._ended.wait(1.0)
                continue
            for event in events:
                if event["kind"] == CLOSING:
                    return
                self._on_event(event)


class WorkerEnd:
    """A worker's end of the channel ``handle``."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._number = 0

    def next_plan(self) -> str | None:
        """Wait for the next stage's plan; None: there will be none, or the driver is gone."""
        import ray
        from ray.exceptions import GetTimeoutError, RayActorError

        while True:
            try:
                found = ray.get(self._handle.plan.remote(self._number), timeout=WAIT_S + DEADLINE_S)
            except GetTimeoutError:
                continue
            except RayActorError:
                return None
            if found is not None:
                self._number, plan = found
                return plan or None

    def tell(self, event: Event, *, wait: bool = False) -> None:
        """Say it to the driver; ``wait`` until it has come, because this process is about to end."""
        import ray
        from ray.exceptions import RayError

        with contextlib.suppress(RayError):  # the driver is gone: nobody listens
            sent = self._handle.tell.remote(event | {"time": time.time(), "number": self._number})
            if wait:
                ray.get(sent, timeout=DEADLINE_S)

    @contextlib.contextmanager
    def stops_in(self, file: Path) -> Iterator[None]:
        """Inside, ``file`` appears when the driver wants the present stage to stop."""
        file.unlink(missing_ok=True)  # of an earlier attempt on this node
        ended = threading.Event()
        threading.Thread(target=self._listen, args=(file, self._number, ended), name="stop", daemon=True).start()
        try:
            yield
        finally:
            ended.set()
            file.unlink(missing_ok=True)

    def _listen(self, file: Path, number: int, ended: threading.Event) -> None:
        import ray
        from ray.exceptions import GetTimeoutError, RayActorError

        while not ended.is_set():
            try:
                stop = ray.get(self._handle.stopped.remote(number), timeout=WAIT_S + DEADLINE_S)
            except GetTimeoutError:
                continue  # asked again
            except RayActorError:
                return
            if stop and not ended.is_set():
                file.touch()
                return
