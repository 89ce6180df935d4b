"""Metrics against matrices worked out by hand, and against the formulas that other projects use."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from amlora_dist.evaluation import metrics

UNTRAINED = [0.05, 0.10, 0.15, 0.20]
LEARNED = [
    [0.90, 0.30, 0.20, 0.10],
    [0.70, 0.80, 0.40, 0.20],
    [0.60, 0.85, 0.75, 0.30],
    [0.65, 0.90, 0.70, 0.88],
]
FOUR_TASKS = [UNTRAINED, *LEARNED]
TWO_TASKS = [[0.0, 0.1], [0.8, 0.3], [0.6, 0.9]]


@pytest.mark.parametrize(
    ("metric", "four", "two"),
    [
        # four: (.65 + .90 + .70 + .88) / 4; two: (.6 + .9) / 2
        (metrics.average_performance, 0.7825, 0.75),
        # four: (.90 + .75 + .7333 + .7825) / 4; two: (.8 + .75) / 2
        (metrics.average_incremental_performance, (0.90 + 0.75 + 2.2 / 3 + 0.7825) / 4, 0.775),
        # four: (-.25 + .10 - .05) / 3; two: .6 - .8
        (metrics.backward_transfer, -0.2 / 3, -0.2),
        # four: ((.90 - .65) + (.85 - .90) + (.75 - .70)) / 3; two: .8 - .6
        (metrics.forgetting, 0.25 / 3, 0.2),
        # four: ((.30 - .10) + (.40 - .15) + (.30 - .20)) / 3; two: .3 - .1
        (metrics.forward_transfer_gem, 0.55 / 3, 0.2),
        # four: (.90 + .80 + .75 + .88) / 4; two: (.8 + .9) / 2
        (metrics.learning_accuracy, 0.8325, 0.85),
    ],
)
def test_metrics_equal_the_values_worked_out_by_hand(metric: metrics.Metric, four: float, two: float) -> None:
    assert metric(FOUR_TASKS) == pytest.approx(four)
    assert metric(TWO_TASKS) == pytest.approx(two)


def test_forward_transfer_against_single_tasks_uses_the_scores_it_is_given() -> None:
    # ((.90 - .90) + (.80 - .85) + (.75 - .60) + (.88 - .80)) / 4
    assert metrics.forward_transfer_single(FOUR_TASKS, [0.90, 0.85, 0.60, 0.80]) == pytest.approx(0.045)
    assert metrics.forward_transfer_single(FOUR_TASKS, [0.90, None, 0.60, 0.80]) is None
    with pytest.raises(ValueError, match="found 3 scores"):
        metrics.forward_transfer_single(FOUR_TASKS, [0.9, 0.8, 0.7])


def test_forgetting_by_task_keeps_the_sign_of_a_task_that_got_better() -> None:
    assert metrics.forgetting_by_task(FOUR_TASKS) == pytest.approx([0.25, -0.05, 0.05])


def diagonal_differences(last: list[float]) -> list[float]:
    return [last[i] - LEARNED[i][i] for i in range(3)]


# What other projects compute under these names (their formulas, read from their public code), on LEARNED.
ELSEWHERE: dict[str, tuple[Callable[[], float], float]] = {
    "backward transfer, mammoth": (lambda: sum(diagonal_differences(LEARNED[-1])) / 3, -0.0667),
    "backward transfer, SAPT and GainLoRA: divided by T": (lambda: sum(diagonal_differences(LEARNED[-1])) / 4, -0.0500),
    "backward transfer, TreeLoRA: gains clipped, divided by T": (
        lambda: sum(min(d, 0.0) for d in diagonal_differences(LEARNED[-1])) / 4,
        -0.0750,
    ),
    "forgetting, SAPT and GainLoRA: best earlier minus last": (
        lambda: sum(max(row[i] for row in LEARNED[i:-1]) - LEARNED[-1][i] for i in range(3)) / 3,
        0.0833,
    ),
    "forgetting, mammoth: best including the last, never negative": (
        lambda: sum(max(row[i] for row in LEARNED) - LEARNED[-1][i] for i in range(3)) / 3,
        0.1000,
    ),
    "forgetting, Avalanche: first minus last": (lambda: -sum(diagonal_differences(LEARNED[-1])) / 3, 0.0667),
    "forward transfer, SAPT: diagonal minus 50.94": (
        lambda: sum(100 * LEARNED[i][i] for i in range(4)) / 4 - 50.94,
        32.31,
    ),
    "forward transfer, GainLoRA: diagonal minus 0": (lambda: sum(100 * LEARNED[i][i] for i in range(4)) / 4, 83.25),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_other_formulas_give_other_values_on_the_same_matrix(name: str) -> None:
    formula, value = ELSEWHERE[name]
    assert formula() == pytest.approx(value, abs=6e-5)


def test_ours_agree_with_the_formulas_they_cite() -> None:
    assert metrics.backward_transfer(FOUR_TASKS) == pytest.approx(ELSEWHERE["backward transfer, mammoth"][0]())
    cited = ELSEWHERE["forgetting, SAPT and GainLoRA: best earlier minus last"][0]()
    assert metrics.forgetting(FOUR_TASKS) == pytest.approx(cited)


@pytest.mark.parametrize("metric", [metrics.backward_transfer, metrics.forgetting, metrics.forward_transfer_gem])
def test_transfer_and_forgetting_are_undefined_for_one_task(metric: metrics.Metric) -> None:
    assert metric([[0.1], [0.9]]) is None


def test_nothing_is_defined_before_the_first_stage() -> None:
    assert set(metrics.summary([UNTRAINED], single=[0.9] * 4).values()) == {None}


def test_a_run_under_way_is_measured_on_the_tasks_it_has_learned() -> None:
    under_way = FOUR_TASKS[:3]
    assert metrics.average_performance(under_way) == pytest.approx(0.75)
    assert metrics.backward_transfer(under_way) == pytest.approx(-0.2)
    assert metrics.forward_transfer_gem(under_way) == pytest.approx(0.2)
    assert metrics.forward_transfer_single(under_way, [0.8, 0.8]) == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("missing", "undefined"),
    [
        ((0, 2), {"forward_transfer_gem"}),
        ((1, 2), {"forward_transfer_gem"}),
        ((1, 4), set()),
        (
            (2, 2),
            {"average_incremental_performance", "backward_transfer", "forgetting", "learning_accuracy",
             "forward_transfer_single"},
        ),
        ((3, 1), {"average_incremental_performance", "forgetting"}),
        (
            (4, 1),
            {"average_performance", "average_incremental_performance", "backward_transfer", "forgetting"},
        ),
    ],
)  # fmt: skip
def test_an_unscored_cell_leaves_exactly_those_metrics_undefined_that_need_it(
    missing: tuple[int, int], undefined: set[str]
) -> None:
    matrix: list[list[float | None]] = [list(row) for row in FOUR_TASKS]
    matrix[missing[0]][missing[1] - 1] = None
    found = metrics.summary(matrix, single=[0.9, 0.8, 0.7, 0.6])
    assert {name for name, value in found.items() if value is None} == undefined


def test_a_method_that_is_scored_once_at_the_end_has_its_average_performance() -> None:
    matrix: list[list[float | None]] = [[None, None], [None, None], [0.5, 0.7]]
    found = metrics.summary(matrix)
    assert found.pop("average_performance") == pytest.approx(0.6)
    assert set(found.values()) == {None}


def test_summary_names_every_metric_once() -> None:
    assert list(metrics.summary(FOUR_TASKS)) == [*metrics.METRICS, "forward_transfer_single"]


@pytest.mark.parametrize(
    ("found", "uniform", "oracle", "share"),
    [
        (0.7, 0.3, 0.8, 0.8),
        (0.8, 0.3, 0.8, 1.0),
        (0.2, 0.3, 0.8, -0.2),
        (0.7, 0.8, 0.8, None),
        (0.7, 0.9, 0.8, None),
        (None, 0.3, 0.8, None),
        (0.7, None, 0.8, None),
        (0.7, 0.3, None, None),
    ],
)
def test_oracle_gap(found: float | None, uniform: float | None, oracle: float | None, share: float | None) -> None:
    assert metrics.oracle_gap_recovered(found, uniform, oracle) == (share if share is None else pytest.approx(share))


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ([], "no rows"),
        ([[0.1, 0.2], [0.3]], r"rows of \[1, 2\] columns"),
        ([*LEARNED, UNTRAINED, UNTRAINED], "5 stages for 4 tasks"),
        ([[0.1], [float("nan")]], "not a finite number"),
    ],
)
def test_a_malformed_matrix_is_refused(matrix: list[list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metrics.average_performance(matrix)


def test_metrics_leave_their_matrix_alone() -> None:
    matrix = [list(row) for row in FOUR_TASKS]
    metrics.summary(matrix)
    assert matrix == FOUR_TASKS
