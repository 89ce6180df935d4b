"""The literal router inside a transformer: exact, causal, part of the KV cache, trained and stored as a whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from amlora_dist.adapters.adapter import Adapter
from amlora_dist.adapters.gate_context import ForwardContext, LayerOptions, Selection, entered
from amlora_dist.adapters.inject import Mixture, NewAdapter, inject
from amlora_dist.adapters.selector_layer import SelectorLinear, Selectors
from amlora_dist.adapters.settings import LiteralSettings
from amlora_dist.adapters.sparsity import gate_map, penalty
from tests.adapters.banks import LinearRouter, prompts, random_adapters, targets_of, tiny_llama, tiny_t5

RANKS = (2, 3, 1)
GRANULARITIES = ["token", "sequence"]


def literal_bank(model: Any, ranks: tuple[int, ...] = RANKS) -> list[Adapter]:
    """A bank as literal stages leave it: the last adapter has the selectors of all."""
    targets = targets_of(model)
    adapters = random_adapters(targets, ranks, recipes=False)
    generator = torch.Generator().manual_seed(9)
    for target in targets:
        weight = 0.5 * torch.randn(len(ranks), target.out_features, generator=generator)
        bias = torch.randn(len(ranks) + 1, generator=generator)
        adapters[-1].selector |= {f"{target.path}.weight": weight, f"{target.path}.bias": bias}
    return adapters


def served(model: Any, **settings: Any) -> Mixture:
    return inject(model, targets_of(model), literal_bank(model), layers=Selectors(settings=LiteralSettings(**settings)))


def learning(model: Any, *, router: Any = None, adapters: list[Adapter] | None = None, **settings: Any) -> Mixture:
    new = NewAdapter(task="new", rank=2, alpha=8.0, seed=3, learn_recipe=False)
    bank = literal_bank(model) if adapters is None else adapters
    layers = Selectors(settings=LiteralSettings(**settings))
    return inject(model, targets_of(model), bank, new=new, router=router, layers=layers)


@pytest.mark.parametrize("map_name", ["softmax", "entmax15", "sparsemax", "relu", "abs_sigmoid", "top_k"])
def test_a_mixture_layer_with_a_selector_equals_the_papers_formula_token_by_token(map_name: str) -> None:
    model = tiny_llama()
    target = targets_of(model)[0]
    adapters = literal_bank(model)
    state = {name: adapters[-1].selector[f"{target.path}.{name}"] for name in ("weight", "bias")}
    settings = LiteralSettings(map=map_name, top_k=2)  # type: ignore[arg-type]
    base = model.get_submodule(target.path)
    layer = SelectorLinear(base, target.path, adapters, settings=settings)
    x = torch.randn(2, 3, target.in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), entered(ForwardContext(object(), options=LayerOptions(select=True))):
        got = layer(x)
    for row in range(2):
        for token in range(3):
            h = x[row, token]
            outputs = [a.scale * a.b[target.path] @ (a.a[target.path] @ h) for a in adapters]
            scores = [w @ u + b for w, u, b in zip(state["weight"], outputs, state["bias"][1:], strict=True)]
            gates = gate_map(map_name, 2)(torch.stack([state["bias"][0], *scores]).tanh())
            with torch.no_grad():
                expected = base(h) + sum(g * u for g, u in zip(gates[1:], outputs, strict=True))
            torch.testing.assert_close(got[row, token], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_a_cache_equals_generation_without(granularity: str, beams: int) -> None:
    model = tiny_llama()
    served(model, granularity=granularity)
    ids = prompts(3, 6)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    run = {"attention_mask": mask, "max_new_tokens": 6, "num_beams": beams, "do_sample": False}
    torch.testing.assert_close(model.generate(ids, use_cache=True, **run), model.generate(ids, use_cache=False, **run))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_padding_and_neighbours_in_the_batch_change_nothing(granularity: str) -> None:
    model = tiny_llama()
    served(model, granularity=granularity)
    ids = prompts(2, 7)
    padded = torch.cat([torch.zeros(2, 4, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(11) >= 4).long().expand(2, -1)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        together = model(input_ids=padded, attention_mask=mask, position_ids=position).logits[:, 4:]
        for row in range(2):
            alone = model(input_ids=ids[row : row + 1]).logits[0]
            torch.testing.assert_close(together[row], alone, atol=1e-4, rtol=1e-4)


def test_the_answer_does_not_move_the_gate_of_its_prompt() -> None:
    model = tiny_llama()
    served(model, granularity="sequence")
    ids = prompts(1, 10)
    other = torch.cat([ids[:, :6], prompts(1, 4, seed=5)], dim=1)
    prompt = (torch.arange(10) < 6).long()[None]
    with torch.no_grad():
        first, second = (model(input_ids=i, prompt_mask=prompt).logits[:, :6] for i in (ids, other))
    torch.testing.assert_close(first, second)


def test_an_encoder_decoder_decodes_with_a_cache_as_without_for_sequence_gates() -> None:
    model = tiny_t5()
    served(model, granularity="sequence")
    ids, answer = prompts(2, 6), prompts(2, 5, seed=3)
    with torch.no_grad():
        whole = model(input_ids=ids, decoder_input_ids=answer, use_cache=False).logits
        encoded = model.get_encoder()(input_ids=ids)
        cache, steps = None, []
        for step in range(5):
            out = model(
                encoder_outputs=encoded,
                decoder_input_ids=answer[:, step : step + 1],
                past_key_values=cache,
                use_cache=True,
            )
            cache = out.past_key_values
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, atol=1e-4, rtol=1e-4)


def collected(model: Any, ids: Tensor, **more: Any) -> tuple[Tensor, dict[str, Selection]]:
    """Next-token loss over the batch, and what every layer chose."""
    chosen: dict[str, Selection] = {}
    out = model(input_ids=ids, labels=ids, on_select=chosen.__setitem__, use_cache=False, **more)
    return out.loss, chosen


def slopes(mixture: Mixture, term: Tensor) -> dict[str, float]:
    named = mixture.trainable()
    found = torch.autograd.grad(term, list(named.values()), retain_graph=True, allow_unused=True)
    return {name: 0.0 if g is None else float(g.abs().max()) for name, g in zip(named, found, strict=True)}


def test_the_l1_term_as_written_moves_nothing_while_the_loss_moves_every_selector() -> None:
    model = tiny_llama()
    mixture = learning(model)
    loss, chosen = collected(model, prompts(3, 8))
    assert list(chosen) == list(mixture.modules)
    written = sum(penalty("literal", s.gates, s.scores) for s in chosen.values())
    assert isinstance(written, Tensor)
    torch.testing.assert_close(written, torch.tensor(float(len(chosen))))
    selectors = {name for name in mixture.trainable() if name.startswith("selector.")}
    term, own = slopes(mixture, written), slopes(mixture, loss)
    assert max(term.values()) < 1e-6
    assert all(own[name] > 1e-6 for name in selectors if "old_" in name or "zero_bias" in name)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_gradient_checkpointing_changes_no_gradient_of_loss_and_penalty(granularity: str) -> None:
    found = []
    for checkpointing in (False, True):
        model = tiny_llama()
        mixture = learning(model, granularity=granularity)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        loss, chosen = collected(model, prompts(3, 8), prompt_mask=(torch.arange(8) < 5).long().expand(3, -1))
        assert len(chosen) == len(mixture.modules)
        extra = sum(penalty("non_zero_slot", s.gates, s.scores) for s in chosen.values())
        (loss + 0.1 * extra).backward()
        found.append({name: p.grad.clone() for name, p in mixture.trainable().items() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 0
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)


@pytest.mark.parametrize("freeze_old", [True, False])
def test_a_stage_trains_and_stores_the_selectors_that_the_next_one_starts_from(freeze_old: bool) -> None:
    model = tiny_llama()
    before = literal_bank(model)
    mixture = learning(model, freeze_old=freeze_old)
    kinds = {name.rsplit(".", 1)[1] for name in mixture.trainable() if name.startswith("selector.")}
    assert kinds == {"zero_bias", "new_weight", "new_bias"} | (set() if freeze_old else {"old_weight", "old_bias"})
    optimizer = torch.optim.SGD(mixture.trainable().values(), lr=0.5)
    ids = prompts(3, 8)
    for _ in range(2):
        optimizer.zero_grad()
        collected(model, ids)[0].backward()
        optimizer.step()
    adapter = mixture.extract_new()
    with torch.no_grad():
        trained = model(input_ids=ids).logits
    path = mixture.targets[0].path
    weight, old = adapter.selector[f"{path}.weight"], before[-1].selector[f"{path}.weight"]
    assert weight.shape[0] == adapter.selector[f"{path}.bias"].shape[0] - 1 == 4
    assert torch.equal(weight[:3], old) is freeze_old

    fresh = tiny_llama()
    inject(fresh, targets_of(fresh), [*before, adapter], layers=Selectors(settings=LiteralSettings()))
    with torch.no_grad():
        torch.testing.assert_close(fresh(input_ids=ids).logits, trained, atol=1e-5, rtol=1e-5)
    following = tiny_llama()
    next_stage = learning(following, adapters=[*before, adapter])
    assert torch.equal(next_stage.modules[path].selector.tensors()["weight"][:4], weight)


def test_the_router_of_literal_with_prior_tilts_the_gates() -> None:
    ids = prompts(2, 7)
    model = tiny_llama()
    adapters = literal_bank(model)
    router = LinearRouter.random([a.task for a in adapters], 32)
    layers = Selectors(settings=LiteralSettings(prior=True))
    mixture = inject(model, targets_of(model), adapters, router=router, layers=layers)
    routed: list[Tensor] = []
    chosen: dict[str, Selection] = {}
    with torch.no_grad():
        model(input_ids=ids, on_route=lambda _, gate: routed.append(gate), on_select=chosen.__setitem__)
    for path, selection in chosen.items():
        plain = torch.softmax(selection.scores, -1)
        odds = torch.cat([torch.ones(2, 1), routed[0] * 3], dim=1)[:, None, :]
        expected = plain * odds / (plain * odds).sum(-1, keepdim=True)
        torch.testing.assert_close(selection.gates, expected, atol=1e-5, rtol=1e-4, msg=path)
    assert mixture.router is not None


def test_selectors_can_be_left_out_for_two_stage_training_and_the_oracle() -> None:
    model = tiny_llama()
    mixture = served(model)
    ids = prompts(2, 6)
    gate = mixture.one_hot(1, 2)
    mixture.use_selectors(False)
    with torch.no_grad():
        oracle = model(input_ids=ids, task_gate=gate).logits
    plain = tiny_llama()
    inject(plain, targets_of(plain), random_adapters(targets_of(plain), RANKS, recipes=False))
    with torch.no_grad():
        torch.testing.assert_close(oracle, plain(input_ids=ids, task_gate=gate).logits)
