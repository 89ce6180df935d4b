"""A bank works in every architecture: exact at one-hot rows, and generation with a cache equals without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from amlora_dist.adapters.inject import NewAdapter, inject
from tests.adapters.banks import VOCABULARY, LinearRouter, merge_row, prompts, random_adapters, targets_of

LLAMA_LIKE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": LLAMA_LIKE,
    "mistral": LLAMA_LIKE | {"sliding_window": 6},
    "qwen2": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE,
    "gemma3_text": LLAMA_LIKE | {"sliding_window": 6},
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64},
    "gpt_neox": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4},
    "phi": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4},
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
        "dropout": 0.0,
    },
    "falcon": {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4},
    "mixtral": LLAMA_LIKE | {"num_local_experts": 3},
    "qwen2_moe": LLAMA_LIKE | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 4, "num_decoder_layers": 2, "num_heads": 4},
    "bart": {
        "d_model": 32,
        "encoder_layers": 4,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
    },
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
TASKS = ["task0", "task1", "task2"]


def build(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=VOCABULARY, **CONFIGS[kind], **SPECIAL)
    family = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = family.from_config(config).eval()
    with torch.no_grad():  # tiny random models otherwise say the same to every prompt
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3.0)
    return model


@pytest.fixture(params=list(CONFIGS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["auto", "all-linear"])
def which(request: pytest.FixtureRequest) -> str:
    """``adapters.targets``; all linear layers include those that the other words mean."""
    return str(request.param)


def inputs_for(model: PreTrainedModel, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": ids} | ({"decoder_input_ids": ids[:, :3]} if model.config.is_encoder_decoder else {})


def test_a_one_hot_row_equals_merged_weights(kind: str, which: str) -> None:
    ids = prompts(2, 8)
    model = build(kind)
    targets = targets_of(model, targets=which)
    adapters = random_adapters(targets, [2, 3, 1], size=0.2)
    mixture = inject(model, targets, adapters)
    for task in range(3):
        merged = build(kind)
        merge_row(merged, adapters, task)
        with torch.no_grad():
            ours = model(**inputs_for(model, ids), task_gate=mixture.one_hot(task, 2)).logits
            reference = merged(**inputs_for(merged, ids)).logits
        assert float((ours - reference).abs().max()) <= 1e-5 * max(1.0, float(reference.abs().max()))


@pytest.mark.parametrize("beams", [1, 2])
def test_generation_with_a_cache_equals_generation_without(kind: str, which: str, beams: int) -> None:
    model = build(kind)
    targets = targets_of(model, targets=which)
    router = LinearRouter.random(TASKS, 32)
    mixture = inject(model, targets, random_adapters(targets, [2, 3, 1], size=0.2), router=router)
    ids, mask = prompts(3, 8), torch.ones(3, 8, dtype=torch.long)
    if model.config.is_encoder_decoder:
        ids[0, 5:], mask[0, 5:] = 0, 0
    else:
        ids[0, :3], mask[0, :3] = 0, 0
    seen: list[torch.Tensor] = []
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams}
    cached = model.generate(
        input_ids=ids, attention_mask=mask, on_route=lambda _f, gate: seen.append(gate), **options
    )
    assert torch.equal(cached, model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **options))
    features = mixture.routing_features(
        input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)  # as generate() makes them
    )
    assert len(seen) == 1
    rows = seen[0] if model.config.is_encoder_decoder else seen[0][::beams]
    torch.testing.assert_close(rows, router.gates(features, 3), atol=1e-4, rtol=1e-4)


def test_every_new_weight_gets_a_gradient(kind: str, which: str) -> None:
    model = build(kind)
    targets = targets_of(model, targets=which)
    new = NewAdapter(task="new", rank=2, alpha=4.0)
    mixture = inject(model, targets, random_adapters(targets, [2, 3], size=0.2), new=new)
    model.train()
    ids = prompts(2, 6)
    model(input_ids=ids, labels=ids, task_gate=mixture.one_hot(2, 2)).loss.backward()
    assert all(parameter.grad is not None for parameter in mixture.trainable().values())
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
