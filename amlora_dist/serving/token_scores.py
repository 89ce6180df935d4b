"""What a model thought of tokens: of each its log probability, and the likeliest in its place (``logprobs``, ``echo``).

Always of the model's own distribution, whatever temperature an answer is drawn at. Shapes: S tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from amlora_dist.serving import messages as wire

CHUNK = 256
"""Tokens whose whole distribution is in memory at once."""


@dataclass(frozen=True, slots=True)
class TokenScore:
    """One token."""

    token: int
    logprob: float | None
    """Nats; None for a first token, which nothing predicts."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens in its place, the best first."""


def scored(logits_SV: Tensor, tokens: Sequence[int], top: int) -> list[TokenScore]:
    """Scores of tokens, each by the logits that predict it.

    Args:
        logits_SV: of the places before the tokens.
        tokens: S of them.
        top: how many of the likeliest to name.
    """
    found: list[TokenScore] = []
    for start in range(0, len(tokens), CHUNK):
        some = list(tokens[start : start + CHUNK])
        scores_SV = torch.log_softmax(logits_SV[start : start + CHUNK].float(), dim=-1)
        own = scores_SV.gather(1, torch.tensor(some, device=scores_SV.device)[:, None])[:, 0].tolist()
        best = scores_SV.topk(min(top, scores_SV.shape[1]), dim=-1)
        likeliest = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        for token, score, (ids, values) in zip(some, own, likeliest, strict=True):
            found.append(TokenScore(token, score, tuple(zip(ids, values, strict=True))))
    return found


def of_prompt(logits_SV: Tensor, tokens: Sequence[int], top: int) -> list[TokenScore]:
    """Scores of a prompt's own tokens: the first has none."""
    return [TokenScore(tokens[0], None), *scored(logits_SV[:-1], tokens[1:], top)]


def completion_logprobs(
    scores: Sequence[TokenScore], words: Callable[[int], str], begin: int
) -> wire.CompletionLogprobs:
    """In the form of completions: next to the likeliest always the token itself.

    Args:
        scores: of the tokens.
        words: text of one token.
        begin: characters of the text before them.
    """
    tokens = [words(one.token) for one in scores]
    offsets = [begin]
    for token in tokens[:-1]:
        offsets.append(offsets[-1] + len(token))
    tops: list[dict[str, float] | None] = []
    for one, token in zip(scores, tokens, strict=True):
        named: dict[str, float] = {}
        for other, score in one.top:
            named.setdefault(words(other), score)
        tops.append(None if one.logprob is None else {token: one.logprob, **named})
    return wire.CompletionLogprobs(
        tokens=tokens, token_logprobs=[one.logprob for one in scores], top_logprobs=tops, text_offset=offsets[: len(tokens)]
    )


def chat_logprobs(scores: Sequence[TokenScore], words: Callable[[int], str]) -> wire.ChatLogprobs:
    """In the form of chats."""

    def entry(token: int, score: float | None) -> dict[str, object]:
        text = words(token)
        whole = "\ufffd" not in text  # a part of a character has no text of its own
        return {"token": text, "logprob": score or 0.0, "bytes": list(text.encode()) if whole else None}

    return wire.ChatLogprobs(
        content=[
            wire.ChatToken(
                **entry(one.token, one.logprob),
                top_logprobs=[wire.ChatTopToken(**entry(other, score)) for other, score in one.top],
            )
            for one in scores
        ]
    )
