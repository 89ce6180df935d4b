"""Whether what must not train has stayed as it was, bit for bit."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from amlora_dist.training.engine import local_part


def weights_checksum(parameters: Iterable[Tensor]) -> tuple[int, int]:
    """Checksum of the bits of parameters, as this rank holds them: two sums modulo 2^64.

    They are sums of eight-byte words. The second weighs every word by its place, so that exchanged values show too. A
    changed bit changes the first sum; it is no defence against an adversary.
    """
    plain = weighted = 0
    with torch.no_grad():
        for number, parameter in enumerate(parameters, start=1):
            part = local_part(parameter).detach().contiguous().view(-1).view(torch.uint8)
            if part.data_ptr() % 8:
                part = part.clone()
            places = torch.arange(1, min(len(part), 1 << 20) + 1, device=part.device)
            whole = len(part) // 8 * 8
            for words in (part[:whole].view(torch.int64), part[whole:].to(torch.int64)):
                for piece in words.split(1 << 20):
                    plain += int(piece.sum())
                    weighted += number * int((piece * places[: len(piece)]).sum())
    return plain % (1 << 64), weighted % (1 << 64)
