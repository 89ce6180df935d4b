"""Ranking makes no more passes than its labels need, and leaves the prompt's cache alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from amlora_dist.evaluation.decoding import CACHE_TOKENS, Decoder, contexts_per_pass, plan_labels
from tests.evaluation.tiny_models import EOS, LABELS, PAD, tiny


def test_labels_of_one_token_need_no_pass() -> None:
    plan = plan_labels([(3,), (4,)], EOS)
    assert (plan.contexts, plan.context_of, plan.ends) == ((), (None, None), False)


def test_labels_that_begin_alike_share_a_context() -> None:
    plan = plan_labels([(8, 3), (3,), (8, 4), (8, 4, 5), (9, 3)], EOS)
    assert plan.ends
    assert plan.contexts == ((3,), (8, 3), (9, 3), (8, 4, 5))
    plan = plan_labels([(8, 3), (8, 4), (8, 5, 5), (9, 3)], EOS)
    assert not plan.ends
    assert plan.contexts == ((9,), (8, 5))
    assert plan.context_of == (1, 1, 1, 0)


def test_eos_counts_for_all_labels_if_one_begins_another() -> None:
    assert plan_labels([(3,), (3, 4), (5,)], EOS).candidates == ((3, EOS), (3, 4, EOS), (5, EOS))
    assert plan_labels([(3, 5), (3, 4)], EOS).candidates == ((3, 5), (3, 4))


def test_contexts_of_unlike_length_go_in_passes_of_their_own() -> None:
    short = [(n, 2) for n in range(3, 9)]
    plan = plan_labels([*short, (9, 2, 2, 2), (10, 2, 2, 2)], EOS)
    assert plan.passes(99) == [range(6), range(6, 8)]
    assert plan.passes(4) == [range(4), range(4, 6), range(6, 8)]
    assert plan_labels([(3, 2), (9, 2, 2)], EOS).passes(99) == [range(2)]
    assert plan_labels([(3,), (9,)], EOS).passes(99) == []


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2", "t5"])
@pytest.mark.parametrize("per_pass", [1, 2, 99])
def test_ranking_in_chunks_changes_no_score_and_no_later_output(kind: str, per_pass: int) -> None:
    model = tiny(kind)
    decoder = Decoder(model, pad_id=PAD, eos_id=EOS, encoder_decoder=kind == "t5")
    plan = plan_labels(LABELS["many tokens"], EOS)
    prompts = torch.tensor([[5, 6, 7, 8, 3], [9, 4, 11, 2, 2]])
    with torch.no_grad():
        untouched = decoder.greedy(decoder.prefill(prompts, torch.ones_like(prompts)), 4)
        state = decoder.prefill(prompts, torch.ones_like(prompts))
        whole = decoder.label_scores(state, plan, contexts_per_pass=50)
        scores = decoder.label_scores(state, plan, contexts_per_pass=per_pass)
        assert decoder.greedy(state, 4) == untouched
    torch.testing.assert_close(scores, whole, rtol=0, atol=1e-4)


def test_passes_over_the_prompt_and_the_labels_are_counted() -> None:
    model = tiny("llama")
    widths: list[tuple[int, ...]] = []

    def forward(**inputs: Any) -> Any:
        widths.append(tuple(inputs["input_ids"].shape))
        return model(**inputs)

    decoder = Decoder(model, pad_id=PAD, eos_id=EOS, encoder_decoder=False, forward=forward)
    plan = plan_labels([(3, 4), (3, 5, 6), (7,), (8, 9)], EOS)
    prompts = torch.tensor([[5, 6, 7, 8, 3]] * 2)
    with torch.no_grad():
        state = decoder.prefill(prompts, torch.ones_like(prompts))
        decoder.label_scores(state, plan, contexts_per_pass=5)
        decoder.greedy(state, 3)
    assert widths == [(2, 5), (4, 2), (2, 1), (2, 1)]


def test_prefill_projects_only_the_last_position_onto_the_vocabulary() -> None:
    model = tiny("llama")
    shapes: list[tuple[int, ...]] = []

    def forward(**inputs: Any) -> Any:
        out = model(**inputs)
        shapes.append(tuple(out.logits.shape))
        return out

    decoder = Decoder(model, pad_id=PAD, eos_id=EOS, encoder_decoder=False, forward=forward)
    with torch.no_grad():
        decoder.prefill(torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.long))
    assert shapes == [(1, 1, model.config.vocab_size)]


def test_repeated_caches_are_bounded_but_never_refused() -> None:
    plan = plan_labels([(n, 3, 4) for n in range(5, 30)], EOS)
    assert contexts_per_pass(62, 16, plan) == CACHE_TOKENS // (64 * 16)
    assert contexts_per_pass(4000, 64, plan) == 1
