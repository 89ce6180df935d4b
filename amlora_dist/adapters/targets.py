"""Which linear layers of a model are adapted, and the layer whose input the router reads.

Sizes come from ``in_features``/``out_features`` (``nx``/``nf`` of transformers' Conv1D), never from ``weight.shape``:
under ZeRO-3 a partitioned weight is empty. Everything here works on a model on the meta device.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

from amlora_dist.errors import BankError, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from amlora_dist.adapters.settings import AdapterSettings

log = logging.getLogger(__name__)

Part = Literal["encoder", "decoder"]

QUERY_VALUE = ["q_proj", "v_proj"]
DEFAULT_TARGETS: dict[str, list[str]] = {
    "bart": QUERY_VALUE,
    "bloom": ["query_key_value"],
    "chatglm": ["query_key_value"],
    "codegen": ["qkv_proj"],
    "falcon": ["query_key_value"],
    "gemma": QUERY_VALUE,
    "gemma2": QUERY_VALUE,
    "gemma3_text": QUERY_VALUE,
    "gpt2": ["c_attn"],
    "gpt_bigcode": ["c_attn"],
    "gpt_neo": QUERY_VALUE,
    "gpt_neox": ["query_key_value"],
    "gptj": QUERY_VALUE,
    "llama": QUERY_VALUE,
    "llama4": QUERY_VALUE,
    "mistral": QUERY_VALUE,
    "mixtral": QUERY_VALUE,
    "mpt": ["Wqkv"],
    "mt5": ["q", "v"],
    "opt": QUERY_VALUE,
    "phi": [*QUERY_VALUE, "fc1", "fc2"],
    "qwen2": QUERY_VALUE,
    "qwen3": QUERY_VALUE,
    "stablelm": QUERY_VALUE,
    "t5": ["q", "v"],
}
"""``targets: auto`` by ``config.model_type``: PEFT's own defaults for LoRA (a test compares the two tables)."""


GROUPS = ("all-linear", "attention", "mlp")
"""Words of ``targets`` that mean many layers, whatever the architecture calls them."""
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_OTHER_MIXERS = frozenset({"mixer", "mamba", "ssm", "conv"})
"""Parts of a layer that mix tokens in place of attention: in ``all-linear`` only."""


@dataclass(frozen=True, slots=True)
class Target:
    """One linear layer to adapt. ``layer`` counts from 0 within its ``part`` of the model."""

    path: str
    in_features: int
    out_features: int
    layer: int
    part: Part = "decoder"


@dataclass(frozen=True, slots=True)
class LayerStack:
    """The repeated blocks of one part of the model: ``path`` of their ModuleList, and the list itself."""

    path: str
    layers: nn.ModuleList
    part: Part


def linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """(in_features, out_features) of a linear layer; None for any other module."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return None


def layer_stacks(model: PreTrainedModel) -> list[LayerStack]:
    """The decoder's stack, or of an encoder-decoder model the encoder's and then the decoder's.

    Raises:
        UserError: if a part has no list of layers.
    """
    parts: list[tuple[Part, nn.Module]] = [("decoder", model.get_decoder())]
    if model.config.is_encoder_decoder:
        parts.insert(0, ("encoder", model.get_encoder()))
    return [_stack_of(model, root, part) for part, root in parts]


def _stack_of(model: PreTrainedModel, root: nn.Module, part: Part) -> LayerStack:
    prefix = next((path for path, module in model.named_modules() if module is root), "")
    lists: dict[str, nn.ModuleList] = {}
    for path, module in root.named_modules():
        nested = any(path.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and len(module) and not nested:
            lists[path] = module
    if not lists:
        raise UserError(
            f"{type(model).__name__}: no list of layers in its {part}; "
            "supported are transformers' causal and encoder-decoder language models"
        )
    path, layers = max(lists.items(), key=lambda item: len(item[1]))
    return LayerStack(".".join(name for name in (prefix, path) if name), layers, part)


def routing_stack(model: PreTrainedModel) -> LayerStack:
    """The stack whose hidden states the router reads: the encoder's if there is one, else the decoder's."""
    return layer_stacks(model)[0]


def default_depths(layer: int) -> list[int]:
    """Layers whose states are features besides those of the routing layer: those at each quarter of its depth."""
    return sorted({layer * quarter // 4 for quarter in (1, 2, 3)} - {0, layer})


def default_router_layer(model: PreTrainedModel) -> int:
    """k: the middle of the depth of the stack that the router reads."""
    return len(routing_stack(model).layers) // 2


def check_router_layer(model: PreTrainedModel, router_layer: int) -> None:
    """Raise UserError unless hidden states exist after ``router_layer`` layers and a layer follows them."""
    depth = len(routing_stack(model).layers)
    if not 0 <= router_layer < depth:
        raise UserError(
            f"router.layer: found {router_layer}, expected 0 to {depth - 1} "
            f"(the {routing_stack(model).part} of this model has {depth} layers)"
        )


def find_targets(model: PreTrainedModel, settings: AdapterSettings, router_layer: int) -> list[Target]:
    """The linear layers that ``settings`` selects, in the model's own order.

    ``layers: above_router`` takes the layers with index >= ``router_layer`` (their input is the hidden state after
    ``router_layer`` layers or a later one), and of an encoder-decoder model also the whole decoder; ``last:K`` takes
    the last K layers of each part. Experts of a mixture of experts are left alone: each sees only some of the tokens.
    A word (``GROUPS``) means layers by where they are: attention's, the others' (mlp), or all but the output head.

    Raises:
        UserError: if nothing matches, or one of the named targets does not; the message lists what could.
    """
    check_router_layer(model, router_layer)
    stacks = layer_stacks(model)
    names = _target_names(model, settings, stacks)
    found: list[Target] = []
    linear: Counter[str] = Counter()
    matched: set[str] = set()
    experts = False
    for stack in stacks:
        # The router reads the first stack; a decoder behind an encoder runs after it as a whole.
        first = _first_layer(settings.layers, stack, router_layer, read_by_router=stack is stacks[0])
        for index, layer in enumerate(stack.layers):
            mixed = _mixtures_of_experts(layer)
            experts = experts or bool(mixed)
            for inner, sizes in _linear_layers(layer):
                linear[inner.rsplit(".", 1)[-1]] += 1
                groups = () if any(inner.startswith(f"{block}.") for block in mixed) else _groups_of(inner)
                name = next((n for n in names if inner == n or inner.endswith(f".{n}") or n in groups), None)
                if name is None:
                    continue
                matched.add(name)
                if index >= first:
                    found.append(Target(f"{stack.path}.{index}.{inner}", *sizes, index, stack.part))
    missing = [name for name in names if name not in matched]
    if missing or not found:
        raise UserError(_no_match(model, settings, missing or names, linear))
    if experts:
        log.info("%s: the experts of its mixture-of-experts layers are left alone", model.config.model_type)
    return found


def bank_targets(model: PreTrainedModel, paths: Sequence[str]) -> list[Target]:
    """The modules that a bank adapts, in the model's order.

    Raises:
        BankError: the model has no linear layer of that path.
    """
    wanted, found = set(paths), []
    for stack in layer_stacks(model):
        for index, layer in enumerate(stack.layers):
            for inner, module in layer.named_modules():
                path = f"{stack.path}.{index}.{inner}"
                if path in wanted and (sizes := linear_sizes(module)) is not None:
                    wanted.remove(path)
                    found.append(Target(path, *sizes, index, stack.part))
    if wanted:
        raise BankError(
            f"the bank adapts {min(wanted)}, which is no linear layer of {type(model).__name__}; "
            "it belongs to another base model"
        )
    return found


def settings_of_paths(
    model: PreTrainedModel, paths: Sequence[str], router_layer: int
) -> tuple[list[str], str] | None:
    """``targets`` and ``layers`` of `AdapterSettings` that select these very modules; None where no settings do.

    Args:
        model: the base model; the meta device will do.
        paths: the modules that a bank adapts.
        router_layer: as in `find_targets`.
    """
    from amlora_dist.adapters.settings import AdapterSettings

    names = sorted({path.rsplit(".", 1)[-1] for path in paths})
    deepest = min(len(stack.layers) for stack in layer_stacks(model))
    for layers in ("above_router", "all", *(f"last:{count}" for count in range(1, deepest + 1))):
        with contextlib.suppress(UserError):
            found = find_targets(model, AdapterSettings(targets=names, layers=layers), router_layer)
            if {target.path for target in found} == set(paths):
                return names, layers
    return None


def _linear_layers(layer: nn.Module) -> Iterator[tuple[str, tuple[int, int]]]:
    """Paths within a layer, and sizes, of what can be adapted in it."""
    for inner, module in layer.named_modules():
        sizes = linear_sizes(module)
        if sizes is not None and "experts" not in inner.split("."):
            yield inner, sizes


def _mixtures_of_experts(layer: nn.Module) -> set[str]:
    """Paths of the parts of a layer that hold experts. Such a part also holds what chooses them, and what it hands on has
    lost its batch axis: none of it is meant by a word, it has to be named."""
    return {inner.rpartition(".")[0] for inner, _ in layer.named_modules() if inner.rpartition(".")[2] == "experts"}


def in_attention(path: str) -> bool:
    """Whether a path, in the model or within a layer, leads into attention."""
    return _ATTENTION.search(path) is not None


def _groups_of(inner: str) -> tuple[str, ...]:
    """Which words mean the linear layer at this path within its transformer layer."""
    if in_attention(inner):
        return ("all-linear", "attention")
    other = not _OTHER_MIXERS.isdisjoint(inner.lower().split("."))
    return ("all-linear",) if other else ("all-linear", "mlp")


def _target_names(model: PreTrainedModel, settings: AdapterSettings, stacks: list[LayerStack]) -> list[str]:
    asked = [settings.targets] if isinstance(settings.targets, str) else settings.targets
    if settings.targets != "auto":
        return _with_mlp(model, list(dict.fromkeys(asked)), stacks)
    kind = model.config.model_type
    if kind in DEFAULT_TARGETS:
        return DEFAULT_TARGETS[kind]
    # Most later architectures name their projections as Llama does; anything else has to be named.
    paths = {path.rsplit(".", 1)[-1] for stack in stacks for path, _ in stack.layers.named_modules()}
    if paths.issuperset(QUERY_VALUE):
        log.info("adapters.targets: auto takes %s for model type %s", ", ".join(QUERY_VALUE), kind)
        return QUERY_VALUE
    return []


def _with_mlp(model: PreTrainedModel, names: list[str], stacks: list[LayerStack]) -> list[str]:
    """``names``, with ``attention`` in place of ``mlp`` where every MLP is a mixture of experts, which are left alone."""
    if "mlp" not in names:
        return names
    for stack in stacks:
        for layer in stack.layers:
            mixed = _mixtures_of_experts(layer)
            for inner, _ in _linear_layers(layer):
                if "mlp" in _groups_of(inner) and not any(inner.startswith(f"{block}.") for block in mixed):
                    return names
    if not any(_mixtures_of_experts(layer) for stack in stacks for layer in stack.layers):
        return names  # no such layer at all, which is for the caller to tell
    log.warning(
        "adapters.targets: the MLPs of model type %s are mixtures of experts, which are left alone: mlp means attention",
        model.config.model_type,
    )
    return list(dict.fromkeys("attention" if name == "mlp" else name for name in names))


def _first_layer(layers: str, stack: LayerStack, router_layer: int, read_by_router: bool) -> int:
    depth = len(stack.layers)
    if layers == "all":
        return 0
    if layers == "above_router":
        return router_layer if read_by_router else 0
    count = int(layers.removeprefix("last:"))
    if count > depth:
        raise UserError(f"adapters.layers: found {layers}, expected at most last:{depth} (the {stack.part}'s depth)")
    return depth - count


def _no_match(model: PreTrainedModel, settings: AdapterSettings, names: list[str], linear: Counter[str]) -> str:
    could = ", ".join(f"{name} ({count})" for name, count in sorted(linear.items())) or "none"
    if not names:
        return (
            f"adapters.targets: auto knows no default for model type {model.config.model_type!r}; "
            f"name some of its linear layers instead: {could}"
        )
    hints = [get_close_matches(name, [*linear, *GROUPS], n=1) for name in names]
    hint = "".join(f" (did you mean {close[0]!r}?)" for close in hints if close)
    return (
        f"adapters.targets: {', '.join(repr(name) for name in names)} matches no linear layer of "
        f"{type(model).__name__} with adapters.layers {settings.layers!r}{hint}; its linear layers are: {could}"
    )
