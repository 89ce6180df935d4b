"""The sparse maps are exact and differentiable; the readings of the L1 term do what their docstrings say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from amlora_dist.adapters import sparsity
from amlora_dist.adapters.settings import LiteralSettings


def scores(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def bisected(values: Tensor, alpha: float) -> Tensor:
    """Reference: alpha-entmax by bisection on tau (Blondel et al. 2019), p = [(alpha-1) z - tau]_+^(1/(alpha-1))."""
    z = (alpha - 1) * values
    low, high = z.amax(-1, keepdim=True) - 1, z.amax(-1, keepdim=True)
    for _ in range(200):
        tau = (low + high) / 2
        mass = (z - tau).clamp(min=0).pow(1 / (alpha - 1)).sum(-1, keepdim=True)
        low, high = torch.where(mass >= 1, tau, low), torch.where(mass >= 1, high, tau)
    return (z - low).clamp(min=0).pow(1 / (alpha - 1))


@pytest.mark.parametrize(("function", "alpha"), [(sparsity.sparsemax, 2.0), (sparsity.entmax15, 1.5)])
@pytest.mark.parametrize("slots", [1, 2, 5, 16])
@pytest.mark.parametrize("scale", [0.1, 2.0, 30.0])
def test_sorting_maps_equal_bisection(function, alpha: float, slots: int, scale: float) -> None:
    values = scores(40, slots, scale=scale)
    torch.testing.assert_close(function(values), bisected(values, alpha), atol=1e-9, rtol=0)


@pytest.mark.parametrize("function", [sparsity.softmax, sparsity.sparsemax, sparsity.entmax15])
def test_gradients_of_the_maps_pass_gradcheck(function) -> None:
    assert torch.autograd.gradcheck(function, (scores(6, 5).requires_grad_(),))


def test_gradient_of_top_k_passes_gradcheck() -> None:
    assert torch.autograd.gradcheck(lambda z: sparsity.top_k(z, 2), (scores(6, 5).requires_grad_(),))


@pytest.mark.parametrize("function", [sparsity.sparsemax, sparsity.entmax15])
def test_ties_far_scores_and_one_slot_give_finite_gates_and_gradients(function) -> None:
    for values in ([[0.0, 0.0, 0.0]], [[5.0, 5.0, -300.0]], [[1e4, 0.0, -1e4]], [[2.0]]):
        z = torch.tensor(values, requires_grad=True)
        gates = function(z)
        gates.square().sum().backward()
        assert torch.isfinite(gates).all() and torch.isfinite(z.grad).all()
        torch.testing.assert_close(gates.sum(-1), torch.ones(1))


def test_sparsemax_and_entmax_reach_exact_zeros_where_softmax_does_not() -> None:
    z = torch.tensor([3.0, 0.0, -1.0])
    assert (sparsity.sparsemax(z) == 0).sum() == 2
    assert (sparsity.entmax15(z) == 0).sum() >= 1
    assert (sparsity.softmax(z) > 0).all()


def test_top_k_keeps_exactly_k_slots_even_in_a_tie() -> None:
    gates = sparsity.top_k(torch.zeros(4, 5), 2)
    assert ((gates > 0).sum(-1) == 2).all()
    torch.testing.assert_close(gates.sum(-1), torch.ones(4))
    torch.testing.assert_close(sparsity.top_k(torch.arange(3.0), 7), torch.softmax(torch.arange(3.0), -1))
    with pytest.raises(ValueError, match="at least one slot"):
        sparsity.top_k(torch.zeros(3), 0)


def test_abs_sigmoid_is_the_formula_of_the_method() -> None:
    values = scores(20)
    torch.testing.assert_close(sparsity.abs_sigmoid(values), (2 * torch.sigmoid(values) - 1).abs())


def test_every_map_of_the_settings_exists_and_an_unknown_one_is_named() -> None:
    for name in ("softmax", "entmax15", "sparsemax", "relu", "abs_sigmoid", "top_k"):
        assert LiteralSettings(map=name).map == name  # type: ignore[arg-type]
        assert sparsity.gate_map(name, 1)(torch.ones(2, 3)).shape == (2, 3)
    with pytest.raises(ValueError, match="'softmin'"):
        sparsity.gate_map("softmin")


def test_relative_threshold_keeps_the_largest_and_sums_to_one() -> None:
    shares = torch.softmax(scores(50, 7, scale=4.0), -1)
    gates = sparsity.relative_threshold(shares, 0.1)
    torch.testing.assert_close(gates.sum(-1), torch.ones(50, dtype=torch.float64))
    assert torch.equal(gates.argmax(-1), shares.argmax(-1))
    assert ((gates == 0) == (shares <= 0.1 * shares.amax(-1, keepdim=True))).all()
    torch.testing.assert_close(sparsity.relative_threshold(shares, 0.0), shares)


def test_relative_threshold_keeps_ten_look_alikes_that_absolute_threshold_loses_to_the_base_model() -> None:
    shares = torch.full((1, 10), 0.1)
    torch.testing.assert_close(sparsity.relative_threshold(shares, 0.1), shares)
    assert sparsity.absolute_threshold(shares, 0.1).sum() < 1e-6


def test_absolute_threshold_leaves_the_rest_to_the_zero_adapter() -> None:
    gates = sparsity.absolute_threshold(torch.tensor([[0.95, 0.04, 0.01]]), 0.1)
    torch.testing.assert_close(gates, torch.tensor([[0.85, 0.0, 0.0]]))


def gradients(name: str, map_name: str = "softmax") -> tuple[Tensor, Tensor]:
    """Gradient to the scores of the L1 term and of a loss on the mixture's output."""
    z = scores(4, 6, 4).requires_grad_()
    gates = sparsity.gate_map(map_name)(z)
    (term,) = torch.autograd.grad(sparsity.penalty(name, gates, z), z, retain_graph=True)
    outputs = scores(4, 6, 4, seed=1)
    (loss,) = torch.autograd.grad((gates * outputs).sum(-1).square().mean(), z)
    return term, loss


