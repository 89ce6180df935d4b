"""Continual-learning metrics of an accuracy matrix; each has one formula here and names its source.

The matrix R has a row for every finished stage, t = 0..n, and a column for every task of the sequence, i = 1..T:
``matrix[t][i - 1]`` is the score on task i after stage t, and row 0 is the untrained base model. A cell that was not
scored is None. Scores may be on any scale (0–1 here); higher is better.

While a run is under way n < T, and every metric is that of the sequence of the first n tasks. What is undefined,
because a cell it needs was not scored or because there are too few tasks, is None: never 0, which would be a result.

Other projects compute other things under the same names; ``tests/evaluation/test_metrics.py`` puts them side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Matrix = Sequence[Sequence[float | None]]
MatrixMetric = Callable[[Matrix], float | None]


def average_performance(matrix: Matrix) -> float | None:
    """AP = 1/n Σ_{i<=n} R[n,i]: mean score after the last stage.

    Source: "average accuracy" of Lopez-Paz and Ranzato 2017 (GEM). Also called AA, ACC or "last".
    """
    last = stages(matrix)
    return mean([cell(matrix, last, i) for i in range(1, last + 1)])


def average_incremental_performance(matrix: Matrix) -> float | None:
    """1/n Σ_{t<=n} 1/t Σ_{i<=t} R[t,i]: mean over the stages of the average performance at that stage.

    Source: "average incremental accuracy" of Rebuffi et al. 2017 (iCaRL).
    """
    return mean([average_performance(matrix[: t + 1]) for t in range(1, stages(matrix) + 1)])


def backward_transfer(matrix: Matrix) -> float | None:
    """BWT = 1/(n-1) Σ_{i<n} (R[n,i] - R[i,i]): what later stages did to a task since it was learned.

    Negative values are forgetting; positive ones are kept. Undefined for fewer than two stages.
    Source: Lopez-Paz and Ranzato 2017.
    """
    last = stages(matrix)
    return mean([minus(cell(matrix, last, i), cell(matrix, i, i)) for i in range(1, last)])


def forgetting(matrix: Matrix) -> float | None:
    """F = 1/(n-1) Σ_{i<n} (max_{i<=t<n} R[t,i] - R[n,i]): from a task's best earlier score to its last one.

    Negative where the last stage gives the best score. Undefined for fewer than two stages, and if any cell between a
    task's own stage and the last was not scored.
    Source: Chaudhry et al. 2018 (Riemannian Walk), with the maximum from the task's own stage on.
    """
    return mean(forgetting_by_task(matrix))


def forgetting_by_task(matrix: Matrix) -> list[float | None]:
    """The terms of `forgetting`, for tasks 1..n-1."""
    last = stages(matrix)
    return [minus(best([cell(matrix, t, i) for t in range(i, last)]), cell(matrix, last, i)) for i in range(1, last)]


def forward_transfer_gem(matrix: Matrix) -> float | None:
    """FWT = 1/(n-1) Σ_{2<=i<=n} (R[i-1,i] - R[0,i]): what earlier stages give a task before it is learned.

    Needs the untrained row, and each task scored at the stage before its own (``evaluate: seen+next``).
    Source: Lopez-Paz and Ranzato 2017, with b_i the base model's score.
    """
    return mean([minus(cell(matrix, i - 1, i), cell(matrix, 0, i)) for i in range(2, stages(matrix) + 1)])


def forward_transfer_single(matrix: Matrix, single: Sequence[float | None]) -> float | None:
    """1/n Σ_{i<=n} (R[i,i] - single_i): what earlier stages give a task while it is learned.

    ``single[i - 1]`` is the score of task i trained alone (our own ``per_task`` runs, never a constant).
    Source: "intransigence" of Chaudhry et al. 2018, with the opposite sign and the reference trained on
    task i alone.
    """
    last = stages(matrix)
    if len(single) < last:
        raise ValueError(f"single: found {len(single)} scores, expected one for each of the {last} tasks learned")
    return mean([minus(cell(matrix, i, i), single[i - 1]) for i in range(1, last + 1)])


def learning_accuracy(matrix: Matrix) -> float | None:
    """LA = 1/n Σ_{i<=n} R[i,i]: mean score right after learning, without forgetting.

    Source: Riemer et al. 2019 (MER).
    """
    return mean([cell(matrix, i, i) for i in range(1, stages(matrix) + 1)])


def oracle_gap_recovered(found: float | None, uniform: float | None, oracle: float | None) -> float | None:
    """(AP - AP_uniform) / (AP_oracle - AP_uniform): the router's share of what routing can give at all.

    1 is a router that never errs, 0 one that is worth equal weights; it may lie outside. Undefined if the oracle is no
    better than equal weights. Source: this project.
    """
    if found is None or uniform is None or oracle is None or oracle <= uniform:
        return None
    return (found - uniform) / (oracle - uniform)


METRICS: dict[str, MatrixMetric] = {
    "average_performance": average_performance,
    "average_incremental_performance": average_incremental_performance,
    "backward_transfer": backward_transfer,
    "forgetting": forgetting,
    "forward_transfer_gem": forward_transfer_gem,
    "learning_accuracy": learning_accuracy,
}
"""Every metric that needs nothing but the matrix, by the name under which it is logged."""


def summary(matrix: Matrix, single: Sequence[float | None] | None = None) -> dict[str, float | None]:
    """Every metric by name; ``forward_transfer_single`` is None without ``single``."""
    found = {name: metric(matrix) for name, metric in METRICS.items()}
    found["forward_transfer_single"] = None if single is None else forward_transfer_single(matrix, single)
    return found


def stages(matrix: Matrix) -> int:
    """n, the number of finished stages.

    Raises:
        ValueError: no row 0, rows of different lengths, more stages than tasks, or a cell that is not a finite number.
    """
    if not matrix:
        raise ValueError("accuracy matrix: no rows, expected at least row 0 (the untrained model, None if not scored)")
    widths = sorted({len(row) for row in matrix})
    if len(widths) > 1:
        raise ValueError(f"accuracy matrix: rows of {widths} columns, expected one length")
    if len(matrix) - 1 > widths[0]:
        raise ValueError(
            f"accuracy matrix: {len(matrix) - 1} stages for {widths[0]} tasks; is row 0 the untrained model?"
        )
    if not all(score is None or math.isfinite(score) for row in matrix for score in row):
        raise ValueError("accuracy matrix: a score is not a finite number; use None for what was not scored")
    return len(matrix) - 1


def cell(matrix: Matrix, t: int, i: int) -> float | None:
    """R[t,i] with i counted from 1."""
    return matrix[t][i - 1]


def minus(first: float | None, second: float | None) -> float | None:
    """first - second, None if either is."""
    return None if first is None or second is None else first - second


def mean(values: Sequence[float | None]) -> float | None:
    """Mean; None of nothing, and if any value is None."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(values) else None


def best(values: Sequence[float | None]) -> float | None:
    """Maximum; None of nothing, and if any value is None."""
    known = [value for value in values if value is not None]
    return max(known) if known and len(known) == len(values) else None
