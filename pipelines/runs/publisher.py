"""One publication at a time, in the background: the next stage trains meanwhile."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from amlora_dist.errors import AmloraError
from amlora_dist.registry.connection import StoreAwayError

log = logging.getLogger(__name__)

DEADLINE_S = 3600.0
"""How long the next stage's end waits for a publication. What it asks of MLflow has shorter deadlines of its own."""
LEAVE_DEADLINE_S = 20.0
"""How long a run that was stopped, or has failed, waits for one: schedulers kill some 30 s after SIGTERM."""


class Publisher:
    """Runs what it is given in a thread, and hands its error on to who settles."""

    def __init__(self) -> None:
        self._at_work: _Publication | None = None

    def begin(self, what: str, work: Callable[[], object]) -> None:
        """Start, and return at once; what was begun before is settled.

        Args:
            what: is published, for messages.
            work: publishes it.
        """
        assert self._at_work is None, "one at a time: versions come in the order of their stages"
        self._at_work = _Publication(what, work)

    def settle(self) -> None:
        """Wait for what was begun, if anything was.

        Raises:
            StoreAwayError: no end within ``DEADLINE_S``.
            Exception: what it failed with.
        """
        if (publication := self._at_work) is None:
            return
        publication.thread.join(DEADLINE_S)
        if publication.thread.is_alive():
            raise StoreAwayError(
                f"publishing {publication.what} did not end within {DEADLINE_S:.0f} s; what was trained is kept: when MLflow"
                " answers again, start the same command again"
            )
        self._at_work = None
        if publication.error is not None:
            raise publication.error

    def leave(self) -> None:
        """The run ends for another reason: wait a little; its failure has been reported."""
        if (publication := self._at_work) is None:
            return
        self._at_work = None
        publication.thread.join(LEAVE_DEADLINE_S)
        if publication.thread.is_alive():
            log.warning("publishing %s has not ended; the same command goes on with it", publication.what)


class _Publication:
    """A thread at work, and what came of it."""

    def __init__(self, what: str, work: Callable[[], object]) -> None:
        self.what, self._work = what, work
        self.error: BaseException | None = None
        # A daemon: a store that hangs must not keep a process that has to end.
        self.thread = threading.Thread(target=self._run, name=f"publishing {what}", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # noqa: BLE001 (raised by who settles)
            self.error = error
            reason = str(error) if isinstance(error, AmloraError) else f"{type(error).__name__}: {error}"
            log.warning("publishing %s failed (%s); all is kept, and the same command goes on with it", self.what, reason)
