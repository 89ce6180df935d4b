"""Statistics are exact and order-free, keys equal the dense formula, serving's short forms equal the long ones."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from amlora_dist.adapters import statistics as st
from amlora_dist.adapters.statistics import TEMPERATURES, TaskStatistics
from amlora_dist.errors import BankError, UserError

WIDTH = 24


def features(task: int, rows: int, width: int = WIDTH, spread: float = 1.0) -> Tensor:
    """Rows around a mean that depends on the task, with a covariance far from spherical and a large common offset."""
    generator = torch.Generator().manual_seed(100 + task)
    centre = torch.randn(width, generator=generator, dtype=torch.float64)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / width**0.5
    noise = torch.randn(rows, width, generator=generator, dtype=torch.float64) @ mixing
    return 20 + centre + spread * noise


def bank(tasks: int = 3, rows: int = 60, width: int = WIDTH) -> list[TaskStatistics]:
    return [TaskStatistics.from_features(f"t{t}", features(t, rows + 7 * t, width)) for t in range(tasks)]


def dense_sigma(stats: list[TaskStatistics], shrinkage: float) -> Tensor:
    pooled = sum(s.factor.T @ s.factor for s in stats) / sum(s.count for s in stats)
    return (1 - shrinkage) * pooled + shrinkage * pooled.diagonal().mean() * torch.eye(len(pooled), dtype=torch.float64)


@pytest.mark.parametrize("rows", [5, WIDTH, 200])
def test_the_thin_factor_is_the_scatter_exactly(rows: int) -> None:
    x = features(0, rows)
    stats = TaskStatistics.from_features("t", x)
    centred = x - x.mean(0)
    assert stats.factor.shape == (min(rows, WIDTH), WIDTH)
    assert stats.count == rows and stats.mean.dtype == torch.float64
    torch.testing.assert_close(stats.factor.T @ stats.factor, centred.T @ centred, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("shares", [(90, 10), (1, 1, 98), (0, 100), (33, 33, 34), (0, 0, 100, 0)])
@pytest.mark.parametrize("width", [WIDTH, 150])
def test_parts_of_several_ranks_merge_to_what_one_rank_has_in_any_order(shares: tuple[int, ...], width: int) -> None:
    x = features(0, 100, width)
    whole = TaskStatistics.from_features("t", x)
    parts = [TaskStatistics.from_features("t", part) for part in x.split(shares)]
    for order in (parts, parts[::-1]):
        merged = st.merge(order)
        assert merged.count == 100
        torch.testing.assert_close(merged.mean, whole.mean, atol=1e-10, rtol=0)
        torch.testing.assert_close(
            merged.factor.T @ merged.factor, whole.factor.T @ whole.factor, atol=1e-10, rtol=1e-10
        )


def test_held_out_rows_of_several_ranks_merge_to_what_one_rank_has() -> None:
    earlier, own = bank(3)[:2], bank(3)[2]
    held = features(2, 11, spread=2.0)
    whole = own.with_holdout(held, earlier, 0.1)
    parts = [own.with_holdout(part, earlier, 0.1) for part in held.split([4, 0, 7])]
    merged = st.merge_holdouts(parts)
    assert merged.holdout_count == whole.holdout_count == 11
    torch.testing.assert_close(merged.holdout_nll, whole.holdout_nll, atol=1e-10, rtol=1e-10)
    first, second = (s.holdout_factor for s in (merged, whole))
    assert first is not None and second is not None
    torch.testing.assert_close(first.T @ first, second.T @ second, atol=1e-10, rtol=1e-10)
    assert st.merge_holdouts([own, own]) is own
    with pytest.raises(ValueError, match="equal on all ranks"):
        st.merge_holdouts([whole, earlier[0].with_holdout(held, [], 0.1)])
    with pytest.raises(ValueError, match="without held-out rows"):
        st.merge([whole])


def test_parts_of_different_tasks_do_not_merge() -> None:
    with pytest.raises(ValueError, match="one task"):
        st.merge([TaskStatistics.from_features("a", features(0, 3)), TaskStatistics.from_features("b", features(0, 3))])
    with pytest.raises(ValueError, match="at least one"):
        st.merge([])


def test_statistics_do_not_depend_on_the_order_of_rows() -> None:
    x = features(0, 80)
    shuffled = x[torch.randperm(80, generator=torch.Generator().manual_seed(3))]
    first, second = (TaskStatistics.from_features("t", rows) for rows in (x, shuffled))
    torch.testing.assert_close(first.factor, second.factor, atol=1e-10, rtol=1e-10)


def test_features_that_are_not_finite_are_refused_with_their_number() -> None:
    x = features(0, 5)
    x[3, 2] = math.nan
    with pytest.raises(UserError, match="1 of 5 rows"):
        TaskStatistics.from_features("t", x)


@pytest.mark.parametrize("shrinkage", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("width", [WIDTH, 400], ids=["dense", "low rank"])
def test_keys_equal_the_dense_formula(shrinkage: float, width: int) -> None:
    stats = bank(width=width)
    weights, bias = st.keys(stats, shrinkage)
    inverse = torch.linalg.inv(dense_sigma(stats, shrinkage))
    means = torch.stack([s.mean for s in stats])
    expected = means @ inverse
    assert st.Covariance(stats, shrinkage).low_rank is (width == 400 and shrinkage < 1)
    torch.testing.assert_close(weights, expected, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(bias, -0.5 * (means * expected).sum(1), rtol=1e-9, atol=1e-8)
    assert weights.dtype == bias.dtype == torch.float64


@pytest.mark.parametrize("shrinkage", [0.1, 1.0])
@pytest.mark.parametrize("width", [WIDTH, 400], ids=["dense", "low rank"])
def test_shrinkage_by_feature_equals_the_dense_formula_and_knows_no_scale(shrinkage: float, width: int) -> None:
    stats = bank(width=width)
    scatter = sum((s.factor.T @ s.factor for s in stats), torch.zeros(width, width, dtype=torch.float64))
    scatter = scatter / sum(s.count for s in stats)
    dense = (1 - shrinkage) * scatter + shrinkage * scatter.diag().diag()
    means = torch.stack([s.mean for s in stats])
    covariance = st.Covariance(stats, shrinkage, by_feature=True)
    torch.testing.assert_close(covariance.solve(means), means @ torch.linalg.inv(dense), atol=1e-8, rtol=1e-7)
    torch.testing.assert_close(covariance.between(means), means @ dense @ means.T)
    scale = torch.logspace(-1, 1, width, dtype=torch.float64)
    wide = [TaskStatistics(s.task, s.count, s.mean * scale, s.factor * scale) for s in stats]
    again = st.Covariance(wide, shrinkage, by_feature=True).solve(means * scale)
    torch.testing.assert_close(again * scale, covariance.solve(means), atol=1e-8, rtol=1e-6)


def test_wide_features_need_no_square_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    stats = [TaskStatistics.from_features(f"t{t}", t + torch.randn(10, 8192, generator=generator)) for t in range(3)]
    covariance = st.Covariance(stats, 0.1)
    assert covariance.low_rank and max(covariance.stack.shape[0], *covariance.chol.shape) < 60
    weights, _ = st.keys(stats, 0.1)
    pooled = sum(float(s.factor.square().sum()) for s in stats) / sum(s.count for s in stats)
    back = 0.9 / sum(s.count for s in stats) * (weights @ covariance.stack.T) @ covariance.stack
    torch.testing.assert_close(back + 0.1 * pooled / 8192 * weights, torch.stack([s.mean for s in stats]))


def test_posterior_of_the_keys_is_the_gaussian_one() -> None:
    stats = bank()
    weights, bias = st.keys(stats, 0.1)
    x = torch.cat([features(t, 20) for t in range(3)])
    sigma = dense_sigma(stats, 0.1)
    densities = torch.stack([torch.distributions.MultivariateNormal(s.mean, sigma).log_prob(x) for s in stats], dim=1)
    torch.testing.assert_close(st.posterior(x, weights, bias, 1.0), torch.softmax(densities, 1), atol=1e-8, rtol=1e-6)


def test_shrinkage_zero_with_too_few_rows_is_an_error_that_names_the_key() -> None:
    with pytest.raises(UserError, match=r"router\.shrinkage"):
        st.keys(bank(tasks=2, rows=5), 0.0)


def test_one_row_per_task_routes_to_the_nearest_mean() -> None:
    stats = [TaskStatistics.from_features(f"t{t}", features(t, 1)) for t in range(3)]
    weights, bias = st.keys(stats, 0.1)
    chosen = st.posterior(torch.cat([features(t, 1) for t in range(3)]), weights, bias, 1.0).argmax(1)
    assert chosen.tolist() == [0, 1, 2]


def test_equal_rows_do_not_blow_up_the_keys() -> None:
    row = torch.full((1, WIDTH), 0.1, dtype=torch.float64)
    stats = [TaskStatistics.from_features(f"t{t}", (row * (t + 1)).repeat(7, 1)) for t in range(2)]
    weights, _ = st.keys(stats, 0.1)
    assert weights.abs().max() < 1.0


def test_a_task_without_rows_or_over_other_features_is_named() -> None:
    with pytest.raises(UserError, match=r"router\.holdout"):
        st.keys([TaskStatistics.from_features("t", torch.zeros(0, 4))], 0.1)
    with pytest.raises(UserError, match="one base model"):
        st.keys([*bank(1), *bank(1, width=WIDTH + 1)], 0.1)


def test_statistics_survive_storage_exactly() -> None:
    bare = bank(1)[0]
    for stats in (bare, bare.with_holdout(features(0, 9), [], 0.1)):
        again = TaskStatistics.from_tensors("t0", stats.tensors())
        assert (again.task, again.count, again.holdout_count) == ("t0", stats.count, stats.holdout_count)
        assert (again.holdout_factor is None) == (stats.holdout_factor is None)
        stored = again.tensors()
        assert all(torch.equal(stored[name], tensor) for name, tensor in stats.tensors().items())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("mean", None, "no tensor mean"),
        ("temperatures", torch.ones(3), "temperature grid"),
        ("mean", torch.zeros(3), "do not fit"),
        ("factor", torch.full((2, WIDTH), math.nan), "NaN"),
        ("count", torch.tensor(0), "count 0"),
        ("holdout_factor", torch.zeros(2, 3), "holdout_factor"),
    ],
)
def test_damaged_statistics_are_refused(name: str, value: Tensor | None, message: str) -> None:
    tensors = bank(1)[0].tensors()
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    with pytest.raises(BankError, match=message):
        TaskStatistics.from_tensors("t0", tensors)


def with_holdout(rows: int, tasks: int, width: int) -> list[TaskStatistics]:
    """A bank grown as a run grows it: each stage scores its own held-out rows with the keys of that stage."""
    stats: list[TaskStatistics] = []
    for t in range(tasks):
        x = features(t, rows + 40, width, spread=3.0)
        new = TaskStatistics.from_features(f"t{t}", x[:rows])
        stats.append(new.with_holdout(x[rows:], stats, 0.1))
    return stats


def test_calibration_takes_the_temperature_that_held_out_rows_prefer() -> None:
    stats = with_holdout(rows=12, tasks=4, width=60)
    total = sum(s.holdout_nll for s in stats)
    chosen = st.calibrate(stats)
    assert chosen > 1.0  # few rows in many dimensions: over-confident
    assert total[TEMPERATURES.index(chosen)] == total.min()
    torch.testing.assert_close(stats[0].holdout_nll, torch.zeros(len(TEMPERATURES), dtype=torch.float64))


def test_calibration_of_one_task_or_without_held_out_rows_is_one() -> None:
    assert st.calibrate(with_holdout(rows=12, tasks=1, width=60)) == 1.0
    assert st.calibrate(bank(3)) == 1.0


def test_held_out_likelihood_is_the_formula() -> None:
    stats = bank()
    weights, bias = st.keys(stats, 0.1)
    x = features(1, 9)
    nll = st.holdout_nll(x, 1, weights, bias)
    at = TEMPERATURES.index(3.0)
    torch.testing.assert_close(nll[at], -st.posterior(x, weights, bias, 3.0)[:, 1].log().sum())
