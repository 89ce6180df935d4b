"""The base model as it came: what the prompts alone give."""

from __future__ import annotations

from typing import Any

from amlora_dist.methods.base import Method
from amlora_dist.methods.kinds import Stages, Trains


class Untrained(Method):
    """``base``: nothing is trained and nothing is published; one row of scores."""

    trains = Trains.NOTHING
    stages = Stages.ONE
    routed = False

    def reads(self, stage: int) -> dict[str, Any]:
        return {"dtype": self.settings.dtype, "attention": self.settings.attention}
