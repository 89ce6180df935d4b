"""Whether the rows of one task hold rows of another, from their statistics alone: no row is kept.

If a share p of task a's rows were drawn from task b, then along the line from one mean to the other, w = (mu_b - mu_a) /
diag(Sigma), a's rows would lie on two heaps: their mean has moved towards b's, and their variance has grown by
p (1 - p) D^2, where D is the distance of the heaps and (1 - p) D the distance of the means that is left. So

    p / (1 - p) = (var_a - var_b) / (mean distance)^2        along w.

Features are scaled one by one: the whole inverse would turn w away from the very direction that mixing has widened.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from amlora_dist.adapters.statistics import TaskStatistics

APART = 3.0
"""Standard deviations between two tasks from which on mixing can be distinguished from likeness."""


def mixed_shares(statistics: Sequence[TaskStatistics]) -> dict[str, dict[str, float]]:
    """How much the newest task and each earlier one look mixed.

    Args:
        statistics: of all tasks of the bank; the last is the newest.

    Returns:
        For each of the two tasks of a pair, by name, the share (0 to 1) of its training rows that look like the
        other's: ``{"a": {"b": 0.28}, "b": {"a": 0.0}}``. Pairs less than ``APART`` apart are left out.
    """
    found: dict[str, dict[str, float]] = {}
    *earlier, newest = statistics
    for other in earlier:
        apart = newest.mean - other.mean
        # Labels spread a task's rows too; where both tasks' are known, what they spread is not taken for mixing.
        known = other.by_label is not None and newest.by_label is not None
        factor = {s.task: s.factor if known else s.task_factor for s in (other, newest)}
        scatter = sum((factor[s.task].square().sum(dim=0) for s in (other, newest)), torch.zeros_like(apart))
        w = apart / scatter.clamp(min=1e-12 * float(scatter.max()) + 1e-300)
        gap = float(apart @ w)
        spread = {s.task: float((factor[s.task] @ w).square().sum()) / s.count for s in (other, newest)}
        if gap <= 0 or gap**2 < APART**2 * min(spread.values()):
            continue
        for one, two in ((other, newest), (newest, other)):
            odds = max(0.0, spread[one.task] - spread[two.task]) / gap**2
            found.setdefault(one.task, {})[two.task] = odds / (1 + odds)
    return found
