"""Who goes on: after every stage a trial does only if it is among the best, when all are there (``scheduler: halving``).

Waiting costs a few idle seconds at each rung and saves most of the stages: where nobody waits, the first trials go on
because nobody is there to be compared with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

OPEN = 0
"""A verdict: nobody can say yet, because others have yet to come to a rung that this trial has reached."""


class Halving:
    """Successive halving (Jamieson and Talwalkar 2016) with a rung after every stage from ``grace`` on.

    All trials come to a rung and wait there; the best ``ceil(n / reduction)`` of the n that came go on; ties go on. Which
    trials are stopped depends on nothing but their values: not on who is faster, what was killed, and how many work at once.

    Args:
        stages: of a whole trial; nothing is decided after the last one.
        order: numbers of the trials as they start.
        grace: stages before the first rung.
        reduction: one of so many goes on.
    """

    def __init__(self, stages: int, order: Sequence[int], *, grace: int, reduction: float) -> None:
        self._stages, self._reduction = stages, reduction
        self.rung = min(grace, stages)
        """Where the trials that are not stopped are to come to."""
        self._values: dict[int, dict[int, float | None]] = {}
        self._ended: set[int] = set()
        self._going = list(order)
        self._stopped: dict[int, int] = {}

    def record(self, trial: int, stage: int, value: float | None) -> None:
        """A trial's value after ``stage`` stages, larger being better; None (undefined there) lets it pass. Recorded again,
        nothing changes."""
        self._values.setdefault(trial, {})[stage] = value
        self._decide()

    def end(self, trial: int) -> None:
        """A trial will come no further, for whatever reason."""
        self._ended.add(trial)
        self._decide()

    def verdict(self, trial: int) -> int | None:
        """After how many stages the trial stops; None: it goes on, or has come to its end; `OPEN`."""
        if trial in self._stopped:
            return self._stopped[trial]
        return None if trial in self._ended or self._is_there(trial, self._stages) else OPEN

    def waits(self, trial: int) -> bool:
        """Whether the trial is to stop where it is until it may go on."""
        return self.rung < self._stages and trial not in self._stopped and self._is_there(trial, self.rung)

    def due(self) -> list[int]:
        """Trials that are to go on and may have waited, in order."""
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
