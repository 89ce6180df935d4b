"""Conversations in the model's own template: what TRL makes of them, and what it does not promise."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from amlora_dist.errors import UserError
from amlora_dist.tasks.batches import IGNORED, Example, collate, encode, label_tokens
from amlora_dist.tasks.chat import ChatPrompts, ChatTemplate, settled
from amlora_dist.tasks.conversations import Turn
from amlora_dist.tasks.prompt_format import PromptFormat, text_ids
from amlora_dist.tasks.prompts import PromptTemplate, template_for
from amlora_dist.tasks.sources import Row
from amlora_dist.tasks.task import TaskSpec, read_mapping
from amlora_dist.training.batching import LossComputer, target_tokens
from tests.tasks.chat_tokenizers import FAMILIES, TEMPLATES, chat_tokenizer

ROWS = 50
MARKED = {
    "smollm2": (
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}",
        "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}{% generation %}"
        "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
        "{{ '\n' }}",
    ),
    "llama3": (
        "{{ content }}{% endfor %}",
        "{% if message['role'] == 'assistant' %}{% set start = content.index('<|end_header_id|>') + 19 %}"
        "{{ content[:start] }}{% generation %}{{ content[start:] }}{% endgeneration %}"
        "{% else %}{{ content }}{% endif %}{% endfor %}",
    ),
    "qwen2_5": (
        """        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}""",
        """        {{- '<|im_start|>' + message.role + '\\n' }}{%- if message.role == 'assistant' %}{% generation %}"""
        """{{- message.content + '<|im_end|>' }}{% endgeneration %}"""
        """{% else %}{{- message.content + '<|im_end|>' }}{% endif %}"""
        """{{- '\\n' }}""",
    ),
}
"""The same templates with TRL's markers of what the assistant wrote, which none of the three has."""


def conversations(most_turns: int) -> list[tuple[Turn, ...]]:
    """Rows of one to so many exchanges, some behind a system's turn, with the white space that people write."""
    draw = random.Random(7)
    words = "The parcel was due on Monday; where is it? 24 euros, again:\nno\n\n  yes  don't 12345 ünï 漢字 (a) {b: 1}"

    def text() -> str:
        texts = " ".join(draw.choices(words.split(" "), k=draw.randint(1, 9))) + "."
        return draw.choice(["", "", "", " ", "\n", "\n\n"]) + texts + draw.choice(["", "", "", "\n", " "])

    made = []
    for _ in range(ROWS):
        turns = [Turn("system", text())] if draw.random() < 0.4 else []
        for _ in range(draw.randint(1, most_turns)):
            # An answer that begins with a line break is another matter: see below.
            turns += [Turn("user", text()), Turn("assistant", text().lstrip("\n"))]
        made.append(tuple(turns))
    return [row for row in made if all(turn.text.strip() for turn in row)]


def spec_of(**prompt: Any) -> TaskSpec:
    mapping = {
        "name": "talk", "version": 1, "kind": "chat", "source": {"kind": "files"}, "splits": {"train": "a", "test": "b"},
        "columns": {"messages": "messages"}, "prompt": {"format": "chat", **prompt},
    }  # fmt: skip
    return read_mapping(mapping, origin=Path("talk.yaml"))


def encoded(rows: list[tuple[Turn, ...]], family: str, max_length: int = 4000, **prompt: Any) -> list[Example]:
    spec = spec_of(**prompt)
    texts = [[turn.text for turn in turns if turn.role == "user"][-1] for turns in rows]
    made = [Row(n, {}, text, None, turns[-1].text, turns) for n, (text, turns) in enumerate(zip(texts, rows, strict=True))]
    return encode(
        made, spec, template_for(spec), chat_tokenizer(family), max_length=max_length, encoder_decoder=False,
        prompt_format=PromptFormat(2, 64),
    )  # fmt: skip


def trl_rows(family: str, rows: list[dict[str, Any]], folder: Path, **options: Any) -> list[dict[str, list[int]]]:
    """What TRL's trainer makes of rows."""
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    pytest.importorskip("trl", reason="TRL is not installed: pip install .[dev]")
    from trl import SFTConfig, SFTTrainer

    tokenizer = copy.deepcopy(chat_tokenizer(family))
    if options.get("assistant_only_loss"):
        plain, marked = MARKED[family]
        assert plain in tokenizer.chat_template
        tokenizer.chat_template = tokenizer.chat_template.replace(plain, marked)
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **small))
    config = SFTConfig(output_dir=str(folder), max_length=None, report_to="none", use_cpu=True, bf16=False, **options)
    trainer = SFTTrainer(model=model, args=config, processing_class=tokenizer, train_dataset=Dataset.from_list(rows))
    return list(trainer.train_dataset)


