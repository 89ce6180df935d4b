"""A pool of prompts: each input's are at its places, chosen by keys, and travel with the cache like any token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from amlora_dist.adapters.adapted_layers import Prefix
from amlora_dist.adapters.adapter import Adapter
from amlora_dist.adapters.inject import Mixture, NewAdapter, inject
from amlora_dist.adapters.router import FixedRouter
from amlora_dist.methods.l2p import PromptPool, embedding_target
from tests.adapters.banks import padded, prompts, tiny_llama, tiny_t5

LEAD = Prefix(tokens=3, marker=1)
POOL = 8
WIDTH = 32


def pools(model: PreTrainedModel, count: int = 2) -> list[Adapter]:
    draw = torch.Generator().manual_seed(0)
    path = embedding_target(model).path
    return [
        Adapter(f"task{i}", POOL, 2.0 * POOL, {path: torch.randn(POOL, WIDTH, generator=draw)},
                {path: torch.randn(WIDTH, POOL, generator=draw)})
        for i in range(count)
    ]  # fmt: skip


def prompted(model: PreTrainedModel, adapters: list[Adapter], **more: Any) -> Mixture:
    names = [adapter.task for adapter in adapters]
    router = FixedRouter.newest(names) if "new" not in more else None
    layers = PromptPool(rank=POOL, prefix=LEAD)
    return inject(model, [embedding_target(model)], adapters, router=router, layers=layers, **more)


def led(ids: Tensor) -> Tensor:
    return torch.cat([torch.full((len(ids), LEAD.tokens), LEAD.marker), ids], dim=1)


def chosen_by_hand(mixture: Mixture, pool: Adapter, **inputs: Tensor) -> Tensor:
    """Indices (B, N) of the prompts whose keys have the largest cosine with the features."""
    (keys,) = pool.a.values()
    match = F.cosine_similarity(mixture.routing_features(**inputs)[:, None], keys[None], dim=-1)
    return match.topk(LEAD.tokens).indices.sort(dim=1).values


def test_the_best_matching_prompts_are_at_the_places_and_nowhere_else() -> None:
    plain, model = tiny_llama(), tiny_llama()
    adapters = pools(model)
    mixture, ids = prompted(model, adapters), led(prompts(3, 8))
    chosen = chosen_by_hand(mixture, adapters[-1], input_ids=ids)
    assert len({tuple(row) for row in chosen.tolist()}) > 1, "inputs choose for themselves"
    embeds = plain.get_input_embeddings()(ids)
    (values,) = adapters[-1].b.values()
    embeds[:, : LEAD.tokens] += 2.0 * values.T[chosen]
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, plain(inputs_embeds=embeds).logits)


def test_padding_on_the_left_moves_neither_places_nor_choice() -> None:
    model = tiny_llama()
    prompted(model, pools(model))
    ids = led(prompts(2, 6))
    shifted = torch.cat([torch.zeros(2, 4, dtype=torch.long), ids], dim=1)
    mask = torch.cat([torch.zeros(2, 4, dtype=torch.long), torch.ones_like(ids)], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        alone = model(input_ids=ids).logits
        behind = model(input_ids=shifted, attention_mask=mask, position_ids=positions).logits[:, 4:]
    torch.testing.assert_close(behind, alone, atol=1e-5, rtol=1e-4)


def test_without_places_or_without_a_gate_the_base_model_answers() -> None:
    plain, model = tiny_llama(), tiny_llama()
    prompted(model, pools(model))
    batch = padded()
    ids = led(prompts(2, 6))
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, plain(**batch).logits)
        torch.testing.assert_close(model(input_ids=ids, task_gate=torch.zeros(1, 2)).logits, plain(input_ids=ids).logits)


def test_generation_with_the_cache_equals_generation_without() -> None:
    model = tiny_llama()
    prompted(model, pools(model))
    ids = led(prompts(2, 6))
    options = {"max_new_tokens": 6, "do_sample": False}
    cached = model.generate(ids, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))
    assert not torch.equal(cached, tiny_llama().generate(ids, **options)), "the prompts have an effect"


def test_an_encoder_has_prompts_and_its_decoder_none() -> None:
    plain, model = tiny_t5(), tiny_t5()
    adapters = pools(model)
    mixture, ids = prompted(model, adapters), led(prompts(2, 6))
    assert embedding_target(tiny_t5()).path == "encoder.embed_tokens"
    embeds = plain.get_input_embeddings()(ids)
    (values,) = adapters[-1].b.values()
    embeds[:, : LEAD.tokens] += 2.0 * values.T[chosen_by_hand(mixture, adapters[-1], input_ids=ids)]
    answer = torch.tensor([[0, LEAD.marker, 5], [0, LEAD.marker, 7]])
    with torch.no_grad():
        expected = plain(inputs_embeds=embeds, decoder_input_ids=answer).logits
        torch.testing.assert_close(model(input_ids=ids, decoder_input_ids=answer).logits, expected)


@pytest.mark.parametrize(("earlier", "first"), [(0, 0), (1, 3), (2, None)])
def test_a_stage_trains_prompts_that_no_earlier_one_had_while_there_are_some(earlier: int, first: int | None) -> None:
    model = tiny_llama()
    adapters = pools(model, earlier)
    mixture = prompted(model, adapters, new=NewAdapter(task="new", rank=POOL, alpha=POOL, learn_recipe=False))
    matches: list[Tensor] = []
    gate = torch.eye(earlier + 1)[-1:]
    logits = model(
        input_ids=led(prompts(4, 6)), task_gate=gate, on_select=lambda _path, one: matches.append(one.scores)
    ).logits
    (logits.square().mean() + (1 - matches[0]).mean()).backward()
    (keys, values) = mixture.trainable().values()
    assert keys.grad is not None and values.grad is not None
    for moved in (keys.grad.abs().sum(dim=1), values.grad.abs().sum(dim=0)):
        touched = moved.nonzero().flatten().tolist()
        if first is None:
            assert len(touched) >= LEAD.tokens
        else:
            assert touched == list(range(first, first + LEAD.tokens))
