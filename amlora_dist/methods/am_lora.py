"""AM-LoRA, the Attentional Mixture of LoRAs (arXiv 2409.19611): frozen adapters, weighed by an attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from amlora_dist.methods.base import Method, StageRecipe

if TYPE_CHECKING:
    from amlora_dist.adapters.adapted_layers import AdaptedLayers
    from amlora_dist.adapters.gate_context import Selection
    from amlora_dist.training.micro_batch import MicroBatch


class AMLoRA(Method):
    """Each task trains its own adapter at weight 1 with a recipe of the earlier ones; none of them moves again.

    With ``router.kind: literal`` the layers' own selectors weigh the adapters, in training and afterwards, as the
    paper has it; every other kind of router works on frozen features and has no part in the training.
    """

    def reads(self, stage: int) -> dict[str, Any]:
        values = super().reads(stage)
        if self._literal:
            values["literal"] = asdict(self.settings.router.literal) | {"l1_on_gates": self.settings.training.l1}
        if stage > 1 and self._memory_rows:
            values["method_settings"] = {"memory_rows": self._memory_rows, "near_tie": self.settings.training.near_tie}
        return values

    def rows(self, stage: str, earlier: Sequence[str], sequence: Sequence[str]) -> dict[str, int | None]:
        """With a memory also some of each earlier task of this run; those of a parent bank keep their rows of G."""
        again = [task for task in earlier if task in sequence] if self._memory_rows else []
        return super().rows(stage, earlier, sequence) | dict.fromkeys(again, self._memory_rows)

    @property
    def layers(self) -> AdaptedLayers:
        plain = super().layers
        if not self._literal:
            return plain
        from amlora_dist.adapters.selector_layer import Selectors

        return Selectors(rank=plain.rank, alpha=plain.alpha, settings=self.settings.router.literal)

    def recipe(self, earlier: int) -> StageRecipe:
        learned = earlier > 0 and self.settings.router.recipes and not self._literal
        return StageRecipe(learned=learned, memory_rows=self._memory_rows)

    def training_gate(self, tasks: int) -> Tensor | None:
        return None if self._literal and not self.layers.selectors_alone else super().training_gate(tasks)

    def loss(self, batch: MicroBatch) -> Tensor:
        """With the literal selectors: plus lambda x sum over layers of the reading of the L1 term that
        ``router.literal.penalty`` names."""
        name, l1 = self.settings.router.literal.penalty, self.settings.training.l1
        if not self._literal or l1 == 0 or name == "none":
            return super().loss(batch)
        from amlora_dist.adapters.sparsity import penalty

        chosen: list[tuple[Selection, Tensor | None]] = []
        loss = batch.cross_entropy(batch.answers(self._gate(batch), chosen))
        terms = [penalty(name, one.gates, one.scores, mask) for one, mask in chosen]
        return loss + batch.mean_over_rows(l1 * torch.stack(terms).sum()) if terms else loss

    @property
    def _memory_rows(self) -> int:
        return 0 if self._literal or not self.settings.router.recipes else self.settings.method_settings.memory_rows

    @property
    def _literal(self) -> bool:
        return self.settings.router.kind == "literal"
