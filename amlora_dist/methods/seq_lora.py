"""Sequential fine-tuning of one LoRA: the lower bound that every continual method is measured against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from amlora_dist.errors import UserError
from amlora_dist.methods.base import Baseline

if TYPE_CHECKING:
    from amlora_dist.adapters.adapter import Adapter


class SeqLoRA(Baseline):
    """One LoRA trained on, task after task: theta_t starts at theta_{t-1}, and the newest answers everything.

    Every stage keeps its own copy, so the bank holds the LoRA as it was after each task; gates are (0, ..., 0, 1).
    The optimizer starts again with each task.
    """


    def start_from(self, parents: Sequence[Adapter]) -> Adapter | None:
        if not parents:
            return None
        last, layers = parents[-1], self.layers
        for key, now in (("rank", layers.rank), ("alpha", layers.alpha)):
            if getattr(last, key) != now:
                raise UserError(
                    f"adapters.{key}: found {now:g}, but method {self.settings.method!r} trains the adapter"
                    f" of {last.task!r} on, which has {getattr(last, key):g}"
                )
        return last
