"""Greedy decoding and label likelihoods from one pass over each prompt.

A batch of prompts goes through the model once (`Decoder.prefill`). Its cache then serves the ranking of a task's
labels, on copies repeated once per label, and greedy decoding, which consumes it. The routing gate is computed in the
prefill and travels with the cache (`amlora_dist.adapters.gate_context`), so no later pass needs to know the task.

Shape suffixes: B prompts, S prompt tokens, K continuation tokens, V vocabulary, T tasks, L labels, C contexts.
"""

from __future__ import annotations

import copy
import inspect
from bisect import bisect_left
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise, takewhile, zip_longest
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from amlora_dist.errors import UserError

if TYPE_CHECKING:
    from amlora_dist.adapters.reading import Reading

T = TypeVar("T")
Forward = Callable[..., Any]
"""Calls the transformer with keyword arguments and returns its ``ModelOutput``."""

CACHE_TOKENS = 8192
"""Positions that the repeated caches of one ranking pass may hold (rows x prompt tokens): bounds its memory."""
PADDING_TOKENS = 3
"""Padding per prompt that is cheaper than one more pass (measured: an empty pass costs 2-3 tokens a prompt)."""


@dataclass(frozen=True, slots=True)
class LabelPlan:
    """How to read the log-likelihood of every label off a few continuation passes.

    The first token of a label needs no pass beyond the prefill, and labels that begin alike share their context
    (``very`` of *very good* and *very bad*): only ``contexts``, the distinct maximal token sequences in front of a
    label's last token, go through the model.
    """

    candidates: tuple[tuple[int, ...], ...]
    """Token ids whose summed log-likelihood is each label's score; EOS is last where ``ends`` is true."""
    contexts: tuple[tuple[int, ...], ...]
    """Shortest first."""
    context_of: tuple[int | None, ...]
    """For each label the index of the context that covers it; None for a label of one token."""
    ends: bool
    """EOS counts for all labels, because the tokens of one label begin another's."""

    @property
    def longest(self) -> int:
        """Tokens of the longest label, without EOS."""
        return max(map(len, self.candidates)) - self.ends

    def passes(self, limit: int) -> list[range]:
        """Contexts of each pass, as indices: at most ``limit``, and of such lengths that little is padding."""
        out: list[range] = []
        for index, context in enumerate(self.contexts):
            padding = sum(len(context) - len(self.contexts[i]) for i in out[-1]) if out else 0
            if out and len(out[-1]) < limit and padding <= PADDING_TOKENS:
                out[-1] = range(out[-1].start, index + 1)
            else:
                out.append(range(index, index + 1))
        return out


