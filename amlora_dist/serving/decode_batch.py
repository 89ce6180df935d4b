"""Rows that decode together: batches of prompts joined while they run, and rows taken out when they are done.

A row's KV cache is at the right end of the joint cache, with padding in front that the mask hides; its positions
and its gate are its own, so that it computes what it would alone. Shape suffixes: B rows, S cached tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers.cache_utils import DynamicCache, DynamicLayer

from amlora_dist.adapters.gate_context import CacheState, GateCarrier
from amlora_dist.evaluation.decoding import Prefilled


def can_join(state: Prefilled) -> bool:
    """Whether other rows can be put next to these: plain growing caches of a causal model.

    Sliding windows and recurrent states leave nothing to pad, and an encoder-decoder counts its decoder's positions
    from the length of the cache.
    """
    cache = state.cache
    return (
        state.encoder_outputs is None
        and isinstance(cache, DynamicCache)
        and all(type(layer) is DynamicLayer for layer in cache.layers)
    )


def joined(first: Prefilled, second: Prefilled) -> Prefilled:
    """Both batches as one, the rows of ``first`` in front; consumes both. Both must be such that ``can_join``."""
    width = max(first.mask.shape[1], second.mask.shape[1])
    missing = [width - state.mask.shape[1] for state in (first, second)]
    for mine, other in zip(first.cache.layers, second.cache.layers, strict=True):
        mine.keys = torch.cat([_padded(layer.keys, n) for layer, n in zip((mine, other), missing, strict=True)])
        mine.values = torch.cat([_padded(layer.values, n) for layer, n in zip((mine, other), missing, strict=True)])
    if isinstance(first.cache, GateCarrier):
        first.cache.cache_state = _together(first.cache.cache_state, second.cache.cache_state)
    masks = [F.pad(state.mask, (n, 0)) for state, n in zip((first, second), missing, strict=True)]
    return Prefilled(
        first.cache,
        torch.cat([first.logits, second.logits]),
        torch.cat(masks),
        torch.cat([first.position, second.position]),
    )


def keep(state: Prefilled, rows: Sequence[int]) -> None:
    """Leave these rows alone in ``state``, and no padding in front that all of them have."""
    chosen = torch.tensor(rows, device=state.logits.device)
    state.cache.batch_select_indices(chosen)
    state.logits, state.mask, state.position = state.logits[chosen], state.mask[chosen], state.position[chosen]
    if state.encoder_outputs is not None:
        hidden = state.encoder_outputs.last_hidden_state[chosen]
        state.encoder_outputs = type(state.encoder_outputs)(last_hidden_state=hidden)
    elif can_join(state):
        padding = int((state.mask.sum(dim=0) > 0).int().argmax())
        if padding:
            state.mask = state.mask[:, padding:]
            for layer in state.cache.layers:
                layer.keys, layer.values = layer.keys[:, :, padding:], layer.values[:, :, padding:]


def _padded(states: torch.Tensor, missing: int) -> torch.Tensor:
    """Keys or values (B, heads, S, head size) with ``missing`` positions of zeros in front."""
    return F.pad(states, (0, 0, missing, 0)) if missing else states


def _together(first: CacheState | None, second: Any) -> CacheState:
    assert first is not None and isinstance(second, CacheState)  # the same model filled both
    if (first.task_gate is None) != (second.task_gate is None):
        raise ValueError("rows that bring their gate and rows gated by the layers' selectors cannot be joined")
    gate = None if first.task_gate is None or second.task_gate is None else torch.cat([first.task_gate, second.task_gate])
    return CacheState(gate, {path: torch.cat([pool, second.pooled[path]]) for path, pool in first.pooled.items()})
