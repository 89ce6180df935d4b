"""Features of the frozen base model as the router reads them, without any training."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amlora_dist.adapters.gate_context import FeaturesReady, pool_features
from amlora_dist.adapters.targets import default_router_layer, routing_stack
from amlora_dist.base_model import ModelSettings, load_model, load_tokenizer, resolve_base
from amlora_dist.config.loading import home
from amlora_dist.tasks.batches import Example, collate_prompts, encode
from amlora_dist.tasks.prompt_format import special_ends, text_ids
from amlora_dist.tasks.prompts import template_for
from amlora_dist.tasks.sources import load_task
from amlora_dist.tasks.task import TaskDefaults, resolve_task
from amlora_dist.training.batching import prompt_positions

BATCH, SKIPPED = 16, 2


class FrozenModel:
    """The layers up to the deepest that is read."""

    def __init__(self, source: str, *, dtype: torch.dtype = torch.bfloat16) -> None:
        base = resolve_base(ModelSettings(source=source), home())
        self.tokenizer: Any = load_tokenizer(base.path)
        self.model: Any = load_model(base, dtype=dtype).eval()
        self.middle = default_router_layer(self.model)
        self.depth = len(routing_stack(self.model).layers)

    def examples(
        self, task: str, split: str, rows: int, *, data_dir: Path | None, style: str, tokens: int, seed: int
    ) -> list[Example]:
        """At most ``rows`` rows of a task, prompts of at most ``tokens`` tokens."""
        limit = {f"max_{split}": rows}
        defaults = TaskDefaults(prompt_style=style, max_length=tokens, **limit)  # type: ignore[arg-type]
        spec = resolve_task(task, data_dir=data_dir, base_dir=Path(), defaults=defaults)
        used = load_task(spec, data_dir=data_dir, splits=(split,), seed=seed).rows[split]
        template = template_for(spec, spec.prompt_style)
        return encode(used, spec, template, self.tokenizer, max_length=tokens, encoder_decoder=False)

    def text_examples(
        self, task: str, split: str, rows: int, *, data_dir: Path | None, tokens: int, seed: int
    ) -> tuple[list[Example], tuple[str, ...]]:
        """At most ``rows`` rows of a task as the router reads them: their texts alone; and the task's label texts."""
        limit = {f"max_{split}": rows}
        spec = resolve_task(task, data_dir=data_dir, base_dir=Path(), defaults=TaskDefaults(**limit))  # type: ignore[arg-type]
        used = load_task(spec, data_dir=data_dir, splits=(split,), seed=seed).rows[split]
        place = {text: number for number, text in enumerate(spec.label_texts)}
        found = zip(used, self.texts([row.text for row in used], tokens), strict=True)
        return [replace(one, label=place.get(row.target)) for row, one in found], spec.label_texts

    def texts(self, texts: Sequence[str], tokens: int) -> list[Example]:
        """Texts alone, at most ``tokens`` tokens of each, behind the tokenizer's own special tokens."""
        before = special_ends(self.tokenizer, encoder_decoder=False).before
        rows = enumerate(text_ids(texts, self.tokenizer, tokens))
        spans = [(number, (*before, *ids), (len(before), len(before) + len(ids))) for number, ids in rows]
        return [Example(number, ids, (), None, "", span=span) for number, ids, span in spans]

    @torch.no_grad()
    def features(self, examples: Sequence[Example], layers: Sequence[int]) -> dict[int, Tensor]:
        """(rows, d) fp32 by layer: means over the prompt of what enters that layer, without its first two tokens."""
        found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        mask_BL = torch.empty(0)

        def read(layer: int, args: Any, kwargs: Any) -> None:
            hidden_BLD = args[0] if args else kwargs["hidden_states"]
            found[layer].append(pool_features(hidden_BLD, mask_BL, SKIPPED))
            if layer == max(layers):
                raise FeaturesReady

        stack = routing_stack(self.model).layers
        with contextlib.ExitStack() as hooks:
            for layer in layers:
                hook = stack[layer].register_forward_pre_hook(
                    lambda _module, args, kwargs, layer=layer: read(layer, args, kwargs), with_kwargs=True
                )
                hooks.callback(hook.remove)
            by_length = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt))
            for start in range(0, len(by_length), BATCH):
                chosen = [examples[i] for i in by_length[start : start + BATCH]]
                batch = collate_prompts(chosen, pad_id=self.tokenizer.pad_token_id, side="left")
                mask_BL = batch.pop("prompt_mask")
                batch |= prompt_positions(self.model, batch["attention_mask"], encoder_decoder=False)
                with contextlib.suppress(FeaturesReady):
                    self.model(**batch, use_cache=False)
        order = torch.empty(len(by_length), dtype=torch.long)
        order[torch.tensor(by_length, dtype=torch.long)] = torch.arange(len(by_length))
        return {layer: torch.cat(parts)[order] for layer, parts in found.items()}
