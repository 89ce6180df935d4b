"""ASHA by stage: after some stages a trial goes on only if it is among the best that came that far.

The rule of asynchronous successive halving in its stopping form (Li et al. 2020, "A System for Massively Parallel
Hyperparameter Tuning"): rungs stand after ``grace``, ``grace x reduction``, ``grace x reduction^2``, ... stages. When a
trial reaches a rung, its value is recorded there, and it goes on if it is among the best ``ceil(n / reduction)`` of the
n values so far; ties go on. Nobody waits for anybody.
"""

from __future__ import annotations

import math


class Halving:
    """Rungs and the values recorded at them; larger is better.

    Args:
        stages: of a whole trial; nothing is decided after the last one.
        grace: stages before the first rung.
        reduction: one of so many goes on.
    """

    def __init__(self, stages: int, *, grace: int, reduction: float) -> None:
        self.reduction = reduction
        self._rungs: dict[int, dict[int, float]] = {}
        self._stopped: set[tuple[int, int]] = set()
        at = float(grace)
        while at < stages:
            self._rungs.setdefault(math.floor(at), {})
            at *= reduction

    @property
    def rungs(self) -> list[int]:
        """After how many stages it decides."""
        return list(self._rungs)

    def goes_on(self, trial: int, stage: int, value: float | None) -> bool:
        """Record a trial's value after ``stage`` stages; whether it goes on. Told again, it says the same again."""
        recorded = self._rungs.get(stage)
        if recorded is None or value is None:
            return True
        if trial not in recorded:
            recorded[trial] = value
            kept = math.ceil(len(recorded) / self.reduction)
            if value < sorted(recorded.values(), reverse=True)[kept - 1]:
                self._stopped.add((trial, stage))
        return (trial, stage) not in self._stopped
