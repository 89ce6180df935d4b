"""A call of the model finds its gate: features, routers, given gates, and recomputation in backward."""

from __future__ import annotations

import threading
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from amlora_dist.adapters.gate_context import ForwardContext, active_call, cache_state_of, pool_features
from amlora_dist.adapters.inject import NewAdapter, inject
from amlora_dist.adapters.selector_layer import Selectors
from amlora_dist.adapters.settings import LiteralSettings
from amlora_dist.errors import UserError
from tests.adapters.banks import (
    RANKS,
    TASKS,
    LinearRouter,
    gate_of,
    padded,
    prompts,
    random_adapters,
    routed,
    targets_of,
    tiny_llama,
    tiny_t5,
)

# -- features ---------------------------------------------------------------------------------------------------------


def test_features_leave_out_padding_answers_and_the_first_two_tokens() -> None:
    hidden = torch.randn(2, 6, 4)
    hidden[0, :2] = float("inf")  # padding
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0]])
    features = pool_features(hidden, mask, 2)
    torch.testing.assert_close(features[0], hidden[0, 4])
    torch.testing.assert_close(features[1], hidden[1, 2:4].mean(dim=0))


@pytest.mark.parametrize("length", [1, 2])
def test_a_prompt_no_longer_than_the_skipped_tokens_pools_them_all(length: int) -> None:
    hidden = torch.randn(1, 4, 3)
    mask = torch.arange(4)[None] >= 4 - length
    torch.testing.assert_close(pool_features(hidden, mask, 2)[0], hidden[0, 4 - length :].mean(dim=0))


def test_features_without_a_mask_pool_everything_but_the_first_tokens() -> None:
    hidden = torch.randn(2, 5, 3).bfloat16()
    assert torch.equal(pool_features(hidden, None, 2), pool_features(hidden, torch.ones(2, 5), 2))
    assert pool_features(hidden, None, 2).dtype == torch.float32


def test_an_empty_prompt_is_zero_and_not_nan() -> None:
    assert torch.equal(pool_features(torch.randn(1, 3, 2), torch.zeros(1, 3), 2), torch.zeros(1, 2))


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(UserError, match=r"prompt_mask: found shape \(1, 9\)"):
        pool_features(torch.randn(1, 3, 2), torch.ones(1, 9), 2)


@pytest.mark.parametrize("layers", ["above_router", "all"])
def test_the_call_routes_on_the_features_of_the_plain_model(layers: str) -> None:
    model, ids = tiny_llama(), prompts(3, 7)
    with torch.no_grad():
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[2]
    mixture = routed(model, layers=layers)
    seen: list[Tensor] = []
    with torch.no_grad():
        model(input_ids=ids, on_route=lambda features, _gate: seen.append(features))
    expected = hidden[:, 2:].mean(dim=1)
    torch.testing.assert_close(seen[0], expected)
    torch.testing.assert_close(mixture.routing_features(input_ids=ids), expected)
    torch.testing.assert_close(mixture.routing_features(input_ids=ids, full_forward=True), expected)


def test_features_only_stops_at_the_routing_layer() -> None:
    model = tiny_llama()
    mixture = routed(model)
    ran: list[int] = []
    for i, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_args, i=i: ran.append(i))
    mixture.routing_features(input_ids=prompts(2, 5))
    assert ran == [0, 1]
    ran.clear()
    mixture.routing_features(input_ids=prompts(2, 5), full_forward=True)
    assert ran == [0, 1, 2, 3]
    assert active_call() is None


def test_features_are_without_dropout_and_leave_the_mode_alone() -> None:
    model = tiny_t5()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    mixture = routed(model)
    expected = mixture.routing_features(input_ids=prompts(2, 6))
    model.train()
    assert torch.equal(mixture.routing_features(input_ids=prompts(2, 6)), expected)
    assert model.training


def test_a_partial_pass_runs_whole_where_it_must() -> None:
    model = tiny_llama()
    mixture = routed(model, layers="all")
    ran: list[int] = []
    for i, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_args, i=i: ran.append(i))
    early = gate_of(mixture, input_ids=prompts(2, 5))
    assert ran == [0, 1, 0, 1, 2, 3]
    ran.clear()
    mixture.run_whole_passes(True)
    torch.testing.assert_close(gate_of(mixture, input_ids=prompts(2, 5)), early)
    assert ran == [0, 1, 2, 3, 0, 1, 2, 3]


