"""The mixture layer is exact, cheap in memory, quiet towards the host, and trains what it should."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from amlora_dist.adapters.adapter import Adapter, rows
from amlora_dist.adapters.mixture import MixtureLinear, NewWeights
from amlora_dist.errors import UserError

PATH = "layers.0.q_proj"


def randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def make_base(kind: str, inputs: int, outputs: int, generator: torch.Generator) -> nn.Module:
    base = Conv1D(outputs, inputs) if kind == "conv1d" else nn.Linear(inputs, outputs, bias=kind == "bias")
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.copy_(randn(generator, *parameter.shape) / inputs**0.5)
    return base.requires_grad_(False)


def make_adapters(ranks: list[int], inputs: int, outputs: int, generator: torch.Generator) -> list[Adapter]:
    return [
        Adapter(
            task=f"t{i}",
            rank=rank,
            alpha=1.5 * rank,
            a={PATH: randn(generator, rank, inputs) / inputs**0.5},
            b={PATH: randn(generator, outputs, rank) / rank**0.5},
            recipe={PATH: randn(generator, i) * 0.5} if i else {},
        )
        for i, rank in enumerate(ranks)
    ]


def make_new(rank: int, earlier: int, inputs: int, outputs: int, generator: torch.Generator) -> NewWeights:
    return NewWeights(
        randn(generator, rank, inputs) / inputs**0.5,
        randn(generator, outputs, rank) / rank**0.5,
        2.0,
        randn(generator, earlier) * 0.5 if earlier else None,
    )


def plain_loop(layer: MixtureLinear, adapters: list[Adapter], x: Tensor, gate_BT: Tensor) -> Tensor:
    """sum_t gate_t sum_i G_ti scale_i B_i A_i x, adapter by adapter, with the layer's own parameters."""
    parts = [(adapter.a[PATH], adapter.b[PATH], adapter.scale) for adapter in adapters]
    table = rows(adapters, PATH)
    if layer.new_a is not None:
        parts.append((layer.new_a, layer.new_b, layer_scale(layer)))
        earlier = layer.recipe if layer.recipe is not None else torch.zeros(len(adapters))
        last = torch.cat([earlier, torch.ones(1)])
        table = torch.cat([torch.cat([table, torch.zeros(len(adapters), 1)], dim=1), last[None]])
    weights = gate_BT @ table
    y = layer.base(x)
    for i, (a, b, scale) in enumerate(parts):
        weight = weights[:, i].view(-1, *[1] * (x.dim() - 1))
        y = y + weight * scale * ((x @ a.T) @ b.T)
    return y


def layer_scale(layer: MixtureLinear) -> float:
    return float(layer.spread[-1, -1])


# The same examples every time: where a gradient's terms cancel, fp32 itself leaves more than 1e-6 of it, in both forms.
@settings(deadline=None, max_examples=100, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    ranks=st.lists(st.integers(1, 5), max_size=5),
    new_rank=st.none() | st.integers(1, 4),
    batch=st.integers(1, 4),
    tokens=st.sampled_from([(), (1,), (5,), (2, 3)]),
    kind=st.sampled_from(["plain", "bias", "conv1d"]),
    hooked=st.booleans(),
)
def test_equals_the_plain_loop_forward_and_backward(
    seed: int, ranks: list[int], new_rank: int | None, batch: int, tokens: tuple[int, ...], kind: str, hooked: bool
) -> None:
    if not ranks and new_rank is None:
        new_rank = 2
    generator = torch.Generator().manual_seed(seed)
    inputs, outputs = 7, 5
    base = make_base(kind, inputs, outputs, generator)
    adapters = make_adapters(ranks, inputs, outputs, generator)
    new = None if new_rank is None else make_new(new_rank, len(ranks), inputs, outputs, generator)
    layer = MixtureLinear(base, PATH, adapters, new)
    if hooked:  # as under ZeRO-3
        base.register_forward_hook(lambda _module, _args, output: output.view_as(output))
    gate = torch.rand(batch, len(ranks) + (new is not None), generator=generator)
    x = randn(generator, batch, *tokens, inputs)
    weight = randn(generator, batch, *tokens, outputs)

    results = []
    for forward in (lambda x: layer(x, gate), lambda x: plain_loop(layer, adapters, x, gate)):
        own = x.clone().requires_grad_()
        y = forward(own)
        trained = [p for p in layer.parameters() if p.requires_grad]
        mean = (y * weight).sum() / y[..., 0].numel()  # over tokens, as a loss is
        results.append([y, *torch.autograd.grad(mean, [own, *trained])])

    for ours, loop in zip(*results, strict=True):
        assert float((ours - loop).abs().max().detach()) <= 1e-6 * max(1.0, float(loop.abs().max().detach()))


