"""Routers give gates that mean what they say, share no state, and come back from storage as they were."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from amlora_dist.adapters.router import (
    FixedRouter,
    PermutedRouter,
    PosteriorRouter,
    Router,
    UniformRouter,
    build_router,
    derangement,
    posterior_router,
    router_from,
)
from amlora_dist.adapters.settings import GateSettings, LiteralSettings, RouterSettings
from amlora_dist.adapters.statistics import TaskStatistics
from amlora_dist.errors import BankError

WIDTH = 16


def features(task: int, rows: int = 50) -> Tensor:
    generator = torch.Generator().manual_seed(task)
    centre = 4 * torch.nn.functional.one_hot(torch.tensor(task), WIDTH).double()
    return centre + torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64)


def statistics(tasks: int) -> list[TaskStatistics]:
    return [TaskStatistics.from_features(f"t{t}", features(t)) for t in range(tasks)]


def posterior(tasks: int = 3, **gate: object) -> PosteriorRouter:
    return posterior_router(statistics(tasks), shrinkage=0.1, gate=GateSettings(**gate))  # type: ignore[arg-type]


def test_posterior_router_finds_the_task_and_closes_the_others() -> None:
    x = torch.cat([features(t) for t in range(3)])
    gates = posterior().gates(x.float(), len(x))
    truth = torch.arange(3).repeat_interleave(50)
    assert gates.dtype == torch.float32 and gates.shape == (150, 3)
    assert (gates.argmax(1) == truth).double().mean() > 0.95
    torch.testing.assert_close(gates.sum(1), torch.ones(150))
    assert (gates == 0).double().mean() > 0.5


def test_one_task_gets_the_whole_gate() -> None:
    for gate in ({}, {"abstention": True}, {"form": "relative", "threshold": 0.9}):
        assert torch.equal(posterior(1, **gate).gates(features(5), 50), torch.ones(50, 1))


def test_absolute_form_leaves_the_remainder_to_the_zero_adapter() -> None:
    gates = posterior(form="absolute", threshold=0.2).gates(features(0), 50)
    assert (gates.sum(1) <= 0.8 + 1e-6).all() and (gates.sum(1) > 0).all()


def test_a_temperature_in_the_settings_overrides_the_calibrated_one() -> None:
    hot, cold = posterior(temperature=50.0), posterior()
    assert hot.posterior(features(0)).amax(1).mean() < cold.posterior(features(0)).amax(1).mean()
    assert hot.temperature == cold.temperature == 1.0
    with pytest.raises(ValueError, match="greater than 0"):
        GateSettings(temperature=0.0)


def test_abstention_spares_the_tasks_and_takes_what_is_far_between_them() -> None:
    router = posterior(abstention=True)
    near = router.gates(torch.cat([features(t) for t in range(3)]), 150).sum(1)
    assert (near > 0.999).double().mean() > 0.95
    stranger = torch.zeros(1, WIDTH, dtype=torch.float64)
    stranger[0, :3] = -25.0
    assert router.gates(stranger, 1).sum() == 0.0
    assert posterior().gates(stranger, 1).sum() == pytest.approx(1.0)


def test_abstention_without_background_statistics_is_refused() -> None:
    router = posterior()
    with pytest.raises(BankError, match=r"router\.gate\.abstention"):
        PosteriorRouter(router.tasks, router.weights, router.bias, 1.0, GateSettings(abstention=True))


def test_the_posterior_router_wants_features_of_every_input() -> None:
    with pytest.raises(ValueError, match="all 4 inputs"):
        posterior().gates(None, 4)
    with pytest.raises(ValueError, match="all 4 inputs"):
        posterior().gates(features(0, 3), 4)


def test_half_precision_features_route_as_full_ones_do() -> None:
    x = torch.cat([features(t) for t in range(3)])
    router = posterior()
    half = router.gates(x.bfloat16(), 150)
    assert (half.argmax(1) == router.gates(x, 150).argmax(1)).double().mean() > 0.97


def test_gates_carry_no_gradient_into_the_base_model() -> None:
    x = features(0).requires_grad_()
    assert not posterior().gates(x, 50).requires_grad


def test_fixed_gates_are_those_of_the_baselines() -> None:
    names = ["a", "b", "c"]
    assert FixedRouter.newest(names).gates(None, 2).tolist() == [[0.0, 0.0, 1.0]] * 2
    assert FixedRouter.total(names).gates(None, 1).tolist() == [[1.0, 1.0, 1.0]]
    torch.testing.assert_close(UniformRouter(names).gates(None, 2), torch.full((2, 3), 1 / 3))
    assert not UniformRouter(names).needs_features
    with pytest.raises(BankError, match="2 fixed gates for 3 tasks"):
        FixedRouter(names, (1.0, 0.0))


@pytest.mark.parametrize("count", [2, 3, 7, 15])
def test_a_derangement_moves_every_task_and_depends_on_the_seed_alone(count: int) -> None:
    for seed in range(20):
        order = derangement(count, seed)
        assert sorted(order) == list(range(count))
        assert all(order[i] != i for i in range(count))
        assert order == derangement(count, seed)
    assert count == 2 or len({derangement(count, seed) for seed in range(20)}) > 1
    assert derangement(1, 0) == (0,)


def test_the_permuted_router_keeps_the_sparsity_and_misses_the_aim() -> None:
    inner = posterior()
    router = PermutedRouter.shuffled(inner, seed=4)
    right, wrong = inner.gates(features(1), 50), router.gates(features(1), 50)
    assert torch.equal(right.sort(dim=1).values, wrong.sort(dim=1).values)
    assert (wrong.argmax(1) != right.argmax(1)).all()
    assert router.tasks == inner.tasks and router.needs_features
    with pytest.raises(BankError, match="does not permute"):
        PermutedRouter(inner, (0, 0, 1))


def everyone() -> list[Router]:
    names = ["t0", "t1", "t2"]
    return [
        posterior(),
        posterior(abstention=True, form="absolute", temperature=2.0),
        UniformRouter(names),
        FixedRouter.total(names),
        PermutedRouter.shuffled(posterior(), seed=1),
    ]


@pytest.mark.parametrize("number", range(5))
def test_every_router_comes_back_from_storage_with_equal_gates(number: int) -> None:
    router = everyone()[number]
    stored = json.loads(json.dumps(router.settings()))
    again = router_from({name: t.clone() for name, t in router.tensors().items()}, stored).to("cpu")
    x = torch.cat([features(t) for t in range(4)])
    assert torch.equal(again.gates(x, 200), router.gates(x, 200))
    assert (again.kind, again.tasks, again.settings()) == (router.kind, router.tasks, router.settings())


def test_damaged_routers_are_refused() -> None:
    router = posterior()
    tensors, stored = router.tensors(), router.settings()
    with pytest.raises(BankError, match="'weights'"):
        router_from({"bias": tensors["bias"]}, stored)
    with pytest.raises(BankError, match="NaN"):
        router_from({**tensors, "bias": tensors["bias"] * float("nan")}, stored)
    with pytest.raises(BankError, match="do not fit 2 tasks"):
        router_from(tensors, {**stored, "tasks": ["t0", "t1"]})
    with pytest.raises(BankError, match="'magic'"):
        router_from(tensors, {"kind": "magic", "tasks": ["t0"]})
    with pytest.raises(BankError, match="kind"):
        router_from(tensors, {})


@pytest.mark.parametrize("kind", ["posterior", "uniform", "permuted", "literal"])
def test_the_configured_router_is_built_from_statistics(kind: str) -> None:
    router = build_router(RouterSettings(kind=kind), statistics(3), seed=0)  # type: ignore[arg-type]
    assert router is None if kind == "literal" else (router is not None and router.kind == kind)


def test_literal_with_prior_has_the_posterior_router_next_to_its_dense_layers() -> None:
    settings = RouterSettings(kind="literal", literal=LiteralSettings(prior=True))
    router = build_router(settings, statistics(2), seed=0)
    assert isinstance(router, PosteriorRouter)
