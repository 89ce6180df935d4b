"""Prompt format 2: the text has the same ids whatever is asked of it, and nothing in it is a command."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from amlora_dist.errors import UserError
from amlora_dist.evaluation.requests import Prompter, Request
from amlora_dist.tasks.batches import answer_tokens, collate_prompts, encode
from amlora_dist.tasks.prompt_format import PromptFormat, TextPrompts, special_ends, text_ids
from amlora_dist.tasks.prompts import BANK_TEMPLATE, PromptTemplate, template_for
from amlora_dist.tasks.task_entry import TaskEntry
from tests.tasks.test_batches import CAUSAL, ROWS, T5_LIKE, make_spec

SECOND = PromptFormat(2, 64)


@pytest.mark.parametrize("tokenizer", CAUSAL)
def test_the_text_has_the_same_ids_behind_every_style_and_question(tokenizer) -> None:  # type: ignore[no-untyped-def]
    spec = make_spec()
    (alone,) = text_ids([ROWS[0].text], tokenizer, 64)
    for style in ("question", "options", "bare", "named"):
        (example,) = encode(
            ROWS[:1], spec, template_for(spec, style), tokenizer, max_length=300, encoder_decoder=False,
            prompt_format=SECOND,
        )  # fmt: skip
        assert example.text == alone and example.span is not None
        assert example.prompt[slice(*example.span)] == alone
        assert (example.span[0] == len(special_ends(tokenizer, False).before)) == (style != "named")


@pytest.mark.parametrize("tokenizer", [*CAUSAL, T5_LIKE])
def test_special_tokens_that_a_user_typed_are_plain_text(tokenizer) -> None:  # type: ignore[no-untyped-def]
    typed = f"before {tokenizer.eos_token} after"
    (ids,) = text_ids([typed], tokenizer, 64)
    assert tokenizer.eos_token_id not in ids
    prompts = TextPrompts(PromptTemplate("{{ text }}{{ text }}"), tokenizer, False, "twice")
    whole = prompts.prompt(ids, 64, text=typed)
    assert whole.span is None and tokenizer.eos_token_id not in whole.ids


@pytest.mark.parametrize("tokenizer", [*CAUSAL, T5_LIKE])
def test_special_tokens_are_plain_text_in_answers_fields_and_questions(tokenizer) -> None:  # type: ignore[no-untyped-def]
    end, encoder_decoder = tokenizer.eos_token, tokenizer is T5_LIKE
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}

    def held(ids: Sequence[int]) -> list[int]:
        return [token for token in ids if token in special]

    assert not held(answer_tokens(f"yes {end}", tokenizer, encoder_decoder))
    assert held(answer_tokens(f"yes {end}", tokenizer, encoder_decoder, split=False)), "as prompt format 1 had it"
    prompts = TextPrompts(PromptTemplate("{{ fields.title }}\n{{ text }}\nAnswer:"), tokenizer, encoder_decoder, "task")
    (ids,) = text_ids(["the text"], tokenizer, 64)
    plain, typed = (
        prompts.prompt(ids, 64, text="the text", fields={"title": title}).ids for title in ("on walls", f"on {end} walls")
    )
    assert held(plain) == held(typed)
    entry = TaskEntry(question="which ?", template="{{ text }}\n{{ question }}\nAnswer:")
    prompter = Prompter(
        {"task": entry}, BANK_TEMPLATE, tokenizer, encoder_decoder=encoder_decoder, positions=None, prompt_format=SECOND
    )
    asked = [Request(place, "the text", question, "task") for place, question in enumerate(("what ?", f"what {end} ?"))]
    prompter.read(asked)
    for request in asked:
        prompter.ask(request, new_tokens=4)
    assert held(asked[0].tokens) == held(asked[1].tokens)
    assert not any(map(held, prompter.labels([f"yes {end}", "no"])))


def test_more_new_tokens_than_a_model_has_room_for_are_named() -> None:
    prompter = Prompter({}, BANK_TEMPLATE, CAUSAL[0], encoder_decoder=False, positions=64, prompt_format=SECOND)
    request = Request(0, "the text")
    prompter.read([request])
    with pytest.raises(UserError, match="found 100 new tokens asked for, the model has room for 64 in all"):
        prompter.ask(request, new_tokens=100)


@pytest.mark.parametrize("tokenizer", CAUSAL)
def test_special_tokens_of_a_templates_author_stay_special(tokenizer) -> None:  # type: ignore[no-untyped-def]
    template = PromptTemplate(f"{tokenizer.eos_token} {{{{ fields.title }}}}\n{{{{ text }}}}\nAnswer:")
    prompts = TextPrompts(template, tokenizer, False, "task")
    (ids,) = text_ids(["the text"], tokenizer, 64)
    for title in ("on walls", f"on {tokenizer.eos_token} walls"):
        made = prompts.prompt(ids, 64, text="the text", fields={"title": title}).ids
        assert list(made).count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("tokenizer", CAUSAL)
def test_a_long_text_loses_its_last_tokens_and_nothing_else(tokenizer) -> None:  # type: ignore[no-untyped-def]
    template = PromptTemplate("{{ text }}\n{{ question }}\nAnswer:", question="which one ?")
    prompts = TextPrompts(template, tokenizer, False, "task")
    (ids,) = text_ids(["one two three four five six seven eight"], tokenizer, 64)
    whole = prompts.prompt(ids, 200, text="")
    assert whole.span is not None
    around = len(whole.ids) - len(ids)
    cut = prompts.prompt(ids, around + 3, text="")
    assert cut.span is not None and cut.ids[slice(*cut.span)] == ids[:3]
    assert cut.ids[cut.span[1] :] == whole.ids[whole.span[1] :]
    with pytest.raises(UserError, match="without any text"):
        prompts.prompt(ids, around, text="")


def test_an_encoder_reads_its_end_token_behind_the_question() -> None:
    prompts = TextPrompts(PromptTemplate("{{ text }}\nAnswer:"), T5_LIKE, True, "task")
    (ids,) = text_ids(["a b"], T5_LIKE, 8)
    assert prompts.prompt(ids, 64, text="a b").ids[-1] == T5_LIKE.eos_token_id


@pytest.mark.parametrize("tokenizer", CAUSAL)
def test_the_router_reads_the_text_and_not_what_is_around_it(tokenizer) -> None:  # type: ignore[no-untyped-def]
    spec = make_spec()
    made = encode(
        ROWS[:2], spec, template_for(spec, "options"), tokenizer, max_length=300, encoder_decoder=False,
        prompt_format=SECOND,
    )  # fmt: skip
    mask = collate_prompts(made, pad_id=0)["prompt_mask"]
    assert mask.sum(dim=1).tolist() == [len(example.text) for example in made]


def test_format_one_says_nothing_of_itself_in_fingerprints() -> None:
    assert PromptFormat(1).values() == {} and PromptFormat(2, 9).values() == {"format": 2, "text_tokens": 9}
