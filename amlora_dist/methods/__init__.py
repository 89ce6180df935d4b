"""The methods by name. Adding one: write its file, add it here (docs/methods.md)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from amlora_dist.methods.base import Method
    from amlora_dist.training.settings import StageSettings

METHODS = {
    "am_lora": "amlora_dist.methods.am_lora:AMLoRA",
    "seq_lora": "amlora_dist.methods.seq_lora:SeqLoRA",
    "inc_lora": "amlora_dist.methods.inc_lora:IncLoRA",
    "o_lora": "amlora_dist.methods.o_lora:OLoRA",
    "replay": "amlora_dist.methods.replay:Replay",
    "ewc": "amlora_dist.methods.ewc:EWC",
    "lwf": "amlora_dist.methods.lwf:LwF",
    "l2p": "amlora_dist.methods.l2p:L2P",
    "keys": "amlora_dist.methods.keys:Keys",
    "gainlora": "amlora_dist.methods.gainlora:GainLoRA",
    "ella": "amlora_dist.methods.ella:ELLA",
    "slao": "amlora_dist.methods.slao:SLAO",
    "per_task": "amlora_dist.methods.per_task:PerTask",
    "joint": "amlora_dist.methods.joint:Joint",
    "base": "amlora_dist.methods.untrained:Untrained",
}
"""Name -> ``module:class``, so that naming the methods imports nothing heavy."""
READ_PARAMETERS = frozenset({"o_lora", "ewc", "l2p", "ella", "slao"})
"""Methods with ``reads_parameters``, which ZeRO-3 is refused for, for the same reason."""

ROWS_APART = frozenset({"l2p"})
"""Methods that put prompts in front of every row (``prompt_slots``), which rows that share a sequence cannot have."""


def method_class(name: str) -> type[Method]:
    """The class of the method of this name."""
    module, class_name = METHODS[name].split(":")
    found: type[Method] = getattr(import_module(module), class_name)
    return found


def method_for(settings: StageSettings) -> Method:
    """The method that ``settings.method`` names, ready for one stage."""
    return method_class(settings.method)(settings)
