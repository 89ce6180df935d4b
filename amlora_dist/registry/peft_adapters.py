"""LoRAs that others saved with PEFT, as adapters of a bank.

PEFT's configuration grows with every version, and what a key does may be anything. So this is a list of what is known:
keys that change nothing in a trained LoRA, keys that are followed here, and keys that must have the value that leaves
them out. Everything else is refused by its name. Where a key is missing, PEFT's own default holds.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import regex
import torch
from torch import Tensor

from amlora_dist.adapters.adapter import Adapter
from amlora_dist.config.schema import shown
from amlora_dist.errors import BankError, UserError
from amlora_dist.registry.adapter_folder import CONFIG_FILE, MODEL_FILE
from amlora_dist.registry.tensor_files import read_tensors

DEFAULT_RANK, DEFAULT_ALPHA = 8, 8
"""PEFT's, where a configuration leaves ``r`` or ``lora_alpha`` out."""

_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<letter>[AB])\.weight")
_MOST_REPEATS, _LONGEST = 6, 2000
"""Bounds of a pattern: Python's matching takes a time that grows with the power of its repeats."""
PATIENCE_S = 1.0
"""For one name: a pattern within these bounds can still take hours, for names that were made for it."""


def _number(value: object) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False


def _any(value: object) -> bool:
    return True


def _positive(value: object) -> bool:
    return _number(value) and value > 0  # type: ignore[operator]


def _rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _flag(value: object) -> bool:
    return isinstance(value, bool) or value is None


def _text(value: object) -> bool:
    return value is None or isinstance(value, str)


