"""ASHA by stage: after some stages a trial goes on only if it is among the best that came that far.

The rule of asynchronous successive halving in its stopping form (Li et al. 2020, "A System for Massively Parallel
Hyperparameter Tuning"): rungs stand after ``grace``, ``grace x reduction``, ``grace x reduction^2``, ... stages. A trial
goes on from a rung if its value is among the best ``ceil(n / reduction)`` of the n values there; ties go on.

Usually these n are the trials that came to the rung before it; here they are those that *start* before it, so that it
does not matter who is faster, what was killed and how many work at once: the same search prunes the same trials. Nobody
waits for that. A trial whose rivals are not there yet goes on; if they turn out to be better it is stopped at its next
report, and counts as it was at its rung.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence

OPEN = 0
"""Verdict of `Halving.verdict`: trials that start earlier have yet to come to a rung that this one has reached."""


class Halving:
    """Rungs, and the values recorded at them; larger is better.

    Args:
        stages: of a whole trial; nothing is decided after the last one.
        order: numbers of the trials as they start.
        grace: stages before the first rung.
        reduction: one of so many goes on.
    """

    def __init__(self, stages: int, order: Sequence[int], *, grace: int, reduction: float) -> None:
        self.reduction, self._order = reduction, order
        self._values: dict[int, dict[int, float | None]] = {}
        self._ended: set[int] = set()
        self.rungs: list[int] = []
        """After how many stages it decides."""
        at = float(grace)
        while at < stages:
            if math.floor(at) not in self.rungs:
                self.rungs.append(math.floor(at))
            at *= reduction

    def record(self, trial: int, stage: int, value: float | None) -> None:
        """A trial's value after ``stage`` stages; None (undefined there) lets it pass. Told again, nothing changes."""
        self._values.setdefault(trial, {})[stage] = value

    def end(self, trial: int) -> None:
        """A trial will come no further, for whatever reason."""
        self._ended.add(trial)

    def verdict(self, trial: int) -> int | None:
        """After how many stages the trial stops; None: it goes on; `OPEN`: nobody can say yet."""
        reached = self._values.get(trial, {})
        candidates = list(self._order)
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
        return value >= seen[-math.ceil(len(seen) / self.reduction)]
