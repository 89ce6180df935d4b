"""How the gate travels: with the call of the model, its KV cache and its encoder outputs, never in a module.

A call of the model enters a ``ForwardContext`` into a ``ContextVar``; mixture layers read it there. Threads have contexts
of their own, nested calls restore the outer one, and recomputation under gradient checkpointing enters the call that it
recomputes. Between calls the gate stays with what the caller holds: the KV cache, or the encoder outputs.

Shapes in names: B batch, L tokens, D hidden size, T tasks.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache

from amlora_dist.errors import UserError

if TYPE_CHECKING:
    from amlora_dist.adapters.dropout import DropoutKeys
    from amlora_dist.adapters.packed_rows import PackedRows

OnSelect = Callable[[str, "Selection"], None]
"""Receives the path of a mixture layer and what its selector chose, once per layer and call."""
OnRoute = Callable[[Tensor | None, Tensor | None], None]
"""Receives features (B, D) and task gate (B, T) of a call, once per routing."""


@dataclass(frozen=True, slots=True)
class Selection:
    """What a selector says of one call; S is 1 where the gate is one for the whole sequence.

    Args:
        gates: (B, S, N + 1), fp32, zero adapter in slot 0: what the penalties read.
        weights: (B, S, N), what the adapters' outputs are multiplied with: the gates without slot 0, and with 1 added
            to the current adapter's while it is learned if ``residual`` is set.
        scores: (B, S, N + 1), a_i after phi and before any prior: what the penalty ``logits`` reads.
        pooled: (B, N), w_i . u_i averaged over the prompt's tokens, for sequence-level gates, else ``None``. A KV cache
            must carry it (and reorder, repeat, select it with its rows) and hand it to the next call.
    """

    gates: Tensor
    weights: Tensor
    scores: Tensor
    pooled: Tensor | None


class FeaturesReady(Exception):  # noqa: N818  (a signal that ends a forward pass early, not an error)
    """Raised inside the transformer once the features are pooled, by a call that wants nothing else."""


@dataclass(slots=True, eq=False)
class CachedGate:
    """A gate (B, T) that stays from call to call, and what each mixture layer has made of it: which part of the bank it
    reaches and with which weights need not be found out again for every token. Copies begin empty."""

    task_gate: Tensor
    layers: dict[object, Any] = field(default_factory=dict)
    _tasks: tuple[int, ...] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> CachedGate:
        return CachedGate(copy.deepcopy(self.task_gate, memo))

    def tasks(self) -> tuple[int, ...]:
        """Tasks that any row weighs; all of them on an accelerator, which would have to be waited for, and which does not
        mind a few more columns."""
        if self._tasks is None:
            weighed = (self.task_gate != 0).any(dim=0).tolist() if self.task_gate.device.type == "cpu" else None
            count = self.task_gate.shape[1]
            self._tasks = tuple(task for task in range(count) if weighed is None or weighed[task])
        return self._tasks


@dataclass(slots=True)
class CacheState:
    """What a KV cache carries for its rows: the task gate (B, T), and sequence-level selectors' pools (B, N);
    ``cached_gate`` once the gate was used for more than its prompt."""

    task_gate: Tensor | None
    pooled: dict[str, Tensor]
    cached_gate: CachedGate | None = None

    def rows(self, pick: Callable[[Tensor], Tensor]) -> CacheState:
        """The same for other rows."""
        gate = None if self.task_gate is None else pick(self.task_gate)
        return CacheState(gate, {path: pick(tensor) for path, tensor in self.pooled.items()})


@dataclass(slots=True, eq=False)
class FeatureReader:
    """How a call finds its features, and by them its gate, while its pass goes on.

    ``depths``: features are the pooled states that enter these layers, side by side, (B, F). ``stop`` ends the pass at the
    last of them, the routing layer.
    """

    depths: tuple[int, ...]
    skip_tokens: int
    gates_of: Callable[[Tensor], Tensor | None] | None = None
    on_route: OnRoute | None = None
    stop: bool = False
    at_depth: dict[int, Tensor] = field(default_factory=dict)
    features: Tensor | None = None


@dataclass(slots=True, eq=False)
class TrunkStates:
    """``states`` (B, L, D): what the layers below the first adapted one need not compute again. With ``captures`` the pass
    ends where they end, and leaves it there (``adapters.trunk``)."""

    states: Tensor | None = None
    captures: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class LayerOptions:
    """What a call asks of the layers.

    ``bypass`` makes mixture layers plain linear layers; ``select`` lets the layers' own selectors gate them, with the task
    gate, if there is one, as prior; ``on_select`` gets what they chose. ``dropout``: the new adapter's layers drop parts of
    their inputs. ``packed``: sequences hold several rows each (B rows then, and the mask (B, L) of each by itself);
    ``logits_at`` the tokens among all of them that the output layer reads.
    """

    bypass: bool = False
    select: bool = False
    on_select: OnSelect | None = None
    dropout: DropoutKeys | None = None
    packed: PackedRows | None = None
    logits_at: Tensor | None = None


@dataclass(slots=True, eq=False)
class ForwardContext:
    """One call of the model: the gate, or what it takes to compute it when the routing layer is reached.

    ``owner``: whose call it is. ``mask`` (B, L): the prompt's tokens. ``cache_state`` came with the KV cache; ``left`` is
    what layers leave for the calls that go on from this one, by module path: it travels with the cache.
    """

    owner: object
    task_gate: Tensor | None = None
    mask: Tensor | None = None
    reader: FeatureReader | None = None
    trunk: TrunkStates | None = None
    options: LayerOptions = field(default_factory=LayerOptions)
    cache_state: CacheState = field(default_factory=lambda: CacheState(None, {}))
    left: dict[str, Tensor] = field(default_factory=dict)

    @property
    def features(self) -> Tensor | None:
        """(B, F), once they are known."""
        return None if self.reader is None else self.reader.features

    @property
    def cached_gate(self) -> CachedGate | None:
        """The gate came with a KV cache, which will bring it again."""
        return self.cache_state.cached_gate

    def gate(self) -> Tensor:
        """The task gate (B, T), fp32.

        Raises:
            UserError: if a mixture layer runs before the gate exists.
        """
        if self.task_gate is None:
            raise UserError("a mixture layer ran before the routing layer: adapted layers must lie above it")
        return self.task_gate

    def see(self, depth: int, hidden_BLD: Tensor) -> None:
        """Called with the hidden states that enter one of the layers that are read: pools the features and, at the last
        of them, computes the gate."""
        reader = self.reader
        if reader is None or reader.features is not None:
            return
        if self.trunk is not None and not self.trunk.captures and len(reader.depths) > 1:
            raise UserError("a pass that brings the states of the lower layers cannot be routed: give it task_gate")
        with torch.no_grad():
            if self.options.packed is not None:
                hidden_BLD = self.options.packed.unpack(hidden_BLD)
            reader.at_depth[depth] = pool_features(hidden_BLD, self.mask, reader.skip_tokens)
            if depth != reader.depths[-1]:
                return
            features = torch.cat([reader.at_depth[one] for one in reader.depths], dim=-1)
        if reader.stop:
            reader.features = features
            raise FeaturesReady
        self.receive(features)

    def receive(self, features_BD: Tensor) -> None:
        """Take the features and compute the gate from them, unless the call brought one."""
        reader = self.reader
        assert reader is not None, "who wants no features gets none"
        reader.features = features_BD
        with torch.no_grad():
            if self.task_gate is None and reader.gates_of is not None:
                self.task_gate = reader.gates_of(features_BD)
        if reader.on_route is not None:
            reader.on_route(features_BD, self.task_gate)

    def recomputed(self) -> ForwardContext:
        """The same, as it is now, for layers that are computed a second time."""
        reader = None if self.reader is None else replace(self.reader)
        return replace(self, reader=reader, options=replace(self.options, on_select=None))

    def pooling_mask(self, x_BSI: Tensor, *, start: bool) -> Tensor:
        """The tokens that a sequence-level selector averages over, (B, S) bool: the prompt, or the first alone."""
        batch, length = x_BSI.shape[:2]
        if start:
            return (torch.arange(length, device=x_BSI.device) == 0).expand(batch, length)
        if self.mask is None:
            return torch.ones(batch, length, dtype=torch.bool, device=x_BSI.device)
        return _fit_mask(self.mask, x_BSI)


_CALL: ContextVar[ForwardContext | None] = ContextVar("amlora_call", default=None)


def active_call() -> ForwardContext | None:
    """The call that this thread is in, or None."""
    return _CALL.get()


def current_call(path: str) -> ForwardContext:
    """The call that this thread is in.

    Raises:
        UserError: outside of a call of the model.
    """
    call = _CALL.get()
    if call is None:
        raise UserError(
            f"{path}: a mixture layer ran outside of a call of its model, so it has no gate; "
            "call the model itself, not its inner modules, or pass task_gate to the layer"
        )
    return call


@contextlib.contextmanager
def entered(call: ForwardContext | None) -> Iterator[None]:
    """Make ``call`` the current one of this thread."""
    token = _CALL.set(call)
    try:
        yield
    finally:
        _CALL.reset(token)


class GateCheckpoint:
    """A model's gradient checkpointing function, whose recomputation runs in the call of its forward pass.

    Backward runs after the call has ended, on accelerators in another thread. Non-reentrant, because the reentrant
    kind has no contexts and no gradient for parameters of blocks whose input needs none.
    """

    def __init__(self, inner: Callable[..., Any]) -> None:
        self.inner = inner
        self.awake: Any = None
        """The layer, where it is in training mode only so that it is checkpointed: it runs as in evaluation."""

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """As ``torch.utils.checkpoint.checkpoint``."""
        call = _CALL.get()
        if self.awake is not None:
            self.awake.training, self.awake = False, None
        # Layers choose again when they are recomputed, but the collector has it already.
        again = None if call is None else call.recomputed()

        def contexts() -> tuple[Any, Any]:
            return contextlib.nullcontext(), entered(again)

        return self.inner(function, *args, **(kwargs | {"use_reentrant": False, "context_fn": contexts}))


def pool_features(hidden_BLD: Tensor, mask_BL: Tensor | None, skip_tokens: int) -> Tensor:
    """Mean hidden state of the prompt, (B, D) fp32.

    Pools the positions where ``mask_BL`` is set (None: all), without the first ``skip_tokens`` of them: a model parks
    attention on its first tokens. A prompt of no more than ``skip_tokens`` tokens pools them all, an empty one is 0.
    A mask shorter than the sequence leaves out what follows it (generated tokens).
    """
    if mask_BL is None:
        length = hidden_BLD.shape[1]
        read_BLD = hidden_BLD[:, skip_tokens if length > skip_tokens else 0 :]
        return read_BLD.float().mean(dim=1)
    mask_BL = _fit_mask(mask_BL, hidden_BLD)
    place = mask_BL.cumsum(dim=1)
    later_BL = mask_BL & (place > skip_tokens)
    long_enough = place[:, -1:] > skip_tokens
    use_BL = torch.where(long_enough, later_BL, mask_BL)
    # Filled, not multiplied by 0: what is at padding may be infinite.
    total_BD = hidden_BLD.float().masked_fill(~use_BL[..., None], 0.0).sum(dim=1)
    return total_BD / use_BL.sum(dim=1, keepdim=True).clamp(min=1)


def _fit_mask(mask_BL: Tensor, hidden_BLD: Tensor) -> Tensor:
    """``mask_BL`` as bool over the tokens of ``hidden_BLD``; what it does not cover follows the prompt."""
    batch, length = hidden_BLD.shape[:2]
    if mask_BL.dim() != 2 or mask_BL.shape[0] != batch or mask_BL.shape[1] > length:
        raise UserError(
            f"prompt_mask: found shape {tuple(mask_BL.shape)}, expected ({batch}, at most {length}) as the input tokens"
        )
    mask_BL = mask_BL.to(device=hidden_BLD.device, dtype=torch.bool)
    return F.pad(mask_BL, (0, length - mask_BL.shape[1])) if mask_BL.shape[1] < length else mask_BL


class GateCarrier:
    """Mixed into the class of a KV cache: the gate follows every operation on the cache's rows."""

    cache_state: CacheState | None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search picks rows."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._change(lambda tensor: tensor[beam_idx.to(tensor.device)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._change(lambda tensor: tensor[indices.to(tensor.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._change(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def reset(self) -> None:
        """An emptied cache serves another prompt, with another gate."""
        super().reset()  # type: ignore[misc]
        self.cache_state = None

    def _change(self, pick: Callable[[Tensor], Tensor]) -> None:
        if self.cache_state is not None:
            self.cache_state = self.cache_state.rows(pick)


_CARRIERS: dict[type, type] = {}


def _cache_class(kind: type) -> type:
    return _CARRIERS.setdefault(kind, type(f"Gated{kind.__name__}", (GateCarrier, kind), {}))


def set_cache_state(cache: Cache, cache_state: CacheState) -> None:
    """Let ``cache`` carry ``cache_state``. Changes the object's class, so that its copies carry it too."""
    if not isinstance(cache, GateCarrier):
        cache.__class__ = _cache_class(type(cache))
    cache.cache_state = cache_state


def cache_state_of(cache: object, *, required: bool = True) -> CacheState | None:
    """What a KV cache carries; None for an empty cache.

    Raises:
        UserError: if it is ``required`` and the cache holds tokens but no gate, which no call of this model leaves.
    """
    if isinstance(cache, GateCarrier) and cache.cache_state is not None:
        return cache.cache_state
    if cache is None or not required or (isinstance(cache, Cache) and int(cache.get_seq_length()) == 0):
        return None
    raise UserError(
        "past_key_values holds tokens but no gate: it was not filled by this model (or was rebuilt from its tensors); "
        "prefill it with this model, or pass task_gate"
    )
