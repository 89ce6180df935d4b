"""The wrapped ``forward`` and ``generate`` of a model with a bank: they open the call and find its gate.

The gate of a call is, first come first served: the argument ``task_gate``; what the KV cache or the encoder outputs
carry; what the router makes of the features, pooled in the same pass from the input of the routing layer. If adapted
layers lie below the routing layer, a partial pass through the plain model up to that layer goes before
(``adapters.layers: all``; its cost is k layers of forward without gradient per routed call, decoding is not affected).

Shapes in names: B batch, T tasks, D hidden size.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from amlora_dist.adapters.gate_context import (
    CachedGate,
    CacheState,
    FeatureReader,
    FeaturesReady,
    ForwardContext,
    GateCheckpoint,
    LayerOptions,
    OnRoute,
    OnSelect,
    TrunkStates,
    active_call,
    cache_state_of,
    entered,
    set_cache_state,
)
from amlora_dist.errors import UserError

if TYPE_CHECKING:
    from amlora_dist.adapters.dropout import DropoutKeys
    from amlora_dist.adapters.packed_rows import PackedRows
    from amlora_dist.adapters.router import Router

GATE_KEY = "task_gate"
"""Under this key the gate travels in the encoder's outputs: ``generate`` expands it for beams with the rest."""
READ_INPUTS = ("input_ids", "attention_mask", "inputs_embeds", "position_ids", "token_type_ids")
EXTRA = ("prompt_mask", "task_gate", "on_route", "on_select", "trunk_states", "dropout_keys", "packed_rows", "logits_at")


@dataclass(slots=True, eq=False)
class Routing:
    """How one model finds its gates; changed between calls only.

    ``router`` None: every call brings its gate, or (``select``) the layers' own selectors make it. ``tasks``: length
    of a gate. ``partial_pass``: adapted layers lie below the routing layer. ``whole_passes``: never stop a pass early,
    for a model partitioned by ZeRO-3, where an aborted pass leaves parameters gathered. ``depths``: layers whose input
    states, pooled, are the features; rising. ``layers_read``: adapted layers
    read the features themselves, whatever gives the gate.
    """

    router: Router | None
    tasks: int
    skip_tokens: int
    partial_pass: bool
    select: bool
    depths: tuple[int, ...]
    whole_passes: bool = False
    layers_read: bool = False
    checkpointed: list[Any] = field(default_factory=list)

    @property
    def needs_features(self) -> bool:
        """Whether gates come from hidden states."""
        return self.router is not None and self.router.needs_features


