"""Under ZeRO-3 every rank reads its own part of the checkpoint, and together they hold the model transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from amlora_dist.base_model import BaseModel, load_model
from amlora_dist.errors import UserError
from amlora_dist.training.engine import deepspeed_config, join_process_group, whole_parameters
from amlora_dist.training.zero3_loading import load_partitioned, read_range, shards_of, sources_of
from tests.tiny_config import write_model
from tests.training.ranks import on_ranks


def test_any_range_of_a_tensor_is_read_alone(tmp_path: Path) -> None:
    whole = torch.arange(7 * 3 * 2, dtype=torch.bfloat16).reshape(7, 3, 2)
    save_file({"x": whole, "y": torch.tensor(5.0), "z": torch.arange(9.0)}, tmp_path / "m.safetensors")
    for start in range(42):
        for count in range(1, 42 - start):
            read = read_range(tmp_path / "m.safetensors", "x", (7, 3, 2), start, count)
            assert torch.equal(read, whole.flatten()[start : start + count])
    assert read_range(tmp_path / "m.safetensors", "y", (), 0, 1).tolist() == [5.0]
    assert read_range(tmp_path / "m.safetensors", "z", (9,), 4, 3).tolist() == [4.0, 5.0, 6.0]


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "one.safetensors"}}')
    with pytest.raises(UserError, match=r"lacks 1 of its shards, the first is one.safetensors"):
        shards_of(tmp_path)


def write(folder: Path, kind: str) -> BaseModel:
    """Sizes that no number of ranks divides, weights in several shards, once with tied embeddings."""
    torch.manual_seed(1)
    sizes: dict[str, Any] = {
        "vocab_size": 61, "hidden_size": 36, "intermediate_size": 50, "num_hidden_layers": 3, "num_attention_heads": 6,
        "num_key_value_heads": 3,
    }  # fmt: skip
    if kind == "t5":
        write_model(folder, "t5")
    elif kind == "mixtral":
        made: Any = MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=3, num_experts_per_tok=2))
        made.save_pretrained(folder)
    else:
        made = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=kind == "tied"))
        made.save_pretrained(folder, max_shard_size="20KB")
    return BaseModel(kind, None, folder, "", kind == "t5", "llama" if kind in ("llama", "tied") else kind)


def test_weights_that_lack_a_tensor_are_refused_and_not_drawn_at_random(tmp_path: Path) -> None:
    base = BaseModel("tiny", None, write_model(tmp_path / "tiny", "llama"), "", False, "llama")
    file = base.path / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if ".2.mlp.down_proj" not in name}
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack 1 tensors of Llama.*, the first is .*2.mlp.down_proj.weight; give the"):
        load_model(base, dtype=torch.float32)


def test_experts_are_streamed_too_each_from_its_own_tensors(tmp_path: Path) -> None:
    base = write(tmp_path, "mixtral")
    shards = shards_of(tmp_path)
    sources = sources_of(base, shards)
    assert sources is not None
    experts = {name for name, parts in sources.items() if len(parts) > 1}
    assert len(experts) == 2 * 3, "both weights of the experts in each of three layers"
    for name, parameter in load_model(base, dtype=torch.float32).named_parameters():
        parts = []
        for tensor in sources[name]:
            with safe_open(shards[tensor], framework="pt") as file:
                parts.append(file.get_tensor(tensor).flatten())
        assert torch.equal(torch.cat(parts).view_as(parameter), parameter), name


def test_what_is_made_in_another_way_is_left_to_transformers(tmp_path: Path) -> None:
    base = write(tmp_path, "llama")
    shards = shards_of(tmp_path)
    assert sources_of(base, shards) == {name: [name] for name in shards}
    lacking = {name: file for name, file in shards.items() if "layers.1.mlp.up_proj" not in name}
    assert sources_of(base, lacking) is None


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    base = write(tmp_path, "mixtral")
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(UserError, match=r"model.source: cannot read .*model.safetensors: .*; fetch the model again"):
        shards_of(tmp_path)
    assert base.path == tmp_path


Weights = dict[str, tuple[list[float], str]]
"""Values and dtype by name."""


def gathered(cases: list[tuple[BaseModel, torch.dtype]]) -> list[Weights]:
    """Every parameter, whole, and every buffer of each partitioned model."""
    join_process_group()
    out: list[Weights] = []
    for base, dtype in cases:
        section = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
        config = deepspeed_config(section, dtype=dtype, micro=1, accumulation=1, world=dist.get_world_size(), clip=1.0)
        model = load_partitioned(base, config, dtype=dtype, attention="sdpa")
        assert not any(p.requires_grad for p in model.parameters()) and not model.training
        assert all(p.numel() == 0 for p in model.parameters()), "nothing is whole"
        held: Weights = {}
        for name, parameter in model.named_parameters():
            with whole_parameters([parameter]):
                held[name] = (parameter.detach().float().flatten().tolist(), str(parameter.dtype))
        held |= {name: (b.float().flatten().tolist(), str(b.dtype)) for name, b in model.named_buffers()}
        out.append(held)
    return out


@pytest.mark.integration
def test_the_parts_make_up_the_model(tmp_path: Path) -> None:
    kinds = {"llama": torch.float32, "tied": torch.bfloat16, "t5": torch.float32, "mixtral": torch.bfloat16}
    cases = [(write(tmp_path / kind, kind), dtype) for kind, dtype in kinds.items()]
    expected: list[Weights] = []
    for base, dtype in cases:
        model = load_model(base, dtype=dtype)
        named = [*model.named_parameters(), *model.named_buffers()]
        expected.append({name: (t.detach().float().flatten().tolist(), str(t.dtype)) for name, t in named})
    for rank in on_ranks(2, gathered, cases):
        for kind, found, wanted in zip(kinds, rank, expected, strict=True):
            assert found.keys() == wanted.keys(), kind
            assert {name for name in wanted if found[name] != wanted[name]} == set(), kind
