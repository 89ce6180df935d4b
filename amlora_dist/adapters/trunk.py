"""The frozen trunk: the layers below the first adapted one, whose answer to a row never changes.

``Trunk.states`` gives what these layers make of one row, alone and unpadded. A call of the model that brings such
states (``trunk_states=``) passes the layers over: the last of them answers with the states, whatever reached it. Embeddings,
masks and positions are made as always, so nothing about the architecture needs to be known, but that its layers hand
on hidden states and nothing else; ``Trunk`` tries that once and refuses where it is not so.

``Trunk.states_and_kv`` gives the keys and values of these layers next to the states, so that decoding can go on from there.

Shapes in names: B batch, L tokens, D hidden size, H heads of keys and values, E size of a head, W states, keys and values of
a token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from amlora_dist.adapters.gate_context import (
    FeatureReader,
    FeaturesReady,
    ForwardContext,
    LayerOptions,
    TrunkStates,
    active_call,
    entered,
)
from amlora_dist.adapters.targets import routing_stack
from amlora_dist.errors import UserError

if TYPE_CHECKING:
    from amlora_dist.adapters.inject import Mixture

TRIED_TOKENS = 4
TOLERANCE = 0.02
"""Relative difference of logits that a trial may show: bf16 has three digits, what is left out shows in the first."""


class Trunk:
    """The layers of ``mixture``'s decoder below ``layer``, its first adapted one; ``Mixture.trunk`` makes it."""

    def __init__(
        self,
        mixture: Mixture,
        plain_forward: Callable[..., Any],
        replace: Callable[[nn.Module, str, object], None],
        undo: list[Callable[[], None]],
    ) -> None:
        """Make the layers ready to be passed over.

        Args:
            mixture: whose model they are in.
            plain_forward: the model's own.
            replace: sets an attribute of a module until the mixture is removed.
            undo: called when the mixture is removed.

        Raises:
            UserError: nothing lies below the first adapted layer, or this architecture hands on more than states.
        """
        model: Any = mixture.model
        stack = routing_stack(model)
        self.layer = min(target.layer for target in mixture.targets)
        if model.config.is_encoder_decoder or self.layer == 0:
            raise UserError(
                "training.cache_trunk: found true, expected a decoder with layers below the first adapted one"
                " (adapters.layers: above_router or last:K)"
            )
        self._mixture, self._model, self._plain_forward = mixture, model, plain_forward
        self.width = int(model.config.hidden_size)
        for index, module in enumerate(stack.layers[: self.layer]):
            replace(module, "forward", _Passable(module.forward, last=index == self.layer - 1))
        hook = stack.layers[self.layer].register_forward_pre_hook(_capture, with_kwargs=True)
        undo.append(hook.remove)
        self._try()

    @property
    def can_route(self) -> bool:
        """Whether a pass that brings the states can find its own gate: not by features of several depths."""
        return len(self._mixture.routing.depths) == 1

    def states(self, tokens: tuple[int, ...]) -> Tensor:
        """What enters the first adapted layer for this row, (L, D), on the model's device."""
        return self._run(tokens)[0]

    def batch_states(self, ids_BL: Tensor, mask_BL: Tensor, positions: dict[str, Tensor]) -> Tensor:
        """What enters the first adapted layer in a pass of this batch, (B, L, D), to the bit: for passes that differ in what
        comes behind.

        Args:
            ids_BL: padded on the left.
            mask_BL: 1 but for padding.
            positions: ``position_ids``, if the model takes them.
        """
        call = self._capturing()
        with torch.no_grad(), entered(call), contextlib.suppress(FeaturesReady):
            self._plain_forward(input_ids=ids_BL, attention_mask=mask_BL, use_cache=False, **positions)
        return _captured(call)

    def _run(self, tokens: tuple[int, ...]) -> tuple[Tensor, DynamicCache]:
        """A pass over the trunk: states (L, D), and the cache that it filled."""
        call = self._capturing()
        row_1L = torch.tensor([tokens], device=self._mixture.device)
        cache = DynamicCache(config=self._model.config)
        with torch.no_grad(), entered(call), contextlib.suppress(FeaturesReady):
            self._plain_forward(input_ids=row_1L, past_key_values=cache, use_cache=True)
        return _captured(call)[0], cache

    def states_and_kv(self, tokens: tuple[int, ...]) -> Tensor:
        """States, and keys and values of every layer of the trunk, for this row: (L, W) in the states' dtype."""
        states_LD, cache = self._run(tokens)
        parts = [states_LD]
        for layer in cache.layers[: self.layer]:
            parts += [pair[0].transpose(0, 1).flatten(1) for pair in (layer.keys, layer.values)]
        return torch.cat(parts, dim=-1)

    @property
    def states_and_kv_width(self) -> int:
        """W."""
        return int(self.states_and_kv((1,)).shape[-1])

    def fill(self, cache: Any, cached_BLW: Tensor) -> None:
        """Put the trunk's keys and values into the cache of a pass that brought its states along."""
        size = (cached_BLW.shape[-1] - self.width) // (2 * self.layer)
        heads = cache.layers[self.layer].keys.shape[1]
        pairs = cached_BLW[..., self.width :].unflatten(-1, (2 * self.layer, heads, size // heads))
        for number in range(self.layer):
            keys_BHLE, values_BHLE = (pairs[:, :, 2 * number + i].transpose(1, 2).contiguous() for i in (0, 1))
            cache.update(keys_BHLE, values_BHLE, number)

    def read(
        self, ids_BL: Tensor, mask_BL: Tensor, positions: dict[str, Tensor], text_mask_BL: Tensor
    ) -> tuple[Tensor, Tensor, DynamicCache]:
        """A pass over texts up to the first adapted layer, without gradient: what begins an answer before anybody knows
        what will be asked.

        Args:
            ids_BL: padded on the left.
            mask_BL: 1 but for padding.
            positions: ``position_ids``, if the model takes them.
            text_mask_BL: 1 on the tokens that features pool over.

        Returns:
            features (B, F) fp32, states (B, L, D), and the KV cache of the layers that were run.
        """
        routing = self._mixture.routing
        call = self._capturing()
        call.mask, call.reader = text_mask_BL, FeatureReader(routing.depths, routing.skip_tokens)
        cache = DynamicCache(config=self._model.config)
        inputs = {"input_ids": ids_BL, "attention_mask": mask_BL, "past_key_values": cache, "use_cache": True}
        with torch.no_grad(), entered(call), contextlib.suppress(FeaturesReady):
            self._plain_forward(**inputs, **positions)
        assert call.features is not None, "adapted layers lie at or above the routing layer"
        return call.features, _captured(call), cache

    def extend(self, cache: DynamicCache, ids_BR: Tensor, mask_BL: Tensor, positions: dict[str, Tensor]) -> Tensor:
        """What the trunk makes of tokens behind those in ``cache``, which grows by them.

        Args:
            cache: of ``read``.
            ids_BR: the tokens, padded on the left.
            mask_BL: over the tokens in the cache and these.
            positions: of these tokens.

        Returns:
            states (B, R, D).
        """
        call = self._capturing()
        inputs = {"input_ids": ids_BR, "attention_mask": mask_BL, "past_key_values": cache, "use_cache": True}
        with torch.no_grad(), entered(call), contextlib.suppress(FeaturesReady):
            self._plain_forward(**inputs, **positions)
        return _captured(call)

    def hand_over(self, cache: Any, read: DynamicCache) -> None:
        """Put the trunk's keys and values, as ``read`` and ``extend`` left them, into the cache of a pass that brought
        the trunk's states along."""
        for number in range(self.layer):
            layer = read.layers[number]
            cache.update(layer.keys, layer.values, number)

    def _capturing(self) -> ForwardContext:
        """A call of the plain model that ends where the trunk ends."""
        return ForwardContext(self._mixture.routing, trunk=TrunkStates(captures=True), options=LayerOptions(bypass=True))

    def _try(self) -> None:
        tokens = tuple(range(1, 1 + min(TRIED_TOKENS, self._model.config.vocab_size - 1)))
        row_1L = torch.tensor([tokens], device=self._mixture.device)
        gate = torch.zeros(1, len(self._mixture.task_names), device=self._mixture.device)
        inputs: dict[str, Any] = {"input_ids": row_1L, "task_gate": gate, "use_cache": False}
        with torch.no_grad():
            whole = self._model(**inputs).logits.float()
            short = self._model(**inputs, trunk_states=self.states(tokens)[None]).logits.float()
        if not torch.allclose(whole, short, rtol=TOLERANCE, atol=TOLERANCE * float(whole.abs().max())):
            raise UserError(
                f"training.cache_trunk: {type(self._model).__name__} hands on more than hidden states from layer to"
                " layer, so its trunk cannot be cached; set it to false"
            )


class _Passable:
    """Replaces the ``forward`` of a layer of the trunk."""

    def __init__(self, inner: Callable[..., Any], *, last: bool) -> None:
        self.inner, self.last = inner, last
        self._in_tuple = False
        """Whether this architecture's layers answer with a tuple; known before a pass is made over them."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = active_call()
        if call is None or call.trunk is None or call.trunk.states is None:
            out = self.inner(*args, **kwargs)
            self._in_tuple = isinstance(out, tuple)
            return out
        hidden = args[0] if args else kwargs["hidden_states"]
        states = call.trunk.states.to(hidden.dtype) if self.last else hidden
        return (states,) if self._in_tuple else states


def _captured(call: ForwardContext) -> Tensor:
    assert call.trunk is not None and call.trunk.states is not None, "a model reaches all of its layers"
    return call.trunk.states


def _capture(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    call = active_call()
    if call is not None and call.trunk is not None and call.trunk.captures:
        call.trunk.states = args[0] if args else kwargs["hidden_states"]
        raise FeaturesReady