class RoutedForward:
    """Replaces the ``forward`` of a model, or of its encoder (``encoder``).

    ``encoder_forward`` is the wrapped encoder of an encoder-decoder: features come from there.

    Takes eight arguments more: ``prompt_mask`` (B, tokens), 1 on prompt tokens, default the attention mask;
    ``task_gate`` (B, T) or (1, T); ``on_route``, called with (features, task gate) when the routing layer is reached,
    also if the call brings its gate; ``on_select``, called with (module path, selection) by selectors;
    ``trunk_states`` (B, tokens, D), what the layers below the first adapted one would come to (``adapters.trunk``);
    ``dropout_keys``: drop parts of what the new adapter reads (``adapters.dropout``); ``packed_rows``: sequences hold
    several rows each, whose gates and prompt masks the call brings, (B, T) or (1, T) and (B, L), with mask and positions to
    match (``adapters.packed_rows``); ``logits_at`` (N,): of all tokens those whose logits are wanted, (1, N, V).
    """

    def __init__(
        self, inner: Callable[..., Any], routing: Routing, *, encoder: bool = False,
        encoder_forward: RoutedForward | None = None,
    ) -> None:
        self.inner = inner
        self.routing = routing
        self.encoder = encoder
        self.encoder_forward = encoder_forward
        signature = inspect.signature(inner)
        self._names = list(signature.parameters)
        named = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        rest = [p for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]
        more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in EXTRA]
        self.__signature__ = signature.replace(parameters=[*named, *more, *rest])  # generate() reads it

    def __call__(
        self,
        *args: Any,
        prompt_mask: Tensor | None = None,
        task_gate: Tensor | None = None,
        on_route: OnRoute | None = None,
        on_select: OnSelect | None = None,
        trunk_states: Tensor | None = None,
        dropout_keys: DropoutKeys | None = None,
        packed_rows: PackedRows | None = None,
        logits_at: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The model's own forward, inside a call that has or finds its gate."""
        kwargs.update(zip(self._names, args, strict=False))
        call = active_call()
        if self.encoder and call is not None and call.owner is self.routing:
            return self._with_cache_state(self.inner(**kwargs), call)
        options = LayerOptions(False, self.routing.select, on_select, dropout_keys, packed_rows, logits_at)
        call = self._open(kwargs, prompt_mask, task_gate, on_route, options)
        if trunk_states is not None:
            call.trunk = TrunkStates(trunk_states)
        with entered(call), self._checkpointing(kwargs):
            output = self.inner(**kwargs)
        return self._with_cache_state(output, call, kwargs.get("past_key_values"))

    @contextlib.contextmanager
    def _checkpointing(self, kwargs: dict[str, Any]) -> Iterator[None]:
        """Where the model turned on gradient checkpointing, layers do so in a pass with gradient, and recomputation sees
        its call.

        transformers asks a layer whether it is in training mode. Ours are not: the base model is frozen, and has no
        dropout. So a layer says that it is until its own pass begins.
        """
        awake = []
        for module in self.routing.checkpointed:
            if not module.gradient_checkpointing:
                continue
            if not isinstance(module._gradient_checkpointing_func, GateCheckpoint):
                module._gradient_checkpointing_func = GateCheckpoint(module._gradient_checkpointing_func)
            learns = torch.is_grad_enabled() and kwargs.get("past_key_values") is None
            if learns and not module.training and isinstance(module, GradientCheckpointingLayer):
                module.training, module._gradient_checkpointing_func.awake = True, module
                awake.append(module)
        if awake and "use_cache" in self._names:
            kwargs["use_cache"] = False  # a layer that runs twice would write it twice
        try:
            yield
        finally:
            for module in awake:
                module.training, module._gradient_checkpointing_func.awake = False, None

    def _open(
        self, kwargs: dict[str, Any], prompt_mask: Tensor | None, task_gate: Tensor | None, on_route: OnRoute | None,
        options: LayerOptions,
    ) -> ForwardContext:  # fmt: skip
        routing, router, packed = self.routing, self.routing.router, options.packed
        batch = _batch(kwargs) if packed is None else packed.count
        if task_gate is not None:
            task_gate = self._checked(task_gate, batch)
            if packed is None:
                task_gate = task_gate.expand(batch, -1)  # of packed rows one gate for all serves their tokens as it is
        mask = self.prompt_mask(kwargs, prompt_mask)
        if mask is None and packed is not None:
            mask = packed.mask_BL
        call = ForwardContext(routing, task_gate, mask, options=options)
        cache_state = None if self.encoder else self._cache_state_of(kwargs, required=task_gate is None)
        if cache_state is not None:
            cached_gate = None
            if task_gate is None:
                call.task_gate = cache_state.task_gate
                if cache_state.task_gate is not None:
                    cached_gate = cache_state.cached_gate or CachedGate(cache_state.task_gate)
            call.cache_state = CacheState(call.task_gate, cache_state.pooled, cached_gate)
            return call
        gates_of = None
        if task_gate is None and router is not None:
            if router.needs_features:
                gates_of = partial(_gates_of, router)
            else:
                call.task_gate = router.gates(None, batch)
        elif task_gate is None and not routing.select:
            raise UserError("this model has no router: pass task_gate (batch, tasks) to the call")
        if gates_of is not None or on_route is not None or routing.layers_read:
            call.reader = FeatureReader(routing.depths, routing.skip_tokens, gates_of, on_route)
            if routing.partial_pass:
                call.receive(self.features(kwargs, mask, stop=not routing.whole_passes, packed=packed))
        return call

    def _checked(self, task_gate: Tensor, batch: int) -> Tensor:
        if task_gate.dim() != 2 or task_gate.shape[0] not in (1, batch) or task_gate.shape[1] != self.routing.tasks:
            raise UserError(
                f"task_gate: found shape {tuple(task_gate.shape)}, expected ({batch} or 1, {self.routing.tasks}): "
                "one row per sequence, one column per task"
            )
        return task_gate.float()

    def features(
        self, kwargs: dict[str, Any], mask: Tensor | None, *, stop: bool, packed: PackedRows | None = None
    ) -> Tensor:
        """Features (B, D) by a pass of the plain model, without gradient; ``stop``: it ends at the routing layer."""
        read = self.encoder_forward or self
        inputs = {name: kwargs[name] for name in READ_INPUTS if name in read._names and kwargs.get(name) is not None}
        if not stop and "logits_to_keep" in read._names:
            inputs["logits_to_keep"] = 1
        routing = self.routing
        call = ForwardContext(
            routing, mask=mask, reader=FeatureReader(routing.depths, routing.skip_tokens, stop=stop),
            options=LayerOptions(bypass=True, packed=packed),
        )  # fmt: skip
        with torch.no_grad(), entered(call), contextlib.suppress(FeaturesReady):
            read.inner(**inputs)
        if call.features is None:
            raise UserError("the routing layer was not reached: the model skipped it")
        return call.features

    @staticmethod
    def prompt_mask(kwargs: dict[str, Any], prompt_mask: Tensor | None) -> Tensor | None:
        """Prompt tokens that are not padding, (B, prompt tokens); None: all tokens."""
        attention = kwargs.get("attention_mask")
        if not isinstance(attention, Tensor) or attention.dim() != 2:
            return prompt_mask
        if prompt_mask is None:
            return attention
        return prompt_mask.bool() & attention[:, : prompt_mask.shape[1]].bool()

    def _cache_state_of(self, kwargs: dict[str, Any], *, required: bool) -> CacheState | None:
        """What this call's KV cache or encoder outputs bring along; None if the gate has to be found."""
        encoded = kwargs.get("encoder_outputs")
        gate = encoded.get(GATE_KEY) if isinstance(encoded, ModelOutput) else None
        cache_state = cache_state_of(kwargs.get("past_key_values"), required=required and gate is None)
        if cache_state is None and gate is not None:
            return CacheState(gate, {})
        if cache_state is None and encoded is not None and required and self.routing.needs_features:
            raise UserError(
                "encoder_outputs carry no gate: they do not come from this model's encoder "
                "(or were rebuilt from its tensors); encode with this model, or pass task_gate"
            )
        return cache_state

    def _with_cache_state(self, output: Any, call: ForwardContext, cache: object = None) -> Any:
        """``output``, with the gate in what its caller keeps."""
        if self.encoder:
            if call.task_gate is not None and isinstance(output, ModelOutput):
                output[GATE_KEY] = call.task_gate
            return output
        cache_state = CacheState(call.task_gate, call.cache_state.pooled | call.left, call.cached_gate)
        entries = output.values() if isinstance(output, ModelOutput) else output if isinstance(output, tuple) else ()
        for item in (cache, *entries):
            if isinstance(item, Cache):
                set_cache_state(item, cache_state)
        return output


class RoutedGenerate:
    """Replaces a decoder's ``generate``: marks the prompt, so that without a KV cache, where every step is a
    pass over prompt and answer, the answer does not move the gate. A prompt that is read in chunks
    (``prefill_chunk_size``) is routed before, as a whole, by a pass up to the routing layer."""

    def __init__(self, inner: Callable[..., Any], forward: RoutedForward) -> None:
        self.inner = inner
        self.forward = forward

    def __call__(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """The model's own generate."""
        if kwargs.get("prompt_mask") is None and kwargs.get("task_gate") is None:
            given = {"input_ids": inputs if inputs is not None else kwargs.get("input_ids")}
            given["inputs_embeds"] = kwargs.get("inputs_embeds")
            prompt = next((tensor for tensor in given.values() if tensor is not None), None)
            mask = kwargs.get("attention_mask")
            if mask is None and prompt is not None:
                mask = torch.ones(prompt.shape[:2], dtype=torch.long, device=prompt.device)
            kwargs["prompt_mask"] = mask
            if prompt is not None and self._in_chunks(kwargs):
                router = self.forward.routing.router
                assert router is not None
                stop = not self.forward.routing.whole_passes
                assert mask is not None
                given |= {"attention_mask": mask, "position_ids": (mask.long().cumsum(-1) - 1).clamp(min=0)}
                features = self.forward.features(given, mask, stop=stop)
                kwargs["task_gate"] = router.gates(features, len(features))
        return self.inner(inputs, *args, **kwargs)

    def _in_chunks(self, kwargs: dict[str, Any]) -> bool:
        config = kwargs.get("generation_config")
        chunk = kwargs.get("prefill_chunk_size") or getattr(config, "prefill_chunk_size", None)
        return chunk is not None and self.forward.routing.needs_features and kwargs.get("past_key_values") is None


def _gates_of(router: Router, features_BD: Tensor) -> Tensor | None:
    return router.gates(features_BD, len(features_BD))


def _batch(kwargs: dict[str, Any]) -> int:
    for name in ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds"):
        if isinstance(kwargs.get(name), Tensor):
            return int(kwargs[name].shape[0])
    raise UserError("the call has neither input_ids nor inputs_embeds")
