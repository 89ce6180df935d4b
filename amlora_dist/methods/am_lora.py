"""AM-LoRA, the Attentional Mixture of LoRAs (arXiv 2409.19611): frozen adapters, weighed by an attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torch import Tensor

from amlora_dist.methods.base import Method

if TYPE_CHECKING:
    from amlora_dist.adapters.router import Router
    from amlora_dist.adapters.statistics import TaskStatistics


class AMLoRA(Method):
    """Each task trains its own adapter at weight 1 beside a recipe of the earlier ones; none of them moves again.

    With ``router.kind: literal`` the layers' own selectors weigh the adapters, in training and afterwards, as the
    paper has it; every other kind of router works on frozen features and has no part in the training.
    """

    name = "am_lora"

    def reads(self, stage: int) -> dict[str, Any]:
        values = super().reads(stage)
        if self._literal:
            values["literal"] = asdict(self.settings.router.literal) | {"l1": self.settings.training.l1}
        return values

    @property
    def uses_selectors(self) -> bool:
        return self._literal

    def learns_recipe(self, stage: int) -> bool:
        return stage > 1 and self.settings.router.recipes and not self._literal

    def training_gate(self, tasks: int) -> Tensor | None:
        return None if self._literal else super().training_gate(tasks)

    def router(self, statistics: Sequence[TaskStatistics]) -> Router | None:
        return None if self._literal else super().router(statistics)

    @property
    def _literal(self) -> bool:
        return self.settings.router.kind == "literal"
