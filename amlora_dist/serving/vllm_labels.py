"""How likely a model behind vLLM holds each label: the sum over its tokens, each asked for behind the label's beginning.

The beginnings form a trie (``evaluation.label_plan``): each is one request for the tokens that may follow it. The first, the
prompt alone, goes ahead, so that vLLM has it in its prefix cache when the others come.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from amlora_dist.evaluation.label_plan import LabelPlan
from amlora_dist.serving.vllm_client import VllmClient

AT_ONCE = 32
"""Beginnings that are asked for together."""


async def label_scores(client: VllmClient, model: str, prompt: Sequence[int], plan: LabelPlan) -> list[tuple[float, ...]]:
    """Log-likelihood of each token of each label, nats; their sum is the label's.

    Args:
        client: of the server.
        model: a LoRA, or the base model.
        prompt: token ids.
        plan: of the labels.
    """
    next_tokens: dict[tuple[int, ...], dict[int, float]] = {}
    for candidate in plan.candidates:
        for cut, token in enumerate(candidate):
            next_tokens.setdefault(candidate[:cut], {})[token] = 0.0

    async def ask(beginning: tuple[int, ...]) -> None:
        tokens = list(next_tokens[beginning])
        scores = await client.next_scores(model, (*prompt, *beginning), tokens)
        next_tokens[beginning] = dict(zip(tokens, scores, strict=True))

    first, *others = next_tokens
    await ask(first)
    for start in range(0, len(others), AT_ONCE):
        await asyncio.gather(*map(ask, others[start : start + AT_ONCE]))
    return [
        tuple(next_tokens[candidate[:cut]][token] for cut, token in enumerate(candidate)) for candidate in plan.candidates
    ]
