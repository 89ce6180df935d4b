"""The mixture layer: a frozen linear layer and the LoRAs of all tasks as one wide LoRA.

Shapes in names: B sequences, S tokens of a sequence, X = B x S tokens in a row, I and O in and out features, R ranks of
adapters side by side, N adapters, T tasks.

``y = W0 x + sum_i g_i (alpha_i / r_i) B_i A_i x`` is computed as ``((x A^T) * gate) B^T`` with A and B of all adapters
side by side: x is read and y written once however many adapters there are, and no tensor of tokens x adapters x
features exists. Exact, because a gate is one number per adapter.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amlora_dist.adapters.adapter import Adapter, rows
from amlora_dist.adapters.dropout import DropoutKeys, dropped, layer_key
from amlora_dist.adapters.gate_context import CachedGate, current_call
from amlora_dist.adapters.gated_linear import GatedLinear, gated_linear
from amlora_dist.adapters.packed_rows import PackedRows
from amlora_dist.adapters.targets import linear_sizes
from amlora_dist.errors import UserError

Gather = Callable[[list[nn.Parameter]], AbstractContextManager[Any]]
"""Makes parameters whole, inside."""


@dataclass(slots=True)
class NewWeights:
    """What one mixture layer learns in a stage: ``a`` (rank, I), ``b`` (O, rank), ``recipe`` (earlier adapters,)."""

    a: Tensor
    b: Tensor
    scale: float
    recipe: Tensor | None
    learn_recipe: bool = True


def _reach(row_N: Tensor, ranks: list[int]) -> tuple[int, int]:
    """First rank column of the first adapter that a row of G uses, and the end of the last one's."""
    ends = list(itertools.accumulate(ranks))
    used = row_N.nonzero().flatten().tolist()
    return (ends[used[0]] - ranks[used[0]], ends[used[-1]]) if used else (0, 0)


