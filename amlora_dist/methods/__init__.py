"""The methods by name. Adding one: write its file, add it here."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from amlora_dist.methods.base import Method
    from amlora_dist.training.settings import StageSettings

METHODS = {
    "am_lora": "am_lora:AMLoRA",
}
"""Name -> ``module:class`` below this package, so that naming the methods imports nothing heavy."""


def method_for(settings: StageSettings) -> Method:
    """The method that ``settings.method`` names, ready for one stage."""
    module, name = METHODS[settings.method].split(":")
    made: Method = getattr(import_module(f"{__name__}.{module}"), name)(settings)
    return made
