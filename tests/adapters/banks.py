"""Random banks, tiny models and a router without statistics, for the tests of the mixture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

from amlora_dist.adapters.adapter import Adapter
from amlora_dist.adapters.inject import Mixture, inject
from amlora_dist.adapters.settings import AdapterSettings
from amlora_dist.adapters.targets import Target, default_router_layer, find_targets

VOCABULARY = 67
RANKS = [2, 3, 1]
TASKS = ["task0", "task1", "task2"]


@dataclass(frozen=True)
class LinearRouter:
    """Gates by a softmax over random projections of the features, sharp enough that prompts differ."""

    weight_TD: Tensor
    tasks: Sequence[str]
    kind: str = "linear"
    needs_features: bool = True

    @classmethod
    def random(cls, tasks: Sequence[str], width: int, seed: int = 0) -> LinearRouter:
        weight = torch.randn(len(tasks), width, generator=torch.Generator().manual_seed(seed))
        return cls(weight * 4, list(tasks))

    def gates(self, features_BD: Tensor | None, batch: int) -> Tensor:
        assert features_BD is not None
        assert features_BD.shape[0] == batch
        return torch.softmax(features_BD @ self.weight_TD.T, dim=-1)

    def to(self, device: Any) -> LinearRouter:
        return replace(self, weight_TD=self.weight_TD.to(device))

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight_TD}

    def settings(self) -> dict[str, Any]:
        return {}


def tiny_llama(seed: int = 0, layers: int = 4) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def tiny_t5(seed: int = 0) -> T5ForConditionalGeneration:
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=4,
        num_decoder_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        initializer_factor=1.5,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config).eval()


def targets_of(model: PreTrainedModel, **settings: Any) -> list[Target]:
    """Of PEFT's default layers, q and v for most, unless ``settings`` say otherwise."""
    return find_targets(model, AdapterSettings(**{"targets": "auto", **settings}), default_router_layer(model))


def random_adapters(
    targets: Sequence[Target], ranks: Sequence[int], *, seed: int = 0, size: float = 0.3, recipes: bool = True
) -> list[Adapter]:
    """One adapter per rank, each with a recipe over the earlier ones."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * size

    return [
        Adapter(
            task=f"task{i}",
            rank=rank,
            alpha=2.0 * rank,
            a={t.path: randn(rank, t.in_features) for t in targets},
            b={t.path: randn(t.out_features, rank) for t in targets},
            recipe={t.path: randn(i) for t in targets} if i and recipes else {},
        )
        for i, rank in enumerate(ranks)
    ]


def prompts(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def merge_row(model: PreTrainedModel, adapters: Sequence[Adapter], task: int) -> None:
    """Add row ``task`` of the bank to the plain weights of ``model``: what the mixture must equal at that row."""
    adapter = adapters[task]
    with torch.no_grad():
        for path in adapter.a:
            weights = [*adapter.recipe.get(path, torch.zeros(task)).tolist(), 1.0]
            delta = sum(
                w * other.scale * (other.b[path] @ other.a[path])
                for w, other in zip(weights, adapters[: task + 1], strict=True)
            )
            assert isinstance(delta, Tensor)
            base = model.get_submodule(path)
            weight = base.weight
            assert isinstance(weight, nn.Parameter)
            weight += delta if isinstance(base, nn.Linear) else delta.T


def routed(model: PreTrainedModel, *, layers: str = "above_router", **options: Any) -> Mixture:
    targets = targets_of(model, layers=layers)
    return inject(model, targets, random_adapters(targets, RANKS), router=LinearRouter.random(TASKS, 32), **options)


def gate_of(mixture: Mixture, **inputs: Any) -> Tensor:
    """The gate that a call of the model finds."""
    seen: list[Tensor] = []
    with torch.no_grad():
        mixture.model(**inputs, on_route=lambda _features, gate: seen.append(gate))
    assert len(seen) == 1
    return seen[0]


def padded(batch: int = 3) -> dict[str, Tensor]:
    ids, mask = prompts(batch, 8), torch.ones(batch, 8, dtype=torch.long)
    ids[0, :3], mask[0, :3] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}