@pytest.mark.parametrize("kind", ["plain", "bias"])
def test_one_adapter_at_gate_one_equals_pefts_lora_layer(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    base = make_base(kind, 48, 32, generator)
    peft = PeftLinear(base, "default", LoraConfig(), r=4, lora_alpha=16)
    a, b = randn(generator, 4, 48) / 7, randn(generator, 32, 4) / 2
    peft.lora_A["default"].weight.data.copy_(a)
    peft.lora_B["default"].weight.data.copy_(b)
    trained = MixtureLinear(base, PATH, [], NewWeights(a, b, 4.0, None))
    frozen = MixtureLinear(base, PATH, [Adapter("t", 4, 16.0, {PATH: a}, {PATH: b})])
    x = randn(generator, 3, 6, 48)
    gate = torch.ones(3, 1)

    expected = peft(x)
    torch.testing.assert_close(trained(x, gate), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(frozen(x, gate), expected, atol=1e-6, rtol=1e-6)

    weight = randn(generator, 3, 6, 32)
    (expected * weight).sum().backward()
    (trained(x, gate) * weight).sum().backward()
    assert trained.new_a is not None
    assert trained.new_b is not None
    torch.testing.assert_close(trained.new_a.grad, peft.lora_A["default"].weight.grad, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(trained.new_b.grad, peft.lora_B["default"].weight.grad, atol=1e-5, rtol=1e-5)


def test_every_trainable_parameter_gets_a_gradient_even_at_gate_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    adapters = make_adapters([2, 3], 6, 4, generator)
    layer = MixtureLinear(make_base("plain", 6, 4, generator), PATH, adapters, make_new(2, 2, 6, 4, generator))
    layer(randn(generator, 2, 3, 6), torch.zeros(2, 3)).sum().backward()
    for name, parameter in layer.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_old_adapters_are_frozen_parameters() -> None:
    generator = torch.Generator().manual_seed(0)
    adapters = make_adapters([2, 3], 6, 4, generator)
    layer = MixtureLinear(make_base("plain", 6, 4, generator), PATH, adapters, make_new(2, 2, 6, 4, generator))
    trainable = {name for name, parameter in layer.named_parameters() if parameter.requires_grad}
    assert trainable == {"new_a", "new_b", "recipe"}
    assert {"old_a", "old_b"} <= dict(layer.named_parameters()).keys()


def test_gates_stay_fp32_when_the_model_becomes_bf16() -> None:
    generator = torch.Generator().manual_seed(0)
    adapters = make_adapters([2, 3, 1], 6, 4, generator)
    layer = MixtureLinear(make_base("plain", 6, 4, generator), PATH, adapters)
    gate = torch.rand(2, 3, generator=generator)
    before = layer.rank_gates(gate)
    layer.bfloat16()
    assert layer.rank_gates(gate).dtype == torch.float32
    assert torch.equal(layer.rank_gates(gate), before)


def test_bf16_is_close_to_fp32_and_keeps_its_dtype() -> None:
    generator = torch.Generator().manual_seed(0)
    adapters = make_adapters([2, 3], 32, 24, generator)
    new = make_new(4, 2, 32, 24, generator)
    layer = MixtureLinear(make_base("bias", 32, 24, generator), PATH, adapters, new)
    x, gate = randn(generator, 2, 5, 32), torch.rand(2, 3, generator=generator)
    expected = layer(x, gate)
    expected.square().mean().backward()
    assert layer.new_a is not None
    expected_gradient = layer.new_a.grad
    layer.bfloat16().zero_grad()
    y = layer(x.bfloat16(), gate)
    y.float().square().mean().backward()
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, atol=0.08, rtol=0.03)
    assert expected_gradient is not None
    assert layer.new_a.grad is not None
    assert float((layer.new_a.grad.float() - expected_gradient).norm() / expected_gradient.norm()) < 0.03


def test_fp32_adapters_on_a_bf16_base_compute_in_bf16() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = MixtureLinear(make_base("plain", 8, 4, generator).bfloat16(), PATH, [], make_new(2, 0, 8, 4, generator))
    layer.new_a = nn.Parameter(layer.new_a.detach().float())  # type: ignore[union-attr]
    y = layer(randn(generator, 2, 3, 8).bfloat16(), torch.ones(2, 1))
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.new_a.grad is not None
    assert layer.new_a.grad.dtype == torch.float32


def test_autocast_works() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = MixtureLinear(
        make_base("plain", 8, 4, generator), PATH, make_adapters([2], 8, 4, generator), make_new(2, 1, 8, 4, generator)
    )
    x, gate = randn(generator, 2, 3, 8), torch.rand(2, 2, generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x, gate)
    y.float().sum().backward()
    torch.testing.assert_close(y.float(), layer(x, gate), atol=0.05, rtol=0.05)


class Watch(TorchDispatchMode):
    """Records the largest tensor that any operation makes, and every wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.waits.append(str(func))
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


def test_no_tensor_of_tokens_times_adapters_times_features_and_no_host_wait() -> None:
    generator = torch.Generator().manual_seed(0)
    adapters = make_adapters([2] * 12, 64, 64, generator)
    layer = MixtureLinear(make_base("plain", 64, 64, generator), PATH, adapters, make_new(2, 12, 64, 64, generator))
    x, gate = randn(generator, 4, 32, 64).requires_grad_(), torch.rand(4, 13, generator=generator)
    with Watch() as watch:
        layer(x, gate).sum().backward()
    assert watch.largest == 4 * 32 * 64
    assert watch.waits == []


@pytest.mark.integration
@pytest.mark.parametrize("learning", [False, True])
def test_compiles_without_a_graph_break(learning: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    adapters = make_adapters([2, 3], 16, 8, generator)
    new = make_new(2, 2, 16, 8, generator) if learning else None
    layer = MixtureLinear(make_base("bias", 16, 8, generator), PATH, adapters, new)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")  # no C++ compiler, no minute of waiting
    x, gate = randn(generator, 2, 5, 16), torch.rand(2, 2 + learning, generator=generator)
    torch.testing.assert_close(compiled(x, gate), layer(x, gate), atol=1e-6, rtol=1e-6)


def test_sizes_are_not_read_off_a_partitioned_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    for kind in ("plain", "conv1d"):
        base = make_base(kind, 6, 4, generator)
        whole = base.weight.data  # type: ignore[union-attr]
        base.weight.data = torch.empty(0)  # type: ignore[union-attr]
        layer = MixtureLinear(base, PATH, make_adapters([2], 6, 4, generator))
        base.weight.data = whole  # type: ignore[union-attr]
        assert layer(torch.ones(1, 2, 6), torch.ones(1, 1)).shape == (1, 2, 4)


def test_without_a_call_and_without_a_gate_it_says_so() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = MixtureLinear(make_base("plain", 6, 4, generator), PATH, make_adapters([2], 6, 4, generator))
    with pytest.raises(UserError, match=r"layers\.0\.q_proj.*outside of a call"):
        layer(torch.ones(1, 2, 6))


def test_a_constant_recipe_is_the_last_row() -> None:
    generator = torch.Generator().manual_seed(0)
    base = make_base("plain", 6, 4, generator)
    adapters = make_adapters([2, 3], 6, 4, generator)
    learned = make_new(2, 2, 6, 4, generator)
    constant = NewWeights(learned.a, learned.b, learned.scale, learned.recipe, learn_recipe=False)
    x, gate = randn(generator, 2, 3, 6), torch.rand(2, 3, generator=generator)
    layer = MixtureLinear(base, PATH, adapters, constant)
    assert layer.recipe is None
    torch.testing.assert_close(layer(x, gate), MixtureLinear(base, PATH, adapters, learned)(x, gate))


def test_a_silent_adapter_adds_nothing_whatever_uses_it() -> None:
    generator = torch.Generator().manual_seed(3)
    base, adapters = make_base("plain", 6, 5, generator), make_adapters([2, 3], 6, 5, generator)
    x, gate = randn(generator, 2, 4, 6), torch.tensor([[0.7, 0.3], [0.0, 1.0]])
    layer = MixtureLinear(base, PATH, adapters)
    before = layer(x, gate)
    adapters[0].b[PATH] = torch.zeros_like(adapters[0].b[PATH])
    expected = MixtureLinear(base, PATH, adapters)(x, gate)
    layer.disabled = 0
    torch.testing.assert_close(layer(x, gate), expected)
    assert not torch.allclose(before, expected), "the second row's recipe uses it too"
    layer.disabled = None
    assert torch.equal(layer(x, gate), before)
