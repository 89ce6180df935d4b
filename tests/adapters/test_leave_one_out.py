"""Leaving a row out in closed form gives what keys that were made without it say of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from amlora_dist.adapters.keyed_router import keyed_router
from amlora_dist.adapters.keys import KeyRule, RouterKeys, covariance_of, fit, keys_under, left_out_rows, make_keys
from amlora_dist.adapters.settings import GateSettings
from amlora_dist.adapters.statistics import HeldOut, Sample, TaskStatistics

LABELS = (3, 2, 0)


def rows_of(task: int, count: int, width: int, seed: int = 0) -> tuple[Tensor, list[int]]:
    """Rows of a task and the places of their labels, -1 of free text."""
    draw = torch.Generator().manual_seed(10 * task + seed)
    labels = [row % LABELS[task] if LABELS[task] else -1 for row in range(count)]
    spread = torch.linspace(0.2, 3.0, width)
    rows = torch.randn(count, width, generator=draw) * spread
    rows[:, task] += 2.0
    for row, label in enumerate(labels):
        rows[row, 3 + label] += 1.5 * (label >= 0)
    return rows, labels


def made(task: int, rows: Tensor, labels: list[int], *, sample: bool = True) -> TaskStatistics:
    one = TaskStatistics.from_features(f"task{task}", rows, [max(label, 0) for label in labels], LABELS[task])
    return replace(one, sample=Sample(rows, torch.tensor(labels)) if sample else None)


def bank(width: int, count: int) -> list[TaskStatistics]:
    return [made(task, *rows_of(task, count, width)) for task in range(3)]


def without(task: int, row: int, width: int, count: int) -> list[TaskStatistics]:
    """The bank as if one row of a task had not been there."""
    parts = []
    for place in range(3):
        rows, labels = rows_of(place, count, width)
        if place == task:
            kept = [n for n in range(count) if n != row]
            rows, labels = rows[kept], [labels[n] for n in kept]
        parts.append(made(place, rows, labels))
    return parts


def scatter_of(statistics: list[TaskStatistics], rule: KeyRule) -> Tensor:
    rows = torch.cat([one.factor if rule == "label" else one.task_factor for one in statistics])
    return rows.T @ rows


def under_the_same_diagonal(
    statistics: list[TaskStatistics], counted: list[TaskStatistics], rule: KeyRule, eps: float
) -> RouterKeys:
    """Keys of ``statistics``, whose scatter is shrunk to the diagonal of that of ``counted``; by an inverse, fp64."""
    before = scatter_of(counted, rule).diag().diag()
    sigma = ((1 - eps) * scatter_of(statistics, rule) + eps * before) / sum(s.count for s in statistics)
    keys = make_keys(statistics, rule, eps)
    means = torch.stack([
        s.mean if label < 0 else s.by_label.means[label]  # type: ignore[union-attr]
        for s, label in ((statistics[task], label) for task, label in zip(keys.task, keys.label, strict=True))
    ])  # fmt: skip
    weights = means @ torch.linalg.inv(sigma)
    return replace(keys, weights=weights, bias=-0.5 * (weights * means).sum(dim=1))


@pytest.mark.parametrize("rule", ["label", "task"])
@pytest.mark.parametrize(("width", "count"), [(8, 12), (60, 12)], ids=["dense", "fewer rows than features"])
def test_a_row_left_out_in_closed_form_is_scored_as_by_keys_made_without_it(rule: KeyRule, width: int, count: int) -> None:
    """The diagonal held fixed: equal to rounding. All made again: close, for a row's share of the diagonal is small."""
    eps, statistics = 0.3, bank(width, count)
    covariance = covariance_of(statistics, rule, eps)
    keys = keys_under(covariance, statistics, rule)
    found = left_out_rows(statistics, rule, covariance, keys)
    assert [len(one.labels) for one in found] == [count] * 3
    counted, refitted = [], []
    for one in found:
        for row in range(count):
            others, text = without(one.task, row, width, count), rows_of(one.task, count, width)[0][row : row + 1]
            exact = under_the_same_diagonal(others, statistics, rule, eps).scores(text, 1.0)[0]
            torch.testing.assert_close(one.scores[row], exact, rtol=1e-9, atol=1e-8)
            fresh = make_keys(others, rule, eps).scores(text, 1.0)[0]
            counted.append(keys.scores(text, 1.0)[0] - fresh)
            refitted.append(one.scores[row] - fresh)
    apart = torch.cat(refitted).abs().mean() / torch.cat(counted).abs().mean()
    assert float(apart) < 0.35, "most of what the row itself added is taken away"


