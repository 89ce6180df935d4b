"""A prompt goes through the model once, and is projected onto the vocabulary once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from amlora_dist.evaluation.decoding import Decoder, picked, repeated
from amlora_dist.evaluation.label_plan import plan_labels
from amlora_dist.evaluation.ranking import Room, label_scores
from tests.evaluation.tiny_models import EOS, PAD, VOCABULARY, tiny


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
        label_scores(decoder, state, plan, Room(5, 2))
        decoder.greedy(state, 3)
    assert widths == [(2, 5), (2, 3), (2, 1), (2, 1)]


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


def test_rows_that_are_picked_or_repeated_copy_no_other_row_and_leave_the_state_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoder = Decoder(tiny("llama"), pad_id=PAD, eos_id=EOS, encoder_decoder=False)
    prompts = torch.tensor([[5, 6, 7, 8], [9, 4, 3, 2], [12, 17, 3, 2]])
    with torch.no_grad():
        wanted = decoder.greedy(decoder.prefill(prompts, torch.ones_like(prompts)), 3)
        state = decoder.prefill(prompts, torch.ones_like(prompts))
        before = [(layer.keys, layer.keys.clone()) for layer in state.cache.layers]
        copied: list[torch.Size] = []
        plain = torch.Tensor.__deepcopy__
        monkeypatch.setattr(torch.Tensor, "__deepcopy__", lambda one, memo: (copied.append(one.shape), plain(one, memo))[1])
        some, twice = picked(state, [2, 0]), repeated(state, 2)
        assert not any(len(shape) == 4 for shape in copied), "keys and values of all rows"
        assert decoder.greedy(some, 3) == [wanted[2], wanted[0]]
        assert all(torch.equal(layer.keys[::2], keys) for layer, (keys, _) in zip(twice.cache.layers, before, strict=True))
        for layer, (keys, was) in zip(state.cache.layers, before, strict=True):
            assert layer.keys is keys and torch.equal(keys, was)
        assert decoder.greedy(state, 3) == wanted


def test_a_row_that_is_done_needs_no_room_for_those_that_go_on() -> None:
    """Learned positions end: a long prompt has room for its own limit, and not for the limit of a shorter one beside it."""
    decoder = Decoder(tiny("gpt2"), pad_id=PAD, eos_id=-1, encoder_decoder=False)  # 64 positions, and nothing ends
    ids = torch.randint(3, VOCABULARY, (2, 62), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 62, dtype=torch.long)
    mask[1, :40] = 0
    with torch.no_grad():
        together = decoder.greedy(decoder.prefill(ids, mask), 8, bool, [2, 8])
        long = decoder.greedy(decoder.prefill(ids[:1], mask[:1]), 2)
        short = decoder.greedy(decoder.prefill(ids[1:, 40:], mask[1:, 40:]), 8)
    assert together == [*long, *short]