def plan_labels(labels: Sequence[Sequence[int]], eos_id: int) -> LabelPlan:
    """Prepare ``labels`` (token ids without EOS) for ranking.

    Raises:
        UserError: a label has no tokens, or two labels have the same ones.
    """
    bare = [tuple(label) for label in labels]
    if not all(bare):
        raise UserError(f"label {bare.index(())} has no tokens: give it a text that the tokenizer can write")
    if len(set(bare)) < len(bare):
        first: dict[tuple[int, ...], int] = {}
        twice = next(i for i, label in enumerate(bare) if first.setdefault(label, i) != i)
        raise UserError(f"labels {first[bare[twice]]} and {twice} have the same tokens: give them different texts")
    # In lexicographic order what begins with a sequence follows it at once: a thousand labels need no million comparisons.
    ends = any(b[: len(a)] == a for a, b in pairwise(sorted(bare)))
    candidates = [(*label, eos_id) for label in bare] if ends else bare
    ordered = sorted({candidate[:-1] for candidate in candidates if len(candidate) > 1})
    maximal = [p for p, q in zip_longest(ordered, ordered[1:], fillvalue=()) if q[: len(p)] != p]
    contexts = sorted(maximal, key=lambda context: (len(context), context))
    place = {context: i for i, context in enumerate(contexts)}

    @cache
    def covering(prefix: tuple[int, ...]) -> int:
        """The first context that begins with ``prefix``; those that do stand together in ``maximal``."""
        begin = bisect_left(maximal, prefix)
        return min(place[q] for q in takewhile(lambda q: q[: len(prefix)] == prefix, maximal[begin:]))

    cover = [covering(c[:-1]) if len(c) > 1 else None for c in candidates]
    return LabelPlan(tuple(candidates), tuple(contexts), tuple(cover), ends)


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
        accepted = inspect.signature(type(model).forward).parameters
        self._keeps_logits = "logits_to_keep" in accepted
        self._takes_positions = "position_ids" in accepted and not encoder_decoder

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
        inputs: dict[str, Any] = {"position_ids": positions_BS} if self._takes_positions else {}
        if self._keeps_logits and on_logits is None:
            inputs["logits_to_keep"] = 1
        out = self._forward(input_ids=input_ids_BS, attention_mask=mask_BS, use_cache=True, **inputs, **routing)
        if on_logits is not None:
            on_logits(out.logits)
        return Prefilled(out.past_key_values, out.logits[:, -1], mask_BS, positions_BS[:, -1:] + 1)

    def positions(self, mask_BL: Tensor) -> dict[str, Tensor]:
        """``position_ids`` of tokens under this mask, if the model takes them: padding, wherever it is, counts nothing."""
        return {"position_ids": (mask_BL.long().cumsum(-1) - 1).clamp(min=0)} if self._takes_positions else {}

    def resume(
        self, reading: Reading, kept_BL: Tensor, rest_BR: Tensor, rest_mask_BR: Tensor, *, task_gate: Tensor
    ) -> Prefilled:
        """The pass over prompts whose texts were read already (causal models): the layers below the adapters run over the
        rest of each prompt alone, those above over all of it.

        Args:
            reading: of the texts; its cache is consumed.
            kept_BL: 1 on the tokens of each text that its prompt holds.
            rest_BR: the rest of each prompt, padded on the left, so that the last column is everybody's last token.
            rest_mask_BR: 1 but for padding.
            task_gate: (B, T).
        """
        assert reading.kept is not None, "a reading without what was kept is prefilled anew"
        kept, length = reading.kept, kept_BL.shape[1]
        mask_BS = torch.cat([kept_BL, rest_mask_BR], dim=1)
        positions_BS = (mask_BS.long().cumsum(-1) - 1).clamp(min=0)
        inputs = self.positions(mask_BS)
        later = {name: tensor[:, length:] for name, tensor in inputs.items()}
        states_BRD = kept.trunk.extend(kept.cache, rest_BR, mask_BS, later)
        if self._keeps_logits:
            inputs["logits_to_keep"] = 1  # type: ignore[assignment]
        out = self._forward(
            input_ids=torch.cat([reading.ids_BL, rest_BR], dim=1), attention_mask=mask_BS, use_cache=True, **inputs,
            trunk_states=torch.cat([kept.states_BLD, states_BRD], dim=1), task_gate=task_gate,
        )  # fmt: skip
        kept.trunk.hand_over(out.past_key_values, kept.cache)
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
            if self._takes_positions:
                inputs["position_ids"] = positions_BK
        out = self._forward(attention_mask=state.mask, past_key_values=state.cache, use_cache=True, **inputs)
        state.cache = out.past_key_values
        logits: Tensor = out.logits
        return logits

    def greedy(
        self, state: Prefilled, steps: int, all_done: Callable[[bool], bool] | None = None
    ) -> list[tuple[list[int], bool]]:
        """The most likely next token, ``steps`` times; consumes ``state``.

        Makes exactly ``steps - 1`` passes unless ``all_done`` is given: it is asked before each pass whether to stop,
        with this rank's answer, and must give every rank the same one.

        Returns:
            for each row its tokens before EOS, and whether EOS came within ``steps`` tokens.
        """
        token_B1 = state.logits.argmax(-1, keepdim=True)
        ended_B1 = token_B1 == self.eos_id
        tokens = [token_B1]
        for _ in range(steps - 1):
            if all_done is not None and all_done(bool(ended_B1.all())):
                break
            token_B1 = self.advance(state, token_B1)[:, -1].argmax(-1, keepdim=True)
            token_B1 = token_B1.masked_fill(ended_B1, self.eos_id)
            ended_B1 = ended_B1 | (token_B1 == self.eos_id)
            tokens.append(token_B1)
        rows: list[list[int]] = torch.cat(tokens, dim=-1).tolist()
        return [(row[: row.index(self.eos_id)], True) if self.eos_id in row else (row, False) for row in rows]

    def label_scores(self, state: Prefilled, plan: LabelPlan, *, contexts_per_pass: int) -> Tensor:
        """Summed log-likelihood of every label after every prompt: (B, L), fp32. Leaves ``state`` as it is.

        Makes the passes of ``plan.passes(contexts_per_pass)``, whatever the batch.
        """
        return finished(self.scoring(state, plan, contexts_per_pass=contexts_per_pass))

    def scoring(self, state: Prefilled, plan: LabelPlan, *, contexts_per_pass: int) -> Generator[int, None, Tensor]:
        """``label_scores`` with a stop after each pass, which yields the tokens that went through: others may run there."""
        device = state.logits.device
        first_L = torch.tensor([candidate[0] for candidate in plan.candidates], device=device)
        logits_BV = state.logits.float()
        scores_BL = logits_BV[:, first_L] - logits_BV.logsumexp(-1, keepdim=True)
        for chosen in plan.passes(contexts_per_pass):
            chunk = [plan.contexts[i] for i in chosen]
            width = len(chunk[-1])
            padded = [[*context, *[self.pad_id] * (width - len(context))] for context in chunk]
            tokens_CK = torch.tensor(padded, device=device)
            batch = state.logits.shape[0]
            logits = self.advance(repeated(state, len(chunk)), tokens_CK.repeat(batch, 1)).float()
            logits_BCKV = logits.view(batch, len(chunk), width, -1)
            total_BCK = logits_BCKV.logsumexp(-1)
            for label, (candidate, cover) in enumerate(zip(plan.candidates, plan.context_of, strict=True)):
                if cover is None or cover not in chosen:
                    continue
                place = chosen.index(cover)
                next_K = torch.tensor(candidate[1:], device=device)
                at_K = torch.arange(len(next_K), device=device)
                own_BK = logits_BCKV[:, place, at_K, next_K] - total_BCK[:, place, at_K]
                scores_BL[:, label] += own_BK.sum(-1)
            del logits, logits_BCKV, total_BCK  # not held while others run
            yield batch * len(chunk) * width
        return scores_BL


