"""Packed rows: the same losses and gradients as rows in sequences of their own, and no row sees another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from amlora_dist.adapters.dropout import row_keys
from amlora_dist.adapters.inject import Mixture, NewAdapter, inject
from amlora_dist.adapters.packed_rows import WIDTH, PackedRows
from amlora_dist.errors import UserError
from amlora_dist.tasks.batches import Example
from amlora_dist.training.batching import LossComputer
from amlora_dist.training.trunk_cache import TrunkCache
from tests.adapters.banks import LinearRouter, random_adapters, targets_of, tiny_llama
from tests.adapters.test_architectures import build

EXACT = torch.float64
"""Processors round fp32 each in their own way; norms and gates are fp32 in it all the same."""
LENGTHS = (5, 11, 3, 7, 9, 4)


@dataclass(frozen=True)
class Given:
    """A router that has its gates."""

    gates_BT: Tensor
    tasks: Sequence[str]
    kind: str = "given"
    needs_features: bool = False

    def gates(self, features_BD: Tensor | None, batch: int) -> Tensor:
        assert batch == len(self.gates_BT)
        return self.gates_BT

    def to(self, device: Any) -> Given:
        return self

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def settings(self) -> dict[str, Any]:
        return {}


def rows(lengths: tuple[int, ...] = LENGTHS, vocabulary: int = 67) -> list[Example]:
    """Rows with a target of two tokens; the second and the fourth are conversations that learn an earlier turn too."""
    draw = torch.Generator().manual_seed(0)
    out = []
    for row, length in enumerate(lengths):
        ids = torch.randint(3, vocabulary, (length + 2,), generator=draw).tolist()
        earlier = (1, 1, 0, 0) if row in (1, 3) else ()
        label = None if row % 2 else 0
        out.append(
            Example(row, tuple(ids[:-2]), tuple(ids[-2:]), label, "x", span=(1, max(2, length - 2)), earlier=earlier)
        )
    return out


def mixture(kind: str = "llama", layers: str = "above_router", *, router: bool = False, dropout: float = 0.0) -> Mixture:
    """A bank of two adapters and a third one in progress, in fp64."""
    torch.manual_seed(0)
    model = (tiny_llama() if kind == "llama" else build(kind)).to(EXACT)
    targets = targets_of(model, targets="all-linear", layers=layers)
    old = random_adapters(targets, [2, 3], size=0.2)
    new = NewAdapter(task="new", rank=2, alpha=4.0, dropout=dropout)
    made = inject(model, targets, old, new=new, router_layer=2)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in made.trainable().items():
            if name.startswith(("b.", "recipe.")):
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.2)
    if router:
        made.set_router(LinearRouter.random(made.task_names, 32))
    return made


def computer(made: Mixture, packs: bool) -> LossComputer:
    return LossComputer(
        made.model, pad_id=0, encoder_decoder=False, device=torch.device("cpu"),
        packing_width=made.packing_width() if packs else 0,
    )  # fmt: skip


def loss_of_each(made: Mixture, packs: bool, gate: Tensor | None, smoothing: float = 0.0, dropout: bool = False) -> Tensor:
    """Loss of every row of one pass, nats."""
    examples = rows()
    keys = row_keys(0, "new", 4, range(len(examples)), from_right=True, device=torch.device("cpu")) if dropout else None
    logits, labels = computer(made, packs).logits(made.model, examples, gate, dropout_keys=keys)
    if not smoothing:
        each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        return each if packs else each[labels.flatten() != -100]
    return LossComputer.cross_entropy(logits, labels, examples, smoothing)[None]


def gradients(made: Mixture, loss: Tensor) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss.sum(), list(made.trainable().values()))
    return dict(zip(made.trainable(), found, strict=True))


def test_rows_lie_in_one_piece_and_the_sequences_come_out_nearly_equal() -> None:
    packed = PackedRows.of(LENGTHS, width=15)
    assert packed.row_PS.shape[0] == 3 and packed.row_PS.shape[1] <= 15 and packed.count == 6
    ids_BL = torch.where(packed.mask_BL, torch.arange(packed.mask_BL.numel()).view(packed.mask_BL.shape), -1)
    assert torch.equal(packed.unpack(packed.pack(ids_BL, -1))[packed.mask_BL], ids_BL[packed.mask_BL])
    for row, length in enumerate(LENGTHS):
        assert packed.place_PS[packed.row_PS == row].tolist() == list(range(length)), "positions start again"
    assert PackedRows.of(LENGTHS, WIDTH).row_PS.shape == (1, sum(LENGTHS)), "short rows share one sequence"
    assert PackedRows.of([300, 20, 20], WIDTH).row_PS.shape == (2, 300), "a long one is none longer for it"


@pytest.mark.parametrize("lengths", [[130] * 4, [170] * 4, [140] * 8, [129, 190, 131, 128, 177]])
def test_packed_rows_are_never_more_tokens_than_rows_apart(lengths: list[int]) -> None:
    assert PackedRows.of(lengths, WIDTH).tokens <= len(lengths) * max(lengths)


@pytest.mark.parametrize("layers", ["above_router", "all"])
@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_every_token_s_loss_and_all_gradients_are_those_of_rows_apart(kind: str, layers: str, routed: bool) -> None:
    """``routed``: each row has gates of its own, from the features of its text."""
    gate = None if routed else torch.tensor([0.3, 0.0, 1.0])
    apart, packed = (mixture(kind, layers, router=routed) for _ in range(2))
    one, other = loss_of_each(apart, False, gate), loss_of_each(packed, True, gate)
    torch.testing.assert_close(other, one, atol=1e-7, rtol=0)
    for (name, a), b in zip(gradients(apart, one).items(), gradients(packed, other).values(), strict=True):
        torch.testing.assert_close(b, a, atol=1e-6, rtol=1e-6, msg=name)


def test_the_losses_in_fp32_are_within_a_hundred_thousandth() -> None:
    def losses(packs: bool) -> Tensor:
        made = mixture()
        made.model.float()
        return loss_of_each(made, packs, torch.tensor([0.3, 0.0, 1.0])).detach()

    one, other = losses(False), losses(True)
    torch.testing.assert_close(other, one, atol=1e-5, rtol=0)
    assert float(other.sum() / len(other)) == pytest.approx(float(one.sum() / len(one)), abs=1e-5)


def test_sequences_that_are_not_filled_by_one_row_alone_give_the_same_with_several_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = mixture(router=True)
    one = loss_of_each(made, False, None)
    made.packing_width()  # tries it once
    monkeypatch.setattr(made, "packing_width", lambda: 16)
    assert PackedRows.of([len(row.prompt) + 2 for row in rows()], 16).row_PS.shape[0] == 4
    torch.testing.assert_close(loss_of_each(made, True, None), one, atol=1e-7, rtol=0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_no_row_sees_another(attention: str) -> None:
    """Changing the first row changes no bit of what the model says of the others, whichever attention it has."""
    made = mixture()
    made.model.set_attn_implementation(attention)
    made.packing_width()
    packed = PackedRows.of([6, 5, 7], width=18)
    ids = torch.randint(3, 67, (3, 7), generator=torch.Generator().manual_seed(1))
    gate = torch.tensor([[0.3, 0.0, 1.0]])

    def logits(first: int) -> Tensor:
        changed = ids.clone()
        changed[0] = torch.where(changed[0] == first, first + 1, first)
        with torch.no_grad():
            return packed.unpack(made.model(**packed.inputs(changed, 0, EXACT), task_gate=gate).logits)

    one, other = logits(5), logits(40)
    assert not torch.equal(one[0], other[0])
    assert torch.equal(one[1][packed.mask_BL[1]], other[1][packed.mask_BL[1]])
    assert torch.equal(one[2][packed.mask_BL[2]], other[2][packed.mask_BL[2]])


@pytest.mark.parametrize("packs", [False, True])
def test_each_row_has_its_own_gate(packs: bool) -> None:
    """Gates that differ from row to row, in the order of the bank: each row's loss is that of its adapter alone."""
    made, order = mixture(), [2, 0, 1, 2, 0, 1]
    alone = torch.stack([loss_of_each(made, False, made.one_hot(task, 1)[0]) for task in range(3)])
    gates = torch.cat([made.one_hot(task, 1) for task in order])
    where = torch.tensor(order).repeat_interleave(torch.tensor([row.learned for row in rows()]))
    made.set_router(Given(gates, made.task_names))
    found = loss_of_each(made, packs, None)
    torch.testing.assert_close(found, alone.gather(0, where[None])[0], atol=1e-7, rtol=0)


