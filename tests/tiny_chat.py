"""A tiny model with a chat template, and tasks of conversations for it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from tests.tasks.chat_tokenizers import chat_tokenizer
from tests.tiny_config import TARGETS, TOPICS

NOUNS = ("parcel", "invoice", "camera", "team", "message", "topic", "paragraph", "offer")


def write_chat_model(folder: Path, family: str = "smollm2") -> Path:
    """A random three-layer Llama with a byte-level tokenizer and the template of a family."""
    tokenizer = chat_tokenizer(family)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_conversations(folder: Path, *, train: int = 24) -> Path:
    """A task of one or two exchanges: the assistant says what the user asked for, in two words."""
    draw = random.Random("talk")
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for split, count in (("train", train), ("dev", 3), ("test", 4)):
        rows = []
        for _ in range(count):
            turns = [{"role": "system", "content": "Repeat it."}] if number % 3 == 0 else []
            for _ in range(1 + number % 2):
                noun = draw.choice(NOUNS)
                turns.append({"role": "user", "content": f"Which {noun} is number {number}?"})
                turns.append({"role": "assistant", "content": f"The {noun}."})
            rows.append({"messages": turns})
            number += 1
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    spec: dict[str, Any] = {
        "name": "talk", "version": 1, "kind": "chat", "source": {"kind": "files"}, "columns": "auto",
        "splits": {split: f"{split}.jsonl" for split in ("train", "dev", "test")},
        "prompt": {"train_on": "all"}, "max_answer_tokens": 8,
    }  # fmt: skip
    file = folder / "talk.yaml"
    file.write_text(yaml.safe_dump(spec), encoding="utf-8")
    return file


def write_chat_config(folder: Path, **more: Any) -> Path:
    """A run that learns conversations and then labels, both in the model's chat template."""
    model = write_chat_model(folder / "model")
    draw = random.Random("colours")
    labels, words = TOPICS["colours"]
    home = folder / "colours"
    home.mkdir()
    for split, count in (("train", 24), ("dev", 3), ("test", 4)):
        rows = [{"text": " ".join([*draw.choices(words, k=5), labels[n % 3], split, str(n)]), "label": labels[n % 3]}
                for n in range(count)]  # fmt: skip
        (home / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    labelled: dict[str, Any] = {
        "name": "colours", "version": 1, "kind": "words", "source": {"kind": "files"},
        "splits": {split: str(home / f"{split}.jsonl") for split in ("train", "dev", "test")},
        "columns": {"text": "text", "label": "label"}, "labels": labels,
        "prompt": {"format": "chat", "question": "Which one?", "system": "You see."},
    }  # fmt: skip
    config: dict[str, Any] = {
        "name": "chat", "model": {"source": str(model)}, "tasks": [str(write_conversations(folder / "talk")), labelled],
        "task_defaults": {"max_length": 160}, "workers": 0, "dtype": "fp32",
        "adapters": {"rank": 4, "alpha": 8, "targets": TARGETS["llama"]}, "router": {"background": False},
        "training": {"epochs": 2, "batch_size": 6, "learning_rate": 1e-2, "checkpoint_every": 4, "probe_rows": 8},
        "evaluation": {"batch_size": 4},
    }  # fmt: skip
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(config | more, sort_keys=False), encoding="utf-8")
    return file
