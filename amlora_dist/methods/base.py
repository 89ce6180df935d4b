"""What a continual-learning method decides, as a few hooks around the one durable stage.

A method never trains by itself: the stage asks it what a new adapter starts from, how the adapters are weighed while
it learns, what is added to the loss, and who weighs them afterwards. The defaults are those of AM-LoRA with the
posterior router; a method overrides what it does differently.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from amlora_dist.adapters.bank import Adapter
    from amlora_dist.adapters.inject import Mixture
    from amlora_dist.adapters.router import Router
    from amlora_dist.adapters.statistics import TaskStatistics
    from amlora_dist.training.settings import StageSettings


class Method:
    """Base of all methods; one instance serves one stage."""

    name: ClassVar[str]
    inherits: ClassVar[bool] = True
    """Whether a stage sees the adapters of earlier stages."""

    def __init__(self, settings: StageSettings) -> None:
        self.settings = settings

    def reads(self, stage: int) -> dict[str, Any]:
        """Configuration values that decide what stage ``stage`` (1-based) trains, for its training fingerprint.

        Whatever is not named here must not change the adapter by a bit; a test changes every such key.
        """
        s = self.settings
        values: dict[str, Any] = {
            "dtype": s.dtype,
            "attention": s.attention,
            "adapters": asdict(s.adapters),
            "router": {
                key: getattr(s.router, key) for key in ("layer", "shrinkage", "skip_tokens", "holdout")
            },
            "training": {
                key: getattr(s.training, key)
                for key in ("epochs", "batch_size", "learning_rate", "schedule", "warmup_steps", "weight_decay", "clip")
            }
            | {"betas": list(s.training.betas)},
        }
        if stage > 1 and self.learns_recipe(stage):
            values["recipe"] = {
                key: getattr(s.training, key) for key in ("l1", "recipe_learning_rate", "probe_rows")
            }
        return values

    def learns_recipe(self, stage: int) -> bool:
        """Whether the new adapter learns beside weights on the earlier ones."""
        return False

    def start_from(self, parents: Sequence[Adapter]) -> Adapter | None:
        """Adapter whose values the new one starts from; None for a fresh one (A random, B zero)."""
        return None

    def training_gate(self, tasks: int) -> Tensor | None:
        """Task gate while the last of ``tasks`` is learned, shape (tasks,); None leaves it to the layers."""
        gate = torch.zeros(tasks)
        gate[-1] = 1.0
        return gate

    def router(self, statistics: Sequence[TaskStatistics]) -> Router | None:
        """Who weighs the adapters of the finished bank; None leaves it to the layers' own selectors."""
        from amlora_dist.adapters.router import build_router

        return build_router(self.settings.router, statistics, seed=self.settings.seed)

    def extra_loss(self, mixture: Mixture) -> Tensor | None:
        """A term added to every step's loss, equal on all ranks; None for none."""
        return None