def test_the_literal_l1_term_has_no_gradient_while_the_loss_has_one() -> None:
    term, loss = gradients("literal")
    assert term.norm() < 1e-12
    assert loss.norm() > 1e-2


@pytest.mark.parametrize("name", ["non_zero_slot", "old_only", "logits"])
def test_other_readings_of_the_l1_term_have_a_gradient(name: str) -> None:
    assert gradients(name)[0].norm() > 1e-3


def test_unnormalised_l1_is_truly_sparse_it_closes_gates() -> None:
    z = torch.tensor([1.0, 1.0, 0.8, 0.6], requires_grad=True)
    for _ in range(50):
        (slope,) = torch.autograd.grad(sparsity.penalty("unnormalised", sparsity.relu_gates(z), z), z)
        z = (z - 0.05 * slope).detach().requires_grad_()
    gates = sparsity.relu_gates(z)
    assert (gates[1:] == 0).all() and gates[0] == 1.0


def descended(name: str) -> Tensor:
    z = torch.tensor([0.5, 1.0, -1.0, 0.3], dtype=torch.float64, requires_grad=True)
    for _ in range(400):
        (slope,) = torch.autograd.grad(sparsity.penalty(name, sparsity.softmax(z), z), z)
        z = (z - 0.05 * slope).detach().requires_grad_()
    return sparsity.softmax(z)


def test_non_zero_slot_moves_mass_to_the_zero_adapter() -> None:
    assert descended("non_zero_slot")[0] > 0.85


def test_old_only_leaves_mass_to_the_current_and_the_zero_adapter() -> None:
    gates = descended("old_only")
    assert gates[1] + gates[2] < 0.15


def test_logits_penalty_makes_gates_uniform_the_opposite_of_sparse() -> None:
    torch.testing.assert_close(descended("logits"), torch.full((4,), 0.25, dtype=torch.float64), atol=0.02, rtol=0)


def test_penalty_is_a_mean_over_real_positions_only() -> None:
    z = scores(2, 3, 4)
    gates = sparsity.softmax(z)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    expected = (gates[0, :2, 1:].sum() + gates[1, :1, 1:].sum()) / 3
    torch.testing.assert_close(sparsity.penalty("non_zero_slot", gates, z, mask), expected)
    assert sparsity.penalty("none", gates, z, mask) == 0
    with pytest.raises(ValueError, match="'l2'"):
        sparsity.penalty("l2", gates, z)


def test_unnormalised_penalty_on_a_map_that_sums_to_one_is_refused() -> None:
    with pytest.raises(ValueError, match="non_zero_slot"):
        LiteralSettings(penalty="unnormalised", map="softmax")
    assert LiteralSettings(penalty="unnormalised", map="relu").map == "relu"
