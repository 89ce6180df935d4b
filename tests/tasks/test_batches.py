"""Tokens of prompts and answers, the order of an epoch, batches."""

from __future__ import annotations

from typing import Any

import pytest

from amlora_dist.errors import UserError
from amlora_dist.tasks.batches import (
    IGNORED,
    Example,
    answer_tokens,
    collate,
    collate_prompts,
    collate_seq2seq,
    encode,
    epoch_order,
    label_tokens,
)
from amlora_dist.tasks.prompts import template_for
from amlora_dist.tasks.sources import Row
from amlora_dist.tasks.task import Columns, Label, PromptSettings, SourceSpec, Splits, TaskSpec
from tests.tasks import tokenizers_small

CAUSAL = [tokenizers_small.byte_level_bpe(), tokenizers_small.sentencepiece_bpe()]
T5_LIKE = tokenizers_small.unigram()


def make_spec(**changes: Any) -> TaskSpec:
    labels = [Label(value=text, text=text) for text in ("World", "Science or Technology", "very negative")]
    settings: dict[str, Any] = {
        "name": "news",
        "version": 1,
        "kind": "topic",
        "source": SourceSpec(kind="builtin"),
        "splits": Splits(train="a", test="b"),
        "columns": Columns(text="text", label="label"),  # type: ignore[arg-type]
        "prompt": PromptSettings(question="What is the topic?"),
        "labels": labels,
    }
    return TaskSpec(**{**settings, **changes})


def make_row(text: str, target: str = "World", number: int = 1) -> Row:
    return Row(number, {"text": text}, text, target, target)


ROWS = [make_row("The parcel was due.", "World", 3), make_row("I was charged twice", "Science or Technology", 7)]


@pytest.mark.parametrize("tokenizer", CAUSAL, ids=["byte-level", "sentencepiece"])
@pytest.mark.parametrize("style", ["question", "options", "bare", "named"])
def test_prompt_and_target_are_what_the_whole_text_tokenises_to(tokenizer: Any, style: Any) -> None:
    spec = make_spec()
    template = template_for(spec, style)
    for target in spec.label_texts:
        row = make_row("The parcel was due on Monday", target)
        (example,) = encode([row], spec, template, tokenizer, max_length=400, encoder_decoder=False)
        whole = tokenizer(f"{template.render(row)} {target}")["input_ids"]
        assert [*example.prompt, *example.target] == [*whole, tokenizer.eos_token_id]
        assert list(example.prompt) == tokenizer(template.render(row))["input_ids"]


def test_encoder_decoder_target_is_the_answer_alone_and_the_prompt_keeps_its_end() -> None:
    spec = make_spec()
    template = template_for(spec, "question")
    row = make_row("The parcel was due", "very negative")
    (example,) = encode([row], spec, template, T5_LIKE, max_length=400, encoder_decoder=True)
    assert list(example.target) == T5_LIKE("very negative")["input_ids"]
    assert list(example.prompt) == T5_LIKE(template.render(row))["input_ids"]
    assert example.prompt[-1] == T5_LIKE.eos_token_id
    assert T5_LIKE.decode(example.target, skip_special_tokens=True) == "very negative"


def test_causal_prompt_never_ends_in_end_of_sequence() -> None:
    spec = make_spec()
    (example,) = encode(ROWS[:1], spec, template_for(spec), T5_LIKE, max_length=400, encoder_decoder=False)
    assert example.prompt[-1] != T5_LIKE.eos_token_id
    assert example.target[-1] == T5_LIKE.eos_token_id


def test_answer_that_would_merge_with_the_prompt_is_tokenised_apart_and_reads_the_same() -> None:
    tokenizer = tokenizers_small.merges_colon_and_space()
    tokens = answer_tokens("True", tokenizer, encoder_decoder=False)
    assert tokenizer.decode(tokens).replace(" ", "") == "True"
    assert tokens[0] == tokenizer(" ")["input_ids"][0]


@pytest.mark.parametrize("tokenizer", [*CAUSAL, T5_LIKE], ids=["byte-level", "sentencepiece", "unigram"])
@pytest.mark.parametrize("encoder_decoder", [False, True])
def test_label_tokens_are_the_targets_without_their_end(tokenizer: Any, encoder_decoder: bool) -> None:
    spec = make_spec()
    rows = [make_row("x y", text) for text in spec.label_texts]
    examples = encode(rows, spec, template_for(spec), tokenizer, max_length=400, encoder_decoder=encoder_decoder)
    labels = label_tokens(spec, tokenizer, encoder_decoder)
    assert [example.target[:-1] for example in examples] == labels
    assert [example.label for example in examples] == [0, 1, 2]
    assert len(set(labels)) == 3 and all(labels)


