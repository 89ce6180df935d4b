"""A base model under ZeRO-3, each rank reading its own part of every weight from the safetensors shards.

transformers' own loader has one rank read the whole checkpoint and send it to the others: its host must hold the model.
Here the modules are made without weights, partitioned as they are made, and every rank then copies the elements that it
holds of a parameter straight from the file, one parameter at a time. A host holds its partition and the largest layer
at most (measured by ``benchmarks/zero_memory.py``), and nothing of the weights travels between ranks.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from amlora_dist.base_model import BaseModel, auto_class, frozen, load_model, model_options
from amlora_dist.errors import UserError
from amlora_dist.training.zero import partition_of, partitioned_construction, partitioned_loading

log = logging.getLogger(__name__)

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def load_partitioned(base: BaseModel, config: Mapping[str, Any], *, dtype: torch.dtype, attention: str) -> Any:
    """The frozen base model, partitioned over the ranks; to be called by all of them.

    A checkpoint whose tensors are not the model's parameters one by one (experts that transformers joins, say) is left
    to transformers.

    Raises:
        UserError: a shard is missing or damaged.
    """
    from transformers import AutoConfig, GenerationConfig

    shards = shards_of(base.path)
    offload = (config["zero_optimization"].get("offload_param") or {}).get("device", "none")
    if offload == "nvme" or not _one_by_one(base, shards):
        log.info("%s is loaded by transformers: rank 0 reads it whole", base.source)
        with partitioned_loading(config):
            return load_model(base, dtype=dtype, attention=attention)
    with partitioned_construction(config):
        made = auto_class(base).from_config(
            AutoConfig.from_pretrained(base.path), **model_options(base, dtype=dtype, attention=attention)
        )
    made.tie_weights()
    if (base.path / "generation_config.json").is_file():
        made.generation_config = GenerationConfig.from_pretrained(base.path)
    _fill(made, shards)
    return frozen(made)


def shards_of(folder: Path) -> dict[str, Path]:
    """The file that holds each tensor of a checkpoint.

    Raises:
        UserError: the index names a file that is not there.
    """
    index = folder / INDEX
    if not index.is_file():
        with safe_open(folder / SINGLE, framework="pt") as file:
            return dict.fromkeys(file.keys(), folder / SINGLE)
    named = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    missing = sorted({name for name in named.values() if not (folder / name).is_file()})
    if missing:
        raise UserError(
            f"model.source: {folder} lacks {len(missing)} of its shards, the first is {missing[0]}; fetch the model again"
        )
    return {tensor: folder / name for tensor, name in named.items()}


def _one_by_one(base: BaseModel, shards: Mapping[str, Path]) -> bool:
    """Whether every parameter has a tensor of its name and shape."""
    from amlora_dist.base_model import meta_model

    model = meta_model(base)
    for name, parameter in model.named_parameters():
        if name not in shards:
            return False
        with safe_open(shards[name], framework="pt") as file:
            if tuple(file.get_slice(name).get_shape()) != tuple(parameter.shape):
                return False
    return True


def _fill(model: nn.Module, shards: Mapping[str, Path]) -> None:
    """Copy every parameter's own part, and every stored buffer, from the files."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            part, start, count = partition_of(parameter)
            if count:
                shape = tuple(parameter.ds_shape)  # type: ignore[attr-defined]
                part.narrow(0, 0, count).copy_(read_range(shards[name], name, shape, start, count))
        for name, buffer in model.named_buffers():
            if name in shards:
                with safe_open(shards[name], framework="pt") as file:
                    buffer.copy_(file.get_tensor(name))


def read_range(file: Path, name: str, shape: tuple[int, ...], start: int, count: int) -> Tensor:
    """Elements ``start : start + count`` of the flattened tensor ``name``, (count,), reading only the rows that hold them.

    The file is opened for each tensor and closed: pages of a mapped file count as this process's memory while it is open.
    """
    width = math.prod(shape[1:]) if shape else 1
    first, last = start // width, -(-(start + count) // width)
    with safe_open(file, framework="pt") as opened:
        rows: Tensor = opened.get_slice(name)[first:last] if shape else opened.get_tensor(name)
        return rows.reshape(-1).narrow(0, start - first * width, count).clone()
