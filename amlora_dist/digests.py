"""sha256 digests of values, tensors and files: what fingerprints and manifests are made of."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


def value_digest(value: Any) -> str:
    """sha256 of a JSON value in canonical form (sorted keys, no spaces; NaN and infinity are refused)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def tensors_digest(tensors: Mapping[str, Tensor], **values: Any) -> str:
    """sha256 over names, dtypes, shapes and bytes of tensors, and over JSON values with them."""
    import torch

    digest = hashlib.sha256(value_digest(values).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        if tensor.numel():
            # A fresh copy: a tensor of one element counts as contiguous whatever its strides, and view() then refuses.
            flat = tensor.reshape(-1).clone(memory_format=torch.contiguous_format)
            digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _pieces(file)


def _pieces(file: Any) -> str:
    digest = hashlib.sha256()
    while piece := file.read(1 << 20):
        digest.update(piece)
    return digest.hexdigest()


def named_seed(*parts: str | int) -> int:
    """Seed of a named random stream, below 2^63: every stream has its own, and none depends on another's use."""
    return int(value_digest(list(parts))[:16], 16) >> 1
