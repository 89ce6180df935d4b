"""One pass over each prompt, and what goes on from it.

A batch of prompts goes through the model once (`Decoder.prefill`). Its cache then serves the ranking of a task's
labels (``evaluation.ranking``), and greedy decoding, which consumes it. The routing gate is computed in the prefill and
travels with the cache (`amlora_dist.adapters.gate_context`), so no later pass needs to know the task.

Shape suffixes: B prompts, S prompt tokens, K continuation tokens, C cached tokens, V vocabulary, T tasks.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from amlora_dist.errors import UserError

if TYPE_CHECKING:
    from amlora_dist.adapters.reading import Reading

Forward = Callable[..., Any]
"""Calls the transformer with keyword arguments and returns its ``ModelOutput``."""


@dataclass(slots=True)
class Prefilled:
    """A batch of prompts after its one pass: what every continuation starts from."""

    cache: Any
    logits: Tensor
    """(B, V) scores of the first token after each prompt, in the model's dtype."""
    mask: Tensor
    """(B, S) attention mask over what the cache holds; over the encoder's tokens for encoder-decoder models."""
    position: Tensor
    """(B, 1) position of the next token of each row."""
    encoder_outputs: Any = None


class Decoder:
    """Runs one causal or encoder-decoder transformer over batches of prompts.

    Args:
        model: a ``transformers`` model; only its class and configuration are read here.
        forward: what to call instead of ``model`` (a DeepSpeed engine, say).
        eos_id: the token that ends an answer.
        encoder_decoder: whether prompts go to an encoder.
    """

    def __init__(
        self, model: nn.Module, *, pad_id: int, eos_id: int, encoder_decoder: bool, forward: Forward | None = None
    ) -> None:
        self.pad_id, self.eos_id, self.encoder_decoder = pad_id, eos_id, encoder_decoder
        self._forward: Forward = forward or model
        self.config: Any = model.config
        self.architecture = type(model)
        accepted = inspect.signature(type(model).forward).parameters
        self._keeps_logits = "logits_to_keep" in accepted
        self.takes_positions = "position_ids" in accepted and not encoder_decoder

    def prefill(
        self, input_ids_BS: Tensor, mask_BS: Tensor, *, on_logits: Callable[[Tensor], None] | None = None, **routing: Any
    ) -> Prefilled:
        """The one pass over the prompts: left-padded for causal models, right-padded for an encoder.

        ``routing`` (``prompt_mask``, ``task_gate``, ``on_route``) goes to the forward call of a model with a mixture;
        ``on_logits`` sees the scores of a causal model's every place, (B, S, V).
        """
        if self.encoder_decoder:
            start = self.config.decoder_start_token_id
            start_B1 = torch.full_like(input_ids_BS[:, :1], start)
            out = self._forward(
                input_ids=input_ids_BS, attention_mask=mask_BS, decoder_input_ids=start_B1, use_cache=True, **routing
            )
            return Prefilled(out.past_key_values, out.logits[:, -1], mask_BS, torch.ones_like(start_B1), encoded(out))
        positions_BS = (mask_BS.long().cumsum(-1) - 1).clamp(min=0)
        inputs: dict[str, Any] = {"position_ids": positions_BS} if self.takes_positions else {}
        if self._keeps_logits and on_logits is None:
            inputs["logits_to_keep"] = 1
        out = self._forward(input_ids=input_ids_BS, attention_mask=mask_BS, use_cache=True, **inputs, **routing)
        if on_logits is not None:
            on_logits(out.logits)
        return Prefilled(out.past_key_values, out.logits[:, -1], mask_BS, positions_BS[:, -1:] + 1)

    def positions(self, mask_BL: Tensor) -> dict[str, Tensor]:
        """``position_ids`` of tokens under this mask, if the model takes them: padding, wherever it is, counts nothing."""
        return {"position_ids": (mask_BL.long().cumsum(-1) - 1).clamp(min=0)} if self.takes_positions else {}

    def resume(
        self, reading: Reading, reused_BL: Tensor, rest_BR: Tensor, rest_mask_BR: Tensor, *, task_gate: Tensor
    ) -> Prefilled:
        """The pass over prompts whose texts were read already (causal models): the layers below the adapters run over the
        rest of each prompt alone, those above over all of it.

        Args:
            reading: of the texts; its cache is consumed.
            reused_BL: 1 on the tokens of each text that its prompt holds.
            rest_BR: the rest of each prompt, padded on the left, so that the last column is everybody's last token.
            rest_mask_BR: 1 but for padding.
            task_gate: (B, T).
        """
        assert reading.cached is not None, "a reading without its cache is prefilled again"
        cached, length = reading.cached, reused_BL.shape[1]
        mask_BS = torch.cat([reused_BL, rest_mask_BR], dim=1)
        positions_BS = (mask_BS.long().cumsum(-1) - 1).clamp(min=0)
        inputs = self.positions(mask_BS)
        later = {name: tensor[:, length:] for name, tensor in inputs.items()}
        states_BRD = cached.trunk.extend(cached.cache, rest_BR, mask_BS, later)
        if self._keeps_logits:
            inputs["logits_to_keep"] = 1  # type: ignore[assignment]
        out = self._forward(
            input_ids=torch.cat([reading.ids_BL, rest_BR], dim=1), attention_mask=mask_BS, use_cache=True, **inputs,
            trunk_states=torch.cat([cached.states_BLD, states_BRD], dim=1), task_gate=task_gate,
        )  # fmt: skip
        cached.trunk.hand_over(out.past_key_values, cached.cache)
        return Prefilled(out.past_key_values, out.logits[:, -1], mask_BS, positions_BS[:, -1:] + 1)

    def advance(self, state: Prefilled, tokens_BK: Tensor) -> Tensor:
        """Feed ``tokens_BK`` on ``state``'s cache, which grows by K, and return logits (B, K, V)."""
        count = tokens_BK.shape[1]
        positions_BK = state.position + torch.arange(count, device=tokens_BK.device)
        state.position = state.position + count
        if self.encoder_decoder:
            inputs = {"encoder_outputs": state.encoder_outputs, "decoder_input_ids": tokens_BK}
        else:
            state.mask = torch.cat([state.mask, state.mask.new_ones(tokens_BK.shape)], dim=-1)
            inputs = {"input_ids": tokens_BK}
            if self.takes_positions:
                inputs["position_ids"] = positions_BK
        out = self._forward(attention_mask=state.mask, past_key_values=state.cache, use_cache=True, **inputs)
        state.cache = out.past_key_values
        logits: Tensor = out.logits
        return logits

    def branch(self, state: Prefilled, tokens_BK: Tensor, positions_BK: Tensor, seen_BKC: Tensor) -> Tensor:
        """Feed tokens that do not follow each other on ``state``'s cache, which grows by K, and return logits (B, K, V).

        Args:
            positions_BK: of each token.
            seen_BKC: the cached tokens, and those of this pass behind them, that each one sees.
        """
        dtype = state.cache.layers[0].keys.dtype
        mask_B1KC = torch.zeros(seen_BKC.shape, dtype=dtype, device=seen_BKC.device)
        mask_B1KC = mask_B1KC.masked_fill(~seen_BKC, torch.finfo(dtype).min)[:, None]
        out = self._forward(
            input_ids=tokens_BK, attention_mask=mask_B1KC, position_ids=positions_BK, past_key_values=state.cache,
            use_cache=True,
        )  # fmt: skip
        logits: Tensor = out.logits
        return logits

    def greedy(
        self,
        state: Prefilled,
        steps: int,
        all_done: Callable[[bool], bool] | None = None,
        limits: Sequence[int] | None = None,
    ) -> list[tuple[list[int], bool]]:
        """The most likely next token, ``steps`` times; consumes ``state``.

        Makes exactly ``steps - 1`` passes unless ``all_done`` is given: it is asked before each pass whether to stop,
        with this rank's answer, and must give every rank the same one.

        Args:
            limits: tokens of each row, at most ``steps``: it is cut there, as if it had been alone. Default: ``steps``.

        Returns:
            for each row its tokens before EOS, and whether EOS came within its limit.
        """
        most = list(limits) if limits is not None else [steps] * len(state.logits)
        most_B1 = torch.tensor(most, device=state.logits.device)[:, None]
        token_B1 = state.logits.argmax(-1, keepdim=True)
        ended_B1 = token_B1 == self.eos_id
        tokens = [token_B1]
        for _ in range(steps - 1):
            done_B1 = ended_B1 | (most_B1 <= len(tokens))
            if all_done is not None and all_done(bool(done_B1.all())):
                break
            # A row that is done goes on for the others' sake: its prompt left room for its own limit and no more.
            state.position = state.position.masked_fill(done_B1, 0)
            token_B1 = self.advance(state, token_B1)[:, -1].argmax(-1, keepdim=True)
            token_B1 = token_B1.masked_fill(ended_B1, self.eos_id)
            ended_B1 = ended_B1 | (token_B1 == self.eos_id)
            tokens.append(token_B1)
        rows: list[list[int]] = torch.cat(tokens, dim=-1).tolist()
        cut = [row[:limit] for row, limit in zip(rows, most, strict=True)]
        return [(row[: row.index(self.eos_id)], True) if self.eos_id in row else (row, False) for row in cut]


