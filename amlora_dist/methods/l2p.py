"""A pool of prompts, of which every input takes those whose keys match it: Learning to Prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from amlora_dist.errors import UserError
from amlora_dist.methods.base import Baseline

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from amlora_dist.adapters.adapter import Adapter
    from amlora_dist.adapters.gate_context import Selection
    from amlora_dist.adapters.targets import Target
    from amlora_dist.training.micro_batch import MicroBatch


class L2P(Baseline):
    """One pool of ``prompt_pool`` prompts, trained on, task after task; an input has ``prompt_tokens`` of them::

        loss = CE + mean over the chosen prompts j of (1 - cos(q(x), k_j))

    The query q(x) is what the posterior router reads too: the mean hidden state of the plain model over the prompt.
    Keys k_j have no other gradient than from the second term, so Adam's steps do not depend on its weight. Each stage
    keeps the pool as it was after it.

    Stages take prompts that no earlier one has had while there are some, which is what the paper's penalty on often
    chosen prompts comes to (its section 4.2, with task boundaries known in training); at test time nothing but the
    keys decides. The paper's prompts of several vectors with one key are prompts of one vector with a key each here.

    Source: Wang et al. 2022 (L2P, arXiv 2112.08654), equations 3 to 5.
    """

    name = "l2p"
    alters_inputs = True
    reads_parameters = True  # the query is a second pass inside of the training pass, which ZeRO-3 does not foresee
    uses = ("prompt_pool", "prompt_tokens")

    def reads(self, stage: int) -> dict[str, Any]:
        values = super().reads(stage)
        adapters, s = self.settings.adapters, self.settings.method_settings
        values["adapters"] = {"scale": adapters.alpha / adapters.rank}
        values["method_settings"] = {key: getattr(s, key) for key in self.uses}
        return values

    @property
    def prompt_slots(self) -> int:
        return self.settings.method_settings.prompt_tokens

    @property
    def rank_and_alpha(self) -> tuple[int, float]:
        size, adapters = self.settings.method_settings.prompt_pool, self.settings.adapters
        return size, size * adapters.alpha / adapters.rank

    def targets(self, model: PreTrainedModel, router_layer: int) -> list[Target]:
        from amlora_dist.adapters.prompt_pool import embedding_target

        return [embedding_target(model)]

    def start_from(self, parents: Sequence[Adapter]) -> Adapter | None:
        if parents and (parents[-1].rank, parents[-1].alpha) != self.rank_and_alpha:
            raise UserError(
                f"method_settings.prompt_pool: found {self.rank_and_alpha[0]} prompts at alpha {self.rank_and_alpha[1]:g},"
                f" but the pool of {parents[-1].task!r}, which is trained on, has {parents[-1].rank} at"
                f" {parents[-1].alpha:g}"
            )
        return parents[-1] if parents else None

    def loss(self, batch: MicroBatch) -> Tensor:
        chosen: list[tuple[Selection, Tensor | None]] = []
        loss = batch.cross_entropy(batch.answers(self._gate(batch), chosen))
        pulls = [(1 - one.scores).mean() for one, _ in chosen]
        return loss + batch.mean_over_rows(torch.stack(pulls).mean()) if pulls else loss
