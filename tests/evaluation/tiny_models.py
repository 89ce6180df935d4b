"""Tiny random transformers, and a naive reference that scores one prompt at a time without cache or padding."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from amlora_dist.tasks.batches import Example

VOCABULARY = 19
PAD, EOS = 0, 1
LABELS: dict[str, list[tuple[int, ...]]] = {
    "one token each": [(3,), (4,), (5,)],
    "many tokens": [(3, 4), (3, 5, 6), (7,), (8, 9, 10, 11), (8, 9, 12)],
    "one begins another": [(3,), (3, 4), (5, 6)],
}


class Words:
    """A tokenizer of which only decoding is needed: token 7 is ``w7``."""

    def decode(self, tokens: list[int], **_: Any) -> str:
        return " ".join(f"w{token}" for token in tokens if token not in (PAD, EOS))


def tiny(kind: str, seed: int = 0) -> Any:
    """An untrained model of the given architecture whose outputs differ from prompt to prompt and sometimes end."""
    torch.manual_seed(seed)
    common: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": 2}
    rope: dict[str, Any] = common | {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.6,
    }
    model: Any
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**rope))
    elif kind == "mistral":
        model = MistralForCausalLM(MistralConfig(**rope, sliding_window=4))
    elif kind == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(**common, n_positions=64, n_embd=16, n_layer=2, n_head=2, initializer_range=0.6)
        )
    else:
        config = T5Config(**common, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=PAD)
        model = T5ForConditionalGeneration(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.6)
    return model.eval()


def examples(count: int, *, labels: list[tuple[int, ...]] | None, seed: int = 0) -> list[Example]:
    """Prompts of 1 to 9 random tokens with random right answers."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, size: int = 1) -> list[int]:
        return torch.randint(low, high, (size,), generator=generator).tolist()

    made = []
    for row in range(1, count + 1):
        prompt = tuple(draw(2, VOCABULARY, draw(1, 10)[0]))
        label = draw(0, len(labels))[0] if labels else None
        answer = labels[label] if labels and label is not None else tuple(draw(2, VOCABULARY, 3))
        made.append(Example(row, prompt, (*answer, EOS), label, Words().decode(list(answer))))
    return made


@torch.no_grad()
def naive_output(model: Any, example: Example, steps: int) -> tuple[list[int], bool]:
    """Greedy tokens before EOS by ``generate`` on the bare prompt, and whether EOS came."""
    prompt = torch.tensor([example.prompt])
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=steps, do_sample=False)
    tokens = out[0].tolist()
    tokens = tokens[1:] if model.config.is_encoder_decoder else tokens[len(example.prompt) :]
    return (tokens[: tokens.index(EOS)], True) if EOS in tokens else (tokens, False)


@torch.no_grad()
def naive_loglikelihood(model: Any, example: Example, answer: tuple[int, ...]) -> float:
    """log p(answer | prompt) from one full forward pass."""
    prompt = torch.tensor([example.prompt])
    if model.config.is_encoder_decoder:
        start = torch.tensor([[model.config.decoder_start_token_id, *answer[:-1]]])
        logits = model(input_ids=prompt, decoder_input_ids=start, use_cache=False).logits[0]
    else:
        whole = torch.tensor([[*example.prompt, *answer[:-1]]])
        logits = model(input_ids=whole, use_cache=False).logits[0, len(example.prompt) - 1 :]
    return float(logits.log_softmax(-1)[range(len(answer)), list(answer)].sum())
