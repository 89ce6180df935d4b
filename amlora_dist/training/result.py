"""What a stage leaves behind: its adapter, the router's statistics of its task, and how it was trained.

A folder of ``adapter.safetensors``, ``statistics.safetensors`` and ``training.json``; it counts when ``COMMIT``,
written last, names the digests of the others.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amlora_dist.digests import file_digest
from amlora_dist.errors import BankError, UserError
from amlora_dist.files import rename_synced

if TYPE_CHECKING:
    from torch import Tensor

    from amlora_dist.adapters.adapter import Adapter
    from amlora_dist.adapters.statistics import TaskStatistics

MEMORY = "memory."
"""Where, among the statistics' tensors, those begin that the method keeps."""
FILES = ("adapter.safetensors", "statistics.safetensors", "training.json")


@dataclass(frozen=True, slots=True)
class Result:
    """The adapter of one stage with all that goes with it."""

    adapter: Adapter
    statistics: TaskStatistics
    training: dict[str, Any]
    """Losses, tokens, seconds, and what the stage was trained with (world size, ZeRO stage, versions)."""
    method_state: dict[str, Tensor] = field(default_factory=dict)
    """What the method keeps for later stages (``Method.method_state``)."""

    def continuation(self) -> dict[str, Tensor]:
        """What only continuation needs, by name: the statistics and the method's memory."""
        memory = {f"{MEMORY}{name}": tensor.contiguous() for name, tensor in self.method_state.items()}
        return self.statistics.tensors() | memory


def split_continuation(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The statistics' tensors and the method's memory, from ``Result.continuation``."""
    statistics = {name: tensor for name, tensor in tensors.items() if not name.startswith(MEMORY)}
    return statistics, {n.removeprefix(MEMORY): tensor for n, tensor in tensors.items() if n.startswith(MEMORY)}


def is_whole(folder: Path) -> bool:
    """Whether the folder was committed and its files are those that were."""
    try:
        expected = json.loads((folder / "COMMIT").read_text(encoding="utf-8"))
        return bool(expected == {name: file_digest(folder / name) for name in FILES})
    except (OSError, json.JSONDecodeError, UnicodeDecodeError):
        return False


def write_result(folder: Path, result: Result) -> None:
    """Write to a temporary name, commit, rename. A whole folder is left as it is: who comes late changes nothing.

    Raises:
        UserError: the disk is full or not writable.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if is_whole(folder):
        return
    adapter = result.adapter
    about = {"task": adapter.task, "rank": adapter.rank, "alpha": adapter.alpha, "digest": adapter.digest()}
    tmp = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(tmp, ignore_errors=True)
    try:
        tmp.mkdir(parents=True)
        save_file({k: t.contiguous() for k, t in adapter.tensors().items()}, tmp / FILES[0])
        save_file(result.continuation(), tmp / FILES[1])
        (tmp / FILES[2]).write_text(json.dumps({"adapter": about, **result.training}), encoding="utf-8")
        (tmp / "COMMIT").write_text(json.dumps({name: file_digest(tmp / name) for name in FILES}), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        shutil.rmtree(tmp, ignore_errors=True)
        raise UserError(f"cannot write the trained adapter to {folder}: {error}; make room, then run again") from error
    shutil.rmtree(folder, ignore_errors=True)
    rename_synced(tmp, folder)


def read_result(folder: Path) -> Result:
    """Read what ``write_result`` wrote.

    Raises:
        BankError: the folder is not whole, or its adapter differs from its digest.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from amlora_dist.adapters.adapter import Adapter
    from amlora_dist.adapters.statistics import TaskStatistics

    if not is_whole(folder):
        raise BankError(f"{folder}: not a whole training result (no commit marker that agrees with its files)")
    try:
        training = json.loads((folder / FILES[2]).read_text(encoding="utf-8"))
        about = training.pop("adapter")
        parts: dict[str, dict[str, Any]] = {"a": {}, "b": {}, "recipe": {}, "selector": {}, "refitted": {}}
        for name, tensor in load_file(folder / FILES[0]).items():
            kind, _, module = name.partition(".")
            parts[kind][module] = tensor
        adapter = Adapter(task=about["task"], rank=about["rank"], alpha=about["alpha"], **parts)
        kept, memory = split_continuation(load_file(folder / FILES[1]))
        statistics = TaskStatistics.from_tensors(adapter.task, kept)
    except (SafetensorError, KeyError, TypeError, AttributeError, ValueError) as error:  # committed, but not by this code
        raise BankError(f"{folder}: not a training result of this project ({error!r}); remove it and start again") from error
    if adapter.digest() != about["digest"]:
        raise BankError(f"{folder}: the adapter's digest is {adapter.digest()}, its record says {about['digest']}")
    return Result(adapter, statistics, training, memory)
