"""How sure a number is: bootstrap intervals over test rows, and the spread over seeds.

The intervals answer "what if other test rows had been drawn"; they say nothing of training noise, which only runs with
other seeds show. Both belong in a report. Percentile bootstrap: Efron and Tibshirani 1993, chapter 13.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from amlora_dist.evaluation.metrics import MatrixMetric, minus

Cells = Sequence[Sequence[Sequence[float] | None]]
"""``cells[t][i - 1]`` holds the score of each test row of task i after stage t, rows in one order; None: not scored."""

RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Interval:
    """A value and the percentile interval around it."""

    value: float
    low: float
    high: float
    level: float
    """Share of the resamples that the interval covers."""


@dataclass(frozen=True, slots=True)
class Spread:
    """A value over several seeds."""

    mean: float
    deviation: float | None
    """Sample standard deviation (n - 1); None for one seed."""
    low: float
    high: float
    seeds: int


def mean_interval(
    scores: Sequence[float], *, seed: int, resamples: int = RESAMPLES, level: float = 0.95
) -> Interval | None:
    """Interval of the mean score of one cell; None without rows."""
    if not scores:
        return None
    return metric_interval([[scores]], lambda matrix: matrix[0][0], seed=seed, resamples=resamples, level=level)


def metric_interval(
    cells: Cells, metric: MatrixMetric, *, seed: int, resamples: int = RESAMPLES, level: float = 0.95
) -> Interval | None:
    """Interval of a metric of the accuracy matrix.

    The rows of each task are drawn with replacement, independently of other tasks and the same for all stages, because
    all stages score the same rows: backward transfer is a paired difference, and its interval must not pretend else.

    Returns:
        None where the metric is undefined.
    """
    value = metric(cell_means(cells))
    if value is None:
        return None
    return percentiles(value, [metric(matrix) for matrix in resampled(cells, seed=seed, resamples=resamples)], level)


def difference_interval(
    first: Cells, second: Cells, metric: MatrixMetric, *, seed: int
) -> Interval | None:
    """Interval of metric(first) - metric(second), paired: both scored the same rows, so the same rows are drawn.

    Returns:
        None where either metric is undefined.

    Raises:
        ValueError: a task has different numbers of rows in the two.
    """
    if _row_counts(first) != _row_counts(second):
        raise ValueError(
            f"paired bootstrap: {_row_counts(first)} rows against {_row_counts(second)}; score the same rows"
        )
    value = minus(metric(cell_means(first)), metric(cell_means(second)))
    if value is None:
        return None
    drawn = [resampled(cells, seed=seed) for cells in (first, second)]
    return percentiles(value, [minus(metric(a), metric(b)) for a, b in zip(*drawn, strict=True)])


def over_seeds(values: Sequence[float | None]) -> Spread | None:
    """Mean, standard deviation and range over seeds; None without values, and if any is undefined."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    deviation = statistics.stdev(known) if len(known) > 1 else None
    return Spread(math.fsum(known) / len(known), deviation, min(known), max(known), len(known))


def cell_means(cells: Cells) -> list[list[float | None]]:
    """The accuracy matrix of per-row scores."""
    return [[math.fsum(rows) / len(rows) if rows else None for rows in line] for line in cells]


def _row_counts(cells: Cells) -> list[int]:
    """Test rows of each task.

    Raises:
        ValueError: two stages scored different numbers of rows of a task.
    """
    counts = []
    for i in range(len(cells[0]) if cells else 0):
        found = {len(line[i] or ()) for line in cells} - {0}
        if len(found) > 1:
            raise ValueError(f"task {i + 1}: stages scored {sorted(found)} rows, expected the same rows at every stage")
        counts.append(found.pop() if found else 0)
    return counts


def resampled(
    cells: Cells, *, seed: int, resamples: int = RESAMPLES, places: Sequence[int] | None = None
) -> list[list[list[float | None]]]:
    """Accuracy matrices of resampled rows (see `metric_interval`).

    A task's draws depend on the seed, its place and its number of rows alone. So what several runs over the same tasks
    and rows give can be averaged or subtracted matrix by matrix: what they share is drawn alike. ``places`` says which
    task each column is, where runs have them in different orders; default: 0, 1, 2, ...
    """
    means_TIS: NDArray[np.float64] = np.full((len(cells), len(cells[0]), resamples), np.nan)
    for i, count in enumerate(_row_counts(cells)):
        if not count:
            continue
        generator = np.random.default_rng([seed, i if places is None else places[i]])
        times_SN = generator.multinomial(count, np.full(count, 1 / count), size=resamples)
        for t, line in enumerate(cells):
            if line[i]:
                means_TIS[t, i] = times_SN @ np.asarray(line[i], dtype=np.float64) / count
    scored = [[bool(rows) for rows in line] for line in cells]
    return [
        [
            [value if known else None for value, known in zip(*both, strict=True)]
            for both in zip(lines, scored, strict=True)
        ]
        for lines in means_TIS.transpose(2, 0, 1).tolist()
    ]


def percentiles(value: float, drawn: Sequence[float | None], level: float = 0.95) -> Interval | None:
    """The interval around ``value`` that covers ``level`` of the resamples; None if the metric is undefined in one."""
    known = [draw for draw in drawn if draw is not None]
    if len(known) < len(drawn):
        return None
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high), level)