def check_room(config: Any, prompt_tokens: int, new_tokens: int) -> None:
    """Refuse prompts that leave a causal model no room for an answer; ``config`` is the transformer's.

    Raises:
        UserError: more positions are needed than the model has.
    """
    room = getattr(config, "max_position_embeddings", None)
    if room is not None and not config.is_encoder_decoder and prompt_tokens + new_tokens > room:
        raise UserError(
            f"task_defaults.max_length: a prompt of {prompt_tokens} tokens and an answer of up to {new_tokens} "
            f"exceed the model's {room} positions: lower max_length to {room - new_tokens} or less"
        )


def repeated(state: Prefilled, repeats: int) -> Prefilled:
    """A copy of ``state`` with each row repeated; the original can be continued as if the copy did not exist."""
    cache = _twin(state.cache)
    cache.batch_repeat_interleave(repeats)
    outputs = state.encoder_outputs
    if outputs is not None:
        outputs = type(outputs)(last_hidden_state=outputs.last_hidden_state.repeat_interleave(repeats, dim=0))
    return Prefilled(
        cache,
        state.logits,
        state.mask.repeat_interleave(repeats, dim=0),
        state.position.repeat_interleave(repeats, dim=0),
        outputs,
    )


def picked(state: Prefilled, rows: Sequence[int]) -> Prefilled:
    """A copy of ``state`` with some of its rows; the original can be continued as if the copy did not exist."""
    cache = _twin(state.cache)
    chosen = torch.tensor(rows, device=state.logits.device)
    cache.batch_select_indices(chosen)
    outputs = state.encoder_outputs
    if outputs is not None:
        outputs = type(outputs)(last_hidden_state=outputs.last_hidden_state[chosen])
    return Prefilled(cache, state.logits[chosen], state.mask[chosen], state.position[chosen], outputs)


def _twin(cache: Any) -> Any:
    """A copy whose rows are about to be picked or repeated: keys and values that this replaces are not copied before."""
    layers = [layer for layer in getattr(cache, "layers", ()) if type(layer) is DynamicLayer and layer.is_initialized]
    kept = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
    return copy.deepcopy(cache, {id(tensor): tensor for tensor in kept})


def encoded(output: Any) -> Any:
    """The encoder's part of an encoder-decoder output, in the form that its forward takes it back."""
    from transformers.modeling_outputs import BaseModelOutput

    return BaseModelOutput(last_hidden_state=output.encoder_last_hidden_state)
