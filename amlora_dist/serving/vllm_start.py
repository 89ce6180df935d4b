"""What is looked at before a vLLM server gets work: whether it serves the bank's base model, takes its rows."""

from __future__ import annotations

import torch

from amlora_dist.errors import UserError
from amlora_dist.inference.model import AMLoRAModel
from amlora_dist.serving.jobs import EngineAwayError
from amlora_dist.serving.vllm_client import ServedModel, VllmClient
from amlora_dist.serving.vllm_rows import RowSet

PROBE = "The order arrived two days late, and the invoice shows a price that nobody had told me before I paid for it."
"""A text of which both base models must think the same."""
PLACES = 8
"""Of the probe whose tokens are compared."""
FIRST_S = 300.0
"""For the first request of all: a server may compile some of its functions in it."""
MOST_APART = 0.5
"""Nats, mean over these tokens: what half precision makes of it is far below, another model's weights far above."""


async def connected(client: VllmClient) -> ServedModel:
    """The base model of a server that is there.

    Raises:
        UserError: nobody answers, or no vLLM.
    """
    try:
        await client.healthy()
        found = [one for one in await client.models() if one.is_base]
    except EngineAwayError as error:
        raise UserError(f"--engine-url: {error}; start vLLM there, or give the address where it is") from error
    if not found:
        raise UserError(f"--engine-url: {client.url} lists no base model, expected a vLLM server")
    return found[0]


async def check_rows(url: str, rows: RowSet) -> None:
    """See that a server takes all rows of a bank; they stay loaded. Raises UserError."""
    client = VllmClient(url)
    try:
        await connected(client)
        for name, folder in rows.folders.items():
            await client.load(name, str(folder))
    except EngineAwayError as error:
        raise UserError(f"--engine-url: {error}") from error
    finally:
        await client.close()


async def check_base(client: VllmClient, name: str, model: AMLoRAModel) -> None:
    """Compare what the server's base model and ours think of a text: a list of models says names, not weights.

    Raises:
        UserError: it is another model.
        EngineAwayError: the server does not answer, or is of before ``logprob_token_ids``.
    """
    tokens = [int(token) for token in model.tokenizer(PROBE)["input_ids"]]
    places = range(1, len(tokens), max(1, len(tokens) // PLACES))
    own = own_scores(model, tokens)
    apart = []
    for place in places:
        (score,) = await client.next_scores(name, tokens[:place], [tokens[place]], silent_s=FIRST_S)
        apart.append(abs(score - own[place - 1]))
    mean = sum(apart) / len(apart)
    if not mean <= MOST_APART:
        raise UserError(
            f"--engine-url: the base model {name!r} of vLLM at {client.url} is not the bank's ({model.base.source!r}): of a "
            f"test sentence their log probabilities differ by {mean:.2f} nats a token; start vLLM with --model "
            f"{model.base_model_path}"
        )


@torch.no_grad()
def own_scores(model: AMLoRAModel, tokens: list[int]) -> list[float]:
    """Log probability of each token but the first, by the base model alone: no row has any weight."""
    seen: list[torch.Tensor] = []
    ids_1S = torch.tensor([tokens], device=model.device)
    none_1T = torch.zeros_like(model.mixture.one_hot(0, 1))
    model.decoder.prefill(ids_1S, torch.ones_like(ids_1S), on_logits=seen.append, task_gate=none_1T)
    scores_SV = torch.log_softmax(seen[0][0, :-1].float(), dim=-1)
    found: list[float] = scores_SV.gather(1, ids_1S[0, 1:, None])[:, 0].tolist()
    return found
