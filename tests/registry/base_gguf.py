"""Base models as GGUF, in fp32, so that llama.cpp computes with the very weights that transformers has."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from amlora_dist.base_model import BaseModel


def write_base_gguf(file: Path, base: BaseModel) -> None:
    """A Llama of ``tiny_config``; llama.cpp writes each word of its tokenizer with a space before it."""
    config = json.loads((base.path / "config.json").read_text(encoding="utf-8"))
    layers, heads, keys = config["num_hidden_layers"], config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(layers)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(keys)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_vocab_size(config["vocab_size"])
    size = config["vocab_size"]
    words = AutoTokenizer.from_pretrained(base.path).convert_ids_to_tokens(list(range(size)))
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"\u2581{word}" for word in words])
    writer.add_token_scores([0.0] * size)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (size - 3))
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    for name, weight in AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32).state_dict().items():
        if "q_proj" in name or "k_proj" in name:
            count = heads if "q_proj" in name else keys
            weight = weight.reshape(count, 2, len(weight) // count // 2, -1).swapaxes(1, 2).reshape(weight.shape)
        there = names.get_name(name, try_suffixes=(".weight",))
        assert there is not None, name
        writer.add_tensor(there, weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