def _names(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _only(*values: object) -> Callable[[object], bool]:
    """One of these, and not merely equal to it: ``0`` is no ``false``."""
    return lambda value: any(type(value) is type(one) and value == one for one in values)


def _init(value: object) -> bool:
    """Whether an initialisation leaves the base model as it is; PiSSA, OLoRA, CorDA and LoftQ take a part out of it, which
    PEFT does again when it loads the adapter."""
    return value is None or isinstance(value, bool) or (isinstance(value, str) and value.lower() in _PLAIN_INITS)


def _layers(value: object) -> bool:
    numbers = value if isinstance(value, list) else [value]
    return value is None or all(isinstance(number, int) and not isinstance(number, bool) for number in numbers)


def _pattern(fits: Callable[[object], bool]) -> Callable[[object], bool]:
    """Values by a pattern of modules' names."""
    return lambda value: isinstance(value, dict) and all(_usable(key) and fits(one) for key, one in value.items())


def _or_null(fits: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or fits(value)


_PLAIN_INITS = ("gaussian", "eva", "orthogonal")
_OFF, _NULL, _EMPTY = (_only(False, None), "false"), (_only(None), "null"), (_only(None, []), "null")
KNOWN: dict[str, tuple[Callable[[object], bool], str]] = {
    # What a trained LoRA no longer depends on.
    **dict.fromkeys(("auto_mapping", "peft_version", "inference_mode", "runtime_config", "megatron_core"), (_any, "")),
    **dict.fromkeys(("eva_config", "corda_config", "loftq_config", "lora_ga_config", "qalora_group_size"), (_any, "")),
    **dict.fromkeys(("base_model_name_or_path", "revision"), (_text, "text")),
    **dict.fromkeys(("fan_in_fan_out", "ensure_weight_tying"), (_flag, "true or false")),
    "lora_dropout": (_number, "a number"),
    "task_type": (_only(None, "CAUSAL_LM", "SEQ_2_SEQ_LM"), "CAUSAL_LM or SEQ_2_SEQ_LM"),
    "init_lora_weights": (_init, f"true, false, {' or '.join(_PLAIN_INITS)}, which leave the base model as it is"),
    # What is followed here.
    "peft_type": (_only("LORA"), "LORA"),
    "r": (_rank, "a whole number above 0"),
    "lora_alpha": (_positive, "a number above 0"),
    "use_rslora": (_flag, "true or false"),
    "rank_pattern": (_or_null(_pattern(_rank)), "whole numbers by short patterns of modules' names"),
    "alpha_pattern": (_or_null(_pattern(_positive)), "numbers above 0 by short patterns of modules' names"),
    "target_modules": (_names, "a list of modules' names, or a short pattern"),
    "exclude_modules": (_or_null(_names), "a list of modules' names, or a short pattern"),
    "layers_to_transform": (_layers, "numbers of layers"),
    "layers_pattern": (_or_null(_names), "names, or a short pattern"),
    # What would make something else of it.
    "bias": (_only("none"), "none"),
    **dict.fromkeys(("lora_bias", "use_dora", "use_qalora", "use_bdlora"), _OFF),
    **dict.fromkeys(("modules_to_save", "layer_replication", "target_parameters"), _EMPTY),
    **dict.fromkeys(("trainable_token_indices", "megatron_config", "alora_invocation_tokens", "arrow_config"), _NULL),
    **dict.fromkeys(("velora_config", "kasa_config", "monteclora_config"), _NULL),
    # What PEFT had once.
    "enable_lora": _NULL,
    "merge_weights": _OFF,
}
"""Keys of ``adapter_config.json``: what they may hold, and how a message says it."""


def read_peft(folder: Path, task: str) -> tuple[Adapter, dict[str, Any]]:
    """An existing PEFT LoRA as an adapter of a bank, and its configuration.

    Layers of several ranks or alphas become one of the largest rank, filled up with zeros, and the differences of their
    scales go into B: the same function.

    Raises:
        UserError: not a LoRA that a bank can hold (another method, DoRA, biases, embeddings), or one with a key that this
            version does not know.
        BankError: a damaged file.
    """
    config = _read_config(folder / CONFIG_FILE)
    if not (folder / MODEL_FILE).is_file():
        raise UserError(
            f"{folder / MODEL_FILE}: missing; pickled weights (adapter_model.bin) are not read, save it again with PEFT"
        )
    a, b = _read_pairs(folder / MODEL_FILE)
    _check_targets(folder / CONFIG_FILE, config, a)
    ranks = {module: _by_pattern(config.get("rank_pattern"), module, config.get("r", DEFAULT_RANK)) for module in a}
    for module, rank in ranks.items():
        shapes = tuple(a[module].shape), tuple(b[module].shape)
        if len(shapes[0]) != 2 or len(shapes[1]) != 2 or shapes[0][0] != rank or shapes[1][1] != rank:
            raise BankError(
                f"{folder / MODEL_FILE}: the A and B of {module} are not pairs of rank {shown(rank)}, as {CONFIG_FILE} says:"
                f" found shapes {shapes[0]} and {shapes[1]}"
            )
    scales = {module: _scale(config, module, rank) for module, rank in ranks.items()}
    largest, first = max(ranks.values()), max(scales, key=scales.__getitem__)
    scale = scales[first]
    for module, rank in ranks.items():
        if scales[module] != scale:
            b[module] = b[module].float() * (scales[module] / scale)
        a[module] = torch.nn.functional.pad(a[module], (0, 0, 0, largest - rank))
        b[module] = torch.nn.functional.pad(b[module], (0, largest - rank))
    if len({tensor.dtype for tensor in (*a.values(), *b.values())}) > 1:  # a bank keeps one, and fp32 holds the others
        a, b = ({module: tensor.float() for module, tensor in part.items()} for part in (a, b))
    alpha = _alpha(config, first) if ranks[first] == largest and not config.get("use_rslora") else scale * largest
    return Adapter(task, largest, alpha, dict(sorted(a.items())), dict(sorted(b.items()))), config


def _read_config(file: Path) -> dict[str, Any]:
    """A configuration of which every key is known and has a value that is."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: {error}; give the folder of a PEFT adapter") from error
    if not isinstance(config, dict):
        raise UserError(f"{file}: found no JSON object, expected PEFT's configuration; give the folder of a PEFT adapter")
    for key in ("peft_type", "target_modules"):
        if key not in config:
            raise UserError(f"{file}: {key}: found nothing, expected {KNOWN[key][1]}; save the adapter again with PEFT")
    for key, value in config.items():
        if key not in KNOWN:
            raise UserError(
                f"{file}: {key}: found {shown(value)}, a key that this version does not know and that may change what the"
                " adapter computes; a newer amlora-dist may know it, or merge the adapter into a plain LoRA with PEFT"
            )
        fits, expected = KNOWN[key]
        if not fits(value):
            raise UserError(f"{file}: {key}: found {shown(value)}, expected {expected}; a bank cannot hold another LoRA")
    return config


def _read_pairs(file: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A and B by module."""
    parts: dict[str, dict[str, Tensor]] = {"A": {}, "B": {}}
    for name, tensor in read_tensors(file).items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise UserError(f"{file}: {name}: not the A or B of a linear layer, as PEFT names them; a bank cannot hold it")
        if not tensor.is_floating_point():
            raise BankError(f"{file}: {name}: found {tensor.dtype}, expected floating-point numbers")
        parts[match["letter"]][match["module"]] = tensor
    a, b = parts["A"], parts["B"]
    if not a or a.keys() != b.keys():
        alone = sorted(a.keys() ^ b.keys())
        found = f"only one of A and B of {alone[0]}" if alone else "no tensors"
        raise BankError(f"{file}: found {found}, expected the A and B of each layer")
    return a, b


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """What PEFT multiplies B A with: alpha / r, or alpha / sqrt(r)."""
    return _alpha(config, module) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _alpha(config: Mapping[str, Any], module: str) -> float:
    return float(_by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", DEFAULT_ALPHA)))


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that fits the end of a module's path, as PEFT looks it up."""
    for pattern, value in (patterns or {}).items():
        if _matched(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _check_targets(file: Path, config: Mapping[str, Any], modules: Iterable[str]) -> None:
    """Refuse tensors of modules that the configuration does not name: PEFT leaves them out without a message."""
    targets, excluded = config["target_modules"], config.get("exclude_modules") or []
    for key in ("target_modules", "exclude_modules", "layers_pattern"):
        given = config.get(key)
        if (isinstance(given, str) or key == "layers_pattern") and given:
            for pattern in [given] if isinstance(given, str) else given:
                if not _usable(pattern):
                    raise UserError(f"{file}: {key}: found {shown(pattern)}, expected a short pattern; give a list of names")
    for module in modules:
        if _matches(excluded, module) or not (_all_linear(targets) or _targeted(config, module)):
            raise UserError(
                f"{file}: target_modules: found a LoRA of {module}, which the configuration does not name, so that PEFT"
                " leaves it out; save the adapter again with PEFT"
            )


def _all_linear(targets: object) -> bool:
    return isinstance(targets, str) and targets.lower() == "all-linear"


def _targeted(config: Mapping[str, Any], module: str) -> bool:
    targets, layers = config["target_modules"], config.get("layers_to_transform")
    if not _matches(targets, module):
        return False
    if layers is None or layers == [] or isinstance(targets, str) or module in targets:
        return True
    given = config.get("layers_pattern") or r"[^.]*"
    before = r".*?\." if not config.get("layers_pattern") else r"(?:^|.*?\.)"
    matches = (_matched(rf"{before}{one}\.(\d+)\.", module) for one in ([given] if isinstance(given, str) else given))
    found = next((match for match in matches if match is not None), None)
    return found is not None and int(found[found.lastindex or 0]) in (layers if isinstance(layers, list) else [layers])


def _matches(names: str | list[str], module: str) -> bool:
    if isinstance(names, str):
        return _matched(names, module, whole=True) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _matched(pattern: str, module: str, *, whole: bool = False) -> regex.Match[str] | None:
    """A pattern at the beginning of a module's path, or all of it; raises UserError where that takes too long."""
    try:
        return (regex.fullmatch if whole else regex.match)(pattern, module, timeout=PATIENCE_S)
    except (TimeoutError, regex.error) as error:
        raise UserError(
            f"{CONFIG_FILE}: found {shown(pattern)}, which cannot be compared with the name {shown(module)}"
            f" ({'it takes too long' if isinstance(error, TimeoutError) else error}); give a list of names"
        ) from None


def _usable(pattern: str) -> bool:
    """A pattern of Python that is matched in a short time: no repeat of a group, and few repeats at all."""
    if len(pattern) > _LONGEST or re.search(r"\)[*+{]", pattern) or len(re.findall(r"[*+{]", pattern)) > _MOST_REPEATS:
        return False
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    return True
