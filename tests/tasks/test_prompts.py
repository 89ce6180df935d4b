"""Prompt styles, the sandbox, and what a digest of a template covers."""

from __future__ import annotations

from typing import Any

import pytest

from amlora_dist.errors import UserError
from amlora_dist.tasks.prompts import BANK_TEMPLATE, PromptTemplate, template_for
from amlora_dist.tasks.sources import Row
from amlora_dist.tasks.task import Columns, Label, PromptSettings, SourceSpec, Splits, TaskSpec

ROW = Row(1, {"text": "It rains."}, "It rains.", "0", "wet")


def make_spec(question: str | None = "Is it wet?", *, free_text: bool = False, **prompt: Any) -> TaskSpec:
    return TaskSpec(
        name="weather",
        version=1,
        kind="topic",
        source=SourceSpec(kind="builtin"),
        splits=Splits(train="a", test="b"),
        columns=Columns(text="text", **({"answer": "a"} if free_text else {"label": "l"})),  # type: ignore[arg-type]
        prompt=PromptSettings(question=question, **prompt),
        labels=None if free_text else [Label(value="0", text="wet"), Label(value="1", text="very dry")],
    )


@pytest.mark.parametrize(
    ("style", "prompt"),
    [
        ("question", "It rains.\nIs it wet?\nAnswer:"),
        ("options", "It rains.\nIs it wet?\nOptions: wet, very dry\nAnswer:"),
        ("bare", "It rains.\nAnswer:"),
        ("named", "Task: topic\nDataset: weather\nIt rains.\nIs it wet?\nAnswer:"),
    ],
)
def test_four_styles_are_exactly_these(style: Any, prompt: str) -> None:
    assert template_for(make_spec(), style).render(ROW) == prompt


def test_without_a_question_style_question_equals_bare() -> None:
    spec = make_spec(None)
    assert template_for(spec, "question").render(ROW) == template_for(spec, "bare").render(ROW)
    assert template_for(spec, "options").render(ROW) == "It rains.\nOptions: wet, very dry\nAnswer:"


def test_style_of_the_task_holds_where_none_is_asked_for() -> None:
    spec = make_spec()
    spec.prompt_style = "bare"
    assert template_for(spec).render(ROW) == "It rains.\nAnswer:"
    assert template_for(spec, "question").render(ROW) != "It rains.\nAnswer:"


def test_bank_template_renders_with_and_without_a_question() -> None:
    bank = PromptTemplate(BANK_TEMPLATE)
    assert bank.render_text("It rains.") == "It rains.\nAnswer:"
    asked = bank.render_text("It rains.", question="Is it wet?")
    assert asked == template_for(make_spec(), "question").render(ROW)


def test_only_the_named_style_is_flagged_as_a_leak() -> None:
    flags = {style: template_for(make_spec(), style).leaks_task for style in ("question", "options", "bare", "named")}  # type: ignore[arg-type]
    assert flags == {"question": False, "options": False, "bare": False, "named": True}


def test_paraphrase_takes_the_place_of_the_question() -> None:
    spec = make_spec(paraphrases=["Does one get wet?"])
    assert template_for(spec, "question", paraphrase=0).render(ROW) == "It rains.\nDoes one get wet?\nAnswer:"
    with pytest.raises(UserError, match=r"no paraphrase 1; prompt.paraphrases has 1"):
        template_for(spec, paraphrase=1)


def test_own_template_sees_fields_and_constants() -> None:
    spec = make_spec(template="{{ fields.text }}|{{ options | join('/') }}|{{ task }}|{{ kind }}")
    assert template_for(spec, "named").render(ROW) == "It rains.|wet/very dry|weather|topic"


def test_text_that_looks_like_a_template_is_not_evaluated() -> None:
    row = Row(1, {"text": "{{ 7 * 7 }} {% if x %}"}, "{{ 7 * 7 }} {% if x %}", "0", "wet")
    assert template_for(make_spec(), "bare").render(row) == "{{ 7 * 7 }} {% if x %}\nAnswer:"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ options.append('x') }}",
        "{{ fields.clear() }}",
        "{{ text.format.__globals__ }}",
        "{% for i in range(10000000) %}x{% endfor %}",
        "{{ no_such_variable }}",
        "{{ 1 / 0 }}",
        "{% include 'x' %}",
    ],
)
def test_sandbox_refuses_what_a_template_must_not_do(source: str) -> None:
    with pytest.raises(UserError, match="prompt template of weather"):
        template_for(make_spec(template=source)).render(ROW)


def test_broken_template_names_its_line() -> None:
    with pytest.raises(UserError, match=r"prompt template of weather: found .*line 2: "):
        template_for(make_spec(template="{{ text }}\n{% if %}"))


def test_digest_changes_with_what_the_prompt_shows_and_with_nothing_else() -> None:
    digest = template_for(make_spec(), "bare").digest
    assert digest == template_for(make_spec("Another question?"), "bare").digest
    question = template_for(make_spec(), "question").digest
    assert question != digest
    assert question != template_for(make_spec("Another question?"), "question").digest


def test_options_for_free_text_and_unknown_styles_are_errors() -> None:
    with pytest.raises(UserError, match="its answers are free text"):
        template_for(make_spec(free_text=True), "options")
    with pytest.raises(UserError, match=r"unknown prompt style 'fancy'; known: question, options, bare, named"):
        template_for(make_spec(), "fancy")  # type: ignore[arg-type]
