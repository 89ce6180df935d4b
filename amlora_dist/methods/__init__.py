"""The methods by name. Adding one: write its file, add it here (docs/methods.md)."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from amlora_dist.methods.base import Method
    from amlora_dist.training.settings import StageSettings

LORA = "LoRA"
"""What the adapters of most methods are."""

Excluded = Literal["zero_3", "packing", "caches"]
"""``zero_3``: the method reads or writes the new adapter's parameters outside of a pass of the model, or makes a second pass
inside of one, and ZeRO-3 partitions them. ``packing``: every row has tokens in front, which rows that share a sequence
cannot have. ``caches``: rows reach the model changed, or gates follow from the training pass itself, so that no part of a
pass is kept for another one (the trunk cache, and features by which scores are taken over)."""

Offered = Literal["memory", "selectors"]
"""``memory``: rows of G of earlier tasks are refitted on some of their rows (``method_settings.memory_rows``).
``selectors``: layers may weigh the adapters by selectors of their own, where the router's kind says so."""

Asked = Literal["plain text", "own prompt", "told the task"]
"""What a row that is scored is asked with: its text alone; its own task's prompt; that, and answered by its own task's
adapter."""


@dataclass(frozen=True, slots=True)
class MethodEntry:
    """What is known of a method without importing anything heavy."""

    path: str
    """``module:class``."""
    excludes: frozenset[Excluded] = frozenset()
    """What cannot be had together with it."""
    offers: frozenset[Offered] = frozenset()
    """What can be had with it alone."""
    form: str = LORA
    """What its adapters are; anything else is in layers that the method brings (``Method.layers``)."""
    asked: Asked = "plain text"
    """What the rows that it is scored on are asked with, unless the configuration says otherwise."""


ZERO_3: frozenset[Excluded] = frozenset({"zero_3"})
CACHES: frozenset[Excluded] = frozenset({"caches"})

METHODS = {
    "am_lora": MethodEntry("amlora_dist.methods.am_lora:AMLoRA", offers=frozenset({"memory", "selectors"})),
    "seq_lora": MethodEntry("amlora_dist.methods.seq_lora:SeqLoRA"),
    "inc_lora": MethodEntry("amlora_dist.methods.inc_lora:IncLoRA"),
    "o_lora": MethodEntry("amlora_dist.methods.o_lora:OLoRA", ZERO_3),
    "replay": MethodEntry("amlora_dist.methods.replay:Replay"),
    "ewc": MethodEntry("amlora_dist.methods.ewc:EWC", ZERO_3),
    "lwf": MethodEntry("amlora_dist.methods.lwf:LwF"),
    "l2p": MethodEntry("amlora_dist.methods.l2p:L2P", ZERO_3 | CACHES | {"packing"}, form="prompts"),
    "keys": MethodEntry("amlora_dist.methods.keys:Keys"),
    "gainlora": MethodEntry("amlora_dist.methods.gainlora:GainLoRA", CACHES),
    "ella": MethodEntry("amlora_dist.methods.ella:ELLA", ZERO_3),
    "slao": MethodEntry("amlora_dist.methods.slao:SLAO", ZERO_3),
    "per_task": MethodEntry("amlora_dist.methods.per_task:PerTask", asked="told the task"),
    "joint": MethodEntry("amlora_dist.methods.joint:Joint"),
    "base": MethodEntry("amlora_dist.methods.untrained:Untrained", asked="own prompt"),
}


def excluded(name: str) -> frozenset[Excluded]:
    """What cannot be had together with the method of this name; nothing where there is none."""
    return METHODS[name].excludes if name in METHODS else frozenset()


def offered(name: str) -> frozenset[Offered]:
    """What can be had with the method of this name and not with all; nothing where there is none."""
    return METHODS[name].offers if name in METHODS else frozenset()


def form_of(name: str) -> str:
    """What the adapters of the method of this name are; LoRA of one that is not known here."""
    return METHODS[name].form if name in METHODS else LORA


def asked_of(name: str) -> Asked:
    """What the rows of the method of this name are asked with; of one that is not known here as of most."""
    return METHODS[name].asked if name in METHODS else "plain text"


def method_class(name: str) -> type[Method]:
    """The class of the method of this name."""
    module, class_name = METHODS[name].path.split(":")
    found: type[Method] = getattr(import_module(module), class_name)
    return found


def method_for(settings: StageSettings) -> Method:
    """The method that ``settings.method`` names, ready for one stage."""
    return method_class(settings.method)(settings)
