"""The engine's classifications: passes of many clients' texts, with a stop after each.

A request's work is its texts times their labels. In a turn of the engine classifications get a budget of tokens, in
turns too; a request of much work (``heavy``) goes apart, a pass at a time, in a small share of the engine's time.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

from amlora_dist.errors import AmloraError
from amlora_dist.evaluation.requests import Classification
from amlora_dist.serving.jobs import Classified, Event, Failed, Job, by_pass, grouped
from amlora_dist.serving.queueing import FairQueue, Share
from amlora_dist.serving.settings import ServeSettings

log = logging.getLogger(__name__)

PASS_FAULTS = (RuntimeError, ValueError, IndexError)
"""What a pass over the rows of several clients may raise: torch's errors, memory that ran out among them."""
OPEN = 4
"""Classifications that are begun and not done, at once: each holds the cache of its prompts."""
HEAVY_ROWS = 8
"""Texts of one heavy pass: it must be over soon."""


@dataclass(eq=False, slots=True)
class Ranking:
    """Texts that share their passes."""

    jobs: list[Job]
    passes: Generator[int, None, list[Classification]] | None = None
    seconds: float = 0.0
    open: set[Job] = field(default_factory=set)


class Ranker:
    """See the module. ``add`` and ``take`` belong under the engine's lock, the rest to its thread.

    Args:
        settings: limits.
        observe: called after every classification: kind, rows, seconds.
        end: ends a job with its last event.
    """

    def __init__(
        self, settings: ServeSettings, observe: Callable[[str, int, float], None], end: Callable[[Job, Event], None]
    ) -> None:
        self._settings, self._observe, self._end = settings, observe, end
        self._light, self._heavy = FairQueue(), FairQueue()
        self._rankings: deque[Ranking] = deque()
        self._slow: deque[Ranking] = deque()
        self.share = Share()

    @property
    def waiting(self) -> int:
        """Texts that wait for their first pass."""
        return len(self._light) + len(self._heavy)

    @property
    def has_heavy(self) -> bool:
        """Whether heavy work waits or is begun."""
        return bool(self._slow or len(self._heavy))

    def add(self, jobs: Sequence[Job]) -> None:
        """The texts of one request."""
        (self._heavy if jobs[0].heavy else self._light).add(jobs)

    def without(self, is_over: Callable[[Job], bool]) -> None:
        """Let waiting texts go for whom it is over."""
        self._light.without(is_over)
        self._heavy.without(is_over)

    def take(self) -> None:
        """Begin what waits, where there is room."""
        tokens = self._settings.prefill_tokens
        if len(self._rankings) < OPEN and (jobs := self._light.taken(self._settings.batch_rows, tokens)):
            self._rankings += self._alike(jobs)
        rows = min(HEAVY_ROWS, self._settings.batch_rows)
        if not self._slow and (jobs := self._heavy.taken(rows, tokens)):
            self._slow += self._alike(jobs)

    def work(self) -> bool:
        """As many passes as a turn may take, those of heavy requests not among them; returns whether there were any."""
        left, worked = self._settings.prefill_tokens, bool(self._rankings)
        while self._rankings and left > 0:
            left -= self._advance(self._rankings)
        return worked

    def work_slowly(self) -> None:
        """One pass of a heavy request, if there is one."""
        if self._slow:
            start = time.perf_counter()
            self._advance(self._slow)
            self.share.heavy(time.perf_counter() - start)

    @staticmethod
    def _alike(jobs: list[Job]) -> list[Ranking]:
        """Jobs that can share passes at once."""
        return [Ranking(group, open=set(group)) for group in grouped(jobs, by_pass)]

    def _advance(self, queue: deque[Ranking]) -> int:
        """One pass of the first in ``queue``, which then waits behind the others; returns its tokens, at least 1."""
        ranking = queue.popleft()
        for job in ranking.jobs:
            if job in ranking.open and (error := job.over()) is not None:
                self._close(ranking, job, Failed(error))
        if not ranking.open:
            if ranking.passes is not None:
                ranking.passes.close()
            return 1
        start = time.perf_counter()
        try:
            if ranking.passes is None:
                ranking.passes = ranking.jobs[0].bank.classify([job.request for job in ranking.jobs])
            tokens = next(ranking.passes)
        except StopIteration as end:
            self._observe("classify", len(ranking.jobs), ranking.seconds + time.perf_counter() - start)
            for job, found in zip(ranking.jobs, end.value, strict=True):
                if job in ranking.open:
                    self._close(ranking, job, Classified(found))
            return 1
        except AmloraError as error:
            self._apart(ranking, error, queue)
            return 1
        except PASS_FAULTS as error:
            log.exception("a pass over %d texts failed", len(ranking.jobs))
            self._apart(ranking, error, queue)
            return 1
        ranking.seconds += time.perf_counter() - start
        queue.append(ranking)
        return max(tokens, 1)

    def _apart(self, ranking: Ranking, error: Exception, queue: deque[Ranking]) -> None:
        """After a pass that failed, each of its texts gets passes of its own; only whose fault it is fails."""
        if len(ranking.jobs) == 1:
            self._close(ranking, ranking.jobs[0], Failed(error))
        else:
            queue.extend(Ranking([job], open={job}) for job in ranking.jobs if job in ranking.open)

    def _close(self, ranking: Ranking, job: Job, event: Event) -> None:
        ranking.open.discard(job)
        self._end(job, event)
