"""Dropout in front of a new adapter's A, from numbers that depend on the row, the place and the layer alone.

PyTorch draws a mask from a stream that moves with every draw, so that it depends on how rows were cut into
micro-batches, on padding and on what was drawn before a crash. Here each element's number is a hash of the step, the
row's place in the global batch, the token's place in the row, the feature and the layer: the same after a kill, under
every world size and ZeRO stage, and when gradient checkpointing computes a layer again.

Shapes in names: B sequences, S tokens of a sequence, I features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from amlora_dist.digests import named_seed

_PLACE, _FEATURE = -1640531527, -2048144789
"""Odd multipliers that spread neighbouring places and features (2^32 / golden ratio; murmur3's first), as int32."""


@dataclass(frozen=True, slots=True)
class DropoutKeys:
    """What names the numbers of one call: a key for each of its rows."""

    keys_B: Tensor
    """int32; of packed rows (P, S), the key of each token's row."""
    from_right: bool
    """Whether tokens are counted from the right end: rows are padded on the left."""
    place_BS: Tensor | None = None
    """Of packed rows, (P, S) int32: the places of tokens in their rows, counted so."""


def row_keys(
    seed: int, stage: str, step: int, places: Sequence[int], *, from_right: bool, device: torch.device
) -> DropoutKeys:
    """The keys of rows by their places in the global batch of a 0-based optimizer step."""
    keys = [named_seed(seed, "dropout", stage, step, place) % 2**31 for place in places]
    return DropoutKeys(torch.tensor(keys, dtype=torch.int32, device=device), from_right)


def layer_key(path: str) -> int:
    """Of the layer at this path."""
    return named_seed("dropout", path) % 2**31


def dropped(x: Tensor, keys: DropoutKeys, layer: int, share: float) -> Tensor:
    """``x`` (B, ..., I) with each element 0 at probability ``share``, the others divided by ``1 - share``."""
    x_BSI = x.reshape(x.shape[0], -1, x.shape[-1])
    _, length, width = x_BSI.shape
    place_BS = keys.place_BS
    if place_BS is None:
        place_S = torch.arange(length, device=x.device, dtype=torch.int32)
        place_BS = (place_S.flip(0) if keys.from_right else place_S)[None]
    else:
        place_BS = place_BS.view(-1, length)
    feature_I = torch.arange(width, device=x.device, dtype=torch.int32)
    base_BS = _mixed((keys.keys_B.view(len(x_BSI), -1) ^ layer) + (place_BS + 1) * _PLACE)
    number_BSI = _mixed(base_BS[..., None] ^ ((feature_I + 1) * _FEATURE))
    keep_BSI = number_BSI >= int(share * 2**32) - 2**31
    return (x_BSI * (keep_BSI.to(x.dtype) / (1.0 - share))).view_as(x)


def _mixed(number: Tensor) -> Tensor:
    """A permutation of int32 in which every bit depends on every bit (the finaliser of murmur3)."""
    number = (number ^ _shifted(number, 16)) * -2048144789
    number = (number ^ _shifted(number, 13)) * -1028477387
    return number ^ _shifted(number, 16)


def _shifted(number: Tensor, bits: int) -> Tensor:
    """To the right, zeros coming in (PyTorch's shift of int32 copies the sign)."""
    return (number >> bits) & ((1 << (32 - bits)) - 1)
