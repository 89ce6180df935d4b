"""Stock PEFT loads every adapter folder of a bank, and computes what our tensors say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from amlora_dist.adapters.adapter import Adapter
from amlora_dist.registry.manifest import BaseEntry
from tests.registry.tiny_banks import fingerprint, tiny_adapter, tiny_bank

KINDS = {
    "llama": ("q_proj", "v_proj"),
    "gpt2": ("c_attn",),  # Conv1D, whose weight is (d_in, d_out)
    "t5": ("q", "v"),
    "llama, all linear layers": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "gpt2, mlp": ("mlp.c_fc", "mlp.c_proj"),
    "t5, mlp": ("wi", "wo"),
}


def tiny_model(kind: str) -> Any:
    import transformers as tf

    torch.manual_seed(0)
    if kind == "llama":
        sizes: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
        return tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, **sizes))
    if kind == "gpt2":
        return tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=32, n_embd=16, n_head=2, n_layer=2, n_positions=16))
    sizes = {"num_heads": 2, "num_layers": 1, "decoder_start_token_id": 0}
    return tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, **sizes))


def logits(model: Any, kind: str) -> torch.Tensor:
    tokens = torch.arange(2, 14).reshape(2, 6)
    extra = {"decoder_input_ids": tokens[:, :3]} if kind == "t5" else {}
    with torch.no_grad():
        return model.eval()(input_ids=tokens, **extra).logits


def add_by_hand(model: nn.Module, adapter: Adapter) -> None:
    """W + (alpha / r) B A on the weights themselves."""
    for path, a in adapter.a.items():
        weight = model.get_submodule(path).weight
        delta = adapter.scale * adapter.b[path] @ a
        assert isinstance(weight, nn.Parameter)
        weight.data += delta.T if type(model.get_submodule(path)).__name__ == "Conv1D" else delta


@pytest.mark.integration  # importing transformers and peft
@pytest.mark.parametrize("kind", KINDS)
def test_stock_peft_loads_each_adapter_and_computes_the_same(kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    endings, kind = KINDS[kind], kind.partition(",")[0]
    modules = {
        path: ((module.nx, module.nf) if type(module).__name__ == "Conv1D" else (module.in_features, module.out_features))
        for path, module in tiny_model(kind).named_modules()
        if path.endswith(tuple(f".{name}" for name in endings))
    }
    adapters = [tiny_adapter(task, k, modules=modules) for k, task in enumerate(("helpdesk/email", "agnews"), start=1)]
    base = BaseEntry(source="base", digest=fingerprint(), architecture=kind, encoder_decoder=kind == "t5")
    tasks = [adapter.task for adapter in adapters]
    manifest = tiny_bank(tmp_path / "bank", tasks, adapters=adapters, base=base, fan_in_fan_out=kind == "gpt2")
    plain = logits(tiny_model(kind), kind)
    for line, adapter in zip(manifest.adapters, adapters, strict=True):
        loaded = peft.PeftModel.from_pretrained(tiny_model(kind), tmp_path / "bank" / line.folder)
        by_hand = tiny_model(kind)
        add_by_hand(by_hand, adapter)
        found, expected = logits(loaded, kind), logits(by_hand, kind)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(found, plain, atol=1e-3)
        assert loaded.peft_config["default"].r == adapter.rank
