"""Rows as LoRAs in GGUF: what llama.cpp would read computes what the bank does."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import gguf
import pytest
import torch
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from amlora_dist.adapters.adapter import Adapter
from amlora_dist.base_model import load_model
from amlora_dist.errors import UserError
from amlora_dist.inference.model import AMLoRAModel
from amlora_dist.registry.exports import row_adapter
from amlora_dist.registry.gguf_adapters import read_gguf, write_gguf
from amlora_dist.registry.server_exports import export_gguf
from tests.bank_with_base import TASKS, write_working_bank

TOKENS = torch.arange(3, 15).reshape(2, 6)
GATE = (0.15, 0.1, 0.05)
"""These adapters move logits by units; weighed so, by about one, as trained ones do. fp16 rounds 4e-4 of that."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> AMLoRAModel:
    folder = tmp_path_factory.mktemp("gguf")
    write_working_bank(folder / "bank", folder / "base")
    return AMLoRAModel.from_bank(folder / "bank", device="cpu")


def test_base_and_scaled_loras_from_the_files_give_the_mixture_s_logits(model: AMLoRAModel, tmp_path: Path) -> None:
    """Read with the reader of the ``gguf`` library, rows put back by transformers' own rule, not by ours."""
    export_gguf(tmp_path / "gguf", model.bank, model.base)
    plain, back = load_model(model.base, dtype=torch.float32), LlamaTensorProcessor({})
    modules = {f"blk.{k}.{ours}.weight": f"model.layers.{k}.{theirs}" for k in range(4) for ours, theirs in (
        ("attn_q", "self_attn.q_proj"), ("attn_k", "self_attn.k_proj"), ("attn_v", "self_attn.v_proj"),
        ("attn_output", "self_attn.o_proj"), ("ffn_gate", "mlp.gate_proj"), ("ffn_up", "mlp.up_proj"),
        ("ffn_down", "mlp.down_proj"),
    )}  # fmt: skip
    with torch.no_grad():
        for task, scale in zip(TASKS, GATE, strict=True):
            reader = gguf.GGUFReader(str(tmp_path / "gguf" / f"{task}.gguf"))
            assert reader.fields["general.type"].contents() == "adapter"
            assert reader.fields["adapter.type"].contents() == "lora"
            parts = {tensor.name: tensor.data for tensor in reader.tensors}
            assert all(data.dtype == "float16" for data in parts.values())
            rank = next(len(data) for name, data in parts.items() if name.endswith(".lora_a"))
            own = scale * reader.fields["adapter.lora.alpha"].contents() / rank
            for name, a in parts.items():
                if name.endswith(".lora_a"):
                    module, b = modules[name.removesuffix(".lora_a")], parts[name.replace(".lora_a", ".lora_b")]
                    if module.endswith("q_proj"):
                        b = back._reverse_permute_weights(b, 4, 4)
                    if module.endswith("k_proj"):
                        b = back._reverse_permute_weights(b, 4, 2)
                    delta = torch.from_numpy(b.copy()).float() @ torch.from_numpy(a.copy()).float()
                    plain.get_submodule(module).weight.add_(own * delta)
        found = plain(input_ids=TOKENS).logits
        expected = model(input_ids=TOKENS, task_gate=torch.tensor([GATE, GATE])).logits
        none = model(input_ids=TOKENS, task_gate=torch.zeros(2, 3)).logits
    assert float((found - expected).abs().max()) <= 1e-3
    assert float((expected - none).abs().max()) > 0.5, "the adapters do something"


def test_what_is_written_is_read_back_in_transformers_order(model: AMLoRAModel, tmp_path: Path) -> None:
    row = row_adapter(model.bank, "shapes")
    write_gguf(tmp_path / "row.gguf", row, model.base)
    read = read_gguf(tmp_path / "row.gguf", model.base, list(row.a))
    assert (read.task, read.rank, read.scale) == ("shapes", row.rank, 1.0)
    for module in row.a:
        torch.testing.assert_close(read.a[module], row.a[module].half().float(), rtol=0, atol=0)
        torch.testing.assert_close(read.b[module], row.b[module].half().float(), rtol=0, atol=0)
    with pytest.raises(UserError, match="expected pairs of the layers that a bank adapts"):
        read_gguf(tmp_path / "row.gguf", model.base, list(row.a)[:1])


def test_what_llama_cpp_does_not_know_is_refused_and_leaves_nothing(model: AMLoRAModel, tmp_path: Path) -> None:
    other = dataclasses.replace(model.base, model_type="t5")
    with pytest.raises(UserError, match="found a base model of type 't5', expected one of llama, mistral"):
        export_gguf(tmp_path / "gguf", model.bank, other)
    odd = Adapter("odd", 1, 1.0, {"model.odd_proj": torch.ones(1, 4)}, {"model.odd_proj": torch.ones(4, 1)})
    with pytest.raises(UserError, match=r"layer 'model\.odd_proj' has no name in llama\.cpp's 'llama'"):
        write_gguf(tmp_path / "odd.gguf", odd, model.base)
    module = "model.layers.1.self_attn.q_proj"
    large = Adapter("large", 1, 1.0, {module: torch.full((1, 32), 7e4)}, {module: torch.ones(32, 1)})
    with pytest.raises(UserError, match="has a value of 70000, more than fp16 holds"):
        write_gguf(tmp_path / "large.gguf", large, model.base)
    assert not list(tmp_path.iterdir())
