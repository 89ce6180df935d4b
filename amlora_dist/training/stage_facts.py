"""What a stage says of itself: what exactly it trains, and with what it was trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from amlora_dist.errors import TrainingError

if TYPE_CHECKING:
    from amlora_dist.adapters.inject import Mixture
    from amlora_dist.training.settings import StageSettings


def trainable_facts(mixture: Mixture) -> dict[str, Any]:
    """The event that says exactly what will train.

    Raises:
        TrainingError: something else would, or nothing.
    """
    named = mixture.trainable()
    wanted = {id(parameter) for parameter in named.values()}
    stray = [n for n, p in mixture.model.named_parameters() if p.requires_grad and id(p) not in wanted]
    if stray or not wanted:
        raise TrainingError(f"parameters outside the new adapter would train: {stray}")
    kinds: dict[str, int] = {}
    for name, parameter in named.items():
        kind = name.split(".", 1)[0]
        kinds[kind] = kinds.get(kind, 0) + int(getattr(parameter, "ds_numel", parameter.numel()))
    modules = sorted({name.split(".", 1)[1] for name in named if name.startswith("a.")})
    return {"kind": "trainable", "parameters": kinds, "modules": modules}


def trained_with(
    settings: StageSettings, world: int, device: torch.device, deepspeed: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Recorded next to the fingerprint, not part of it; ``deepspeed`` is None without workers."""
    import transformers

    return {
        "workers": 0 if deepspeed is None else world,
        "zero_stage": deepspeed["zero_optimization"]["stage"] if deepspeed else None,
        "threads": torch.get_num_threads(),
        "device": device.type,
        "cache_trunk": settings.training.cache_trunk,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
