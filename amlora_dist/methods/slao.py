"""SLAO: one LoRA for all tasks, merged after each, whose next task starts from an orthogonal basis of the last."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from amlora_dist.methods.seq_lora import SeqLoRA

if TYPE_CHECKING:
    from amlora_dist.adapters.adapter import Adapter
    from amlora_dist.methods.base import Trained


class SLAO(SeqLoRA):
    """Task t fine-tunes a LoRA whose A starts at an orthonormal basis of the rows of the last fine-tuned A, and whose B
    starts at the last fine-tuned B; what answers is the merge of all so far::

        A_ft(0) = Q^T with Q R = QR(A_ft,t-1^T)       B_ft(0) = B_ft,t-1
        A_merge,t = A_ft,t                            B_merge,t = B_merge,t-1 + (B_ft,t - B_merge,t-1) / sqrt(t)

    The bank holds the merges; a fine-tuned B is read off the last two of them. So nothing is kept next to the LoRA of each
    stage, of which the newest alone is needed to serve.

    Source: Qiao and Mahdavi 2025 (SLAO, arXiv 2512.23017). The initialisation is known from a summary of the paper; the
    merge (A taken over, B averaged with the time-aware weight 1/sqrt(t)) from memory of it. Not known: whether the signs of
    Q are fixed (here R has a positive diagonal, so that Q depends on the rows alone), its learning rates, and whether its
    optimizer goes on from task to task (here it starts again).
    """


    def start_from(self, parents: Sequence[Adapter]) -> Adapter | None:
        last = super().start_from(parents)
        if last is None:
            return None
        before = parents[-2].b if len(parents) > 1 else {}
        tuned = {path: _fine_tuned(b, before.get(path), len(parents)) for path, b in last.b.items()}
        return replace(last, a={path: orthonormal_rows(a) for path, a in last.a.items()}, b=tuned)

    def finished(self, trained: Trained) -> tuple[Adapter, dict[str, Tensor]]:
        adapter, earlier = trained.adapter, trained.earlier
        if not earlier:
            return adapter, {}
        weight = 1.0 / math.sqrt(len(earlier) + 1)
        merged = {
            path: torch.lerp(earlier[-1].b[path].float(), b.float(), weight).to(b.dtype) for path, b in adapter.b.items()
        }
        return replace(adapter, b=merged), {}


def orthonormal_rows(a_RI: Tensor) -> Tensor:
    """An orthonormal basis of the rows of A (R, d_in), as rows, by QR with a positive diagonal of R."""
    q_IR: Tensor
    r_RR: Tensor
    q_IR, r_RR = torch.linalg.qr(a_RI.double().T)
    signs_R = torch.where(r_RR.diagonal() < 0, -1.0, 1.0).to(q_IR)
    return (q_IR * signs_R).T.to(a_RI.dtype).contiguous()


def _fine_tuned(merged: Tensor, before: Tensor | None, stage: int) -> Tensor:
    """B as it was after stage ``stage`` (1-based) and before its merge, from the merges of that stage and the one before."""
    if before is None:
        return merged
    return (before.float() + (merged.float() - before.float()) * math.sqrt(stage)).to(merged.dtype)
