"""What the frozen trunk makes of each row, kept in memory-mapped files: computed once for all epochs, stages and trials.

A file is named by the digest of its row's tokens, in a folder named by the digest of all else that decides the states:
base model, layer, dtype, attention implementation, device, processor, library versions. Rows are computed alone and
unpadded, so that a hit and a miss give the same bits, whoever wrote the file. Files appear when they are whole, and end
with a checksum: several workers share a folder without a lock, and one that was cut off leaves nothing that is read. When
the files of all folders together pass the limit, those that were used longest ago go.

The cache is in front of a model (``TrunkCache.attach`` for training, ``TrunkCache.forward_for`` for prompts): whoever
calls the model knows nothing of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import os
import struct
import threading
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from amlora_dist.adapters.gate_context import pool_features
from amlora_dist.digests import value_digest

if TYPE_CHECKING:
    from amlora_dist.adapters.trunk import Trunk
    from amlora_dist.evaluation.decoding import Forward
    from amlora_dist.tasks.batches import Example

log = logging.getLogger(__name__)

RETAINED_SHARE = 0.8
"""Of the limit, what is left after old files went."""
ROOM = 8
"""Sets of rows (the splits of tasks) for which the limit must have room if one of them is to be cached for decoding."""
LOOKS = 16
"""The files are counted after every 1/LOOKS of the limit that this process has written."""


class TrunkCache:
    """What one trunk makes of rows.

    Args:
        trunk: computes what is missing.
        folder: of all trunks' files; shared by processes.
        limit: of its size, bytes.
        dtype: of the states.
        decided_by: what besides layer, dtype and library versions decides them.
        decodes: keep the layers' keys and values next to the states, for prompts that are decoded from.
    """

    def __init__(
        self,
        trunk: Trunk,
        folder: Path,
        *,
        limit: int,
        dtype: torch.dtype,
        decided_by: dict[str, str],
        decodes: bool = False,
    ) -> None:
        self.trunk, self._root, self._limit, self._dtype = trunk, folder, limit, dtype
        self._compute = trunk.states_and_kv if decodes else trunk.states
        self.width = trunk.states_and_kv_width if decodes else trunk.width
        """Numbers cached of a token."""
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        versions["cpu"] = torch.backends.cpu.get_cpu_capability()  # another one rounds in another way
        key = {**decided_by, **versions, "layer": str(trunk.layer), "dtype": str(dtype), "width": str(self.width)}
        self._folder = folder / value_digest(key)[:32]
        self._checked: set[str] = set()
        """Files whose checksum this process has seen to be right."""
        self._written = self._limit  # so that the first write looks at what others have left
        self.hits = self.misses = 0

    def attach(self, model: nn.Module) -> RemovableHandle:
        """Go in front of ``model``: passes over whole rows that leave nothing for later ones (``use_cache=False``:
        training) begin above the trunk. Until the handle is removed, or the model is given back as it was loaded."""
        return model.register_forward_pre_hook(self._bring, with_kwargs=True)

    def _bring(self, _model: nn.Module, args: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if inputs.get("use_cache") is not False or inputs.get("trunk_states") is not None:
            return None
        states_BLD, packed = self.states(_rows_of(inputs)), inputs.get("packed_rows")
        states_BLD = states_BLD.to(inputs["input_ids"].device) if packed is None else packed.pack(states_BLD)
        return args, inputs | {"trunk_states": states_BLD}

    def forward_for(self, model: Forward, examples: Sequence[Example]) -> Forward:
        """What passes over these prompts call in place of ``model``: it, where they have no room together. Else they would
        push each other out, and each would be written for nothing."""
        size = sum(len(example.prompt) for example in examples) * self.width * self._dtype.itemsize
        return CachedForward(model, self) if size <= self._limit / ROOM else model

    def states(self, rows: Sequence[tuple[int, ...]]) -> Tensor:
        """States of these rows, (B, L, D), padded on the left with zeros, on the CPU."""
        return self.states_in(self.cached(rows))

    def states_in(self, cached_BLW: Tensor) -> Tensor:
        """The states among what is cached, (B, L, D)."""
        return cached_BLW[..., : self.trunk.width]

    def fill(self, cache: Any, cached_BLW: Tensor) -> None:
        """Put the keys and values among it into the KV cache of the pass that was given the states."""
        self.trunk.fill(cache, cached_BLW)

    def cached(self, rows: Sequence[tuple[int, ...]]) -> Tensor:
        """All that is cached of these rows, (B, L, W); the first D are the states."""
        longest = max(map(len, rows))
        out_BLW = torch.zeros(len(rows), longest, self.width, dtype=self._dtype)
        for place, row in enumerate(rows):
            out_BLW[place, longest - len(row) :] = self._row(row)
        return out_BLW

    def features(self, examples: Sequence[Example], skip_tokens: int) -> Tensor:
        """Routing features of prompts, (B, D) fp32, where the trunk ends at the routing layer: in a decoder what
        follows a prompt does not change its states, so those kept for training serve."""
        states_BLD = self.states([example.prompt + example.target for example in examples])
        end_B1 = states_BLD.shape[1] - torch.tensor([[len(example.target)] for example in examples])
        start_B1 = end_B1 - torch.tensor([[len(example.prompt)] for example in examples])
        place_L = torch.arange(states_BLD.shape[1])
        return pool_features(states_BLD, (place_L >= start_B1) & (place_L < end_B1), skip_tokens)

    def _row(self, tokens: tuple[int, ...]) -> Tensor:
        """(L, W)"""
        name = hashlib.sha256(struct.pack(f"<{len(tokens)}q", *tokens)).hexdigest()
        file = self._folder / name[:2] / name
        found = self._read(file, name, len(tokens))
        if found is not None:
            self.hits += 1
            return found
        self.misses += 1
        row_LW = self._compute(tokens).to("cpu", self._dtype).contiguous()
        self._write(file, row_LW)
        return row_LW

    def _read(self, file: Path, name: str, length: int) -> Tensor | None:
        """The mapped file; None where there is none, or where it is not whole."""
        size = length * self.width
        try:
            if file.stat().st_size != size * self._dtype.itemsize + 4:
                return None
            flat = torch.from_file(str(file), shared=False, size=size, dtype=self._dtype)
            if name not in self._checked:
                with file.open("rb") as stream:
                    stream.seek(-4, os.SEEK_END)
                    expected = struct.unpack("<I", stream.read(4))[0]
                if _checksum(flat) != expected:
                    log.warning("%s: damaged, computed again", file)
                    return None
                os.utime(file)  # used now: the last to go
                self._checked.add(name)
        except (OSError, RuntimeError, struct.error):  # gone, or being replaced: torch reports it as a RuntimeError
            return None
        return flat.view(length, self.width)

    def _write(self, file: Path, row: Tensor) -> None:
        tmp = file.with_name(f".{file.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with tmp.open("wb") as stream:
                stream.write(_bytes(row))
                stream.write(struct.pack("<I", _checksum(row)))
            tmp.replace(file)
        except OSError as error:
            log.warning("the trunk cache cannot keep %s: %s; going on without", file, error)
            with contextlib.suppress(OSError):
                tmp.unlink(missing_ok=True)
            return
        self._written += row.numel() * row.element_size()
        if self._written * LOOKS >= self._limit:
            self._written = 0
            make_room(self._root, self._limit)


class CachedForward:
    """A model whose first pass over prompts begins above the trunk; to its caller it is the model.

    Args:
        model: whose trunk it is; called with keyword arguments.
        cache: made with ``decodes``.
    """

    def __init__(self, model: Forward, cache: TrunkCache) -> None:
        self._model, self._cache = model, cache

    def __call__(self, **inputs: Any) -> Any:
        """As the model; what comes after the prompts, and a gate that features of several depths decide, is its alone."""
        if inputs.get("past_key_values") is not None:
            return self._model(**inputs)
        if inputs.get("task_gate") is None and not self._cache.trunk.can_route:
            return self._model(**inputs)
        cached_BLW = self._cache.cached(_rows_of(inputs)).to(inputs["input_ids"].device)
        output = self._model(**inputs, trunk_states=self._cache.states_in(cached_BLW))
        self._cache.fill(output.past_key_values, cached_BLW)
        return output


def _rows_of(inputs: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """The tokens of each row of a call, without padding."""
    ids, mask, packed = inputs["input_ids"], inputs.get("attention_mask"), inputs.get("packed_rows")
    if packed is not None:
        ids, mask = packed.unpack(ids), packed.mask_BL
    mask = torch.ones_like(ids) if mask is None else mask
    return [tuple(itertools.compress(*row)) for row in zip(ids.tolist(), mask.tolist(), strict=True)]


def make_room(folder: Path, limit: int) -> None:
    """Where the files below ``folder`` pass ``limit`` bytes, delete those used longest ago. One process at a time."""
    from filelock import FileLock, Timeout

    with contextlib.suppress(Timeout, OSError), FileLock(folder / ".room", timeout=0):
        files = []
        for file in folder.glob("*/*/*"):
            with contextlib.suppress(OSError):  # another process may just have renamed it
                found = file.stat()
                files.append((found.st_mtime_ns, found.st_size, file))
        total = sum(size for _, size, _ in files)
        if total <= limit:
            return
        for _, size, file in sorted(files):
            if total <= RETAINED_SHARE * limit:
                return
            with contextlib.suppress(OSError):
                file.unlink()
            total -= size


def _bytes(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(_bytes(tensor))
