"""The base model as it came: what the prompts alone give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from amlora_dist.methods.base import Method


class Untrained(Method):
    """``base``: nothing is trained and nothing is published; one row of scores."""

    name = "base"
    inherits = False
    trains = False
    routed = False

    def reads(self, stage: int) -> dict[str, Any]:
        return {"dtype": self.settings.dtype, "attention": self.settings.attention}

    def stages(self, tasks: Sequence[str]) -> list[str]:
        return ["base"]

    def rows(self, stage: str, earlier: Sequence[str], sequence: Sequence[str]) -> dict[str, int | None]:
        return {}
