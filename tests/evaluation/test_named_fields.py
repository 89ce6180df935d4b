"""A text may come as named fields: joined as its task's rows are, routed by what it says, seen by the task's template."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from amlora_dist.errors import UserError
from amlora_dist.evaluation.field_texts import fields_for
from amlora_dist.evaluation.served_scoring import PlainRow, ServedScore
from amlora_dist.inference.model import AMLoRAModel
from amlora_dist.tasks.named_fields import FieldEntry, fields_read, unknown_fields
from amlora_dist.tasks.prompts import template_faults
from amlora_dist.tasks.task import Columns, Label, PromptSettings, SourceSpec, Splits, TaskSpec, TextField
from amlora_dist.tasks.task_entry import task_entry
from tests.bank_with_base import described, texts_of, write_keyed_bank
from tests.tiny_config import TOPICS

PAIR = [FieldEntry("first", "a"), FieldEntry("second", "the")]
BY_NAME = "{{ text }}\n{{ fields.first }} what\nAnswer:"


def split(text: str) -> dict[str, str]:
    words = text.split()
    return {"first": " ".join(words[:2]), "second": " ".join(words[2:])}


def joined(fields: dict[str, str]) -> str:
    return f"a: {fields['first']}\nthe: {fields['second']}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> AMLoRAModel:
    """Texts of colours have two fields, one of which their prompt shows again; the other tasks have plain texts."""
    folder: Path = tmp_path_factory.mktemp("named")
    write_keyed_bank(folder / "bank", folder / "base")
    made = AMLoRAModel.from_bank(folder / "bank", device="cpu")
    entry = made.prompter.entry("colours")
    described(made, "colours", replace(entry, template=BY_NAME, fields=PAIR))
    return made


def test_fields_are_joined_as_rows_are_and_shown_to_the_template(model: AMLoRAModel) -> None:
    fields = split(texts_of("colours", 1, "named")[0])
    (request,) = model.requests(fields)
    assert request.text == joined(fields) and request.fields == fields
    model.prompter.read([request])
    request.task = "colours"
    model.prompter.ask(request, new_tokens=4)
    words = model.prompter.words_of(request.tokens).split()
    assert words[-5:] == [*fields["first"].split(), "what", "Answer", ":"]
    swapped = dict(reversed(fields.items()))
    assert model.requests([swapped])[0].text == request.text, "the order is the task's"
    only = {"second": fields["second"]}
    assert model.requests(only)[0].text == f"the: {fields['second']}", "what is empty is left out, as of rows"


def test_names_of_fields_route_nothing(model: AMLoRAModel) -> None:
    for task in TOPICS.keys() & set(model.tasks):
        fields = split(texts_of(task, 1, "named")[0])
        assert model.route(fields)[0] == model.route(joined(fields))[0]


def test_all_ways_in_take_fields(model: AMLoRAModel) -> None:
    asked = [split(text) for text in texts_of("colours", 4, "named")]
    found = model.classify(asked)
    labels = [one.label for one in found]
    assert model.predict(asked) == labels and any(one.task == "colours" for one in found)
    assert [one.task for one in model.classify(asked, task="colours")] == ["colours"] * 4
    mixed = model.classify([asked[0], texts_of("sizes", 1, "named")[0]])
    assert (mixed[0].label, mixed[1].task) == (labels[0], "sizes")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"third": "red"}, "found third, expected some of a task's .colours: first, second"),
        ({"first": " ", "second": ""}, "found no words"),
        ({"first": 3}, "'first': found int"),
        ({}, "found no words"),
    ],
)
def test_fields_that_are_none_are_refused_in_one_line(model: AMLoRAModel, given: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        model.classify([given])
    assert "\n" not in str(caught.value)


def test_a_plain_text_is_not_asked_behind_a_prompt_that_shows_its_fields(model: AMLoRAModel) -> None:
    text = joined(split(texts_of("colours", 1, "named")[0]))
    assert model.route(text)[0].task == "colours"
    with pytest.raises(UserError, match=r"its prompt reads the fields first, second, .*give `fields` in place of the text"):
        model.answer(text)
    assert model.classify(texts_of("sizes", 2, "named"))[0].task == "sizes", "other texts are asked as ever"


def test_fields_that_tasks_join_differently_want_the_task_named(model: AMLoRAModel) -> None:
    entry = model.prompter.entry("sizes")
    described(model, "sizes", replace(entry, fields=PAIR[::-1]))
    try:
        fields = split(texts_of("colours", 1, "named")[0])
        with pytest.raises(UserError, match="colours and sizes join differently; name the task"):
            model.answer(fields)
        assert model.requests(fields, task="sizes")[0].text == f"the: {fields['second']}\na: {fields['first']}"
    finally:
        described(model, "sizes", entry)


def test_rows_are_scored_with_their_fields_and_without_them_count_as_wrong(model: AMLoRAModel) -> None:
    assert model.answering is not None
    texts = texts_of("colours", 6, "named")
    answers = [text.split()[-1] for text in texts]
    scorer = ServedScore(model.answering, "accuracy", tuple(TOPICS["colours"][0]))
    asked = [split(text) for text in texts]
    rows = [PlainRow(n, joined(one), answer, fields=one) for n, (one, answer) in enumerate(zip(asked, answers, strict=True))]
    found = scorer.score(rows, batch_size=4)
    assert [one.served for one in found] == model.predict(asked) and any(one.correct for one in found)
    bare = scorer.score([replace(row, fields={}) for row in rows], batch_size=4)
    for with_fields, without in zip(found, bare, strict=True):
        assert without.route == with_fields.route
        if without.route == "colours":
            assert (without.served, without.correct, without.loglikelihoods) == ("", 0.0, None), "a server refuses it"
        else:
            assert without.served == with_fields.served
    assert sum(one.route == "colours" for one in bare) > 2


def pair_spec(template: str | None) -> TaskSpec:
    return TaskSpec(
        name="pairs", version=1, kind="pairs", source=SourceSpec(kind="builtin"), splits=Splits(train="a", test="b"),
        columns=Columns(
            text=[
                TextField(column="first", marker="a", neutral=True), TextField(column="second", marker="the", neutral=True)
            ],
            label="label",
        ),
        prompt=PromptSettings(template=template), labels=[Label(value="0", text="wet"), Label(value="1", text="dry")],
    )  # fmt: skip


def test_a_bank_knows_how_texts_of_several_fields_are_joined() -> None:
    assert task_entry(pair_spec(None)).fields == PAIR
    assert task_entry(pair_spec(BY_NAME)).fields == PAIR
    one = replace(pair_spec(None), columns=Columns(text=[TextField(column="first")], label="label"))
    assert task_entry(one).fields is None
    read = replace(one, prompt=PromptSettings(template="{{ fields.first }}"))
    assert task_entry(read).fields == [FieldEntry("first")]


def test_a_template_that_reads_a_field_which_no_row_has_is_a_fault() -> None:
    assert template_faults(pair_spec(BY_NAME)) == []
    (fault,) = template_faults(pair_spec("{{ fields.firts }} {{ fields['second'] }}\nAnswer:"))
    assert fault.found == "the field 'firts'" and "first, second" in fault.expected
    assert unknown_fields("{{ fields.get('third', '') }} {{ text }}", pair_spec(None)) == []


def test_what_a_template_reads() -> None:
    assert fields_read("{{ text }} of many fields") is None
    assert fields_read("{{ fields.a }} {{ fields['b'] }} {% for name in fields %}{{ name }}{% endfor %}") == {"a", "b"}
    assert fields_read("{% for name, value in fields.items() %}{{ value }}{% endfor %}") == frozenset()
    assert fields_read("{{ fields.a | default('') }}") == frozenset()
    assert fields_read("{{ fields.") is None


@pytest.mark.parametrize(
    "template",
    ["{{ fields.title | default('') }} {{ text }}", "{{ fields.get('title', '') }} {{ text }}",
     "{% for name, one in fields.items() %}{{ one }}{% endfor %}{{ text }}"],
)  # fmt: skip
def test_a_bank_of_before_which_names_no_fields_is_asked_plain_text_as_it_was(model: AMLoRAModel, template: str) -> None:
    entry = replace(model.prompter.entry("colours"), template=template, fields=None)
    assert fields_for("colours", {"colours": entry}, "hello", {}) is None
    assert entry.prompt("colours").render_text("hello").strip() == "hello"
