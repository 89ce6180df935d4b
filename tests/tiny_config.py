"""Base models and tasks small enough for whole sequences in a test: folders as a user would have them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

COLOURS = ["red", "green", "blue"]
SHAPES = ["round", "square", "flat"]
SIZES = ["big", "small"]
FRUIT = ["apple", "pear", "plum"]
TOPICS: dict[str, tuple[list[str], list[str]]] = {
    "colours": (COLOURS, ["paint", "wall", "sky", "the", "a", "looks"]),
    "shapes": (SHAPES, ["box", "ball", "coin", "the", "a", "is"]),
    "sizes": (SIZES, ["house", "mouse", "tree", "the", "a", "seems"]),
    "fruit": (FRUIT, ["basket", "tree", "juice", "the", "a", "from"]),
}
TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "t5": ["q", "k", "v", "o", "wi", "wo"],
}
"""All linear layers: a random base learns little through two of them."""
WORDS = sorted({w for labels, words in TOPICS.values() for w in (*labels, *words)} | {"Answer", ":", "what", "Options", ","})


def write_tokenizer(folder: Path, *, closes_prompts: bool) -> int:
    """A word-level tokenizer; ``closes_prompts``: it appends the end token, as T5's does. Returns its size."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace()])
    if closes_prompts:
        tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    return len(vocabulary)


def write_model(folder: Path, kind: str) -> Path:
    """A random four-layer Llama or T5 with its tokenizer, as ``from_pretrained`` reads it."""
    size = write_tokenizer(folder, closes_prompts=kind == "t5")
    torch.manual_seed(0)
    model: Any
    if kind == "llama":
        config = LlamaConfig(
            vocab_size=size, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None,
            initializer_range=0.2,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
    else:
        config = T5Config(
            vocab_size=size, d_model=32, d_kv=8, d_ff=48, num_layers=4, num_decoder_layers=2, num_heads=4,
            pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, tie_word_embeddings=False,
        )  # fmt: skip
        model = T5ForConditionalGeneration(config)
    model.save_pretrained(folder)
    return folder


def write_task(folder: Path, name: str, *, train: int = 32, test: int = 9) -> Path:
    """A task whose label is the one label word in its text. A quarter of the training rows are held out: 24 are left."""
    labels, words = TOPICS[name]
    draw = random.Random(name)
    seen: set[str] = set()
    home = folder / name
    home.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("dev", 6), ("test", test)):
        rows: list[dict[str, str]] = []
        while len(rows) < count:
            label = labels[len(rows) % len(labels)]
            text = " ".join([*draw.choices(words, k=draw.randint(3, 7)), label, *draw.choices(words, k=2)])
            if text not in seen:
                seen.add(text)
                rows.append({"text": text, "label": label})
        (home / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    spec = {
        "name": name,
        "version": 1,
        "kind": "words",
        "source": {"kind": "files"},
        "splits": {split: f"{name}/{split}.jsonl" for split in ("train", "dev", "test")},
        "columns": {"text": "text", "label": "label"},
        "labels": labels,
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(spec), encoding="utf-8")
    return file


def write_config(
    folder: Path,
    kind: str = "llama",
    tasks: tuple[str, ...] = ("colours", "shapes", "sizes"),
    *,
    rows: int = 32,
    **more: Any,
) -> Path:
    """A run of tiny tasks of so many training ``rows`` on a tiny model; ``more`` replaces top-level keys."""
    model = folder / f"model-{kind}"
    if not model.is_dir():
        write_model(model, kind)
    files = [str(write_task(folder / "tasks", task, train=rows)) for task in tasks]
    config: dict[str, Any] = {
        "name": "tiny",
        "model": {"source": str(model)},
        "tasks": files,
        "task_defaults": {"max_length": 24},
        "workers": 0,
        "dtype": "fp32",
        "adapters": {"rank": 4, "alpha": 8, "targets": TARGETS[kind]},
        "router": {"background": False},
        "training": {
            "epochs": 4, "batch_size": 6, "learning_rate": 3e-2, "warmup_steps": 2, "checkpoint_every": 2, "probe_rows": 8,
        },
        "evaluation": {"batch_size": 5},
    }  # fmt: skip
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(config | more, sort_keys=False), encoding="utf-8")
    return file
