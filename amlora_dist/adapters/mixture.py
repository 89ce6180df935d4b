"""The mixture layer: a frozen linear layer and the LoRAs of all tasks as one wide LoRA.

Shapes in names: B batch, L tokens of a sequence, X = B x L tokens in a row, I and O in and out features, R ranks of
all adapters together, N adapters, T tasks.

``y = W0 x + sum_i g_i (alpha_i / r_i) B_i A_i x`` is computed as ``((x A_cat^T) * gate) B_cat^T`` with A and B of all
adapters concatenated: x is read once and y written once whatever N, and no tensor of tokens x adapters x features
exists. Exact, because a gate is one number per adapter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from amlora_dist.adapters.bank import Adapter, rows
from amlora_dist.adapters.call import current_call
from amlora_dist.adapters.targets import linear_sizes


@dataclass(slots=True)
class NewWeights:
    """What one mixture layer learns in a stage: ``a`` (rank, I), ``b`` (O, rank), ``recipe`` (earlier adapters,)."""

    a: Tensor
    b: Tensor
    scale: float
    recipe: Tensor | None
    learn_recipe: bool = True


class MixtureLinear(nn.Module):
    """A linear layer with a bank.

    Gates are per task and sequence, ``task_gate`` (B, T). Row t of G says how much task t uses each adapter
    (``bank.rows``), so the weight of adapter i is ``sum_t task_gate[b, t] G[t, i]``. While a stage is in progress
    T = old tasks + 1 and the last row is ``(recipe, 1)``: the recipe is learned here, the older rows are constants.

    Parameters: ``old_a`` (R_old, I) and ``old_b`` (O, R_old), frozen, so that ZeRO-3 shards them with the base model;
    ``new_a`` (r, I), ``new_b`` (O, r) and ``recipe`` (N_old,) while a stage is in progress. Every trainable parameter
    takes part in every call, whatever the gate: a gradient that exists on one rank only would hang a collective.

    Args:
        base: the frozen ``nn.Linear`` or transformers ``Conv1D``.
        path: path of ``base`` in the model; names its rows of the bank and itself in errors.
        adapters: the bank, in the order of its tasks; all have weights for ``path``.
        new: what the stage in progress learns; None outside of training.
        selector: the literal router's dense layers for this layer; then the gate is computed here, per token.
    """

    def __init__(
        self,
        base: nn.Module,
        path: str,
        adapters: list[Adapter],
        new: NewWeights | None = None,
        selector: nn.Module | None = None,
    ) -> None:
        super().__init__()
        sizes = linear_sizes(base)
        assert sizes is not None, f"{path}: {type(base).__name__} is not a linear layer"
        self.in_features, self.out_features = sizes
        self.base = base
        self.path = path
        self.selector = selector
        weight = next(base.parameters())
        dtype = weight.dtype if weight.dtype.is_floating_point else torch.get_default_dtype()
        place = {"device": weight.device, "dtype": dtype}

        self.old_ranks = [adapter.rank for adapter in adapters]
        self.old_a = self.old_b = self.new_a = self.new_b = self.recipe = None
        if adapters:
            wide_a = torch.cat([adapter.a[path] for adapter in adapters], dim=0).to(**place)
            wide_b = torch.cat([adapter.b[path] for adapter in adapters], dim=1).to(**place)
            self.old_a = nn.Parameter(wide_a, requires_grad=False)
            self.old_b = nn.Parameter(wide_b, requires_grad=False)
        if new is not None:
            self.new_a = nn.Parameter(new.a.to(**place))
            self.new_b = nn.Parameter(new.b.to(**place))
        self.new_scale = new.scale if new is not None else 1.0
        self._add_rows(adapters, new, weight.device)
        if new is not None and new.recipe is not None and new.learn_recipe and adapters:
            self.recipe = nn.Parameter(new.recipe.to(device=weight.device, dtype=torch.float32))

    def _add_rows(self, adapters: list[Adapter], new: NewWeights | None, device: torch.device) -> None:
        """The constants of the gate: ``spread`` (N_old, R_old) gives each rank column its adapter's scale, and
        ``mix`` (T, R_old) the rows of the old tasks, spread. Kept as the int32 bits of fp32 numbers, because
        ``module.bfloat16()`` (DeepSpeed calls it) rounds every floating buffer."""
        count, ranks = len(adapters), sum(self.old_ranks)
        spread = torch.zeros(count, ranks)
        start = 0
        for i, adapter in enumerate(adapters):
            spread[i, start : start + adapter.rank] = adapter.scale
            start += adapter.rank
        mix = rows(adapters, self.path) @ spread if adapters else torch.zeros(0, 0)
        if new is not None and new.recipe is not None and not new.learn_recipe:
            mix = torch.cat([mix, (new.recipe.float().cpu() @ spread)[None]])
        elif new is not None and (new.recipe is None or not adapters):
            mix = torch.cat([mix, torch.zeros(1, ranks)])
        self.register_buffer("spread_bits", spread.view(torch.int32).to(device), persistent=False)
        self.register_buffer("mix_bits", mix.view(torch.int32).to(device), persistent=False)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        new = self.new_a is not None
        return f"adapters={len(self.old_ranks) + new}, old_ranks={self.old_ranks}, learning={new}"

    def rank_gates(self, task_gate_BT: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Gate times scale of every rank column, fp32: (B, R_old) of the old adapters, (B, 1) of the new one."""
        old = new = None
        if self.old_a is not None:
            mix_TR = self.mix_bits.view(torch.float32)
            if self.recipe is not None:
                row_R = self.recipe.float() @ self.spread_bits.view(torch.float32)
                mix_TR = torch.cat([mix_TR, row_R[None]])
            old = task_gate_BT @ mix_TR
        if self.new_a is not None:
            new = task_gate_BT[:, -1:] * self.new_scale
        return old, new

    def forward(self, x: Tensor, task_gate: Tensor | None = None) -> Tensor:
        """The base layer's output plus the gated adapters'.

        Args:
            x: (B, ..., I).
            task_gate: (B, T) or (1, T) fp32, constant over the tokens of a sequence; default: that of the current
                call of the model.

        Returns:
            (B, ..., O).
        """
        if task_gate is None:
            call = current_call(self.path)
            if call.bypass:
                return self.base(x)
            task_gate = call.gate()
        old_gate, new_gate = self.rank_gates(task_gate)
        # TODO(fast)
        y = self.base(x)
        if old_gate is not None:
            z = F.linear(x, self.old_a.to(x.dtype))
            z = (z * _along(old_gate, z)).to(x.dtype)
            y = y + F.linear(z, self.old_b.to(x.dtype))
        if new_gate is not None:
            z = F.linear(x, self.new_a.to(x.dtype))
            z = (z * _along(new_gate, z)).to(x.dtype)
            y = y + F.linear(z, self.new_b.to(x.dtype))
        return y


def _along(gate_BR: Tensor, z: Tensor) -> Tensor:
    """``gate_BR`` with axes of size 1 for the token axes of ``z`` (B, ..., R)."""
    return gate_BR.view(gate_BR.shape[0], *([1] * (z.dim() - 2)), gate_BR.shape[1])
