"""The paper's attentional selector as it can be reconstructed, with every open point a switch (``LiteralSettings``).

For one adapted linear layer and adapters 1..n with outputs u_i = scale_i B_i z_i, z_i = A_i x::

    a_i = phi(w_i . u_i + bias_i)     a_0 = phi(bias_0)      (slot 0: the zero adapter, which adds nothing)
    g   = map(a_0, ..., a_n)

Folded into rank space: w_i . u_i = (scale_i B_i^T w_i) . z_i, so that no tensor of tokens x adapters x d_out exists.

Shapes: B inputs, S tokens, N adapters, R sum of their ranks, O d_out; slots are N + 1.
"""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amlora_dist.adapters.adapted_layers import AdaptedLayers
from amlora_dist.adapters.gate_context import Selection, current_call
from amlora_dist.adapters.gated_linear import concat
from amlora_dist.adapters.mixture import MixtureLinear
from amlora_dist.adapters.router import PRIOR_KEY
from amlora_dist.adapters.sparsity import UNNORMALISED, gate_map
from amlora_dist.digests import named_seed
from amlora_dist.errors import BankError, UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from transformers import PreTrainedModel

    from amlora_dist.adapters.adapter import Adapter
    from amlora_dist.adapters.mixture import Gather, NewWeights
    from amlora_dist.adapters.router import Router
    from amlora_dist.adapters.settings import LiteralSettings
    from amlora_dist.adapters.targets import Target

CROSS_ATTENTION = frozenset({"EncDecAttention", "encoder_attn"})
KEYS_VALUES = frozenset({"k", "v", "k_proj", "v_proj"})
PRIOR_FLOOR = 1e-12
"""Exact zeros of a prior are raised to this, so that the sorting maps see finite scores."""