def test_features_of_packed_rows_are_those_of_their_texts() -> None:
    made = mixture(router=True)
    seen: list[list[Tensor]] = []
    for packs in (False, True):
        whole, loss_computer = made.model.forward, computer(made, packs)
        features: list[Tensor] = []

        def noting(*args: Any, features: list[Tensor] = features, whole: Any = whole, **inputs: Any) -> Any:
            return whole(*args, **inputs, on_route=lambda found, gate: features.extend([found, gate]))

        loss_computer.logits(noting, rows(), None)
        seen.append(features)
    for one, other in zip(*seen, strict=True):
        torch.testing.assert_close(other, one, atol=1e-6, rtol=0)


def test_labels_are_smoothed_and_free_text_is_not_in_packed_rows_too() -> None:
    one, other = (loss_of_each(mixture(), packs, torch.ones(3), smoothing=0.2).item() for packs in (False, True))
    assert other == pytest.approx(one, rel=1e-6)
    assert other != pytest.approx(loss_of_each(mixture(), True, torch.ones(3)).sum().item(), abs=1e-2)


@pytest.mark.parametrize("routed", [False, True])
def test_dropout_knows_a_token_by_its_row(routed: bool) -> None:
    gate = None if routed else torch.tensor([0.0, 0.0, 1.0])
    one, other = (
        loss_of_each(mixture(router=routed, dropout=0.4), packs, gate, dropout=True) for packs in (False, True)
    )
    torch.testing.assert_close(other, one, atol=1e-6, rtol=0)
    plain = loss_of_each(mixture(router=routed, dropout=0.4), True, gate)
    assert (plain - other).abs().max().item() > 1e-3