def test_routing_and_gating_never_wait_for_the_device() -> None:
    class Waits(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
            return func(*args, **(kwargs or {}))

    def waits(model: PreTrainedModel) -> int:
        with torch.no_grad(), Waits() as mode:
            out = model(**padded(), use_cache=True)
            mask = torch.ones(3, 9, dtype=torch.long)
            model(input_ids=prompts(3, 1), attention_mask=mask, past_key_values=out.past_key_values)
        return mode.count

    plain, model = waits(tiny_llama()), tiny_llama()
    routed(model)
    assert waits(model) == plain


def test_answers_do_not_move_the_gate() -> None:
    mixture = routed(tiny_llama())
    ids = prompts(2, 8)
    mask = torch.zeros(2, 8, dtype=torch.long)
    mask[:, :5] = 1
    torch.testing.assert_close(
        gate_of(mixture, input_ids=ids, prompt_mask=mask), gate_of(mixture, input_ids=ids[:, :5]), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("layers", ["above_router", "all"])
def test_padding_and_the_rest_of_the_batch_do_not_matter(side: str, layers: str) -> None:
    model = tiny_llama()
    mixture = routed(model, layers=layers)
    lengths = [9, 4, 6, 1]
    rows = [prompts(1, length, seed=length)[0] for length in lengths]
    ids = torch.zeros(4, 9, dtype=torch.long)
    mask = torch.zeros(4, 9, dtype=torch.long)
    for row, tokens in enumerate(rows):
        where = slice(9 - len(tokens), 9) if side == "left" else slice(0, len(tokens))
        ids[row, where], mask[row, where] = tokens, 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    gates = gate_of(mixture, input_ids=ids, attention_mask=mask, position_ids=positions)
    with torch.no_grad():
        together = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        for row, tokens in enumerate(rows):
            alone = model(input_ids=tokens[None]).logits[0]
            torch.testing.assert_close(together[row][mask[row].bool()], alone, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(
                gate_of(mixture, input_ids=tokens[None])[0], gates[row], atol=1e-5, rtol=1e-5
            )


# -- gates ------------------------------------------------------------------------------------------------------------


def test_a_given_gate_wins_over_the_router() -> None:
    model = tiny_llama()
    mixture = routed(model)
    ids = prompts(2, 6)
    with torch.no_grad():
        one_hot = model(input_ids=ids, task_gate=mixture.one_hot(1, 2)).logits
        broadcast = model(input_ids=ids, task_gate=mixture.one_hot(1, 1)).logits
        found = model(input_ids=ids).logits
    assert torch.equal(one_hot, broadcast)
    assert not torch.allclose(one_hot, found)


@pytest.mark.parametrize("shape", [(2, 4), (3, 3), (3,)])
def test_a_gate_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    model = tiny_llama()
    routed(model)
    with pytest.raises(UserError, match=r"task_gate: found shape .* expected \(2 or 1, 3\)"):
        model(input_ids=prompts(2, 4), task_gate=torch.ones(shape))


def test_without_router_and_gate_the_call_says_what_to_pass() -> None:
    model = tiny_llama()
    mixture = routed(model)
    mixture.set_router(None)
    with pytest.raises(UserError, match="task_gate"):
        model(input_ids=prompts(1, 4))


def test_an_inner_module_called_alone_is_refused() -> None:
    model = tiny_llama()
    routed(model)
    with pytest.raises(UserError, match="call the model itself"):
        model.model(input_ids=prompts(1, 4))
    assert active_call() is None


def test_a_failed_call_leaves_nothing_behind() -> None:
    model = tiny_llama()
    routed(model)
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        model(input_ids=prompts(1, 4), inputs_embeds=torch.zeros(1, 4, 32))
    assert active_call() is None


def test_a_new_router_serves_the_next_call_and_caches_keep_their_gate() -> None:
    model = tiny_llama()
    mixture = routed(model)
    ids = prompts(1, 6)
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
        before = cache_state_of(cache)
        mixture.set_router(LinearRouter.random(TASKS, 32, seed=9))
        model(input_ids=ids[:, :1], past_key_values=cache)
    assert before is not None
    assert cache_state_of(cache).task_gate is before.task_gate  # type: ignore[union-attr]
    assert not torch.allclose(before.task_gate, gate_of(mixture, input_ids=ids))  # type: ignore[arg-type]


def test_a_router_of_other_tasks_is_refused() -> None:
    mixture = routed(tiny_llama())
    with pytest.raises(UserError, match="its tasks are"):
        mixture.set_router(LinearRouter.random(["a", "b", "c"], 32))


# -- gradient checkpointing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])
@pytest.mark.parametrize("before", [True, False])
def test_gradient_checkpointing_changes_no_gradient(kind: str, before: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny_llama() if kind == "decoder" else tiny_t5()
        if checkpointing and before:
            model.gradient_checkpointing_enable({"use_reentrant": True})
        targets = targets_of(model)
        mixture = inject(
            model, targets, random_adapters(targets, RANKS), new=NewAdapter(task="new", rank=2, alpha=4.0)
        )
        if checkpointing and not before:
            model.gradient_checkpointing_enable()
        model.train()
        for parameter in mixture.trainable().values():
            torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(1))
        ids = prompts(2, 6)
        model(input_ids=ids, labels=ids, task_gate=mixture.one_hot(3, 2)).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in mixture.trainable().items()})
    # An encoder-decoder adds up the encoder's gradients in another order.
    tolerance = 0.0 if kind == "decoder" else 1e-5
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])
def test_a_model_in_evaluation_mode_is_checkpointed_where_it_learns_and_stays_without_dropout(kind: str) -> None:
    """As stages train: the base model is frozen and never in training mode, which transformers asks for."""

    def own_pass(layer: Any, inner: Any) -> Any:
        def passed(*args: Any, **kwargs: Any) -> Any:
            modes.append(layer.training)
            return inner(*args, **kwargs)

        return passed

    modes: list[bool] = []  # of a layer, while its own pass runs
    gradients, passes = [], []
    for checkpointing in (False, True):
        model = (tiny_llama() if kind == "decoder" else tiny_t5()).eval()
        targets = targets_of(model)
        mixture = inject(
            model, targets, random_adapters(targets, RANKS), new=NewAdapter(task="new", rank=2, alpha=4.0)
        )
        if checkpointing:
            model.gradient_checkpointing_enable()
        for parameter in mixture.trainable().values():
            torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(1))
        mlps = [module for name, module in model.named_modules() if name.endswith(("mlp", "DenseReluDense"))]
        counted: list[bool] = []
        for layer in model.modules():
            if isinstance(layer, GradientCheckpointingLayer):  # what a layer of Bart or OPT asks about its dropout
                first = next(module for module in layer.modules() if isinstance(module, torch.nn.Linear))
                first.forward = own_pass(layer, first.forward)
        for mlp in mlps:
            mlp.register_forward_pre_hook(lambda *_, to=counted: to.append(True))
        ids = prompts(2, 6)
        with torch.no_grad():
            model(input_ids=ids, labels=ids, task_gate=mixture.one_hot(3, 2))
        assert len(counted) == len(mlps), "nothing is computed twice where nothing is learned"
        model(input_ids=ids, labels=ids, task_gate=mixture.one_hot(3, 2)).loss.backward()
        passes.append(len(counted) - len(mlps))
        gradients.append({name: parameter.grad for name, parameter in mixture.trainable().items()})
        assert not any(m.training for m in model.modules() if isinstance(m, GradientCheckpointingLayer))
    assert passes[0] == len(mlps) < passes[1], "layers behind the first adapted one are computed again in backward"
    assert modes and not any(modes)
    tolerance = 0.0 if kind == "decoder" else 1e-5
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=tolerance, rtol=tolerance)