class LiteralSelector(nn.Module):
    """One dense layer per adapter, on that adapter's own output, and the zero adapter's bias, for one adapted layer.

    Earlier adapters' dense layers and the current one's are separate parameters, so that each can be frozen or trained
    as a whole (ZeRO shards whole parameters). The zero adapter's bias belongs to no task and is trained in every stage.
    All arithmetic is fp32, whatever the parameters' dtype.

    Args:
        out_features: O.
        settings: the switches.
        state: ``weight`` (n, O) and ``bias`` (n + 1,) of the bank so far, slot 0 first; ``None`` for an empty bank.
        new: add a dense layer for an adapter in progress. Without, everything is frozen (serving).
        generator: draws the new dense layer (CPU), its own stream.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        BankError: a state whose shapes do not fit.
    """

    def __init__(
        self,
        out_features: int,
        settings: LiteralSettings,
        *,
        state: Mapping[str, Tensor] | None = None,
        new: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        weight, bias = _checked(state, out_features)
        if not (new or weight is not None):
            raise ValueError("a selector without adapters")
        self.settings = settings
        self.out_features = out_features
        self.old = 0 if weight is None else len(weight)
        self.adapters = self.old + int(new)
        start = _start_bias(settings)
        zero = torch.full((1,), start) if bias is None else bias[:1]
        retrain = new and not settings.freeze_old

        def parameter(values: Tensor, trained: bool) -> nn.Parameter:
            return nn.Parameter(values.detach().clone().to(device, dtype), requires_grad=trained)

        self.zero_bias = parameter(zero, new)
        self.old_weight = self.old_bias = self.new_weight = self.new_bias = None
        if weight is not None and bias is not None:
            self.old_weight, self.old_bias = parameter(weight, retrain), parameter(bias[1:], retrain)
        if new:
            # nn.Linear's own start, U(-1/sqrt(d), 1/sqrt(d)).
            drawn = torch.empty(1, out_features).uniform_(-1.0, 1.0, generator=generator) / out_features**0.5
            self.new_weight, self.new_bias = parameter(drawn, True), parameter(torch.full((1,), start), True)
        self._phi: Callable[[Tensor], Tensor] = _activation(settings.activation)
        self._map = gate_map(settings.map, settings.top_k)

    def forward(
        self,
        z_BSR: Tensor,
        b_OR: Tensor,
        scaled_expand_NR: Tensor,
        *,
        prompt_mask_BS: Tensor | None = None,
        pooled_BN: Tensor | None = None,
        prior_BN: Tensor | None = None,
    ) -> Selection:
        """Gates of one layer in one call.

        Args:
            z_BSR: x A^T of all adapters side by side, in the bank's order, the new one last.
            b_OR: their B side by side.
            scaled_expand_NR: row i holds alpha_i / r_i in adapter i's columns and 0 elsewhere.
            prompt_mask_BS: 1 on the prompt's tokens; sequence-level gates average over them (``None``: over all).
                In a decoder that is not its own prompt it must mark the start token alone: answers may not be pooled.
            pooled_BN: the ``Selection.pooled`` of the call that read the prompt; sequence-level gates then follow from
                it and the tokens at hand do not count.
            prior_BN: probabilities of the adapters, rows of sum at most 1. Their logarithms are added to the scores,
                as n/(n+1) of the mass with 1/(n+1) for the zero adapter, so that a uniform prior changes nothing; the
                gates of unnormalised maps are multiplied with them instead, in proportion to the uniform prior.

        Raises:
            ValueError: a mask or cached gate of another batch, or one given to token-level gates.
        """
        sequence = self.settings.granularity == "sequence"
        if not sequence and pooled_BN is not None:
            raise ValueError("token-level gates carry nothing between calls")
        weight_NO, bias_N = self._dense()
        if pooled_BN is None:
            key_NR = scaled_expand_NR.float() * (weight_NO @ b_OR.float())
            raw_BSN = z_BSR.float() @ key_NR.T
            pooled_BN = _pool(raw_BSN, prompt_mask_BS) if sequence else None
        elif len(pooled_BN) != len(z_BSR):
            raise ValueError(f"the cached gate has {len(pooled_BN)} rows, the call has {len(z_BSR)}")
        raw_BSN = raw_BSN if pooled_BN is None else pooled_BN.float()[:, None, :]
        zero_BS1 = self.zero_bias.float().expand(*raw_BSN.shape[:2], 1)
        scores = self._phi(torch.cat([zero_BS1, raw_BSN + bias_N], dim=-1))
        gates = self._gates(scores, prior_BN)
        weights = gates[..., 1:]
        if self.settings.residual and self.new_weight is not None:
            own = torch.zeros(self.adapters, device=weights.device)
            own[-1] = 1.0
            weights = weights + own
        return Selection(gates, weights, scores, pooled_BN)

    def _dense(self) -> tuple[Tensor, Tensor]:
        weights = [w.float() for w in (self.old_weight, self.new_weight) if w is not None]
        biases = [b.float() for b in (self.old_bias, self.new_bias) if b is not None]
        return torch.cat(weights), torch.cat(biases)

    def _gates(self, scores: Tensor, prior_BN: Tensor | None) -> Tensor:
        if prior_BN is None:
            return self._map(scores)
        prior = prior_BN.to(scores)[:, None, :]
        if self.settings.map in UNNORMALISED:
            gates = self._map(scores)
            return torch.cat([gates[..., :1], gates[..., 1:] * prior * self.adapters], dim=-1)
        ratio = (prior * self.adapters).clamp(min=PRIOR_FLOOR).log().expand(-1, scores.shape[1], -1)
        return self._map(torch.cat([scores[..., :1], scores[..., 1:] + ratio], dim=-1))

    def tensors(
        self, gather: Gather | None = None
    ) -> dict[str, Tensor]:
        """``weight`` (N, O) and ``bias`` (N + 1,) of the whole bank, CPU copies in fp32: ``state`` of the next stage.

        Earlier dense layers are among them because a stage may have retrained them: the last adapter's selector is the
        bank's.

        Args:
            gather: context manager that makes the given parameters whole (ZeRO-3), used one by one.
        """

        def copy(parameter: nn.Parameter) -> Tensor:
            with gather([parameter]) if gather else contextlib.nullcontext():
                return parameter.detach().to("cpu", torch.float32, copy=True)

        weights = [copy(w) for w in (self.old_weight, self.new_weight) if w is not None]
        biases = [copy(b) for b in (self.zero_bias, self.old_bias, self.new_bias) if b is not None]
        return {"weight": torch.cat(weights), "bias": torch.cat(biases)}


class SelectorLinear(MixtureLinear):
    """A mixture layer that makes its own gates, per token or sequence, by a ``LiteralSelector``.

    Args:
        settings: of the selector.
        pools_start: sequence-level gates pool the first token alone (a decoder behind an encoder reads answers).
        seed: draws the dense layer of an adapter in progress.

    Raises:
        UserError: the bank's last adapter has no selector for this layer.
    """

    def __init__(
        self,
        base: nn.Module,
        path: str,
        adapters: list[Adapter],
        new: NewWeights | None = None,
        *,
        settings: LiteralSettings,
        pools_start: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(base, path, adapters, new)
        state = None
        if adapters:
            # A stage may retrain the dense layers of earlier tasks: the last adapter's selector is the bank's.
            known = adapters[-1].selector
            if any(f"{path}.{name}" not in known for name in ("weight", "bias")):
                raise UserError(f"adapter {adapters[-1].task!r} has no selector for {path}: not a `literal` bank")
            state = {name: known[f"{path}.{name}"] for name in ("weight", "bias")}
        generator = None if new is None else torch.Generator().manual_seed(named_seed(seed, "selector", path))
        device = next(base.parameters()).device
        self.pools_start = pools_start
        self.selector = LiteralSelector(
            self.out_features, settings, state=state, new=new is not None, generator=generator, device=device
        )

    def more_trainable(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.selector.named_parameters() if parameter.requires_grad}

    def more_tensors(self, gather: Gather | None = None) -> dict[str, Tensor]:
        return self.selector.tensors(gather)

    def forward(self, x: Tensor, task_gate: Tensor | None = None) -> Tensor:
        """With gates from the selector, where the call says so; ``task_gate`` or the call's are prior probabilities."""
        call = current_call(self.path) if task_gate is None else None
        if call is not None and (call.options.bypass or not call.options.select):
            return super().forward(x)
        x_BSI = x.reshape(x.shape[0], -1, self.in_features)
        keys = call.options.dropout if call is not None and self.dropout else None
        if keys is None:
            z_BSR = F.linear(x_BSI, concat(self.old_a, self.new_a, 0).to(x.dtype))
        else:
            parts = [a for a in (self.old_a, self.new_a) if a is not None]
            z_BSR = torch.cat([F.linear(self._read_by(a, x_BSI, keys), a.to(x.dtype)) for a in parts], dim=-1)
        b_OR = concat(self.old_b, self.new_b, 1).to(x.dtype)
        prior_BN, mask_BS, pooled_BN = task_gate, None, None
        if call is not None:
            prior_BN = call.task_gate
            if self.selector.settings.granularity == "sequence":
                pooled_BN = call.cache_state.pooled.get(self.path)
                mask_BS = call.pooling_mask(x_BSI, start=self.pools_start) if pooled_BN is None else None
        selection = self.selector(
            z_BSR, b_OR, self.spread, prompt_mask_BS=mask_BS, pooled_BN=pooled_BN, prior_BN=prior_BN
        )
        if call is not None:
            if selection.pooled is not None:
                call.left[self.path] = selection.pooled
            if call.options.on_select is not None:
                call.options.on_select(self.path, selection)
        gate_BSR = self._masked(selection.weights @ self.spread)
        y = self._base(x)
        return y + F.linear((z_BSR * gate_BSR).to(x.dtype), b_OR).view(y.shape)


@dataclass(frozen=True, kw_only=True)
class Selectors(AdaptedLayers):
    """Linear layers with a selector each, ``SelectorLinear``."""

    settings: LiteralSettings

    selects: ClassVar[bool] = True
    several_depths: ClassVar[bool] = False

    @property
    def selectors_alone(self) -> bool:
        return self.settings.training == "two_stage"

    @property
    def has_prior(self) -> bool:
        return self.settings.prior

    def make(
        self, model: PreTrainedModel, target: Target, adapters: list[Adapter], new: NewWeights | None, seed: int
    ) -> MixtureLinear:
        return SelectorLinear(
            self._base(model, target), target.path, adapters, new,
            settings=self.settings, pools_start=_reads_answer(model, target), seed=seed,
        )  # fmt: skip

    def described(self, router: Router | None) -> tuple[str, dict[str, Any]]:
        prior = {} if router is None else {PRIOR_KEY: router.settings()}
        return "literal", asdict(self.settings) | prior


def _reads_answer(model: PreTrainedModel, target: Target) -> bool:
    """Whether the layer reads the decoder's tokens although the prompt is the encoder's: all of such a decoder but
    the keys and values of its cross-attention."""
    if not model.config.is_encoder_decoder or target.part == "encoder":
        return False
    *_, owner, name = target.path.split(".")
    return not (owner in CROSS_ATTENTION and name in KEYS_VALUES)


def mean_over_prompt(values_BSN: Tensor, mask_BS: Tensor) -> Tensor:
    """Mean over the prompt's tokens, (B, N); the decoder behind an encoder, and gates per sequence, have others."""
    if values_BSN.shape[1] != mask_BS.shape[1]:
        return values_BSN.mean(dim=1)
    mask_BS1 = mask_BS.to(values_BSN)[..., None]
    return (values_BSN * mask_BS1).sum(dim=1) / mask_BS1.sum(dim=1).clamp(min=1)


def _pool(raw_BSN: Tensor, mask_BS: Tensor | None) -> Tensor:
    if mask_BS is None:
        return raw_BSN.mean(dim=1)
    if mask_BS.shape != raw_BSN.shape[:2]:
        raise ValueError(f"prompt mask {tuple(mask_BS.shape)} for tokens {tuple(raw_BSN.shape[:2])}")
    mask_BS1 = mask_BS.to(raw_BSN)[..., None]
    return (raw_BSN * mask_BS1).sum(dim=1) / mask_BS1.sum(dim=1).clamp(min=1)


def _start_bias(settings: LiteralSettings) -> float:
    """0, the uniform gate; but 1 where 0 is a saddle (u_i = 0 and a gate of 0) or a dead ReLU, which never start."""
    return 1.0 if settings.map in UNNORMALISED or settings.activation == "relu" else 0.0


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    phis: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "relu": torch.relu, "identity": lambda a: a}
    return phis[name]


def _checked(state: Mapping[str, Tensor] | None, out_features: int) -> tuple[Tensor | None, Tensor | None]:
    if state is None:
        return None, None
    if set(state) != {"weight", "bias"}:
        raise BankError(f"selector: tensors {sorted(state)}, expected bias and weight")
    weight, bias = state["weight"], state["bias"]
    if weight.dim() != 2 or weight.shape[1] != out_features or bias.shape != (len(weight) + 1,) or not len(weight):
        raise BankError(
            f"selector: weight {tuple(weight.shape)} and bias {tuple(bias.shape)},"
            f" expected (n, {out_features}) and (n + 1,) for n adapters"
        )
    return weight, bias
