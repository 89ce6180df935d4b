"""A base model under ZeRO-3, each rank reading its own part of every weight from the safetensors shards.

transformers' own loader has one rank read the whole checkpoint and send it to the others: its host must hold the model.
Here the modules are made without weights, partitioned as they are made, and every rank then copies the elements that it
holds of a parameter straight from the file, one parameter at a time. A host holds its partition and the largest layer
at most (measured by ``benchmarks/zero_memory.py``), and nothing of the weights travels between ranks.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from amlora_dist.base_model import BaseModel, auto_class, frozen, load_model, model_options
from amlora_dist.errors import UserError
from amlora_dist.training.engine import partition_of, partitioned_construction, partitioned_loading

log = logging.getLogger(__name__)

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


Sources = dict[str, list[str]]
"""Tensors of the checkpoint by the parameter that they make up: laid end to end they are its elements in order."""


def load_partitioned(base: BaseModel, config: Mapping[str, Any], *, dtype: torch.dtype, attention: str) -> Any:
    """The frozen base model, partitioned over the ranks; to be called by all of them.

    A checkpoint whose tensors are not the model's parameters, one by one or end to end (as experts are joined), is left to
    transformers, which reads it whole on rank 0.

    Raises:
        UserError: a shard is missing or damaged.
    """
    from transformers import AutoConfig, GenerationConfig

    shards = shards_of(base.path)
    offload = (config["zero_optimization"].get("offload_param") or {}).get("device", "none")
    sources = None if offload == "nvme" else sources_of(base, shards)
    if sources is None:
        log.info("%s is loaded by transformers: rank 0 reads it whole", base.source)
        with partitioned_loading(config):
            return load_model(base, dtype=dtype, attention=attention)
    with partitioned_construction(config):
        made = auto_class(base).from_config(
            AutoConfig.from_pretrained(base.path, trust_remote_code=False),
            trust_remote_code=False,
            **model_options(base, dtype=dtype, attention=attention),
        )
    made.tie_weights()
    if (base.path / "generation_config.json").is_file():
        made.generation_config = GenerationConfig.from_pretrained(base.path)
    _fill(made, shards, sources)
    return frozen(made)


def shards_of(folder: Path) -> dict[str, Path]:
    """The file that holds each tensor of a checkpoint.

    Raises:
        UserError: the index names a file that is not there.
    """
    index = folder / INDEX
    if not index.is_file():
        with _opened(folder / SINGLE) as file:
            return dict.fromkeys(file.keys(), folder / SINGLE)
    named = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    missing = sorted({name for name in named.values() if not (folder / name).is_file()})
    if missing:
        raise UserError(
            f"model.source: {folder} lacks {len(missing)} of its shards, the first is {missing[0]}; fetch the model again"
        )
    return {tensor: folder / name for tensor, name in named.items()}


def sources_of(base: BaseModel, shards: Mapping[str, Path]) -> Sources | None:
    """Which tensors make up each parameter; None where they do not by laying them end to end."""
    from amlora_dist.base_model import meta_model

    model = meta_model(base)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found = {name: parts for name, parts in _joined(model, shards).items() if name in shapes}
    for name, shape in shapes.items():
        parts = [_shape(shards[part], part) for part in found.get(name, [])]
        whole = len(parts) == 1 and parts[0] == shape
        joined = bool(parts) and all(part[1:] == shape[2:] for part in parts)
        if not whole and not (joined and sum(map(math.prod, parts)) == math.prod(shape)):
            return None
    return found


def _joined(model: Any, shards: Mapping[str, Path]) -> Sources:
    """The tensors of each parameter by transformers' own rules: one, or what it stacks, expert by expert. Parameters that
    it makes in another way are left out."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:  # another version of transformers keeps its rules elsewhere
        return {tensor: [tensor] for tensor in shards}
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    steps = {
        pattern: [(type(step).__name__, getattr(step, "dim", None)) for step in rule.operations]
        for rule in converters
        for pattern in rule.source_patterns
    }
    order = {pattern: place for rule in converters for place, pattern in enumerate(rule.source_patterns)}
    parts: dict[str, dict[str, list[str]]] = {}
    for tensor in sorted(shards, key=_natural):
        name, pattern = rename_source_key(tensor, renamings, converters)
        if pattern is None:
            parts.setdefault(name, {}).setdefault("", []).append(tensor)
        elif steps[pattern] in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]):
            parts.setdefault(name, {}).setdefault(pattern, []).append(tensor)
    out: Sources = {}
    for name, groups in parts.items():
        columns = [groups[pattern] for pattern in sorted(groups, key=lambda p: order.get(p, 0))]
        if len({len(column) for column in columns}) == 1:
            out[name] = [tensor for expert in zip(*columns, strict=True) for tensor in expert]
    return out


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts expert 10 behind expert 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _shape(file: Path, name: str) -> tuple[int, ...]:
    with _opened(file) as opened:
        return tuple(opened.get_slice(name).get_shape())


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise UserError(f"model.source: cannot read {file}: {error}; fetch the model again") from error


def _fill(model: nn.Module, shards: Mapping[str, Path], sources: Sources) -> None:
    """Copy every parameter's own part, and every stored buffer, from the files."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            part, start, count = partition_of(parameter)
            at = 0
            for tensor in sources[name]:
                shape = _shape(shards[tensor], tensor)
                size = math.prod(shape)
                first, last = max(start, at), min(start + count, at + size)
                if first < last:
                    own = read_range(shards[tensor], tensor, shape, first - at, last - first)
                    part.narrow(0, first - start, last - first).copy_(own)
                at += size
        for name, buffer in model.named_buffers():
            if name in shards:
                with _opened(shards[name]) as file:
                    buffer.copy_(file.get_tensor(name))


def read_range(file: Path, name: str, shape: tuple[int, ...], start: int, count: int) -> Tensor:
    """Elements ``start : start + count`` of the flattened tensor ``name``, (count,), reading only the rows that hold them.

    The file is opened for each tensor and closed: pages of a mapped file count as this process's memory while it is open.
    """
    width = math.prod(shape[1:]) if shape else 1
    first, last = start // width, -(-(start + count) // width)
    with _opened(file) as opened:
        rows: Tensor = opened.get_slice(name)[first:last] if shape else opened.get_tensor(name)
        return rows.reshape(-1).narrow(0, start - first * width, count).clone()
