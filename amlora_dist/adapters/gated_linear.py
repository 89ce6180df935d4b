"""The arithmetic of a mixture layer whose base is a plain ``nn.Linear``, with as few passes over memory as PyTorch allows.

Shapes in names: B sequences, X tokens in a row, I and O in and out features, R ranks of adapters side by side (the new
adapter's r last).

One LoRA in plain operations reads and writes the output three times (scale, add, and backward of the scaling) and the
input's gradient twice more (to add it to the base layer's). Here adapters accumulate into the base layer's own result
by the matrix product itself, forward and backward, so that what a wide LoRA costs more in arithmetic is mostly saved.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def concat(old: Tensor | None, new: Tensor | None, dim: int) -> Tensor:
    """Old and new weights side by side; at least one is given."""
    if old is None or new is None:
        only = new if old is None else old
        assert only is not None
        return only
    return torch.cat([old, new], dim=dim)


def _times(z_XR: Tensor, gate_BR: Tensor) -> Tensor:
    """z times its sequence's gate, in the gate's precision, rounded once to z's."""
    batch, ranks = gate_BR.shape
    return (z_XR.view(batch, -1, ranks) * gate_BR[:, None]).to(z_XR.dtype).view_as(z_XR)


def gated_linear(
    x_XI: Tensor, gate_BR: Tensor, weight: Tensor, bias: Tensor | None, parts: list[tuple[Tensor, Tensor]]
) -> Tensor:
    """``W x + b + sum over parts of ((x A^T) * gate) B^T``, shape (X, O), without gradient.

    ``parts`` are pairs (A, B) whose ranks lie side by side in ``gate_BR``.
    """
    y_XO = F.linear(x_XI, weight, bias)
    start = 0
    for a_RI, b_OR in parts:
        end = start + a_RI.shape[0]
        y_XO.addmm_(_times(x_XI @ a_RI.t(), gate_BR[:, start:end]), b_OR.t())
        start = end
    return y_XO


class GatedLinear(torch.autograd.Function):
    """``gated_linear`` with gradients for x, the gate and the new adapter, none for the base layer and old adapters.

    The wide weights are put together in forward and again in backward instead of being kept: under sharding they
    would be held whole from one to the other.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_XI: Tensor,
        gate_BR: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        old_a: Tensor | None,
        old_b: Tensor | None,
        new_a: Tensor | None,
        new_b: Tensor | None,
    ) -> Tensor:
        """(X, O)."""
        a_RI, b_OR = concat(old_a, new_a, 0), concat(old_b, new_b, 1)
        z_XR = x_XI @ a_RI.t()
        y_XO = F.linear(x_XI, weight, bias).addmm_(_times(z_XR, gate_BR), b_OR.t())
        ctx.save_for_backward(x_XI, z_XR, gate_BR, weight, old_a, old_b, new_a, new_b)
        return y_XO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_XO: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, the gate, and A and B of the new adapter."""
        x_XI, z_XR, gate_BR, weight, old_a, old_b, new_a, new_b = ctx.saved_tensors
        needs_x, needs_gate, *_, needs_new, _ = ctx.needs_input_grad
        dx = dgate = da = db = None
        dzg_XR = dy_XO @ concat(old_b, new_b, 1)
        if needs_gate:
            batch, ranks = gate_BR.shape
            dgate = (dzg_XR.float() * z_XR).view(batch, -1, ranks).sum(dim=1)
        if needs_x or needs_new:
            dz_XR = _times(dzg_XR, gate_BR)
        if needs_x:
            dx = (dy_XO @ weight).addmm_(dz_XR, concat(old_a, new_a, 0))
        if needs_new:
            rank = new_a.shape[0]
            da = dz_XR[:, -rank:].t() @ x_XI
            db = dy_XO.t() @ _times(z_XR[:, -rank:].contiguous(), gate_BR[:, -rank:])
        return dx, dgate, None, None, None, None, da, db