def test_keys_of_other_texts_are_scored_as_under_the_covariance_without_the_row() -> None:
    width, count, eps = 8, 12, 0.3
    statistics = bank(width, count)
    covariance = covariance_of(statistics, "label", eps)
    generic = torch.randn(4, width, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    weights = covariance.solve(generic)
    (one, *_) = left_out_rows(statistics, "label", covariance, keys_under(covariance, statistics, "label"))
    found = one.left_out.scores(weights, -0.5 * (weights * generic).sum(dim=1))
    rows, labels = rows_of(0, count, width)
    apart = rows[5].double() - statistics[0].by_label.means[labels[5]]  # type: ignore[union-attr]
    size = count // 3
    scatter = scatter_of(statistics, "label")
    less = scatter - size / (size - 1) * torch.outer(apart, apart)
    sigma = ((1 - eps) * less + eps * scatter.diag().diag()) / (3 * count - 1)
    solved = generic @ torch.linalg.inv(sigma)
    wanted = solved @ rows[5].double() - 0.5 * (solved * generic).sum(dim=1)
    torch.testing.assert_close(found[5], wanted, rtol=1e-9, atol=1e-8)


def test_the_only_row_of_a_label_is_passed_over() -> None:
    rows, _ = rows_of(0, 7, 8)
    lonely = made(0, rows, [0, 0, 0, 1, 1, 1, 2])
    statistics = [lonely, made(1, *rows_of(1, 6, 8))]
    covariance = covariance_of(statistics, "label", 0.3)
    keys = keys_under(covariance, statistics, "label")
    found = left_out_rows(statistics, "label", covariance, keys)
    assert found[0].left_out.places.tolist() == [0, 1, 2, 3, 4, 5] and 2 not in found[0].labels.tolist()
    assert all(bool(torch.isfinite(one.scores).all()) for one in found)
    whole = covariance_of(statistics, "task", 0.3)
    of_tasks = left_out_rows(statistics, "task", whole, keys_under(whole, statistics, "task"))
    assert len(of_tasks[0].labels) == 7, "the task's key has other rows"


def test_equal_rows_have_no_spread_and_are_left_out_of_their_mean_alone() -> None:
    same = torch.ones(4, 8)
    statistics = [made(2, same, [-1] * 4), made(2, 3 * same, [-1] * 4)]
    covariance = covariance_of(statistics, "label", 0.3)
    keys = keys_under(covariance, statistics, "label")
    for one in left_out_rows(statistics, "label", covariance, keys):
        torch.testing.assert_close(one.scores, keys.scores((same, 3 * same)[one.task], 1.0))


def with_held(one: TaskStatistics, task: int, width: int) -> TaskStatistics:
    rows, labels = rows_of(task, 12, width, seed=5)
    return replace(one, held=HeldOut(rows, torch.tensor(labels)))


def test_samples_set_the_thresholds_and_nothing_else_of_a_router() -> None:
    width = 60
    plain = [with_held(replace(one, sample=None), task, width) for task, one in enumerate(bank(width, 24))]
    sampled = [replace(one, sample=more.sample) for one, more in zip(plain, bank(width, 24), strict=True)]
    background = {"far": torch.full((width,), -4.0), "other": torch.full((width,), 5.0)}
    gate = GateSettings(abstention=True)
    before, after = (
        keyed_router(s, rule="label", shrinkage=None, gate=gate, background=background, label_keys="stage")
        for s in (plain, sampled)
    )
    assert before.foreign_above != after.foreign_above
    assert {n for n, t in before.tensors().items() if not torch.equal(t, after.tensors()[n])} == set()
    assert before.settings() | {"foreign_above": None} == after.settings() | {"foreign_above": None}


def test_thresholds_lose_the_share_of_new_rows_that_was_asked_better_than_those_of_few_held_out_rows() -> None:
    """Sixty features, twelve held-out rows a task, over many draws: the error of the share lost is smaller."""
    width = 60
    errors: tuple[list[float], list[float]] = ([], [])
    background = {f"part{n}": torch.randn(width, generator=torch.Generator().manual_seed(90 + n)) for n in range(3)}
    for draw in range(10):
        new = torch.cat([rows_of(task, 200, width, seed=1000 + draw)[0] for task in range(3)])
        kept = [made(task, *rows_of(task, 40, width, seed=100 + draw)) for task in range(3)]
        sampled = [
            replace(one, held=HeldOut(rows, torch.tensor(labels)))
            for task, one in enumerate(kept)
            for rows, labels in [rows_of(task, 12, width, seed=500 + draw)]
        ]
        for found, statistics in zip(errors, ([replace(s, sample=None) for s in sampled], sampled), strict=True):
            router = keyed_router(statistics, rule="label", shrinkage=0.3, gate=GateSettings(), background=background)
            above = dict(router.foreign_above)[0.03]
            found.append(float((router.foreign(new) > above).double().mean()) - 0.03)
    few, more = (torch.tensor(found).square().mean().sqrt() for found in errors)
    assert float(more) < 0.8 * float(few)


def test_left_out_rows_choose_settings_only_where_they_are_asked_to() -> None:
    width = 60
    statistics = [with_held(one, task, width) for task, one in enumerate(bank(width, 24))]
    without_any = [replace(one, sample=None) for one in statistics]
    shrinkages = (0.1, 0.7)
    chosen, before = fit(statistics, "label", shrinkages), fit(without_any, "label", shrinkages)
    assert (chosen.temperature, chosen.shrinkage) == (before.temperature, before.shrinkage)
    assert torch.equal(chosen.keys.weights, before.keys.weights)
    few, more = (fit(statistics, "label", (0.3,), None, also) for also in (False, True))
    assert few.temperature != more.temperature
    routers = [
        keyed_router(statistics, rule="label", shrinkage=None, gate=GateSettings(), label_keys="stage", leave_one_out=also)
        for also in (False, True, False)
    ]
    assert torch.equal(routers[0].tensors()["own.weights"], routers[2].tensors()["own.weights"])
    assert not torch.equal(routers[0].tensors()["own.weights"], routers[1].tensors()["own.weights"])