def finished(work: Generator[Any, None, T]) -> T:
    """What a generator returns, run to its end without a stop."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            result: T = end.value
            return result


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


def contexts_per_pass(prompt_tokens: int, batch_size: int, plan: LabelPlan) -> int:
    """Contexts to rank in one pass so that the repeated caches hold at most `CACHE_TOKENS` positions; at least 1.

    Depends on the task's longest prompt and the nominal batch size only, so that every rank and every batch makes
    equally many passes.
    """
    longest = prompt_tokens + max((len(context) for context in plan.contexts), default=0)
    return max(1, CACHE_TOKENS // (longest * batch_size))


def repeated(state: Prefilled, repeats: int) -> Prefilled:
    """A copy of ``state`` with each row repeated; the original can be continued as if the copy did not exist."""
    cache = copy.deepcopy(state.cache)
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
    cache = copy.deepcopy(state.cache)
    chosen = torch.tensor(rows, device=state.logits.device)
    cache.batch_select_indices(chosen)
    outputs = state.encoder_outputs
    if outputs is not None:
        outputs = type(outputs)(last_hidden_state=outputs.last_hidden_state[chosen])
    return Prefilled(cache, state.logits[chosen], state.mask[chosen], state.position[chosen], outputs)


def encoded(output: Any) -> Any:
    """The encoder's part of an encoder-decoder output, in the form that its forward takes it back."""
    from transformers.modeling_outputs import BaseModelOutput

    return BaseModelOutput(last_hidden_state=output.encoder_last_hidden_state)