class MixtureLinear(nn.Module):
    """A linear layer with a bank.

    Gates are per task and sequence, ``task_gate`` (B, T). Row t of G says how much task t uses each adapter
    (``bank.rows``), so the weight of adapter i is ``sum_t task_gate[b, t] G[t, i]``. While a stage is in progress
    T = old tasks + 1 and the last row is ``(recipe, 1)``: the recipe is learned here, the older rows are constants.

    Parameters: ``old_a`` (R_old, I) and ``old_b`` (O, R_old), frozen, so that ZeRO-3 shards them with the base model;
    ``new_a`` (r, I), ``new_b`` (O, r) and ``recipe`` (N_old,) while a stage is in progress. Every trainable parameter
    takes part in every call, whatever the gate: a gradient that exists on one rank only would hang a collective.

    Args:
        base: the frozen ``nn.Linear`` (quantised ones of bitsandbytes are some) or transformers ``Conv1D``.
        path: path of ``base`` in the model; names its rows of the bank, and itself in errors.
        adapters: the bank, in the order of its tasks; all have weights for ``path``.
        new: what the stage in progress learns; None outside of training.
    """

    spread_bits: Tensor
    mix_bits: Tensor

    def __init__(
        self,
        base: nn.Module,
        path: str,
        adapters: list[Adapter],
        new: NewWeights | None = None,
    ) -> None:
        super().__init__()
        sizes = self.sizes(base)
        if sizes is None:
            raise TypeError(f"{path}: {type(base).__name__} is not a layer that {type(self).__name__} can adapt")
        self.in_features, self.out_features = sizes
        self.base = base
        self.path = path
        self.dropout = 0.0
        """Share of the new adapter's input that is dropped where a call says so."""
        self._dropout_key = layer_key(path)
        self.flat_input = False
        """Whether the model hands this layer the tokens of all sequences in one row, sequence after sequence."""
        self.disabled: int | None = None
        """Adapter that adds nothing, whatever weighs it (``Mixture.disable_adapter``)."""
        self.tried: Tensor | None = None
        """A row (N,), with gradient or not, that every input has instead of its gate (``Mixture.try_row``)."""
        weight = next(base.parameters())
        # A quantised layer says in what it computes.
        computes = getattr(base, "compute_dtype", None) or torch.get_default_dtype()
        device, dtype = weight.device, weight.dtype if weight.is_floating_point() else computes

        self.old_a: nn.Parameter | None = None
        self.old_b: nn.Parameter | None = None
        self.new_a: nn.Parameter | None = None
        self.new_b: nn.Parameter | None = None
        self.recipe: nn.Parameter | None = None
        if adapters:
            wide_a = torch.cat([adapter.a[path] for adapter in adapters], dim=0)
            wide_b = torch.cat([adapter.b[path] for adapter in adapters], dim=1)
            self.old_a = nn.Parameter(wide_a.to(device, dtype), requires_grad=False)
            self.old_b = nn.Parameter(wide_b.to(device, dtype), requires_grad=False)
        if new is not None:
            self.new_a = nn.Parameter(new.a.to(device, dtype))
            self.new_b = nn.Parameter(new.b.to(device, dtype))
            if adapters and new.recipe is not None and new.learn_recipe:
                # Like A and B: ZeRO-3 wants one dtype for all that is trained, and the engine keeps the master in fp32.
                self.recipe = nn.Parameter(new.recipe.to(device, dtype))
        self._add_constants(adapters, new, device)

    @staticmethod
    def sizes(base: nn.Module) -> tuple[int, int] | None:
        """(in features, out features); None for what this cannot adapt."""
        return linear_sizes(base)

    def _add_constants(self, adapters: list[Adapter], new: NewWeights | None, device: torch.device) -> None:
        """``spread`` (N, R) has each adapter's scale in its rank columns; ``mix`` (T, R) is G of the constant rows,
        spread. Both are kept as the int32 bits of fp32 numbers, because ``module.bfloat16()``, which DeepSpeed calls,
        would round floating buffers; a view reads them without a copy."""
        scales = [(adapter.rank, adapter.scale) for adapter in adapters]
        if new is not None:
            scales.append((new.a.shape[0], new.scale))
        spread = torch.block_diag(*(torch.full((1, rank), scale) for rank, scale in scales))
        gates = torch.eye(len(scales))
        gates[: len(adapters), : len(adapters)] = rows(adapters, self.path)
        if new is not None and new.recipe is not None:
            gates[-1, :-1] = new.recipe.float()
        self.register_buffer("spread_bits", spread.to(device).view(torch.int32), persistent=False)
        self._ranks = [rank for rank, _ in scales]
        self.set_rows(gates)

    def set_rows(self, rows_TN: Tensor) -> None:
        """Take other constant rows of G; a last row that is learned stays as it is. Between calls."""
        self._reach = [_reach(row, self._ranks) for row in rows_TN]
        if self.recipe is not None:
            rows_TN = rows_TN[:-1]  # the last row is learned
        mix_TR = rows_TN.to(self.spread) @ self.spread
        self.register_buffer("mix_bits", mix_TR.view(torch.int32), persistent=False)

    @property
    def spread(self) -> Tensor:
        """(N, R) fp32: alpha_i / r_i in adapter i's rank columns, 0 elsewhere."""
        return self.spread_bits.view(torch.float32)

    @property
    def weight(self) -> Tensor:
        """The base layer's, for models that look at it from outside (T5 reads the dtype of ``wo.weight``)."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    def more_trainable(self) -> dict[str, nn.Parameter]:
        """What a stage learns in this layer besides A, B and the recipe, by name."""
        return {}

    def more_tensors(self, gather: Gather | None = None) -> dict[str, Tensor]:
        """What of it goes into the adapter, CPU copies; ``gather`` makes parameters whole (ZeRO-3), one by one."""
        return {}

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"adapters={self.spread_bits.shape[0]}, ranks={self.spread_bits.shape[1]}, path={self.path!r}"

    def rank_gates(self, task_gate_BT: Tensor) -> Tensor:
        """Gate times scale of every rank column, (B, R) fp32."""
        if self.tried is not None:
            return self._masked((self.tried.to(self.spread) @ self.spread).expand(len(task_gate_BT), -1))
        mix_TR = self.mix_bits.view(torch.float32)
        if self.recipe is not None:
            own_N = F.pad(self.recipe.float(), (0, 1), value=1.0)
            mix_TR = torch.cat([mix_TR, (own_N @ self.spread)[None]])
        return self._masked(task_gate_BT.to(mix_TR.device) @ mix_TR)

    def _masked(self, gate_R: Tensor) -> Tensor:
        """Gates of rank columns (..., R), 0 in those of a disabled adapter."""
        return gate_R if self.disabled is None else gate_R * (self.spread[self.disabled] == 0)

    def forward(self, x: Tensor, task_gate: Tensor | None = None) -> Tensor:
        """The base layer's output plus the gated adapters'.

        Args:
            x: (B, ..., I).
            task_gate: (B, T) or (1, T), fp32, one for all tokens of a sequence; default: the gate of the current call
                of the model.

        Returns:
            (B, ..., O).

        Raises:
            UserError: outside of a call of the model and without ``task_gate``, or for an input without batch axis.
        """
        call = None
        if task_gate is None:
            call = current_call(self.path)
            if call.options.bypass:
                return self._base(x)
            task_gate = call.gate()
            if call.options.packed is not None and task_gate.shape[0] > 1:
                return self._packed(x, call.options.packed, task_gate, call.options.dropout)
        if flat := self.flat_input and x.dim() == 2 and task_gate.shape[0] > 1:
            x = x.view(task_gate.shape[0], -1, self.in_features)
        if task_gate.shape[0] not in (1, x.shape[0]):
            raise UserError(
                f"{self.path}: the call has {task_gate.shape[0]} gates, this layer an input of shape {tuple(x.shape)}: "
                "its first axis is not the batch, so it cannot be a target"
            )
        if call is not None and call.cached_gate is not None and self._can_keep(x):
            y = self._with_cached_gate(x, call.cached_gate)
        else:
            keys = call.options.dropout if call is not None and self.dropout else None
            gate_BR = self.rank_gates(task_gate)
            y = self._fused(x, gate_BR) if keys is None and self._can_fuse(x) else self._unfused(x, gate_BR, keys)
        return y.flatten(0, 1) if flat else y

    def _packed(self, x: Tensor, packed: PackedRows, task_gate: Tensor, keys: DropoutKeys | None) -> Tensor:
        """For sequences that hold several rows with gates of their own: every token is weighed by itself."""
        x_XI = x.reshape(-1, self.in_features)
        if len(x_XI) != packed.tokens or task_gate.shape[0] != packed.count:
            raise UserError(
                f"{self.path}: found {task_gate.shape[0]} gates and an input of shape {tuple(x.shape)} in a call with"
                f" {packed.count} packed rows and {packed.tokens} tokens; it cannot be a target with training.packing"
            )
        gate_XR, keys = packed.of_tokens(self.rank_gates(task_gate)), keys if self.dropout else None
        y_XO = self._fused(x_XI, gate_XR) if keys is None and self._can_fuse(x) else self._unfused(x_XI, gate_XR, keys)
        return y_XO.view(*x.shape[:-1], self.out_features)

    def _base(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        return y

    def _can_fuse(self, x: Tensor) -> bool:
        """Whether the base layer is nothing but a frozen matrix, so that its product can be part of ours. Not so with
        hooks (ZeRO-3 gathers its weight in one) or a forward of its own (accelerate's offloading), in other classes
        (quantised, Conv1D), or in mixed precision."""
        base = self.base
        return (
            type(base) is nn.Linear
            and not (base._forward_pre_hooks or base._forward_hooks or base._backward_hooks or base._backward_pre_hooks)
            and "forward" not in vars(base)
            and not base.weight.requires_grad
            and x.dtype == base.weight.dtype
            and not torch.compiler.is_compiling()
            and not torch.is_autocast_enabled(x.device.type)
        )

    def _can_keep(self, x: Tensor) -> bool:
        """Whether the adapters that a gate does not reach can be left out: nothing trains, nobody shards them (ZeRO-3)."""
        old = self.old_a
        return (
            old is not None
            and self.new_a is None
            and not torch.is_grad_enabled()
            and not hasattr(old, "ds_id")
            and old.dtype == x.dtype
            and self._can_fuse(x)
        )

    def _with_cached_gate(self, x: Tensor, cached: CachedGate) -> Tensor:
        """With the rank columns that ``cached`` reaches, from the first to the last: the others have gate 0."""
        assert isinstance(self.base, nn.Linear) and self.old_a is not None and self.old_b is not None
        found = cached.layers.get(self)
        if found is None or found[0] != self.disabled:
            reached = [self._reach[task] for task in cached.tasks()]
            begin, end = min((r[0] for r in reached), default=0), max((r[1] for r in reached), default=0)
            gate_BR = self.rank_gates(cached.task_gate)[:, begin:end].expand(x.shape[0], -1).contiguous()
            parts = [(self.old_a[begin:end], self.old_b[:, begin:end])] if end > begin else []
            found = cached.layers[self] = (self.disabled, gate_BR, parts)
        _, gate_BR, parts = found
        y_XO = gated_linear(x.reshape(-1, self.in_features), gate_BR, self.base.weight, self.base.bias, parts)
        return y_XO.view(*x.shape[:-1], self.out_features)

    def _fused(self, x: Tensor, gate_BR: Tensor) -> Tensor:
        assert isinstance(self.base, nn.Linear)
        weight, bias = self.base.weight, self.base.bias
        x_XI = x.reshape(-1, self.in_features)
        gate_BR = gate_BR.expand(x.shape[0], -1)
        old_a, old_b, new_a, new_b = (
            None if w is None else w.to(x.dtype) for w in (self.old_a, self.old_b, self.new_a, self.new_b)
        )
        if torch.is_grad_enabled():
            y_XO: Tensor = GatedLinear.apply(x_XI, gate_BR, weight, bias, old_a, old_b, new_a, new_b)
        else:
            parts = [(a, b) for a, b in ((old_a, old_b), (new_a, new_b)) if a is not None and b is not None]
            y_XO = gated_linear(x_XI, gate_BR, weight, bias, parts)
        return y_XO.view(*x.shape[:-1], self.out_features)

    def _unfused(self, x: Tensor, gate_BR: Tensor, keys: DropoutKeys | None = None) -> Tensor:
        """The same in plain operations, with the base layer called as the module it is; with ``keys`` the new adapter
        reads ``x`` with parts dropped."""
        y = self._base(x)
        gate = gate_BR.view(-1, *[1] * (x.dim() - 2), gate_BR.shape[1])
        start = 0
        for a, b in ((self.old_a, self.old_b), (self.new_a, self.new_b)):
            if a is not None and b is not None:
                z = F.linear(self._read_by(a, x, keys), a.to(x.dtype))
                end = start + z.shape[-1]
                y = y + F.linear((z * gate[..., start:end]).to(x.dtype), b.to(x.dtype))
                start = end
        return y

    def _read_by(self, a_RI: Tensor, x: Tensor, keys: DropoutKeys | None) -> Tensor:
        """What old or new adapters read of ``x``."""
        return x if keys is None or a_RI is not self.new_a else dropped(x, keys, self._dropout_key, self.dropout)