def test_with_gradient_checkpointing_the_gradients_are_the_same() -> None:
    plain, made = mixture(router=True), mixture(router=True)
    expected = gradients(plain, loss_of_each(plain, True, None))
    made.model.gradient_checkpointing_enable()
    made.model.train()
    loss = computer(made, True)(made.model, rows(), None)
    for parameter in made.trainable().values():
        parameter.grad = None
    loss.backward()
    for name, parameter in made.trainable().items():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, expected[name].to(parameter.dtype), atol=1e-6, rtol=1e-6)


def test_the_trunk_s_cache_goes_with_packed_rows(tmp_path: Path) -> None:
    made, gate = mixture(), torch.tensor([0.3, 0.0, 1.0])
    cache = TrunkCache(made.trunk(), tmp_path, limit=10**9, dtype=EXACT, decided_by={})
    packing = computer(made, True)
    with cache.attach(made.model):
        found = packing(made.model, rows(), gate)
    assert float(found.detach()) == pytest.approx(float(loss_of_each(made, False, gate).detach().sum()), rel=1e-6)
    assert cache.misses == len(LENGTHS)


def test_a_model_that_does_not_keep_rows_apart_is_refused() -> None:
    model = build("falcon")
    model.config.alibi = True
    torch.manual_seed(0)
    model = type(model)(model.config)
    made = inject(model, targets_of(model), [], new=NewAdapter(task="new", rank=2, alpha=4.0), router_layer=2)
    with pytest.raises(UserError, match=r"training\.packing: found true with FalconForCausalLM, .* expected false"):
        made.packing_width()


def test_a_removed_mixture_leaves_the_output_layer_as_it_was() -> None:
    made = mixture()
    head = made.model.get_output_embeddings()
    before = len(head._forward_pre_hooks)
    assert made.packing_width() == made.packing_width() == WIDTH
    assert len(head._forward_pre_hooks) == before + 1
    made.remove()
    assert len(head._forward_pre_hooks) == before