def as_messages(turns: tuple[Turn, ...]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.text} for turn in turns]


def of_trl(row: dict[str, list[int]], end: int) -> tuple[list[int], list[int]]:
    """Ids and labels up to the last end of turn: what a template writes behind it no model is asked to write."""
    ids = list(row["input_ids"])
    stop = len(ids) - ids[::-1].index(end)
    return ids[:stop], list(row["labels"])[:stop]


@pytest.mark.integration
@pytest.mark.parametrize("family", FAMILIES)
def test_ids_and_masks_of_the_last_turn_are_trls(family: str, tmp_path: Path) -> None:
    rows = conversations(1) + conversations(4)
    given = [{"prompt": as_messages(turns[:-1]), "completion": as_messages(turns[-1:])} for turns in rows]
    theirs = trl_rows(family, given, tmp_path)
    end = chat_tokenizer(family).eos_token_id
    for mine, other in zip(encoded(rows, family), theirs, strict=True):
        assert (list(mine.prompt + mine.target), list(mine.labels)) == of_trl(other, end)


@pytest.mark.integration
@pytest.mark.parametrize("family", FAMILIES)
def test_ids_and_masks_of_all_turns_are_trls(family: str, tmp_path: Path) -> None:
    rows = conversations(1) + conversations(4)
    theirs = trl_rows(family, [{"messages": as_messages(turns)} for turns in rows], tmp_path, assistant_only_loss=True)
    end = chat_tokenizer(family).eos_token_id
    for mine, other in zip(encoded(rows, family, train_on="all"), theirs, strict=True):
        assert (list(mine.prompt + mine.target), list(mine.labels)) == of_trl(other, end)
        assert mine.learned == sum(label != IGNORED for label in mine.labels)


@pytest.mark.parametrize("family", FAMILIES)
def test_special_tokens_in_a_users_text_are_split_and_those_of_the_template_are_not(family: str) -> None:
    end = FAMILIES[family][0]
    hostile = (Turn("user", f"before {end}\n{FAMILIES[family][1]} after"), Turn("assistant", f"said {end} twice"))
    (mine,) = encoded([hostile], family)
    (plain,) = encoded([(Turn("user", "x"), Turn("assistant", "y"))], family)
    tokenizer = chat_tokenizer(family)
    special = set(tokenizer.all_special_ids)
    assert [i for i in mine.prompt if i in special] == [i for i in plain.prompt if i in special]
    assert [i for i in mine.target if i in special] == [tokenizer.eos_token_id] == [mine.target[-1]]
    assert tokenizer.decode(mine.target[:-1]) == hostile[1].text
    assert not special & set(mine.text)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_router_reads_the_users_last_turn_and_not_the_system_or_markers(family: str) -> None:
    turns = (Turn("system", "Be polite."), Turn("user", "hello"), Turn("assistant", "hi"), Turn("user", "where is it?"))
    (mine,) = encoded([(*turns, Turn("assistant", "there"))], family)
    assert [mine.text] == text_ids(["where is it?"], chat_tokenizer(family), 64)
    assert mine.span is not None
    assert chat_tokenizer(family).decode(mine.prompt[slice(*mine.span)]).strip() == "where is it?"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_long_conversation_loses_its_earliest_turns_and_then_the_end_of_the_last_text(family: str) -> None:
    turns = (Turn("system", "s"), Turn("user", "one " * 9), Turn("assistant", "two"), Turn("user", "three four five six"))
    prompts = ChatPrompts(PromptTemplate("{{ text }}"), ChatTemplate(chat_tokenizer(family)), None, "talk")
    whole, asked = prompts.prompt(turns, 4000)
    assert asked == list(turns)
    shorter, left = prompts.prompt(turns, len(whole.ids) - 1)
    assert left == [turns[0], turns[3]]
    cut, left = prompts.prompt(turns, len(shorter.ids) - 2)
    assert left[0] == turns[0] and turns[3].text.startswith(left[1].text) and left[1].text
    assert len(cut.ids) <= len(shorter.ids) - 2
    with pytest.raises(UserError, match="without any text"):
        prompts.prompt(turns, 3)


