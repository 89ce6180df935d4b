"""Backward transfer row by row: what is counted is what a stage did, and the line of all tasks is BWT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from amlora_dist.evaluation.intervals import Cells, cell_means, metric_interval
from amlora_dist.evaluation.metrics import backward_transfer
from amlora_dist.evaluation.scoring import Prediction
from amlora_dist.evaluation.stage_changes import StageAnswers, stage_changes

TASKS = ["mood", "route", "topic"]


def said(rows: str, routes: str) -> list[Prediction]:
    """Rows whose right answer is ``a``: the answer of each and the first letter of the task that it went to."""
    names = {task[0]: task for task in TASKS}
    return [
        Prediction(row=n, answer="a", output="?", ended=True, correct=float(given == "a"), served=given, route=names.get(to))
        for n, (given, to) in enumerate(zip(rows, routes, strict=True), start=1)
    ]


def cells_of(answers: StageAnswers) -> Cells:
    return [[None] * 3, *([None if rows is None else [p.correct for p in rows] for rows in line] for line in answers)]


def matrix_of(answers: StageAnswers) -> list[list[float | None]]:
    return cell_means(cells_of(answers))


@pytest.fixture
def answers() -> list[list[list[Prediction] | None]]:
    return [
        [said("aaaabb", "mmmmmm"), None, None],
        [said("aaabba", "mmmrmr"), said("aaaaab", "rrrrrr"), None],  # one lost by a route, one won by one
        [said("acabba", "mttrmr"), said("aaaaab", "rrrrrr"), said("aaaaaa", "tttttt")],  # rerouted twice, changed once
    ]


def test_a_stage_is_compared_with_the_one_before_and_counts_what_a_route_did(
    answers: list[list[list[Prediction] | None]],
) -> None:
    found = stage_changes(TASKS, matrix_of(answers), answers, seed=0)
    assert [(one.stage, one.task) for one in found] == [(2, "mood"), (2, None), (3, "mood"), (3, "route"), (3, None)]
    second, _, third, still, whole = found
    assert (second.before, second.after, second.difference) == (pytest.approx(4 / 6), pytest.approx(4 / 6), 0.0)
    assert second.counts() == {
        "changed": 2, "rerouted": 2, "worse": 1, "worse, rerouted": 1, "better": 1, "better, rerouted": 1,
    }  # fmt: skip
    assert second.interval is not None and second.interval.low < 0 < second.interval.high
    assert third.difference == pytest.approx(-1 / 6) and third.counts()["worse, rerouted"] == 1
    assert third.answers is not None and [one.before.row for one in third.answers] == [2], "row 3 has the same words"
    assert still.counts() == dict.fromkeys(still.counts(), 0) and still.interval is not None
    assert (still.interval.low, still.interval.high) == (0.0, 0.0), "the same rows are drawn on both sides"
    assert whole.counts()["changed"] == 3, "against each task's own stage: rows 2, 4 and 6 of mood"


def test_the_line_of_all_earlier_tasks_is_the_backward_transfer_with_its_interval(
    answers: list[list[list[Prediction] | None]],
) -> None:
    matrix = matrix_of(answers)
    cells = cells_of(answers)
    whole = [one for one in stage_changes(TASKS, matrix, answers, seed=3) if one.task is None]
    assert [one.stage for one in whole] == [2, 3]
    for one in whole:
        assert one.difference == pytest.approx(backward_transfer(matrix[: one.stage + 1]))
        wanted = metric_interval(cells[: one.stage + 1], backward_transfer, seed=3)
        assert one.interval is not None and wanted is not None
        assert (one.interval.low, one.interval.high) == pytest.approx((wanted.low, wanted.high))


def test_scores_without_rows_have_no_interval_and_cells_that_were_not_scored_no_line(
    answers: list[list[list[Prediction] | None]],
) -> None:
    matrix = matrix_of(answers)
    nothing: list[list[Sequence[Prediction] | None]] = [[None] * 3 for _ in range(3)]
    found = stage_changes(TASKS, matrix, nothing, seed=0)
    assert [one.difference for one in found] == [
        one.difference for one in stage_changes(TASKS, matrix, answers, seed=0)
    ]
    assert all(one.interval is None and set(one.counts().values()) == {None} for one in found)
    last_only = [[None] * 3, [None] * 3, [None] * 3, matrix[3]]
    assert stage_changes(TASKS, last_only, nothing, seed=0) == []


def test_without_a_router_nothing_is_rerouted_and_other_rows_are_refused(
    answers: list[list[list[Prediction] | None]],
) -> None:
    plain: list[list[list[Prediction] | None]] = [
        [None if rows is None else [replace(one, route=None) for one in rows] for rows in line] for line in answers
    ]
    first = stage_changes(TASKS, matrix_of(plain), plain, seed=0)[0].counts()
    assert first["changed"] == 2 and first["rerouted"] is None
    plain[1][0] = [replace(one, row=one.row + 1) for one in plain[1][0] or []]
    with pytest.raises(ValueError, match="mood: stages answered different rows"):
        stage_changes(TASKS, matrix_of(plain), plain, seed=0)
