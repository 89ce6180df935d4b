"""Incremental LoRAs, all added up: a new adapter for each task on top of the frozen sum of the earlier ones."""

from __future__ import annotations

import torch

from amlora_dist.methods.base import Baseline, StageRecipe


class IncLoRA(Baseline):
    """h = W0 x + sum_{i<=t} (alpha/r) B_i A_i x, where only A_t and B_t are learned: IncLoRA of O-LoRA's comparison.

    The sum is the newest task's row: its recipe is the constant (1, ..., 1). So the row of an earlier task is the sum
    as it was after that task, which is what the oracle and an export of that task mean.

    Source: Wang et al. 2023 (O-LoRA, arXiv 2310.14152), baseline "IncLoRA".
    """


    def recipe(self, earlier: int) -> StageRecipe:
        return StageRecipe(constant=torch.ones(earlier))
