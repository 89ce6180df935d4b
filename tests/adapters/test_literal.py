"""The literal selector equals the paper's formula written as loops, and each switch does what it says."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from amlora_dist.adapters.selector_layer import LiteralSelector
from amlora_dist.adapters.settings import LiteralSettings
from amlora_dist.adapters.sparsity import gate_map, penalty
from amlora_dist.errors import BankError

OUT, IN, BATCH, TOKENS = 7, 5, 3, 6
RANKS, SCALES = [2, 4, 3], [4.0, 2.0, 1.5]
MAPS = ["softmax", "entmax15", "sparsemax", "relu", "abs_sigmoid", "top_k"]


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Layer:
    """Three adapters of one layer, side by side as the mixture holds them."""

    def __init__(self) -> None:
        self.a = [0.5 * draw(r, IN, seed=10 + i) for i, r in enumerate(RANKS)]
        self.b = [0.5 * draw(OUT, r, seed=20 + i) for i, r in enumerate(RANKS)]
        self.expand = torch.zeros(len(RANKS), sum(RANKS))
        for i, rank in enumerate(RANKS):
            start = sum(RANKS[:i])
            self.expand[i, start : start + rank] = SCALES[i]
        self.x = draw(BATCH, TOKENS, IN, seed=30)

    @property
    def call(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.x @ torch.cat(self.a).T, torch.cat(self.b, dim=1), self.expand

    def outputs(self, row: int, token: int) -> list[Tensor]:
        """u_i of one token."""
        return [s * b @ (a @ self.x[row, token]) for a, b, s in zip(self.a, self.b, SCALES, strict=True)]


def selector(new: bool = True, seed: int = 0, **settings: object) -> LiteralSelector:
    state = {"weight": draw(3 - new, OUT, seed=40 + seed), "bias": draw(4 - new, seed=50 + seed)}
    return LiteralSelector(
        OUT,
        LiteralSettings(**settings),  # type: ignore[arg-type]
        state=state,
        new=new,
        generator=torch.Generator().manual_seed(seed),
    )


def by_loops(layer: Layer, chosen: LiteralSelector, row: int, token: int) -> Tensor:
    """g of one token, from the outputs themselves."""
    phi = {"tanh": torch.tanh, "relu": torch.relu, "identity": lambda a: a}[chosen.settings.activation]
    stored = chosen.tensors()
    scores = [phi(stored["bias"][0])]
    for i, output in enumerate(layer.outputs(row, token)):
        scores.append(phi(stored["weight"][i] @ output + stored["bias"][i + 1]))
    return gate_map(chosen.settings.map, chosen.settings.top_k)(torch.stack(scores))


@pytest.mark.parametrize("activation", ["tanh", "relu", "identity"])
@pytest.mark.parametrize("map_name", MAPS)
def test_the_folded_selector_equals_the_plain_loop(activation: str, map_name: str) -> None:
    layer, chosen = Layer(), selector(activation=activation, map=map_name, top_k=2)
    got = chosen(*layer.call).gates
    assert got.shape == (BATCH, TOKENS, 4) and got.dtype == torch.float32
    for row in range(BATCH):
        for token in range(TOKENS):
            torch.testing.assert_close(got[row, token], by_loops(layer, chosen, row, token), atol=2e-6, rtol=1e-5)


def test_sequence_gates_score_the_mean_output_of_the_prompt() -> None:
    layer, chosen = Layer(), selector(granularity="sequence")
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]])
    selection = chosen(*layer.call, prompt_mask_BS=mask)
    assert selection.gates.shape == (BATCH, 1, 4)
    stored = chosen.tensors()
    for row in range(BATCH):
        tokens = mask[row].nonzero().flatten().tolist()
        scores = [stored["bias"][0]]
        for i in range(3):
            mean = torch.stack([layer.outputs(row, token)[i] for token in tokens]).mean(0)
            scores.append(stored["weight"][i] @ mean + stored["bias"][i + 1])
        torch.testing.assert_close(selection.gates[row, 0], torch.softmax(torch.stack(scores).tanh(), 0))


def test_what_a_cache_carries_gives_the_same_gates_for_later_tokens() -> None:
    layer, chosen = Layer(), selector(granularity="sequence")
    first = chosen(*layer.call, prompt_mask_BS=torch.ones(BATCH, TOKENS))
    z, b, expand = layer.call
    beams = torch.tensor([2, 0, 0, 1])
    later = chosen(draw(4, 1, z.shape[-1], seed=9), b, expand, pooled_BN=first.pooled[beams])
    assert torch.equal(later.gates, first.gates[beams])
    assert torch.equal(later.pooled, first.pooled[beams])


def test_answer_tokens_do_not_move_sequence_gates_and_padding_moves_none() -> None:
    layer, chosen = Layer(), selector(granularity="sequence")
    mask = torch.ones(BATCH, TOKENS)
    mask[:, 4:] = 0
    z, b, expand = layer.call
    before = chosen(z, b, expand, prompt_mask_BS=mask).gates
    z = torch.cat([z[:, :4], 100 * draw(BATCH, 5, z.shape[-1], seed=8)], dim=1)
    mask = torch.cat([mask[:, :4], torch.zeros(BATCH, 5)], dim=1)
    torch.testing.assert_close(chosen(z, b, expand, prompt_mask_BS=mask).gates, before)


def test_masks_and_cached_gates_that_do_not_fit_are_refused() -> None:
    layer = Layer()
    with pytest.raises(ValueError, match="prompt mask"):
        selector(granularity="sequence")(*layer.call, prompt_mask_BS=torch.ones(BATCH, TOKENS + 1))
    with pytest.raises(ValueError, match="2 rows"):
        selector(granularity="sequence")(*layer.call, pooled_BN=torch.zeros(2, 3))
    with pytest.raises(ValueError, match="carry nothing"):
        selector(granularity="token")(*layer.call, pooled_BN=torch.zeros(BATCH, 3))


def test_token_gates_are_causal() -> None:
    layer, chosen = Layer(), selector()
    z, b, expand = layer.call
    torch.testing.assert_close(chosen(z[:, :2], b, expand).gates, chosen(z, b, expand).gates[:, :2])


def trained(chosen: LiteralSelector) -> set[str]:
    return {name for name, parameter in chosen.named_parameters() if parameter.requires_grad}


def test_which_dense_layers_are_trained() -> None:
    new = {"zero_bias", "new_weight", "new_bias"}
    assert trained(selector(freeze_old=False)) == new | {"old_weight", "old_bias"}
    assert trained(selector(freeze_old=True)) == new
    assert trained(selector(new=False)) == set()
    first = LiteralSelector(OUT, LiteralSettings(), new=True)
    assert trained(first) == new and first.adapters == 1


@pytest.mark.parametrize("freeze_old", [True, False])
def test_gradients_reach_every_trained_parameter_and_the_adapter(freeze_old: bool) -> None:
    layer, chosen = Layer(), selector(freeze_old=freeze_old)
    z, b, expand = layer.call
    b.requires_grad_()
    chosen(z, b, expand).weights.square().sum().backward()
    assert all(parameter.grad is not None for parameter in chosen.parameters() if parameter.requires_grad)
    assert b.grad is not None and b.grad.abs().sum() > 0


@pytest.mark.parametrize("activation", ["tanh", "relu", "identity"])
@pytest.mark.parametrize("map_name", MAPS)
def test_a_fresh_selector_starts_learning_although_the_new_adapter_is_still_zero(
    activation: str, map_name: str
) -> None:
    """B = 0 gives u = 0; a gate of 0 there would be a saddle that no gradient leaves."""
    chosen = LiteralSelector(OUT, LiteralSettings(activation=activation, map=map_name, top_k=2), new=True)  # type: ignore[arg-type]
    z, b, expand = draw(2, 3, 4, seed=1), torch.zeros(OUT, 4), torch.full((1, 4), 2.0)
    b.requires_grad_()
    weights = chosen(z, b, expand).weights
    assert (weights > 0.1).all()
    ((z * weights) @ b.T - 1).square().sum().backward()
    assert b.grad is not None and b.grad.abs().sum() > 0


def test_residual_adds_one_to_the_current_adapter_while_it_is_learned_only() -> None:
    layer = Layer()
    plain, residual = selector(residual=False)(*layer.call), selector(residual=True)(*layer.call)
    torch.testing.assert_close(residual.weights, plain.weights + torch.tensor([0.0, 0.0, 1.0]))
    torch.testing.assert_close(residual.gates, plain.gates)
    served = selector(new=False, residual=True)(*layer.call)
    assert torch.equal(served.weights, served.gates[..., 1:])


@pytest.mark.parametrize("map_name", MAPS)
def test_a_uniform_prior_changes_nothing(map_name: str) -> None:
    layer, chosen = Layer(), selector(map=map_name)
    prior = torch.full((BATCH, 3), 1 / 3)
    torch.testing.assert_close(chosen(*layer.call, prior_BN=prior).gates, chosen(*layer.call).gates)


def test_a_prior_multiplies_the_odds_of_softmax_gates() -> None:
    layer, chosen = Layer(), selector()
    prior = torch.tensor([[0.7, 0.2, 0.1]]).repeat(BATCH, 1)
    plain, informed = chosen(*layer.call), chosen(*layer.call, prior_BN=prior)
    product = plain.gates * torch.tensor([1.0, 2.1, 0.6, 0.3])
    torch.testing.assert_close(informed.gates, product / product.sum(-1, keepdim=True))
    assert torch.equal(informed.scores, plain.scores)


@pytest.mark.parametrize("map_name", MAPS)
def test_a_certain_prior_closes_the_other_adapters_and_stays_finite(map_name: str) -> None:
    layer, chosen = Layer(), selector(map=map_name)
    prior = torch.tensor([[0.0, 1.0, 0.0]]).repeat(BATCH, 1)
    selection = chosen(*layer.call, prior_BN=prior)
    selection.gates.square().sum().backward()
    assert (selection.weights[..., [0, 2]] < 1e-8).all()
    assert all(torch.isfinite(p.grad).all() for p in chosen.parameters() if p.grad is not None)


def test_state_goes_round_and_the_next_stage_starts_from_it() -> None:
    layer, chosen = Layer(), selector()
    stored = chosen.tensors()
    assert stored["weight"].shape == (3, OUT) and stored["bias"].shape == (4,)
    served = LiteralSelector(OUT, chosen.settings, state=stored)
    assert torch.equal(served(*layer.call).gates, chosen(*layer.call).gates)
    following = LiteralSelector(OUT, chosen.settings, state=stored, new=True)
    assert following.adapters == 4
    assert torch.equal(following.tensors()["weight"][:3], stored["weight"])
    assert torch.equal(following.tensors()["bias"][:4], stored["bias"])


def test_the_new_dense_layer_depends_on_its_generator_alone() -> None:
    torch.manual_seed(1)
    first = selector(seed=3)
    torch.manual_seed(2)
    assert torch.equal(first.new_weight, selector(seed=3).new_weight)
    assert not torch.equal(first.new_weight, selector(seed=4).new_weight)


def test_parameters_are_gathered_one_by_one() -> None:
    seen: list[int] = []

    @contextlib.contextmanager
    def gather(parameters: list[nn.Parameter]) -> Iterator[None]:
        seen.append(len(parameters))
        yield

    selector().tensors(gather)
    assert seen == [1] * 5


def test_bf16_parameters_still_give_fp32_gates_near_the_exact_ones() -> None:
    layer, exact = Layer(), selector()
    rounded = LiteralSelector(OUT, exact.settings, state=exact.tensors(), dtype=torch.bfloat16)
    z, b, expand = layer.call
    got = rounded(z.bfloat16(), b.bfloat16(), expand).gates
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, exact(z, b, expand).gates, atol=0.03, rtol=0)


def test_the_papers_l1_term_does_not_move_the_selector_while_the_loss_does() -> None:
    layer, chosen = Layer(), selector()
    selection = chosen(*layer.call)

    def size(term: Tensor) -> float:
        slopes = torch.autograd.grad(term, [p for p in chosen.parameters() if p.requires_grad], retain_graph=True)
        return max(float(slope.abs().max()) for slope in slopes)

    assert size(penalty("literal", selection.gates, selection.scores)) < 1e-7
    assert size(penalty("non_zero_slot", selection.gates, selection.scores)) > 1e-3
    z, b, _ = layer.call
    spread = torch.repeat_interleave(selection.weights, torch.tensor(RANKS), dim=-1)
    assert size(((z * spread) @ b.T).square().mean()) > 1e-3


def test_a_damaged_state_is_refused() -> None:
    with pytest.raises(BankError, match="expected bias and weight"):
        LiteralSelector(OUT, LiteralSettings(), state={"weight": torch.zeros(2, OUT)})
    with pytest.raises(BankError, match=r"expected \(n, 7\)"):
        LiteralSelector(OUT, LiteralSettings(), state={"weight": torch.zeros(2, 3), "bias": torch.zeros(3)})
    with pytest.raises(ValueError, match="without adapters"):
        LiteralSelector(OUT, LiteralSettings())