def test_a_labelled_task_has_question_and_options_in_the_users_turn_and_the_label_as_the_assistants() -> None:
    mapping = {
        "name": "mood", "version": 1, "kind": "mood", "source": {"kind": "files"}, "splits": {"train": "a", "test": "b"},
        "columns": {"text": "text", "label": "label"}, "labels": ["good", "not good"], "prompt_style": "options",
        "prompt": {"format": "chat", "question": "How is it?", "system": "You judge."},
    }  # fmt: skip
    spec, tokenizer = read_mapping(mapping, origin=Path("mood.yaml")), chat_tokenizer("smollm2")
    rows = [Row(1, {}, "fine day", "good", "good"), Row(2, {}, "rain", "not good", "not good")]
    made = encode(
        rows, spec, template_for(spec), tokenizer, max_length=4000, encoder_decoder=False, prompt_format=PromptFormat(2, 64)
    )
    assert tokenizer.decode(made[0].prompt) == (
        "<|im_start|>system\nYou judge.<|im_end|>\n"
        "<|im_start|>user\nfine day\nHow is it?\nOptions: good, not good<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert [tokenizer.decode(one.target) for one in made] == ["good<|im_end|>", "not good<|im_end|>"]
    assert [one.target[:-1] for one in made] == label_tokens(spec, tokenizer, False)
    assert [one.label for one in made] == [0, 1]


def test_an_answer_that_is_cut_does_not_learn_to_end() -> None:
    spec = read_mapping(spec_of().to_mapping() | {"max_answer_tokens": 3}, origin=Path("talk.yaml"))
    turns = (Turn("user", "a"), Turn("assistant", "one two three four five"))
    (cut,) = encode([Row(1, {}, "a", None, turns[1].text, turns)], spec, template_for(spec), chat_tokenizer("smollm2"),
                    max_length=400, encoder_decoder=False, prompt_format=PromptFormat(2, 64))  # fmt: skip
    assert len(cut.target) == 3 and chat_tokenizer("smollm2").eos_token_id not in cut.target


def test_the_labels_of_a_batch_are_those_of_its_rows() -> None:
    rows = conversations(3)[:4]
    made = encoded(rows, "qwen2_5", train_on="all")
    batch = collate(made, pad_id=0, side="left")
    for one, labels in zip(made, batch["labels"].tolist(), strict=True):
        assert labels[-len(one.labels) :] == list(one.labels) and set(labels[: -len(one.labels)]) <= {IGNORED}


def altered(family: str, template: str | None, **changes: Any) -> Any:
    tokenizer = copy.deepcopy(chat_tokenizer(family))
    tokenizer.chat_template = template
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The thinking of earlier turns is taken out."""
THINKING = FORGETFUL.replace(
    "assistant\n{% endif %}",
    "assistant\n{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
)
"""As Qwen 3's: its generation prompt may have the empty thinking that it takes out later."""


@pytest.mark.parametrize(
    ("tokenizer", "prompt", "reason"),
    [
        (altered("smollm2", None), {}, "no chat template"),
        (altered("smollm2", THINKING), {"train_on": "all"}, "changes what is before an answer once.*train_on: last"),
        (altered("qwen2_5", chat_tokenizer("qwen2_5").chat_template, eos_token="<pad>"), {}, "set eos_token to <.im_end"),
        (altered("smollm2", "{{ raise_exception('only tools') }}"), {}, "refuses the conversation: only tools"),
        (altered("smollm2", "{% for m in messages %}{{ m.role }}<|im_end|>{% endfor %}"), {}, "user's words|otherwise"),
    ],
)
def test_a_template_that_masks_cannot_be_made_of_is_refused_with_the_reason(
    tokenizer: Any, prompt: dict[str, str], reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        settled(spec_of(**prompt), tokenizer, encoder_decoder=False)
    assert settled(spec_of(**prompt | {"format": "auto"}), tokenizer, encoder_decoder=False).prompt.format == "classic"


def test_a_template_that_takes_thinking_out_of_earlier_turns_can_learn_the_last_one() -> None:
    tokenizer = altered("smollm2", FORGETFUL)
    assert settled(spec_of(), tokenizer, encoder_decoder=False).chat
    _, answer, _ = ChatTemplate(tokenizer).split([Turn("user", "a"), Turn("assistant", "b")], all_turns=False)
    assert tokenizer.decode(answer) == "<think>\n\n</think>\n\nb<|im_end|>"


def test_thinking_is_turned_off_where_the_template_can_do_without() -> None:
    tokenizer = altered("smollm2", THINKING)
    prompt, answer, _ = ChatTemplate(tokenizer).split([Turn("user", "a"), Turn("assistant", "b")], all_turns=False)
    assert tokenizer.decode(answer) == "b<|im_end|>" and tokenizer.decode(prompt).endswith("</think>\n\n")


def test_an_answer_that_begins_with_a_line_break_has_the_tokens_that_a_model_can_write() -> None:
    tokenizer = chat_tokenizer("qwen2_5")
    chat = ChatTemplate(tokenizer)
    turns = [Turn("user", "a"), Turn("assistant", "\nb")]
    prompt, answer, _ = chat.split(turns, all_turns=False)
    assert prompt == chat.render(turns[:1]).ids and tokenizer.decode(answer) == "\nb<|im_end|>"
    assert prompt + answer != chat.render(turns, open_ended=False).ids[: len(prompt + answer)]


def test_a_date_in_a_template_is_the_same_every_day() -> None:
    dated = "{{ strftime_now('%d %b %Y') }}" + (TEMPLATES / "smollm2.jinja").read_text(encoding="utf-8")
    tokenizer = altered("smollm2", dated)
    assert "26 Jul 2024" in tokenizer.decode(ChatTemplate(tokenizer).render([Turn("user", "a")]).ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversation_is_rendered_as_transformers_renders_it(family: str) -> None:
    tokenizer = chat_tokenizer(family)
    for turns in conversations(4):
        for open_ended in (True, False):
            rendered = ChatTemplate(tokenizer).render(turns, open_ended=open_ended)
            assert rendered.plain == tokenizer.apply_chat_template(
                as_messages(turns), tokenize=False, add_generation_prompt=open_ended, date_string="26 Jul 2024"
            )


LOOPING = (
    "{% for m in messages %}{% set content = m.content.strip() %}{% if loop.index0 == messages | length - 1 and content is"
    " string and '</think>' in content %}{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""As Qwen3's and Llama 2's: methods of texts inside the loop, and how many messages there are for each of them."""


def test_long_texts_and_many_turns_cost_a_template_no_more_than_they_are_long() -> None:
    tokenizer = altered("smollm2", LOOPING)
    chat = ChatTemplate(tokenizer)
    long = [Turn("user", "a"), Turn("assistant", "<think>" + "b" * 60_000 + "</think>" + "c" * 60_000)]
    many = [Turn(role, "word " * 40) for _ in range(300) for role in ("user", "assistant")]
    for turns in (long, many):
        expected = tokenizer.apply_chat_template(as_messages(turns), tokenize=False, add_generation_prompt=False)
        assert chat.render(turns, open_ended=False).text == expected


def test_of_a_conversation_that_is_too_much_for_a_template_the_earliest_turns_go() -> None:
    inner = "{% for n in messages %}{{ '' if n.content == m.content else ' ' }}{% endfor %}"
    pairs = f"{{% for m in messages %}}{inner}{{% endfor %}}"
    chat = ChatTemplate(altered("smollm2", f"{{% set _ %}}{pairs}{{% endset %}}{LOOPING}"))
    many = [Turn(role, f"word {n} " * 40) for n in range(400) for role in ("user", "assistant")]
    with pytest.raises(UserError, match="too many steps"):
        chat.render(many, open_ended=False)
    prompts = ChatPrompts(PromptTemplate("{{ text }}"), chat, None, "a")
    found, kept = prompts.prompt([Turn("system", "s"), *many, Turn("user", "last")], 3000)
    assert len(found.ids) <= 3000 and kept[0].role == "system" and len(kept) > 2 and "last" in kept[-1].text
    loops = "{% for a in range(999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    endless = ChatTemplate(altered("smollm2", loops))
    with pytest.raises(UserError, match="too many steps"):
        ChatPrompts(PromptTemplate("{{ text }}"), endless, None, "a").prompt(many[:1], 300)


def test_what_only_a_part_for_tools_uses_may_be_unknown() -> None:
    chat = ChatTemplate(altered("smollm2", "{% if tools %}{{ tools | fromjson }}{{ 1 is odder }}{% endif %}" + LOOPING))
    assert chat.render([Turn("user", "a")]).ids
    reached = ChatTemplate(altered("smollm2", LOOPING + "{% if messages | length > 1 %}{{ 'a' | fromjson }}{% endif %}"))
    with pytest.raises(UserError, match="the filter 'fromjson', which is not known here"):
        reached.render([Turn("user", "a"), Turn("assistant", "b")])


def test_what_chat_templates_use_works_as_in_transformers() -> None:
    source = (
        "{%- macro said(m) -%}{{ m['role'] | upper }}: {{ m.content | trim }}{%- endmacro -%}\n"
        "{% set ns = namespace(last=0) %}{% for m in messages[::-1] %}"
        "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% break %}{% endif %}{% endfor %}\n"
        "{% for m in messages if m.role is string and m.content is not none %}{% if loop.first %}{{ bos_token }}{% endif %}"
        "{{ said(m) + '\\n' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content | tojson }}{% endgeneration %}"
        "{% endif %}{{ eos_token if loop.last and not add_generation_prompt else missing }}{% endfor %}\n"
        "{{ ns.last }}{{ dict(a=[1, 2]) | tojson(indent=1) }}{{ tools is none }}{{ '%s and {}'.format('x') % 'y' }}\n"
        "{% if messages[0].role == 'tool' %}{{ raise_exception('no tool first') }}{% endif %}\n"
    )
    tokenizer = altered("smollm2", source)
    for turns in conversations(3):
        assert ChatTemplate(tokenizer).render(turns).plain == tokenizer.apply_chat_template(
            as_messages(turns), tokenize=False, add_generation_prompt=True
        )
    with pytest.raises(UserError, match="refuses the conversation: no tool first"):
        ChatTemplate(tokenizer).render([Turn("tool", "x")])


HOLDS = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"


@pytest.mark.parametrize(
    "bomb",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'x' * 3000000000 }}",
        "{% set ns = namespace(t='x') %}{% for i in range(60) %}{% set ns.t = ns.t + ns.t %}{% endfor %}",
        "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{% for m in messages %}{% for a in range(99999) %}{% for b in m.content %}x{% endfor %}{% endfor %}{% endfor %}",
        "{{ lipsum(n=100000) }}",
        "{{ 9 ** 99999 }}",
        "{{ '%999999999s' % 'x' }}",
        "{% include 'other' %}",
        "{{ messages.__class__.__mro__ }}",
        "{% for %}",
    ],
)
def test_a_chat_template_without_end_is_refused_in_one_line(bomb: str) -> None:
    with pytest.raises(UserError, match=r"the chat template (refuses the conversation|cannot be used): ") as caught:
        settled(spec_of(), altered("smollm2", bomb + HOLDS), encoder_decoder=False)
    assert "\n" not in str(caught.value)


def test_several_chat_templates_without_a_default_are_none() -> None:
    tokenizer = altered("smollm2", None)
    tokenizer.chat_template = {"tool_use": HOLDS, "rag": HOLDS}
    with pytest.raises(UserError, match="has no chat template"):
        settled(spec_of(), tokenizer, encoder_decoder=False)
    auto = read_mapping(spec_of(format="auto").to_mapping(), origin=Path("talk.yaml"))
    assert settled(auto, tokenizer, encoder_decoder=False).prompt.format == "classic"


def test_guards_that_a_user_writes_change_nothing() -> None:
    tokenizer = chat_tokenizer("smollm2")
    chat, special = ChatTemplate(tokenizer), set(tokenizer.all_special_ids)
    end, guard = tokenizer.eos_token, "\ue000\ue002"
    plain = [token for token in chat.render([Turn("user", "x")]).ids if token in special]
    for text in (guard, f"{end[:3]}{guard}{end[3:]}", f"\ue000{guard}\ue002{end}", f"{guard}{end}"):
        assert [token for token in chat.render([Turn("user", text)]).ids if token in special] == plain


def test_classic_tasks_are_left_alone_and_auto_asks_the_tokenizer() -> None:
    mapping = {
        "name": "facts", "version": 1, "kind": "facts", "source": {"kind": "files"}, "splits": {"train": "a", "test": "b"},
        "columns": {"text": "text", "answer": "answer"},
    }  # fmt: skip
    plain = read_mapping(mapping, origin=Path("facts.yaml"))
    assert settled(plain, chat_tokenizer("llama3"), encoder_decoder=False) is plain
    auto = read_mapping(mapping | {"prompt": {"format": "auto"}}, origin=Path("facts.yaml"))
    assert settled(auto, chat_tokenizer("llama3"), encoder_decoder=False).chat
    assert settled(auto, None, encoder_decoder=True).prompt.format == "classic"


def test_the_loss_over_all_turns_is_the_cross_entropy_of_their_tokens() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(chat_tokenizer("llama3")), **small))
    rows = encoded(conversations(3)[:5], "llama3", train_on="all")
    made = LossComputer(model, pad_id=0, encoder_decoder=False, device=torch.device("cpu"))(model, rows, None)
    expected = torch.zeros(())
    for row in rows:
        ids, labels = torch.tensor([row.prompt + row.target]), torch.tensor([row.labels])
        logits = model(input_ids=ids).logits[0, :-1]
        expected = expected + torch.nn.functional.cross_entropy(
            logits, labels[0, 1:], ignore_index=IGNORED, reduction="sum"
        )
    assert made.item() == pytest.approx(expected.item(), rel=1e-5)
    assert target_tokens(rows) == sum(sum(label != IGNORED for label in row.labels) for row in rows)
