"""The tasks that come with the package: complete, pinned, and in step with the schemas recorded for the Hub."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
import pytest

from amlora_dist.tasks.prompts import template_for
from amlora_dist.tasks.task import TaskSpec, builtin_tasks

LONG_SEQUENCE = (
    "dbpedia amazon yahoo agnews yelp imdb sst2 mnli cb wic copa qqp boolq rte multirc"  # the 15 of the benchmark
).split()
DEMO = ["helpdesk/call_urgency", "helpdesk/chat_mood", "helpdesk/email_route", "helpdesk/review_topic"]
FREE_TEXT = ["helpdesk/mail_facts", "helpdesk/mail_gist"]
CHAT = ["helpdesk/order_note", "helpdesk/polite_reply", "helpdesk/policy_answer"]
SUITES = ("superni/", "trace/")  # of files that their authors give away: test_suites.py
SPECS = {spec.name: spec for spec in builtin_tasks() if not spec.name.startswith(SUITES)}
SCHEMAS: dict[str, Any] = json.loads(Path(__file__).with_name("recorded").joinpath("hub_schemas.json").read_text())

# What each label stands for on the Hub, where the verbaliser is not the class name itself.
MEANING = {
    "yelp": dict(zip(["1 star", "2 star", "3 stars", "4 stars", "5 stars"],
                     ["very negative", "negative", "neutral", "positive", "very positive"], strict=True)),
    "imdb": {"neg": "Bad", "pos": "Good"},
    "sst2": {"negative": "Bad", "positive": "Good"},
    "qqp": {"not_duplicate": "False", "duplicate": "True"},
    "rte": {"entailment": "entailment", "not_entailment": "contradiction"},
    "copa": {"choice1": "A", "choice2": "B"},
}  # fmt: skip


def recorded(spec: TaskSpec) -> dict[str, Any]:
    schema: dict[str, Any] = SCHEMAS[f"{spec.source.repository}|{spec.source.config or ''}"]
    return schema


def read_columns(spec: TaskSpec) -> set[str]:
    columns = {part.column for part in spec.columns.text if part.column} | {str(spec.columns.label)}
    for part in spec.columns.text:
        if part.value:
            columns |= jinja2.meta.find_undeclared_variables(jinja2.Environment().parse(part.value))
    return columns


def test_package_brings_the_long_sequence_and_the_demo_stream() -> None:
    assert sorted(SPECS) == sorted(LONG_SEQUENCE + DEMO + FREE_TEXT + CHAT)


@pytest.mark.parametrize("name", LONG_SEQUENCE)
def test_columns_and_splits_are_in_the_recorded_schema(name: str) -> None:
    spec, schema = SPECS[name], recorded(SPECS[name])
    assert read_columns(spec) <= set(schema["columns"])
    assert {spec.splits.train, spec.splits.test} <= set(schema["splits"])
    assert spec.splits.test != "test" or name in ("dbpedia", "amazon", "yahoo", "agnews", "yelp", "imdb")


@pytest.mark.parametrize("name", LONG_SEQUENCE)
def test_label_values_cover_the_recorded_classes_with_the_right_meaning(name: str) -> None:
    spec = SPECS[name]
    classes = recorded(spec)["columns"][str(spec.columns.label)]
    texts = {label.value: label.text for label in spec.labels or []}
    if isinstance(classes, dict):
        assert set(texts) == {str(value) for value in classes["int"]}
        return
    assert set(texts) == {str(number) for number in range(len(classes))}
    for number, class_name in enumerate(classes):
        expected = MEANING.get(name, {}).get(class_name) or re.sub(r"(?<=[a-z])(?=[A-Z])", " ", class_name)
        assert texts[str(number)] == expected.replace(" Of ", " of ")


@pytest.mark.parametrize("name", LONG_SEQUENCE)
def test_hub_revision_is_a_commit_or_the_hubs_own_parquet_copy(name: str) -> None:
    revision = SPECS[name].source.revision or ""
    assert re.fullmatch(r"[0-9a-f]{40}", revision) or (name == "amazon" and revision == "refs/convert/parquet")


@pytest.mark.parametrize("name", sorted(SPECS))
def test_every_task_describes_itself_and_renders_in_every_style(name: str) -> None:
    spec = SPECS[name]
    assert spec.description and spec.kind and spec.version >= 1
    assert spec.free_text == (name in FREE_TEXT + CHAT) and (spec.free_text or len(spec.label_texts) >= 2)
    for style in ("question", "bare", "named") if spec.free_text else ("question", "options", "bare", "named"):
        assert template_for(spec, style).render_text("words").endswith("\nAnswer:")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted(SPECS))
def test_every_question_has_paraphrases_that_differ_from_it(name: str) -> None:
    prompt = SPECS[name].prompt
    assert (prompt.question is None) == (name in ["copa", *CHAT])
    if prompt.question is not None:
        assert len(prompt.paraphrases) >= 2
        assert len({prompt.question, *prompt.paraphrases}) == len(prompt.paraphrases) + 1


def test_field_markers_that_tell_tasks_apart_are_not_called_neutral() -> None:
    for spec in SPECS.values():
        for part in spec.columns.text:
            assert not (part.neutral and part.marker in ("Title", "Text", "Question"))
