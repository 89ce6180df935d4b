"""Who goes on: after some stages a trial does only if it is among the best that came that far.

`Halving` (``scheduler: asha``) decides without waiting, `Rounds` (``scheduler: halving``) when all are there.

The rule of asynchronous successive halving in its stopping form (Li et al. 2020, "A System for Massively Parallel
Hyperparameter Tuning"): rungs stand after ``grace``, ``grace x reduction``, ``grace x reduction^2``, ... stages. A trial
goes on from a rung if its value is among the best ``ceil(n / reduction)`` of the n values there; ties go on.

Usually these n are the trials that came to the rung before it; here they are those that *start* before it, so that it
does not matter who is faster, what was killed and how many work at once: the same search prunes the same trials. Nobody
waits for that. A trial whose rivals are not there yet goes on; if they turn out to be better it is stopped at its next
report, and counts as it was at its rung.

Waiting costs a few idle seconds at each rung and saves most of the stages: without it the first trials go on because
nobody is there to be compared with.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence

OPEN = 0
"""A verdict: nobody can say yet, because others have yet to come to a rung that this trial has reached."""


class Stopping:
    """A scheduler of trials, which hears their values, larger being better.

    Args:
        stages: of a whole trial; nothing is decided after the last one.
        order: numbers of the trials as they start.
        grace: stages before the first rung.
        reduction: one of so many goes on.
    """

    def __init__(self, stages: int, order: Sequence[int], *, grace: int, reduction: float) -> None:
        self._stages, self._reduction, self._order = stages, reduction, list(order)
        self._values: dict[int, dict[int, float | None]] = {}
        self._ended: set[int] = set()

    def record(self, trial: int, stage: int, value: float | None) -> None:
        """A trial's value after ``stage`` stages; None (undefined there) lets it pass. Told again, nothing changes."""
        self._values.setdefault(trial, {})[stage] = value

    def end(self, trial: int) -> None:
        """A trial will come no further, for whatever reason."""
        self._ended.add(trial)

    def verdict(self, trial: int) -> int | None:
        """After how many stages the trial stops; None: it goes on, or has come to its end; `OPEN`."""
        return None

    def waits(self, trial: int) -> bool:
        """Whether the trial is to stop where it is until it is told to go on."""
        return False

    def due(self) -> list[int]:
        """Trials that are to go on and may have waited, in order."""
        return []


class Halving(Stopping):
    """Rungs, and the values recorded at them."""

    def __init__(self, stages: int, order: Sequence[int], *, grace: int, reduction: float) -> None:
        super().__init__(stages, order, grace=grace, reduction=reduction)
        self.rungs: list[int] = []
        """After how many stages it decides."""
        at = float(grace)
        while at < stages:
            if math.floor(at) not in self.rungs:
                self.rungs.append(math.floor(at))
            at *= reduction

    def verdict(self, trial: int) -> int | None:
        """See `Stopping`."""
        reached = self._values.get(trial, {})
        candidates = self._order
        for rung in self.rungs:
            if rung not in reached:
                return None
            going: list[int] = []
            seen: list[float] = []
            settled = False
            for one in candidates:
                values = self._values.get(one, {})
                if rung not in values and one not in self._ended:
                    break  # it may still come, and what is said of those after it depends on it
                goes = rung in values and self._among_best(values[rung], seen)
                if one == trial:
                    if not goes:
                        return rung
                    settled = True
                if goes:
                    going.append(one)
            if not settled:
                return OPEN
            candidates = going
        return None

    def _among_best(self, value: float | None, seen: list[float]) -> bool:
        """Whether a value is among the best share of those seen and itself; it is then one of those seen."""
        if value is None:
            return True
        bisect.insort(seen, value)
        return value >= seen[-math.ceil(len(seen) / self._reduction)]


class Rounds(Stopping):
    """Successive halving (Jamieson and Talwalkar 2016) with a rung after every stage from ``grace`` on.

    All trials come to a rung and wait there; the best ``ceil(n / reduction)`` of the n that came go on; ties go on. Which
    trials are stopped depends on nothing but their values.
    """

    def __init__(self, stages: int, order: Sequence[int], *, grace: int, reduction: float) -> None:
        super().__init__(stages, order, grace=grace, reduction=reduction)
        self.rung = min(grace, stages)
        """Where the trials that are not stopped are to come to."""
        self._going = list(order)
        self._stopped: dict[int, int] = {}

    def record(self, trial: int, stage: int, value: float | None) -> None:
        """See `Stopping`."""
        super().record(trial, stage, value)
        self._decide()

    def end(self, trial: int) -> None:
        """See `Stopping`."""
        super().end(trial)
        self._decide()

    def verdict(self, trial: int) -> int | None:
        """See `Stopping`."""
        if trial in self._stopped:
            return self._stopped[trial]
        return None if trial in self._ended or self._is_there(trial, self._stages) else OPEN

    def waits(self, trial: int) -> bool:
        """See `Stopping`."""
        return self.rung < self._stages and trial not in self._stopped and self._is_there(trial, self.rung)

    def due(self) -> list[int]:
        """See `Stopping`."""
        return [one for one in self._going if one not in self._ended and not self._is_there(one, self.rung)]

    def _is_there(self, trial: int, stage: int) -> bool:
        return stage in self._values.get(trial, {})

    def _decide(self) -> None:
        """Close every rung that all have come to who still may."""
        while self.rung < self._stages and all(self._is_there(n, self.rung) or n in self._ended for n in self._going):
            there = [one for one in self._going if self._is_there(one, self.rung)]
            known = sorted(value for one in there if (value := self._values[one][self.rung]) is not None)
            bar = known[-math.ceil(len(known) / self._reduction)] if known else -math.inf
            going = []
            for one in there:
                value = self._values[one][self.rung]
                if value is None or value >= bar:
                    going.append(one)
                else:
                    self._stopped[one] = self.rung
            self._going, self.rung = going, self.rung + 1
