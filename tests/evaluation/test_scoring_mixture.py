"""A model with a bank is scored as it answers one prompt at a time: each gate stays with its prompt in the cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from amlora_dist.adapters.adapter import Adapter
from amlora_dist.adapters.inject import Mixture, inject
from amlora_dist.adapters.router import PosteriorRouter, UniformRouter
from amlora_dist.adapters.settings import AdapterSettings, GateSettings
from amlora_dist.adapters.targets import find_targets
from amlora_dist.evaluation.scoring import ZERO_ROW, Prediction, merge, score_task
from tests.evaluation.tiny_models import EOS, LABELS, PAD, Words, examples, naive_output, tiny

TASKS = ["first", "second", "third"]
MANY = LABELS["many tokens"]


def with_bank(model: Any, router: Any = None) -> Mixture:
    """Three adapters that change the answers, the third with a recipe, behind a posterior router."""
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    targets = find_targets(model, AdapterSettings(rank=2, alpha=2), 1)
    adapters = [
        Adapter(
            task,
            2,
            2.0,
            {t.path: draw(2, t.in_features) for t in targets},
            {t.path: draw(t.out_features, 2) for t in targets},
            {t.path: draw(place) for t in targets} if place == 2 else {},
        )
        for place, task in enumerate(TASKS)
    ]
    if router is None:
        weights, bias = draw(3, 16).double(), torch.zeros(3, dtype=torch.float64)
        router = PosteriorRouter(TASKS, weights, bias, 8.0, GateSettings(threshold=0.0))
    return inject(model, targets, adapters, router=router, router_layer=1)


def score(model: Any, rows: list[Any], **settings: Any) -> list[Prediction]:
    fixed: dict[str, Any] = {"tokenizer": Words(), "pad_id": PAD, "eos_id": EOS, "batch_size": 4, "labels": MANY}
    fixed |= {"tasks": len(TASKS), "encoder_decoder": model.config.is_encoder_decoder}
    return score_task(model, rows, **(fixed | settings))


@torch.no_grad()
def naive_scores(model: Any, example: Any, **routing: Any) -> list[float]:
    """Label log-likelihoods of one prompt without cache or padding; only the prompt is routed."""
    prompt = torch.tensor([example.prompt])
    found = []
    for label in MANY:
        if model.config.is_encoder_decoder:
            inputs = {"input_ids": prompt, "decoder_input_ids": torch.tensor([[PAD, *label[:-1]]])}
            first = 0
        else:
            inputs = {"input_ids": torch.tensor([[*example.prompt, *label[:-1]]])}
            first = len(example.prompt) - 1
            routing["prompt_mask"] = torch.ones_like(prompt)
        logits = model(**inputs, use_cache=False, **routing).logits[0, first:]
        found.append(float(logits.log_softmax(-1)[range(len(label)), list(label)].sum()))
    return found


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_routed_rows_score_as_one_at_a_time(kind: str) -> None:
    model = tiny(kind)
    mixture = with_bank(model)
    rows = examples(9, labels=MANY)
    found = score(model, rows)
    for example, prediction in zip(rows, found, strict=True):
        tokens, ended = naive_output(model, example, 5)
        assert (prediction.output, prediction.ended) == (Words().decode(tokens), ended)
        assert prediction.loglikelihoods == pytest.approx(naive_scores(model, example), abs=5e-4)
        features = mixture.routing_features(input_ids=torch.tensor([example.prompt]))
        assert mixture.router is not None
        assert prediction.gates == pytest.approx(mixture.router.gates(features, 1)[0].tolist(), abs=1e-5)
    assert len({tuple(p.gates or ()) for p in found}) > 5


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_routed_rows_score_alike_on_one_rank_and_on_three(kind: str) -> None:
    model = tiny(kind)
    with_bank(model)
    rows = examples(14, labels=MANY)
    assert merge(score(model, rows, rank=rank, world=3) for rank in range(3)) == score(model, rows)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_the_oracle_gives_every_prompt_the_row_of_its_task(kind: str) -> None:
    model = tiny(kind)
    mixture = with_bank(model)
    rows = examples(5, labels=MANY)
    for task in range(3):
        found = score(model, rows, task_gate_row=task)
        gate = mixture.one_hot(task, 1)
        expected = [naive_scores(model, example, task_gate=gate) for example in rows]
        assert [p.loglikelihoods for p in found] == [pytest.approx(one, abs=5e-4) for one in expected]
        assert {p.gates for p in found} == {None}


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_the_zero_row_answers_as_the_base_model(kind: str) -> None:
    rows = examples(7, labels=MANY)
    base = score(tiny(kind), rows, tasks=0)
    model = tiny(kind)
    with_bank(model)
    found = score(model, rows, task_gate_row=ZERO_ROW)
    assert [replace(p, loglikelihoods=None) for p in found] == [replace(p, loglikelihoods=None) for p in base]
    routed = score(model, rows)
    assert [p.output for p in routed] != [p.output for p in base]


def test_a_router_that_reads_no_features_is_noted_too() -> None:
    model = tiny("llama")
    with_bank(model, UniformRouter(TASKS))
    found = score(model, examples(3, labels=MANY))
    assert [p.gates for p in found] == [pytest.approx([1 / 3] * 3)] * 3
