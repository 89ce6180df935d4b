"""The plan's bytes and FLOPs: against arithmetic done by hand, and against a tiny model that really runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from amlora_dist.adapters.adapter import Adapter
from amlora_dist.adapters.inject import NewAdapter, inject
from amlora_dist.adapters.settings import AdapterSettings, RouterSettings
from amlora_dist.adapters.targets import find_targets
from amlora_dist.base_model import ModelSettings
from amlora_dist.planning.memory import MemoryLayout, TrainedShare, activation_table, activations, memory_of
from amlora_dist.planning.shapes import Shape, shape_of
from amlora_dist.planning.work import forward_flops

RANK = 4
MiB = 1 << 20


def eight_b() -> Shape:
    return shape_of(ModelSettings(source="llama-3-8b"), AdapterSettings(targets="auto"), RouterSettings())


def of(zero: int, **more: Any) -> Any:
    t = 8 * 212_992
    layout = MemoryLayout(zero=zero, ranks=8, micro_batch=2, **more)
    return memory_of(eight_b(), TrainedShare(new=t, old=3 * t), layout, size=2, length=520, targets=8, eager=False)


def test_llama_3_8b_on_eight_gpus_by_hand() -> None:
    p, t = 8_030_261_248, 1_703_936
    assert of(0).weights == of(2).weights == 2 * (p + 4 * t)
    assert of(3).weights == pytest.approx(2 * (p + 4 * t) / 8, rel=1e-6)
    assert of(0).gradients == (2 + 4) * t
    assert of(1).gradients == of(2).gradients == 4 * t // 8
    assert of(3).gradients == (2 + 4) * t // 8
    assert of(0).optimizer == 12 * t
    assert of(1).optimizer == of(3).optimizer == 12 * t // 8
    assert of(2).buffers == 2 * 500_000_000, "DeepSpeed's reduce bucket, whatever little there is to reduce"
    assert of(2, bucket=1000, overlap=True).buffers == 2 * 2 * 1000
    small = 65 * 4096  # 2 norms a layer and the last
    assert of(3, bucket=0).buffers == 2 * (1_000_000_000 + 128_256 * 4096 + small)
    assert of(2).loading == 2 * (p + 4 * t), "every rank reads the whole model"
    assert of(3).loading == of(3).weights + 2 * 218_112_000, "its part, and one layer"


def test_offloading_moves_bytes_to_the_host_or_to_its_disk() -> None:
    t = 1_703_936
    moved = of(3, offload="parameters")
    assert moved.weights == 0 and moved.optimizer == of(3).optimizer, "DeepSpeed moves what it is asked to, no more"
    assert moved.host == of(3).weights
    both = of(3, offload="both")
    assert both.weights == both.optimizer == 0
    assert both.host == of(3).weights + (12 + 4) * t // 8
    assert of(2, offload="optimizer").host == (12 + 4) * t // 8
    assert of(2, offload="optimizer").weights == of(2).weights
    disk = of(3, offload="nvme")
    assert disk.weights == 0 and disk.nvme == of(3).weights and disk.host == 2 * 500_000_000, "the buffers on the way"
    assert disk.reader == of(2).loading and moved.reader == 0, "read whole on one rank: parts are streamed to memory only"


def test_activations_by_hand() -> None:
    token = 2 * 4 * 4096 + 2 * (4096 + 2 * 4096 + 2 * 1024 + 3 * 14336)
    logits = 2 * 9 * 128_256 * (2 * 2 + 12)
    adapters = 2 * 2 * (4 * 8)  # A x of four adapters of rank 8 in q and v of a layer
    assert of(2).activations == 2 * 520 * 16 * (token + adapters) + logits
    assert of(2, checkpointing=True).activations == 2 * 520 * (16 * 2 * 4096 + token + adapters) + logits


def test_a_deepspeed_section_is_read_as_deepspeed_reads_it() -> None:
    section = {"zero_optimization": {
        "stage": 3, "reduce_bucket_size": 7, "stage3_max_live_parameters": 8, "offload_param": {"device": "cpu"},
        "stage3_param_persistence_threshold": 9, "overlap_comm": False,
    }}  # fmt: skip
    made = MemoryLayout.of(section, zero=3, ranks=4, micro_batch=1, checkpointing=True)
    assert made == MemoryLayout(3, 4, "parameters", True, 1, 7, 8, False, 9)

    def offload(zero: int, **devices: str) -> str:
        given = {"zero_optimization": {name: {"device": device} for name, device in devices.items()}}
        return MemoryLayout.of(given, zero=zero, ranks=4, micro_batch=1, checkpointing=False).offload

    assert offload(3, offload_param="cpu", offload_optimizer="cpu") == "both"
    assert offload(3, offload_param="nvme") == "nvme"
    assert offload(2, offload_param="cpu", offload_optimizer="cpu") == "optimizer", "weights stay where they are whole"
    assert offload(0, offload_optimizer="cpu") == "none"


def test_activations_are_shown_by_rows_and_tokens_with_and_without_checkpointing() -> None:
    layout = MemoryLayout(zero=3, ranks=8, micro_batch=3)
    table = activation_table(eight_b(), layout, size=2, lengths=[130, 520], targets=8, eager=False, ranks=32)
    assert [(e["micro_batch"], e["length"]) for e in table] == [(b, n) for b in (1, 2, 3, 4, 8) for n in (130, 520)]
    by = {(e["micro_batch"], e["length"]): e for e in table}
    assert by[2, 520] == {
        "micro_batch": 2, "length": 520, "without": of(2).activations,
        "with_checkpointing": of(2, checkpointing=True).activations,
    }  # fmt: skip


def tiny(tmp_path: Path, attention: str, dtype: torch.dtype, targets: Any = "auto") -> tuple[Shape, Any, Any]:
    """A Llama small enough to run, with an old and a new adapter, and its shape."""
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=160, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    settings = AdapterSettings(rank=RANK, targets=targets)
    shape = shape_of(ModelSettings(source=str(tmp_path)), settings, RouterSettings())
    model = LlamaForCausalLM._from_config(config, attn_implementation=attention, dtype=dtype)
    found = find_targets(model, settings, 2)
    old = Adapter("first", RANK, 8.0, {}, {})
    for target in found:
        old.a[target.path] = torch.randn(RANK, target.in_features)
        old.b[target.path] = torch.randn(target.out_features, RANK)
        old.recipe[target.path] = torch.zeros(0)
    mixture = inject(model, found, [old], new=NewAdapter(task="second", rank=RANK, alpha=8.0, seed=0))
    return shape, model, mixture


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_and_gradients_are_what_a_model_really_holds(tmp_path: Path, dtype: torch.dtype) -> None:
    shape, model, mixture = tiny(tmp_path, "sdpa", dtype)
    new = RANK * shape.adapter_width + len(shape.targets)
    assert new == sum(p.numel() for p in mixture.trainable().values())
    old = RANK * shape.adapter_width
    size = dtype.itemsize
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    planned = memory_of(shape, TrainedShare(new, old), MemoryLayout(0, 1), size=size, length=32, targets=1, eager=False)
    assert held == planned.weights


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets", ["auto", "mlp", "all-linear"])
def test_activations_are_what_autograd_really_keeps(
    tmp_path: Path, attention: str, dtype: torch.dtype, targets: str
) -> None:
    shape, model, _ = tiny(tmp_path, attention, dtype, targets)
    batch, length = 3, 48
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    own |= {b.untyped_storage().data_ptr() for b in model.buffers()}
    alive: list[Any] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    ids = torch.randint(0, 97, (batch, length))
    gate = torch.tensor([[0.0, 1.0]]).expand(batch, -1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(input_ids=ids, task_gate=gate, use_cache=False, logits_to_keep=1).logits
    assert out.requires_grad
    layout = MemoryLayout(0, 1, micro_batch=batch)
    planned = activations(
        shape, layout, size=dtype.itemsize, length=length, targets=0, eager=attention == "eager", ranks=2 * RANK
    )
    planned -= batch * 97 * (2 * dtype.itemsize + 12)  # no loss was taken
    assert planned == pytest.approx(sum(kept.values()), rel=0.12)


def test_flops_are_those_that_pytorch_counts(tmp_path: Path) -> None:
    shape, model, _ = tiny(tmp_path, "eager", torch.float32)
    length = 64
    ids = torch.randint(0, 97, (1, length))
    gate = torch.tensor([[0.0, 1.0]])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=ids, task_gate=gate, use_cache=False, logits_to_keep=1)
    head = 2 * 64 * 97
    planned = length * forward_flops(shape, length=length, ranks=2 * RANK) + head
    assert planned == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_only_the_upper_half_is_passed_on_the_way_back(tmp_path: Path) -> None:
    shape = eight_b()
    whole = forward_flops(shape, length=512, ranks=0)
    assert forward_flops(shape, length=512, ranks=0, top=True) == pytest.approx(whole / 2)
    assert replace(shape, below_router=0).training_layers == 16
