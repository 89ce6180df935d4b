"""From scores to gates, and readings of the paper's L1 term. Pure functions, differentiable, over the last dimension.

Shapes: ``...`` any leading dimensions, ``N`` slots. Where a zero adapter is among the slots it is slot 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable


def softmax(scores: Tensor) -> Tensor:
    """softmax over the last dimension: never an exact zero."""
    return torch.softmax(scores, dim=-1)


def sparsemax(scores: Tensor) -> Tensor:
    """Euclidean projection of the scores onto the simplex (Martins and Astudillo 2016, algorithm 1), by sorting.

    Only ``tau`` and the kept scores are on the autograd graph, which gives the paper's Jacobian
    ``diag(s) - s s^T / |s|`` with ``s`` the indicator of the support.

    Args:
        scores: ``(..., N)``.

    Returns:
        ``(..., N)``, sums to 1, with exact zeros.
    """
    shifted = scores - scores.amax(dim=-1, keepdim=True).detach()
    ordered, _ = torch.sort(shifted, dim=-1, descending=True)
    counts = torch.arange(1, scores.shape[-1] + 1, device=scores.device, dtype=scores.dtype)
    taus = (ordered.cumsum(dim=-1) - 1) / counts
    support = (taus < ordered).sum(dim=-1, keepdim=True)
    tau = taus.gather(-1, support - 1)
    return torch.relu(shifted - tau)


def entmax15(scores: Tensor) -> Tensor:
    """1.5-entmax (Peters, Niculae and Martins 2019, algorithm 2), exact, by sorting.

    With x = scores / 2 the result is ``max(x - tau, 0)^2``, and tau solves ``sum = 1`` in closed form on each
    candidate support. The square root is taken of the chosen candidate only: those that are not chosen may have
    a zero there, whose derivative is infinite and would turn the gradient into NaN.

    Args:
        scores: ``(..., N)``.

    Returns:
        ``(..., N)``, sums to 1, with exact zeros (fewer than sparsemax).
    """
    halves = (scores - scores.amax(dim=-1, keepdim=True).detach()) / 2
    ordered, _ = torch.sort(halves, dim=-1, descending=True)
    counts = torch.arange(1, scores.shape[-1] + 1, device=scores.device, dtype=scores.dtype)
    means = ordered.cumsum(dim=-1) / counts
    spreads = counts * (ordered.square().cumsum(dim=-1) / counts - means.square())
    radicands = (1 - spreads) / counts
    with torch.no_grad():
        taus = means - radicands.clamp(min=0).sqrt()
        chosen = (taus <= ordered).sum(dim=-1, keepdim=True) - 1
    tau = means.gather(-1, chosen) - radicands.gather(-1, chosen).sqrt()
    return torch.relu(halves - tau).square()


def top_k(scores: Tensor, k: int) -> Tensor:
    """softmax over the k largest scores, exact zeros elsewhere; with k >= N it is softmax.

    Ties are broken by position, so that exactly k slots are kept. The choice itself has no gradient.
    """
    if k < 1:
        raise ValueError(f"top_k keeps at least one slot, not {k}")
    if k >= scores.shape[-1]:
        return softmax(scores)
    selected = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(k, dim=-1).indices, True)
    return softmax(scores.masked_fill(~selected, float("-inf")))


def relu_gates(scores: Tensor) -> Tensor:
    """max(a, 0): unnormalised, with exact zeros. No gradient where a <= 0, so it must start above 0."""
    return torch.relu(scores)


def abs_sigmoid(scores: Tensor) -> Tensor:
    """|2 sigmoid(a) - 1| = |tanh(a / 2)|: unnormalised, in [0, 1). Zero at a = 0, where it must not start."""
    return torch.tanh(scores / 2).abs()


UNNORMALISED = ("relu", "abs_sigmoid")
"""Maps whose gates need not sum to 1."""


def gate_map(name: str, k: int = 1) -> Callable[[Tensor], Tensor]:
    """The map of that name (``LiteralSettings.map``).

    Raises:
        ValueError: no such map.
    """
    maps: dict[str, Callable[[Tensor], Tensor]] = {
        "softmax": softmax,
        "sparsemax": sparsemax,
        "entmax15": entmax15,
        "relu": relu_gates,
        "abs_sigmoid": abs_sigmoid,
        "top_k": lambda scores: top_k(scores, k),
    }
    if name not in maps:
        raise ValueError(f"no map {name!r} from scores to gates; there are {', '.join(maps)}")
    return maps[name]


def relative_threshold(shares: Tensor, threshold: float) -> Tensor:
    """relu(p - threshold x max p), rescaled to sum 1: scale-free, and the largest share always survives.

    Args:
        shares: ``(..., N)``, non-negative with at least one positive in each row.
        threshold: lambda_g in [0, 1).
    """
    cut = torch.relu(shares - threshold * shares.amax(dim=-1, keepdim=True))
    return cut / cut.sum(dim=-1, keepdim=True)


def absolute_threshold(shares: Tensor, threshold: float) -> Tensor:
    """max(p - threshold, 0); what is missing to 1 belongs to the zero adapter. Never reaches 1 for a threshold > 0."""
    return torch.relu(shares - threshold)


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return values.mean()
    weights = mask.to(values.dtype).expand_as(values)
    return (values * weights).sum() / weights.sum().clamp(min=1)


def literal_l1(gates: Tensor, scores: Tensor) -> Tensor:
    """sum_{i>=0} g_i, as the paper writes it. After softmax it is 1 whatever the scores: **no gradient, no effect**."""
    return gates.abs().sum(dim=-1)


def non_zero_slot_l1(gates: Tensor, scores: Tensor) -> Tensor:
    """sum_{i>=1} g_i = 1 - g_0: moves mass to the zero adapter (the base model); chooses nothing among adapters."""
    return gates[..., 1:].abs().sum(dim=-1)


def old_only_l1(gates: Tensor, scores: Tensor) -> Tensor:
    """sum_{1<=i<n} g_i: favours the current adapter (and the zero adapter) over the earlier ones."""
    return gates[..., 1:-1].abs().sum(dim=-1)


def logits_l1(gates: Tensor, scores: Tensor) -> Tensor:
    """sum_{i>=0} |a_i|: draws all scores to 0 and so the gates to uniform, **the opposite of sparse**."""
    return scores.abs().sum(dim=-1)


def unnormalised_l1(gates: Tensor, scores: Tensor) -> Tensor:
    """sum_{i>=1} |g_i| of gates that need not sum to 1 (``relu``, ``abs_sigmoid``): truly sparse."""
    return gates[..., 1:].abs().sum(dim=-1)


PENALTIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "literal": literal_l1,
    "non_zero_slot": non_zero_slot_l1,
    "old_only": old_only_l1,
    "logits": logits_l1,
    "unnormalised": unnormalised_l1,
}
"""Readings of the L1 term on a selector's output, by the names of ``LiteralSettings.penalty``; ``recipe`` is below."""


def penalty(name: str, gates: Tensor, scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """One layer's L1 term, a mean over positions; the loss adds lambda x its sum over layers.

    Args:
        name: a key of ``PENALTIES``, or ``none``.
        gates: ``(B, S, N + 1)`` gates with the zero adapter in slot 0 (S is 1 for sequence-level gates).
        scores: ``(B, S, N + 1)`` what the gates were made of.
        mask: ``(B, S)`` or broadcastable to it, 1 where a position counts (not padding); ``None``: all count.

    Returns:
        Scalar.

    Raises:
        ValueError: no such reading.
    """
    if name == "none":
        return gates.new_zeros(())
    if name not in PENALTIES:
        raise ValueError(f"no L1 penalty {name!r} on gates; there are none, {', '.join(PENALTIES)}")
    return _mean(PENALTIES[name](gates, scores), mask)
