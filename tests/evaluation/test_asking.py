"""How a bank asks: in turns where a task was learned in turns, as before where it was not."""

from __future__ import annotations

from typing import Any

import pytest

from amlora_dist.errors import UserError
from amlora_dist.evaluation.requests import Prompter, Request
from amlora_dist.tasks.conversations import Turn
from amlora_dist.tasks.prompt_format import PromptFormat
from amlora_dist.tasks.prompts import BANK_TEMPLATE, CHAT_STYLES
from amlora_dist.tasks.task_entry import TaskEntry
from tests.tasks.chat_tokenizers import chat_tokenizer

TALK = TaskEntry(kind="chat", template=CHAT_STYLES["question"], chat=True, system="Be short.", max_length=400)
MOOD = TaskEntry(kind="mood", template=BANK_TEMPLATE, question="How is it?", labels=["good", "bad"], max_length=400)
TURNS = (Turn("user", "hello"), Turn("assistant", "hi"), Turn("user", "how are you?"))


def prompter(**entries: TaskEntry) -> Prompter:
    return Prompter(
        entries, BANK_TEMPLATE, chat_tokenizer("smollm2"), encoder_decoder=False, positions=512,
        prompt_format=PromptFormat(2, 64),
    )  # fmt: skip


def prompt_of(bank: Prompter, task: str | None, turns: tuple[Turn, ...] = (), **more: Any) -> str:
    asked = bank.asked(turns or (Turn("user", "how are you?"),))
    request = Request(0, asked.text, asked.question, task, turns=asked.turns, **more)
    bank.read([request])
    bank.ask(request, new_tokens=8)
    return bank.words_of(request.tokens)


def test_a_task_of_turns_is_asked_in_turns_with_its_own_system_turn() -> None:
    assert prompt_of(prompter(talk=TALK), "talk", TURNS) == (
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nhi<|im_end|>\n"
        "<|im_start|>user\nhow are you?<|im_end|>\n<|im_start|>assistant\n"
    )
    prompt = prompt_of(prompter(talk=TALK), "talk", (Turn("system", "Be kind."), *TURNS))
    assert "Be kind." in prompt and "Be short." not in prompt


def test_a_text_of_no_task_is_asked_as_all_tasks_are() -> None:
    assert prompt_of(prompter(talk=TALK), None).endswith("user\nhow are you?<|im_end|>\n<|im_start|>assistant\n")
    assert prompt_of(prompter(talk=TALK, mood=MOOD), None) == "how are you?\nAnswer:"


def test_a_classic_task_of_a_bank_of_both_is_asked_of_all_turns() -> None:
    bank = prompter(talk=TALK, mood=MOOD)
    assert prompt_of(bank, "mood", TURNS) == "hello\nhi\nhow are you?\nHow is it?\nAnswer:"
    assert prompt_of(bank, "mood", (Turn("system", "Well?"), *TURNS)) == "hello\nhi\nhow are you?\nWell?\nAnswer:"
    assert bank.plan(("good", "bad"), "mood") != bank.plan(("good", "bad"), "talk"), "the space before a word"


def test_a_bank_without_turns_joins_them_as_it_always_did() -> None:
    bank = prompter(mood=MOOD)
    asked = bank.asked((Turn("system", "Well?"), Turn("system", " "), *TURNS, Turn("assistant", "so so")))
    assert (asked.text, asked.question, asked.turns) == ("hello\nhi\nhow are you?\nso so", "Well?", ())
    assert prompt_of(bank, "mood", TURNS) == "hello\nhi\nhow are you?\nHow is it?\nAnswer:"


def test_the_router_reads_the_last_words_or_the_first() -> None:
    bank = prompter(talk=TALK, mood=MOOD)
    assert bank.asked(TURNS).text == "how are you?"
    assert bank.asked(TURNS, "conversation").text == "hello"
    with pytest.raises(UserError, match="a last turn of role assistant"):
        bank.asked(TURNS[:2])
