"""Ranking finds the labels that continuing every one of them finds, in few passes, and leaves the prompt's cache alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from amlora_dist.errors import UserError
from amlora_dist.evaluation import ranking
from amlora_dist.evaluation.decoding import Decoder, Prefilled
from amlora_dist.evaluation.label_plan import LabelPlan, plan_labels
from amlora_dist.evaluation.ranking import (
    CACHE_TOKENS,
    Room,
    choosing,
    count_passes,
    finished,
    label_scores,
    scoring,
    takes_tries,
)
from amlora_dist.tasks.batches import Example
from tests.evaluation.tiny_models import EOS, LABELS, PAD, VOCABULARY, naive_loglikelihood, tiny

PROMPTS = [(5, 6, 7, 8, 3), (9, 4), (12, 17, 3, 3, 2, 14, 6)]
SETS: dict[str, list[tuple[int, ...]]] = LABELS | {
    "many": sorted({(n % 13 + 3, n % 7 + 2, n % 5 + 4)[: 1 + n % 3] for n in range(60)}),
    "one alone": [(3, 4, 5)],
}


def decoder_of(kind: str, attention: str | None = None) -> Decoder:
    model = tiny(kind)
    if attention is not None:
        model.set_attn_implementation(attention)
    return Decoder(model, pad_id=PAD, eos_id=EOS, encoder_decoder=kind == "t5")


@torch.no_grad()
def prefilled(decoder: Decoder) -> Prefilled:
    width = max(map(len, PROMPTS))
    left = not decoder.encoder_decoder
    ids = [[PAD] * (width - len(one)) + [*one] if left else [*one] + [PAD] * (width - len(one)) for one in PROMPTS]
    mask = [[int(i >= width - len(o)) if left else int(i < len(o)) for i in range(width)] for o in PROMPTS]
    return decoder.prefill(torch.tensor(ids), torch.tensor(mask))


def naive(decoder: Decoder, plan: LabelPlan) -> Tensor:
    rows = [
        [naive_loglikelihood(decoder._forward, Example(0, prompt, (), None, ""), one) for one in plan.candidates]
        for prompt in PROMPTS
    ]
    return torch.tensor(rows)


def test_labels_of_one_token_need_no_pass() -> None:
    plan = plan_labels([(3,), (4,)], EOS)
    assert (plan.contexts, plan.trie.size, plan.ends) == ((), 0, False)


def test_labels_that_begin_alike_share_their_nodes_and_contexts() -> None:
    plan = plan_labels([(8, 3), (3,), (8, 4), (8, 4, 5), (9, 3)], EOS)
    assert plan.ends
    assert plan.contexts == ((3,), (8, 3), (9, 3), (8, 4, 5))
    assert plan.trie.tokens == (3, 8, 3, 4, 5, 9, 3)
    assert plan.trie.ends == (1, 5, 3, 5, 5, 7, 7)
    plan = plan_labels([(8, 3), (8, 4), (8, 5, 5), (9, 3)], EOS)
    assert not plan.ends
    assert plan.contexts == ((9,), (8, 5))
    assert plan.trie.tokens == (8, 5, 9)


def test_eos_counts_for_all_labels_if_one_begins_another() -> None:
    assert plan_labels([(3,), (3, 4), (5,)], EOS).candidates == ((3, EOS), (3, 4, EOS), (5, EOS))
    assert plan_labels([(3, 5), (3, 4)], EOS).candidates == ((3, 5), (3, 4))


@pytest.mark.parametrize("labels", [[(3,), ()], [(3,), (4,), (3,)]])
def test_labels_that_the_model_cannot_tell_apart_are_refused(labels: list[tuple[int, ...]]) -> None:
    with pytest.raises(UserError, match=r"no tokens|same tokens"):
        plan_labels(labels, EOS)


def test_contexts_of_unlike_length_go_in_passes_of_their_own() -> None:
    short = [(n, 2) for n in range(3, 9)]
    plan = plan_labels([*short, (9, 2, 2, 2), (10, 2, 2, 2)], EOS)
    assert plan.passes(99) == [range(6), range(6, 8)]
    assert plan.passes(4) == [range(4), range(4, 6), range(6, 8)]
    assert plan_labels([(3, 2), (9, 2, 2)], EOS).passes(99) == [range(2)]
    assert plan_labels([(3,), (9,)], EOS).passes(99) == []


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize(("kind", "attention"), [("llama", "eager"), ("llama", "sdpa"), ("gpt2", "eager")])
def test_tries_give_every_label_its_likelihood_alone(kind: str, attention: str, name: str) -> None:
    decoder, plan = decoder_of(kind, attention), plan_labels(SETS[name], EOS)
    state = prefilled(decoder)
    assert takes_tries(decoder, state)
    with torch.no_grad():
        scores = label_scores(decoder, state, plan, Room(7, 3))
    torch.testing.assert_close(scores, naive(decoder, plan), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("kind", ["mistral", "t5"])
def test_sliding_windows_and_encoder_decoders_continue_copies(kind: str, name: str) -> None:
    decoder, plan = decoder_of(kind), plan_labels(SETS[name], EOS)
    state = prefilled(decoder)
    assert not takes_tries(decoder, state)
    with torch.no_grad():
        scores = label_scores(decoder, state, plan, Room(7, 3))
        chosen = finished(choosing(decoder, state, plan, Room(7, 3)))
    torch.testing.assert_close(scores, naive(decoder, plan), rtol=0, atol=1e-5)
    assert chosen == scores.argmax(dim=-1).tolist()


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("first", [1, 3, 16])
@pytest.mark.parametrize("scale", [None, 0.0, 3.0])
def test_the_best_label_is_the_likeliest_whatever_else_counts(
    name: str, first: int, scale: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranking, "FIRST_NODES", first)
    decoder, plan = decoder_of("llama"), plan_labels(SETS[name], EOS)
    more = None
    if scale is not None:
        more = scale * torch.randn(3, len(plan.candidates), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        state = prefilled(decoder)
        chosen = finished(choosing(decoder, state, plan, Room(7, 3), more))
        scores = label_scores(decoder, state, plan, Room(7, 3)) + (0.0 if more is None else more)
    assert chosen == scores.argmax(dim=-1).tolist()


def test_of_equals_the_first_wins() -> None:
    decoder, plan = decoder_of("llama"), plan_labels(SETS["many"], EOS)
    state = prefilled(decoder)
    with torch.no_grad():
        # So much counts for the labels that nothing of their likelihoods is left.
        chosen = finished(choosing(decoder, state, plan, Room(7, 3), torch.full((3, len(plan.candidates)), 1e12)))
    assert chosen == [0, 0, 0]


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2", "t5"])
@pytest.mark.parametrize("few", [True, False])
def test_ranking_in_several_passes_changes_no_score_and_no_later_output(
    kind: str, few: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, plan, room = decoder_of(kind), plan_labels(LABELS["many tokens"], EOS), Room(7, 3)
    with torch.no_grad():
        untouched = decoder.greedy(prefilled(decoder), 4)
        state = prefilled(decoder)
        whole = label_scores(decoder, state, plan, room)
        if few:
            monkeypatch.setattr(ranking, "PASS_LOGITS", 2 * VOCABULARY * 3)
            monkeypatch.setattr(ranking, "CACHE_TOKENS", 1)
        passes = list(scoring(decoder, state, plan, room))
        scores = label_scores(decoder, state, plan, room)
        finished(choosing(decoder, state, plan, room))
        abandoned = scoring(decoder, state, plan, room)
        next(abandoned)
        abandoned.close()
        assert len(passes) == count_passes(decoder, state, plan, room)
        assert len(passes) > 1 or not few
        assert decoder.greedy(state, 4) == untouched
    torch.testing.assert_close(scores, whole, rtol=0, atol=1e-5)


def test_a_sure_model_needs_few_tokens_and_an_unsure_one_few_passes() -> None:
    model = tiny("llama")
    tokens: list[int] = []

    def forward(**inputs: Any) -> Any:
        tokens.append(inputs["input_ids"].shape[1])
        return model(**inputs)

    labels = [(a, b, c) for a in range(3, 9) for b in range(3, 9) for c in range(3, 7)]
    plan = plan_labels(labels, EOS)

    def used(shape: Callable[[Prefilled], None], more: Tensor | None = None) -> list[int]:
        decoder = Decoder(model, pad_id=PAD, eos_id=EOS, encoder_decoder=False, forward=forward)
        with torch.no_grad():
            state = prefilled(decoder)
            shape(state)
            tokens.clear()
            finished(choosing(decoder, state, plan, Room(7, 3), more))
        return list(tokens)

    def sure(state: Prefilled) -> None:
        state.logits[:, 5] += 40

    assert sum(used(sure)) < plan.trie.size
    favoured = torch.zeros(3, len(labels))
    favoured[:, 17] = 100.0
    assert len(used(lambda _: None, favoured)) == 1
    assert len(used(lambda _: None)) <= 3


def test_passes_are_bounded_but_never_refused() -> None:
    plan = plan_labels([(n, 3, 4) for n in range(5, 30)], EOS)
    assert Room(62, 16).contexts(plan) == CACHE_TOKENS // (64 * 16)
    assert Room(4000, 64).contexts(plan) == 1
    assert Room(62, 16).nodes(49_152) == 85
    assert Room(62, 4096).nodes(250_000) == 1
