"""Who is next: a queue in which a request of many texts does not delay one of a single text; what heavy work gets.

Both are about time, not about order of arrival: nobody's wait may hang on how much somebody else asked for.
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Callable, Iterator, Sequence

from amlora_dist.serving.jobs import BusyError, Job
from amlora_dist.serving.settings import ServeSettings

HEAVY_SHARE = 0.1
"""Of the engine's time, seconds of heavy work for each second of other work; all of it where there is no other."""
MOST_CREDIT_S = 0.1
"""Heavy work may save up so much of it: a pass or two, and no second that others would wait for after a quiet while."""
GAP_S = 0.1
"""So long after the last other work heavy work still gives way: a client that has its answer asks again at once."""


class Admission:
    """The jobs that are inside an engine, and whether there is room for more.

    Args:
        settings: limits.
    """

    def __init__(self, settings: ServeSettings) -> None:
        self._most = settings.max_concurrency
        self._inside: set[Job] = set()
        self._heavy = 0

    def __len__(self) -> int:
        return len(self._inside)

    def __contains__(self, job: Job) -> bool:
        return job in self._inside

    def __iter__(self) -> Iterator[Job]:
        return iter(list(self._inside))

    def check(self, texts: int, *, heavy: bool) -> None:
        """Raise BusyError where there is no room for so many texts of one request."""
        inside = len(self._inside)
        if inside + texts > self._most:
            raise BusyError(f"the server has {inside} texts at work and takes {self._most} at once; try again later")
        if heavy and self._heavy and self._heavy + texts > self._most // 2:
            raise BusyError(
                f"the server has {self._heavy} texts with many labels at work and takes {self._most // 2} of them at "
                "once; try again later, or with fewer texts or labels in one request"
            )

    def add(self, jobs: Sequence[Job]) -> None:
        """They are inside now."""
        self._inside.update(jobs)
        self._heavy += sum(job.heavy for job in jobs)

    def remove(self, job: Job) -> bool:
        """It has left; False: it was not inside."""
        if job not in self._inside:
            return False
        self._inside.remove(job)
        self._heavy -= job.heavy
        return True


class FairQueue:
    """Texts by their place in their request: the second text of one waits behind the first of all."""

    def __init__(self) -> None:
        self._waiting: list[tuple[int, int, Job]] = []
        self._turn = self._count = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, jobs: Sequence[Job]) -> None:
        """The texts of one request."""
        for place, job in enumerate(jobs):
            insort(self._waiting, (self._turn + place, self._count, job), key=lambda entry: entry[:2])
            self._count += 1

    def taken(self, room: int, most_tokens: int) -> list[Job]:
        """Those who are next, of one version of the bank: at most ``room`` rows and ``most_tokens``, padding included."""
        jobs: list[Job] = []
        longest = 0
        while self._waiting and len(jobs) < room:
            turn, _, job = self._waiting[0]
            longest = max(longest, job.prompt_tokens)
            if jobs and (longest * (len(jobs) + 1) > most_tokens or job.bank is not jobs[0].bank):
                break
            self._turn = turn
            jobs.append(self._waiting.pop(0)[2])
        return jobs

    def without(self, is_over: Callable[[Job], bool]) -> None:
        """Let those go for whom it is over: what they hold is somebody else's room."""
        self._waiting = [entry for entry in self._waiting if not is_over(entry[2])]


class Share:
    """When heavy work may run next to other work.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._credit, self._other_at = clock, 0.0, float("-inf")

    def other(self, seconds: float) -> None:
        """Other work took so long."""
        self._credit = min(self._credit + HEAVY_SHARE * seconds, MOST_CREDIT_S)
        self._other_at = self._clock()

    def heavy(self, seconds: float) -> None:
        """Heavy work took so long."""
        if self._others():
            self._credit -= seconds

    def wait_s(self) -> float:
        """Seconds until heavy work may run, should no other come; 0: now."""
        if self._credit > 0 or not self._others():
            return 0.0
        return max(0.001, self._other_at + GAP_S - self._clock())

    def _others(self) -> bool:
        return self._clock() - self._other_at < GAP_S