@pytest.mark.parametrize("tokenizer", [*CAUSAL, T5_LIKE], ids=["byte-level", "sentencepiece", "unigram"])
@pytest.mark.parametrize("max_length", [60, 75, 100])
def test_only_the_text_is_cut_and_as_little_as_needed(tokenizer: Any, max_length: int) -> None:
    spec = make_spec()
    template = template_for(spec, "question")
    text = "The parcel was due on Monday and has not come, I was charged twice for the camera. " * 8
    (example,) = encode([make_row(text)], spec, template, tokenizer, max_length=max_length, encoder_decoder=True)
    assert max_length - 8 <= len(example.prompt) <= max_length
    shown = tokenizer.decode(example.prompt, skip_special_tokens=True).replace("\n", " ").replace("▁", " ").split()
    assert " ".join(shown).replace(" ", "").endswith("Whatisthetopic?Answer:")
    assert "".join(shown).startswith("Theparcelwasdue")


def test_short_prompt_is_untouched_by_the_limit() -> None:
    spec = make_spec()
    template = template_for(spec)
    wide = encode(ROWS, spec, template, CAUSAL[0], max_length=500, encoder_decoder=False)
    exact = max(len(example.prompt) for example in wide)
    assert encode(ROWS, spec, template, CAUSAL[0], max_length=exact, encoder_decoder=False) == wide


def test_limit_shorter_than_the_question_is_a_clear_error() -> None:
    spec = make_spec()
    with pytest.raises(UserError, match=r"task 'news': max_length 10 is too small"):
        encode(ROWS, spec, template_for(spec), CAUSAL[0], max_length=10, encoder_decoder=False)


def test_tokenizer_without_end_of_sequence_is_a_clear_error() -> None:
    tokenizer = tokenizers_small.byte_level_bpe()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        encode(ROWS, make_spec(), template_for(make_spec()), tokenizer, max_length=100, encoder_decoder=False)


def test_free_text_answer_is_cut_to_its_limit_and_has_no_label() -> None:
    spec = make_spec(labels=None, max_answer_tokens=2, columns=Columns(text="text", answer="a"))  # type: ignore[arg-type]
    row = Row(1, {"text": "x"}, "x", None, "a long answer with many tokens")
    (example,) = encode([row], spec, template_for(spec, "bare"), CAUSAL[0], max_length=99, encoder_decoder=False)
    assert len(example.target) == 3 and example.target[-1] == CAUSAL[0].eos_token_id
    assert example.label is None and example.answer == row.target


def test_examples_keep_row_numbers() -> None:
    spec = make_spec()
    examples = encode(ROWS, spec, template_for(spec), CAUSAL[0], max_length=300, encoder_decoder=False)
    assert [example.row for example in examples] == [3, 7]
    assert encode([], spec, template_for(spec), CAUSAL[0], max_length=300, encoder_decoder=False) == []


def test_epoch_order_is_a_permutation_that_depends_on_seed_stage_and_epoch_alone() -> None:
    order = epoch_order(100, seed=1, stage="agnews", epoch=0)
    assert sorted(order) == list(range(100))
    assert order == epoch_order(100, seed=1, stage="agnews", epoch=0)
    others = [
        epoch_order(100, seed=2, stage="agnews", epoch=0),
        epoch_order(100, seed=1, stage="yahoo", epoch=0),
        epoch_order(100, seed=1, stage="agnews", epoch=1),
        list(range(100)),
    ]
    assert all(order != other for other in others)
    # Golden: stored runs resume in this order on every machine and Python version.
    assert epoch_order(8, seed=0, stage="s", epoch=0) == GOLDEN_ORDER


GOLDEN_ORDER = [0, 2, 3, 1, 6, 4, 5, 7]
TWO = [Example(1, (5, 6, 7), (8, 2), 0, "a"), Example(2, (5,), (9, 9, 9, 2), 1, "b")]


def test_causal_batch_puts_labels_on_targets_only_whatever_the_side() -> None:
    left = collate(TWO, pad_id=0, side="left")
    assert left["input_ids"].tolist() == [[5, 6, 7, 8, 2], [5, 9, 9, 9, 2]]
    right = collate([TWO[0], Example(2, (5,), (9, 2), 1, "b")], pad_id=0, side="right")
    assert right["input_ids"].tolist() == [[5, 6, 7, 8, 2], [5, 9, 2, 0, 0]]
    assert right["labels"].tolist() == [[IGNORED] * 3 + [8, 2], [IGNORED, 9, 2, IGNORED, IGNORED]]
    assert right["prompt_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]
    assert right["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    padded = collate([TWO[0], Example(2, (5,), (9, 2), 1, "b")], pad_id=0, side="left")
    assert padded["labels"].tolist()[1] == [IGNORED, IGNORED, IGNORED, 9, 2]
    assert padded["prompt_mask"].tolist()[1] == [0, 0, 1, 0, 0]


def test_encoder_decoder_batch_pads_prompts_and_labels_apart() -> None:
    batch = collate_seq2seq(TWO, pad_id=0, side="right")
    assert batch["input_ids"].tolist() == [[5, 6, 7], [5, 0, 0]]
    assert batch["labels"].tolist() == [[8, 2, IGNORED, IGNORED], [9, 9, 9, 2]]
    assert batch["prompt_mask"].equal(batch["attention_mask"])


def test_prompt_batch_holds_no_answer() -> None:
    batch = collate_prompts(TWO, pad_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [0, 0, 5]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert set(batch) == {"input_ids", "attention_mask", "prompt_mask"}
