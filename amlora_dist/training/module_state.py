"""A model as it was when it was loaded: what adapters, hooks and DeepSpeed have put into its modules since can be undone.

Weights are left alone: a checksum shows that they have not changed (``checksum``).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from amlora_dist.errors import TrainingError

CONTAINERS = (dict, set, list)
"""Attributes of these kinds are changed in place by those who use a module; all others are replaced."""
PARTITION = ("ds_tensor", "ds_status")
"""Of a parameter under ZeRO-3: its part on this rank, and whether it is whole now."""


class ModuleState:
    """The attributes of every module, the values of every buffer, and what hangs on every parameter.

    Submodules, hooks, the mode and a ``forward`` of its own are attributes of a module like any other. Buffers are kept
    by value, because ``module.bfloat16()``, which DeepSpeed calls, rounds them. Under ZeRO-3 DeepSpeed also replaces the
    dictionary of a module's parameters, and leaves functions behind that hold its engine.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._modules = [(module, _attributes(module)) for module in model.modules()]
        self._buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
        self._parameters = [(parameter, dict(vars(parameter))) for parameter in model.parameters()]
        self._generation_config = copy.deepcopy(getattr(model, "generation_config", None))

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those that the model was loaded with, in its order."""
        return [parameter for parameter, _ in self._parameters]

    def restore(self) -> None:
        """Put the model back: no adapter, no hook and no attribute that it was not loaded with.

        Raises:
            TrainingError: a parameter of the base model is whole that ZeRO-3 had shared out, or would train.
        """
        for module, attributes in self._modules:
            for name in vars(module).keys() - attributes.keys():
                del vars(module)[name]
            for name, (value, content) in attributes.items():
                if content is not None:
                    value.clear()
                    value.extend(content) if isinstance(value, list) else value.update(content)
                vars(module)[name] = value
        if self._generation_config is not None:
            self._model.generation_config = copy.deepcopy(self._generation_config)
        with torch.no_grad():
            for buffer, content in self._buffers:
                buffer.copy_(content)
        for parameter, attributes in self._parameters:
            if parameter.requires_grad or parameter.grad is not None:
                raise TrainingError("a parameter of the base model would train")
            if vars(parameter).get("ds_status") != attributes.get("ds_status"):
                raise TrainingError("a parameter of the base model was left whole that ZeRO-3 had shared out")
            held = {name: vars(parameter)[name] for name in PARTITION if name in attributes}
            vars(parameter).clear()
            vars(parameter).update(attributes | held)


def _attributes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """By name: the value, and a copy of it where it may be changed in place."""
    return {
        name: (value, copy.copy(value) if isinstance(value, CONTAINERS) else None) for name, value in vars(module).items()
    }