def test_recomputation_in_another_thread_and_another_call_sees_its_own_gate() -> None:
    """As on an accelerator, where backward runs in a thread of autograd's own."""
    model = tiny_llama()
    targets = targets_of(model)
    mixture = inject(model, targets, random_adapters(targets, RANKS), new=NewAdapter(task="new", rank=2, alpha=4.0))
    model.train()
    ids = prompts(2, 6)

    def gradients(in_thread: bool) -> dict[str, Tensor]:
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids, task_gate=torch.full((2, 4), 0.5)).loss
        with torch.no_grad():
            model(input_ids=ids, task_gate=torch.zeros(2, 4))
        if in_thread:
            thread = threading.Thread(target=loss.backward)
            thread.start()
            thread.join(timeout=30)
        else:
            loss.backward()
        return {name: p.grad.clone() for name, p in mixture.trainable().items() if p.grad is not None}

    plain = gradients(in_thread=False)
    model.gradient_checkpointing_enable()
    recomputed = gradients(in_thread=True)
    assert plain.keys() == mixture.trainable().keys() == recomputed.keys()
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


# -- selections -------------------------------------------------------------------------------------------------------


def test_selections_reach_the_collector_once_even_when_recomputed() -> None:
    model = tiny_llama()
    targets = targets_of(model)
    layers = Selectors(settings=LiteralSettings())
    mixture = inject(model, targets, [], new=NewAdapter(task="new", rank=2, alpha=4.0), layers=layers)
    model.gradient_checkpointing_enable()
    model.train()
    seen: dict[str, Any] = {}
    ids = prompts(2, 6)
    calls: list[str] = []

    def collect(path: str, selection: Any) -> None:
        calls.append(path)
        seen[path] = selection

    loss = model(input_ids=ids, labels=ids, on_select=collect).loss
    (loss + sum(selection.gates[..., 1:].mean() for selection in seen.values())).backward()
    assert sorted(calls) == sorted(target.path for target in targets)
    trainable = mixture.trainable()
    assert any(name.startswith("selector.") for name in trainable)
    assert all(parameter.grad is not None for parameter in trainable.values())


def test_a_call_says_what_it_is_in_eight_fields() -> None:
    assert len(fields(ForwardContext)) <= 8
