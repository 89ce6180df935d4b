"""A frozen base model whose linear layers are kept in 4 or 8 bits, by transformers' integration of bitsandbytes.

What a linear layer computes changes with it, so features, adapters and answers do too: a base model in 4 bits counts as
another one than the same files in full precision (``BaseModel.identity``). The output head, embeddings and norms stay as
they are. ``bitsandbytes`` is an extra, and nothing here imports it before a model is loaded in fewer bits.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
from typing import TYPE_CHECKING, Any, Literal, get_args

from amlora_dist.errors import Fault, UserError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import torch
    from torch import Tensor, nn

Quantisation = Literal["none", "nf4", "int8"]
"""``nf4``: 4 bits a weight and a scale for each 64 (QLoRA's NormalFloat); ``int8``: 8 bits and a scale for each row
(LLM.int8)."""
QUANTISATIONS: tuple[str, ...] = get_args(Quantisation)
PACKAGE, OLDEST = "bitsandbytes", "0.50"
COMMAND = "pip install 'amlora-dist[quantise]'"
BYTES: dict[str, float] = {"nf4": 0.5 + 4 / 64, "int8": 1.0}
"""Of one element of a linear layer's weight, scales included where they count."""
QUIET = ("bitsandbytes.autograd._functions", "bitsandbytes.backends.cpu.ops")
"""Loggers that say of every product in 8 bits that its input is rounded, and of a kernel on the Hub that it is not there."""
_STATES = ("quant_state", "state")
"""Where bitsandbytes' layers keep what belongs to their weight: Linear4bit, Linear8bitLt."""


def package_fault(quantisation: str, where: str = "model.quantisation") -> Fault | None:
    """What is wrong with the installation for such a base model; None where nothing is.

    Args:
        quantisation: one of ``QUANTISATIONS``.
        where: the key that asks for it.
    """
    if quantisation == "none":
        return None
    expected = f"the package {PACKAGE} {OLDEST} or newer, which reads base models in {quantisation}"
    if importlib.util.find_spec(PACKAGE) is None:
        return Fault(where, f"{quantisation}, and {PACKAGE} is not installed", expected, COMMAND)
    from packaging.version import Version

    found = importlib.metadata.version(PACKAGE)
    if Version(found) < Version(OLDEST):
        return Fault(where, f"{quantisation}, and {PACKAGE} {found} is installed", expected, COMMAND)
    return None


def check_package(quantisation: str, where: str = "model.quantisation") -> None:
    """Raise UserError, in one line, where a base model cannot be loaded in this quantisation for want of a package."""
    if (fault := package_fault(quantisation, where)) is not None:
        raise UserError(str(fault))


def loading_options(quantisation: Quantisation, dtype: torch.dtype, device: torch.device | None) -> dict[str, Any]:
    """More arguments for transformers' ``from_pretrained``, empty for ``none``.

    Args:
        quantisation: which.
        dtype: in which the layers compute.
        device: on which weights are quantised as they come; None: the CPU. transformers would take the first GPU.

    Raises:
        UserError: the package is not installed.
    """
    if quantisation == "none":
        return {}
    check_package(quantisation)
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers import BitsAndBytesConfig

    if quantisation == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": config, "device_map": {"": "cpu" if device is None else str(device)}}


def settle(model: nn.Module, dtype: torch.dtype) -> None:
    """Make a model that was just loaded fit to stay: its weights keep their bits whatever passes through.

    On CPUs with bf16 instructions bitsandbytes lays a 4-bit weight out again at the first pass without gradients, with its
    scales rounded: training and answering would use two different base models, and no checksum would hold.
    """
    for layer in _layers(model):
        layer.support_avx512bf16_for_cpu = False
        layer.compute_dtype = dtype  # of 8-bit layers nothing else tells it


def scales(model: nn.Module) -> Iterator[Tensor]:
    """The tensors besides a model's parameters without which its quantised weights mean nothing."""
    for layer in _layers(model):
        state = getattr(layer.weight, "quant_state", None)
        if state is not None:
            yield state.absmax
        elif (row_scales := _first(getattr(layer.weight, "SCB", None), getattr(layer.state, "SCB", None))) is not None:
            yield row_scales


def states(model: nn.Module) -> Iterable[Any]:
    """Objects that copies of a model must share with it, because they belong to the weights."""
    for layer in _layers(model):
        yield from (held for name in _STATES if (held := getattr(layer, name, None)) is not None)
        if (held := getattr(layer.weight, "quant_state", None)) is not None:
            yield held


def _first(*found: Any) -> Any:
    return next((one for one in found if one is not None), None)


def _layers(model: nn.Module) -> Iterator[Any]:
    """Quantised linear layers, recognised by their weight's class: bitsandbytes need not be there."""
    for module in model.modules():
        if type(module._parameters.get("weight")).__name__ in ("Params4bit", "Int8Params"):  # its own, not one it wraps
            yield module
