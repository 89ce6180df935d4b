"""Bootstrap intervals are seeded, paired where rows are shared, and honest about what is undefined."""

from __future__ import annotations

import math

import numpy as np
import pytest

from amlora_dist.evaluation.intervals import (
    Interval,
    Spread,
    cell_means,
    difference_interval,
    mean_interval,
    metric_interval,
    over_seeds,
)
from amlora_dist.evaluation.metrics import average_performance, backward_transfer, forgetting


def rows(share: float, count: int = 200) -> list[float]:
    return [1.0] * round(share * count) + [0.0] * (count - round(share * count))


def test_the_interval_of_a_mean_is_that_of_the_normal_approximation() -> None:
    found = mean_interval(rows(0.7), seed=0)
    assert found is not None
    half = 1.96 * math.sqrt(0.7 * 0.3 / 200)
    assert found.value == pytest.approx(0.7)
    assert (found.low, found.high) == pytest.approx((0.7 - half, 0.7 + half), abs=0.012)


def test_the_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    scores = np.random.default_rng(5).random(40).tolist()
    assert mean_interval(scores, seed=1) == mean_interval(scores, seed=1)
    assert mean_interval(scores, seed=1) != mean_interval(scores, seed=2)


def test_rows_that_never_differ_leave_no_doubt() -> None:
    assert mean_interval([1.0] * 20, seed=0) == Interval(1.0, 1.0, 1.0, 0.95)
    assert mean_interval([], seed=0) is None


def test_a_wider_level_gives_a_wider_interval() -> None:
    narrow, wide = (mean_interval(rows(0.5), seed=0, level=level) for level in (0.5, 0.99))
    assert narrow is not None and wide is not None
    assert wide.low < narrow.low < narrow.high < wide.high


def test_backward_transfer_is_paired_over_stages() -> None:
    scores = rows(0.6)
    cells = [[None, None], [scores, None], [scores, rows(0.9)]]
    assert metric_interval(cells, backward_transfer, seed=0) == Interval(0.0, 0.0, 0.0, 0.95)


def test_the_interval_of_an_average_shrinks_with_the_number_of_tasks() -> None:
    one = metric_interval([[None], [rows(0.5)]], average_performance, seed=0)
    line = [rows(0.5)] * 4
    four = metric_interval([[None] * 4] * 4 + [line], average_performance, seed=0)
    assert one is not None and four is not None
    assert (one.high - one.low) / (four.high - four.low) == pytest.approx(2.0, abs=0.3)


def test_a_metric_that_is_undefined_has_no_interval() -> None:
    cells = [[None, None], [rows(0.6), None], [None, rows(0.9)]]
    assert metric_interval(cells, forgetting, seed=0) is None
    assert metric_interval(cells, average_performance, seed=0) is None


def test_a_paired_difference_is_surer_than_two_intervals() -> None:
    weaker = rows(0.6)
    better = [1.0] * 10 + weaker[10:120] + [1.0] * 10 + weaker[130:]
    found = difference_interval([[None], [better]], [[None], [weaker]], average_performance, seed=0)
    alone = mean_interval(weaker, seed=0)
    assert found is not None and alone is not None
    assert found.value == pytest.approx(0.05)
    assert found.low > 0
    assert found.high - found.low < (alone.high - alone.low) / 2


def test_pairs_need_the_same_rows() -> None:
    with pytest.raises(ValueError, match=r"\[200\] rows against \[100\]"):
        difference_interval([[None], [rows(0.6)]], [[None], [rows(0.6, 100)]], average_performance, seed=0)
    with pytest.raises(ValueError, match="expected the same rows at every stage"):
        metric_interval([[rows(0.6)], [rows(0.6, 100)]], average_performance, seed=0)


def test_cells_become_the_accuracy_matrix() -> None:
    assert cell_means([[None, [1.0, 0.0]], [[], [0.5]]]) == [[None, 0.5], [None, 0.5]]


def test_the_spread_over_seeds_is_the_sample_deviation() -> None:
    assert over_seeds([0.7, 0.8, 0.9]) == Spread(pytest.approx(0.8), pytest.approx(0.1), 0.7, 0.9, 3)
    assert over_seeds([0.7]) == Spread(0.7, None, 0.7, 0.7, 1)
    assert over_seeds([]) is None
    assert over_seeds([0.7, None]) is None
