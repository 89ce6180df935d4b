"""Tiny tokenizers with the chat templates of three families, as their models have them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.tasks.tokenizers_small import CORPUS

TEMPLATES = Path(__file__).with_name("templates")
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Llama 3 and Qwen cut words: newlines join those that follow."""
FAMILIES = {
    "smollm2": ["<|im_end|>", "<|im_start|>", "<|endoftext|>"],
    "llama3": ["<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"],
    "qwen2_5": ["<|im_end|>", "<|im_start|>", "<|endoftext|>"],
}
"""Special tokens of each, the end of a turn first."""


@cache
def chat_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE with the family's special tokens, pre-tokeniser and template."""
    special = [*FAMILIES[family], "<pad>"]
    tokenizer = Tokenizer(models.BPE())
    if family == "smollm2":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        cut = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([*CORPUS, "user assistant system header id\n\n\n You are a helpful assistant"], trainer)
    begin = special[1] if family == "llama3" else None
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=special[0], pad_token="<pad>", bos_token=begin,
        additional_special_tokens=special[1:-1],
    )  # fmt: skip
    fast.chat_template = (TEMPLATES / f"{family}.jinja").read_text(encoding="utf-8")
    return fast
