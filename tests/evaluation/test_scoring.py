"""Scoring in batches with a cache gives what a naive pass over one prompt at a time gives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from amlora_dist.errors import UserError
from amlora_dist.evaluation.scoring import (
    Prediction,
    deal,
    merge,
    read_predictions,
    score_task,
    summarise,
    write_predictions,
)
from tests.evaluation.tiny_models import EOS, LABELS, PAD, Words, examples, naive_loglikelihood, naive_output, tiny

KINDS = ["llama", "mistral", "gpt2", "t5"]


def score(model: Any, rows: list[Any], **settings: Any) -> list[Prediction]:
    fixed: dict[str, Any] = {"tokenizer": Words(), "pad_id": PAD, "eos_id": EOS, "batch_size": 4}
    fixed["encoder_decoder"] = model.config.is_encoder_decoder
    return score_task(model, rows, **(fixed | settings))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LABELS)
def test_labelled_rows_score_as_one_at_a_time(kind: str, name: str) -> None:
    model, labels = tiny(kind), LABELS[name]
    rows = examples(11, labels=labels)
    steps = max(map(len, labels)) + 1
    found = score(model, rows, labels=labels)
    assert [p.row for p in found] == [e.row for e in rows]
    for example, prediction in zip(rows, found, strict=True):
        tokens, ended = naive_output(model, example, steps)
        assert (prediction.output, prediction.ended) == (Words().decode(tokens), ended)
        assert prediction.correct == float(ended and Words().decode(tokens) == example.answer)
        eos = (EOS,) if name == "one begins another" else ()
        expected = [naive_loglikelihood(model, example, (*label, *eos)) for label in labels]
        assert prediction.loglikelihoods == pytest.approx(expected, abs=2e-4)
        assert prediction.ranked == expected.index(max(expected))
        assert prediction.ranked_correct == (prediction.ranked == example.label)


@pytest.mark.parametrize(("kind", "seed"), [("llama", 1), ("mistral", 1), ("gpt2", 4), ("t5", 3)])
def test_free_text_is_what_generate_writes(kind: str, seed: int) -> None:
    model, rows = tiny(kind, seed), examples(9, labels=None)
    found = score(model, rows, metric="token_f1", max_new_tokens=7)
    expected = [naive_output(model, example, 7) for example in rows]
    assert [(p.output, p.ended) for p in found] == [(Words().decode(t), ended) for t, ended in expected]
    assert {p.ranked for p in found} == {None}
    assert any(ended for _, ended in expected) and not all(ended for _, ended in expected)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_three_ranks_give_exactly_what_one_gives(kind: str) -> None:
    model, labels = tiny(kind), LABELS["many tokens"]
    rows = examples(21, labels=labels)
    alone = score(model, rows, labels=labels)
    shares = [score(model, rows, labels=labels, rank=rank, world=3) for rank in range(3)]
    assert merge(shares) == alone
    assert summarise(merge(shares)) == summarise(alone)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_batch_size_changes_no_answer_and_no_rank(batch_size: int) -> None:
    model, labels = tiny("llama"), LABELS["many tokens"]
    rows = examples(13, labels=labels)
    found = score(model, rows, labels=labels, batch_size=batch_size)
    expected = score(model, rows, labels=labels, batch_size=4)
    assert [replace(p, loglikelihoods=None) for p in found] == [replace(p, loglikelihoods=None) for p in expected]


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("count", [1, 4, 9, 13])
def test_every_rank_makes_equally_many_passes(kind: str, count: int) -> None:
    model, labels = tiny(kind), LABELS["many tokens"]
    rows = examples(count, labels=labels)
    passes, answered = [], 0
    for rank in range(3):
        calls: list[int] = []

        def forward(calls: list[int] = calls, **inputs: Any) -> Any:
            calls.append(1)
            return model(**inputs)

        answered += len(score(model, rows, labels=labels, rank=rank, world=3, forward=forward))
        passes.append(len(calls))
    assert len(set(passes)) == 1
    assert answered == count


def test_ranks_that_end_early_go_on_until_all_are_done() -> None:
    model, rows = tiny("llama", seed=1), examples(4, labels=None)
    asked: list[bool] = []

    def nobody_is_done(done: bool) -> bool:
        asked.append(done)
        return False

    found = score(model, rows, metric="rouge_l", max_new_tokens=9, all_done=nobody_is_done)
    assert len(asked) == 8
    assert found == score(model, rows, metric="rouge_l", max_new_tokens=9)


def test_a_single_process_stops_when_its_rows_have_ended() -> None:
    model, rows = tiny("llama", seed=1), examples(1, labels=None)
    calls: list[int] = []

    def forward(**inputs: Any) -> Any:
        calls.append(1)
        out = model(**inputs)
        out.logits[..., EOS] = 1e4
        return out

    (prediction,) = score(model, rows, metric="rouge_l", max_new_tokens=9, forward=forward)
    assert (len(calls), prediction.output, prediction.ended) == (1, "", True)


def test_a_labelled_output_that_goes_on_is_wrong_even_if_it_begins_with_the_label() -> None:
    model, labels = tiny("llama"), [(3,), (4,)]
    rows = [replace(e, label=0, answer="w3") for e in examples(2, labels=labels)]

    def forward(eos_at: int, **inputs: Any) -> Any:
        out = model(**inputs)
        second = inputs["input_ids"].shape[1] == 1 and inputs.get("past_key_values") is not None
        out.logits[..., EOS if second and eos_at == 2 else (PAD if second else 3)] = 1e4
        return out

    ends = score(model, rows, labels=labels, forward=lambda **i: forward(2, **i))
    goes_on = score(model, rows, labels=labels, forward=lambda **i: forward(3, **i))
    assert [p.output for p in ends] == [p.output for p in goes_on] == ["w3", "w3"]
    assert [p.correct for p in ends] == [1.0, 1.0]
    assert [p.correct for p in goes_on] == [0.0, 0.0]


def test_routing_arguments_go_with_the_prompt_only() -> None:
    model, labels = tiny("llama"), LABELS["many tokens"]
    rows = examples(5, labels=labels)
    seen: list[dict[str, Any]] = []

    def forward(*, task_gate: Any = None, prompt_mask: Any = None, on_route: Any = None, **inputs: Any) -> Any:
        if inputs.get("past_key_values") is None:
            seen.append({"task_gate": task_gate, "prompt_mask": prompt_mask})
            assert prompt_mask.sum(-1).tolist() == inputs["attention_mask"].sum(-1).tolist()
            if on_route is not None:
                on_route(None, torch.tensor([[0.25, 0.75]]).expand(len(prompt_mask), 2))
        else:
            assert task_gate is None and prompt_mask is None and on_route is None
        return model(**inputs)

    routed = score(model, rows, labels=labels, tasks=2, forward=forward)
    assert {tuple(p.gates or ()) for p in routed} == {(0.25, 0.75)}
    assert seen[0]["task_gate"] is None
    seen.clear()
    oracle = score(model, rows, labels=labels, tasks=2, task_gate_row=1, forward=forward)
    assert {p.gates for p in oracle} == {None}
    assert seen[0]["task_gate"].tolist() == [[0.0, 1.0]] * 4


def test_dummy_batches_fill_the_last_round_and_do_not_count() -> None:
    rows = examples(9, labels=None)
    dealt = [deal(rows, 2, rank, 3) for rank in range(3)]
    assert [len(batches) for batches in dealt] == [2, 2, 2]
    counted = [i for batches in dealt for batch, counts in batches if counts for i in batch]
    assert sorted(counted) == list(range(9))
    assert [len(batch) for batches in dealt for batch, counts in batches if not counts] == [1]
    longest_first = [len(rows[i].prompt) for batch, _ in deal(rows, 2, 0, 1) for i in batch]
    assert longest_first == sorted(longest_first, reverse=True)


def test_the_model_is_in_its_former_mode_afterwards() -> None:
    model = tiny("llama").train()
    score(model, examples(2, labels=LABELS["one token each"]), labels=LABELS["one token each"])
    assert model.training


def test_no_examples_give_no_predictions_and_undefined_scores() -> None:
    assert score(tiny("llama"), [], labels=[(3,)]) == []
    assert summarise([]) == {"accuracy": None, "ranked_accuracy": None, "rows": 0}


def test_summary_is_the_mean_over_rows() -> None:
    one = Prediction(row=1, answer="a", output="a", ended=True, correct=1.0, ranked=0, ranked_correct=True)
    two = Prediction(row=2, answer="a", output="b", ended=True, correct=0.5, ranked=1, ranked_correct=False)
    assert summarise([one, two]) == {"accuracy": 0.75, "ranked_accuracy": 0.5, "rows": 2}
    assert summarise([replace(one, ranked=None, ranked_correct=None)])["ranked_accuracy"] is None


def test_predictions_survive_a_file(tmp_path: Path) -> None:
    full = Prediction(3, "ja", 'nein\n"', True, 0.0, 1, False, [-0.1, -2.5], [0.75, 0.25])
    free = Prediction(4, "Grüße", "", False, 0.5)
    path = tmp_path / "scores" / "test.jsonl"
    write_predictions(path, [full, free])
    assert read_predictions(path) == [full, free]
    assert [file.name for file in path.parent.iterdir()] == ["test.jsonl"]


def test_a_damaged_file_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "test.jsonl"
    write_predictions(path, [Prediction(4, "a", "", False, 0.5)])
    path.write_text(path.read_text() + '{"row": 5}\n')
    with pytest.raises(UserError, match=r"test\.jsonl, line 2: not a prediction"):
        read_predictions(path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metric": "bleu", "labels": [(3,)]}, "metric: found 'bleu', expected one of accuracy"),
        ({"metric": "rouge_l"}, "max_answer_tokens"),
        ({"labels": [(3,), ()]}, "label 1 has no tokens"),
        ({"labels": [(3,), (4,), (3,)]}, "labels 0 and 2 have the same tokens"),
        ({"metric": "rouge_l", "max_new_tokens": 64}, "exceed the model's 64 positions"),
    ],
)
def test_unusable_settings_say_what_to_fix(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        score(tiny("llama"), examples(2, labels=[(3,)]), **settings)
