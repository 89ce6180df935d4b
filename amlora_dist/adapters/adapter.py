"""One adapter in memory: the LoRA of a stage with its recipe, and rows of the mixture made of a list of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from amlora_dist.digests import tensors_digest


@dataclass(slots=True)
class Adapter:
    """The LoRA of one stage, and its recipe.

    ``a[m]`` is (rank, d_in) and ``b[m]`` (d_out, rank) for each adapted module path ``m``; ``recipe[m]`` holds, in
    fp32, the weights of the earlier adapters for this task, shape (earlier adapters,). Row t of the mixture is
    ``(*recipe, 1)`` (docs/method.md).
    """

    task: str
    rank: int
    alpha: float
    a: dict[str, Tensor]
    b: dict[str, Tensor]
    recipe: dict[str, Tensor] = field(default_factory=dict)
    selector: dict[str, Tensor] = field(default_factory=dict)
    """Dense layers of the selectors, by ``<module path>.weight`` and ``.bias``; empty without them."""
    refitted: dict[str, Tensor] = field(default_factory=dict)
    """Rows of the earlier tasks as this adapter's stage left them (``training.recipe_refit``), fp32 of shape (earlier
    tasks, earlier adapters + 1): they may lean on adapters that came after them. Empty where the earlier rows stay."""

    @property
    def scale(self) -> float:
        """LoRA's alpha / r."""
        return self.alpha / self.rank

    def tensors(self) -> dict[str, Tensor]:
        """Everything training produced, by name: ``a.<module>``, ``b.<module>``, ``recipe.<module>``,
        ``refitted.<module>``, ``selector.*``."""
        named = {f"a.{m}": t for m, t in self.a.items()} | {f"b.{m}": t for m, t in self.b.items()}
        named |= {f"recipe.{m}": t for m, t in self.recipe.items()}
        named |= {f"refitted.{m}": t for m, t in self.refitted.items()}
        return named | {f"selector.{name}": t for name, t in self.selector.items()}

    def digest(self) -> str:
        """sha256 over task, rank, alpha and all tensors."""
        return tensors_digest(self.tensors(), task=self.task, rank=self.rank, alpha=float(self.alpha))


def rows(adapters: list[Adapter], module: str) -> Tensor:
    """G of one module, shape (tasks, adapters), fp32: row t is ``(*recipe of t, 1, 0, ...)``, or what the last refit has
    made of it."""
    count = len(adapters)
    out = torch.zeros(count, count)
    for t, adapter in enumerate(adapters):
        refitted = adapter.refitted.get(module)
        if refitted is not None and t:
            out[:t, : t + 1] = refitted.float()
        out[t, t] = 1.0
        weights = adapter.recipe.get(module)
        if weights is not None and t:
            out[t, :t] = weights.float()
    return out


def tasks_using(adapters: Sequence[Adapter], place: int) -> list[int]:
    """Tasks (0-based) whose row of the bank has weight on the adapter at ``place``, in any module: itself, then others."""
    bank = list(adapters)
    used_T = torch.stack([rows(bank, module)[:, place] != 0 for module in adapters[0].a]).any(dim=0)
    return [place, *(t for t in used_T.nonzero().flatten().tolist() if t != place)]


def recipe_zeros(adapter: Adapter) -> float | None:
    """Share of a recipe's weights that are exactly 0, which is where L1 has reached; None where there is no recipe."""
    if not adapter.recipe or not any(weights.numel() for weights in adapter.recipe.values()):
        return None
    return torch.stack([weights == 0 for weights in adapter.recipe.values()]).double().mean().item()


def recipe_summary(adapter: Adapter, earlier: Sequence[str]) -> dict[str, Any] | None:
    """A recipe in a few numbers, for reports; None where there is none.

    Args:
        adapter: of the newest task.
        earlier: tasks of the adapters below it, in order.

    Returns:
        ``weights``: mean absolute weight over modules of each earlier adapter, by task; ``zeros``: share of all weights
        that are exactly 0.
    """
    if not adapter.recipe or not earlier:
        return None
    weights_MN = torch.stack([weights.float() for weights in adapter.recipe.values()])
    return {
        "weights": dict(zip(earlier, weights_MN.abs().mean(dim=0).tolist(), strict=True)),
        "zeros": recipe_zeros(adapter),
    }
