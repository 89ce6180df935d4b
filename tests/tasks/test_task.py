"""Finding and checking tasks: names, files, overrides, and the message about a wrong file."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from amlora_dist.errors import FaultsError, UserError
from amlora_dist.tasks.task import TaskDefaults, TaskSpec, builtin_tasks, plain_value, read_mapping, resolve_task

DEFAULTS = TaskDefaults()
MINIMAL: dict[str, Any] = {
    "name": "mine",
    "version": 1,
    "kind": "topic",
    "source": {"kind": "files"},
    "splits": {"train": "train.jsonl", "test": "test.jsonl"},
    "columns": {"text": "text", "label": "label"},
    "labels": ["yes", "no"],
}


def resolve(ref: Any, base_dir: Path = Path(), **settings: Any) -> TaskSpec:
    return resolve_task(ref, base_dir=base_dir, defaults=TaskDefaults(**settings))


def read(**changes: Any) -> TaskSpec:
    mapping = {key: value for key, value in {**MINIMAL, **changes}.items() if value is not ...}
    return read_mapping(mapping, origin=Path("mine.yaml"))


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("agnew", "agnews"), ("dbpedia14", "dbpedia"), ("email_route", "helpdesk/email_route"), ("MNLI", "mnli")],
)
def test_unknown_name_is_answered_with_what_was_meant(wrong: str, right: str) -> None:
    with pytest.raises(UserError, match=f"unknown task '{wrong}'.*did you mean '{right}'"):
        resolve(wrong)


def test_unknown_name_far_from_all_lists_what_is_known() -> None:
    with pytest.raises(UserError, match=r"unknown task 'zzzzzz'; known: agnews, amazon, .*yaml"):
        resolve("zzzzzz")


def test_defaults_fill_what_the_task_leaves_open_and_overrides_win() -> None:
    spec = resolve("agnews", max_train=100, prompt_style="options", field_markers="keep", max_length=64)
    assert (spec.max_train, spec.max_dev, spec.prompt_style, spec.max_length) == (100, None, "options", 64)
    own = resolve({"task": "agnews", "max_train": 7, "prompt_style": "bare", "seed": 5}, max_train=100)
    assert (own.max_train, own.prompt_style, own.seed, own.on_bad_row) == (7, "bare", 5, "error")


def test_overrides_reach_into_sections_and_leave_the_rest() -> None:
    spec = resolve({"task": "agnews", "prompt": {"question": "What is it about?"}, "source": {"revision": "main"}})
    assert spec.prompt.question == "What is it about?" and spec.prompt.paraphrases
    assert (spec.source.repository, spec.source.revision) == ("sh0416/ag_news", "main")


def test_renamed_task_keeps_its_mirror(tmp_path: Path) -> None:
    (tmp_path / "agnews").mkdir()
    spec = resolve_task({"task": "agnews", "name": "news_again"}, data_dir=tmp_path, base_dir=Path(), defaults=DEFAULTS)
    assert (spec.name, spec.source.mirror) == ("news_again", "agnews")


def test_missing_mirror_is_an_error_at_once_that_lists_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "ag_news").mkdir()
    (tmp_path / "ag_news" / "test.jsonl").touch()
    with pytest.raises(UserError, match=r"no folder 'agnews'.*did you mean 'ag_news'.*it holds ag_news"):
        resolve_task("agnews", data_dir=tmp_path, base_dir=Path(), defaults=DEFAULTS)


def test_data_dir_leaves_tasks_that_are_not_on_the_hub_alone(tmp_path: Path) -> None:
    spec = resolve_task("helpdesk/chat_mood", data_dir=tmp_path, base_dir=Path(), defaults=DEFAULTS)
    assert spec.source.kind == "builtin"


def test_task_file_is_found_next_to_the_run_and_its_data_next_to_itself(tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "mine.yaml").write_text(json.dumps(MINIMAL))
    spec = resolve("tasks/mine.yaml", base_dir=tmp_path)
    assert spec.splits.train == str(folder / "train.jsonl")
    with pytest.raises(UserError, match=r"task file .*other\.yaml does not exist"):
        resolve("tasks/other.yaml", base_dir=tmp_path)


def test_task_may_be_in_the_run_itself(tmp_path: Path) -> None:
    assert resolve(MINIMAL, base_dir=tmp_path).splits.test == str(tmp_path / "test.jsonl")


def test_every_fault_of_a_file_is_named_at_once(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(json.dumps({**MINIMAL, "labls": [], "max_train": 0, "source": {"kind": "hubb"}}))
    with pytest.raises(FaultsError) as caught:
        resolve(str(path))
    assert {fault.where for fault in caught.value.faults} == {"labls", "max_train", "source.kind"}
    assert "did you mean 'labels'" in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": ..., "columns": {"text": "t", "answer": "a"}, "metric": "accuracy"}, "metric `accuracy` needs"),
        ({"metric": "rouge_l"}, "has metric `accuracy`, found 'rouge_l'"),
        ({"labels": ...}, "needs `columns.answer`"),
        ({"columns": {"text": "t", "answer": "a"}}, "needs `columns.label`"),
        ({"labels": ["a", "a"]}, "label values are there twice: a"),
        ({"labels": [{"value": 0, "text": "a"}, {"value": 1, "text": "a"}]}, "two different texts"),
        ({"source": {"kind": "hub", "repository": "x/y"}}, "pinned `revision`"),
        ({"columns": {"text": [{"column": "a", "value": "{{ a }}"}], "label": "l"}}, "either `column` or `value`"),
        ({"name": "../evil"}, "name: found '../evil'"),
        ({"labels": [{"value": ["a"], "text": "a"}, "b"]}, "labels[0].value: found"),
        ({"labels": [{"value": "a", "text": {"a": 1}}, "b"]}, "expected a text, a whole number"),
        ({"labels": [{"value": None, "text": "a"}, "b"]}, "labels[0].value: found"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FaultsError) as caught:
        read(**changes)
    assert message in str(caught.value)


def test_free_text_task_has_no_labels_and_exact_match() -> None:
    spec = read(labels=..., columns={"text": "t", "answer": "a"})
    assert spec.free_text and spec.metric == "exact_match" and spec.label_texts == []
    assert read(labels=..., columns={"text": "t", "answer": "a"}, metric="token_f1").metric == "token_f1"


def test_two_values_may_share_a_label_text() -> None:
    values = [{"value": 1, "text": "bad"}, {"value": 2, "text": "bad"}, {"value": 3, "text": "good"}]
    assert read(labels=values).label_texts == ["bad", "good"]


@pytest.mark.parametrize(
    ("value", "plain"), [(1, "1"), (1.0, "1"), (True, "True"), (" World ", "World"), (1.5, "1.5"), ("01", "01")]
)
def test_labels_compare_in_one_form(value: object, plain: str) -> None:
    assert plain_value(value) == plain


def test_every_builtin_task_survives_its_mapping() -> None:
    for spec in builtin_tasks():
        again = read_mapping(json.loads(json.dumps(spec.to_mapping())), origin=Path(spec.origin))
        assert again == spec


def test_what_leaks_the_task_is_flagged() -> None:
    assert resolve("agnews").leaks == []
    assert resolve("agnews", prompt_style="named").leaks == ["prompt_style: named"]
    assert resolve("agnews", field_markers="keep").leaks == ["field_markers: keep"]
    assert resolve("mnli", field_markers="keep").leaks == []


def test_resolving_does_not_touch_what_it_was_given() -> None:
    ref = {"task": "agnews", "prompt": {"question": "q"}}
    before = json.dumps(ref)
    resolve(ref, max_train=3)
    assert json.dumps(ref) == before
    assert dataclasses.asdict(DEFAULTS) == dataclasses.asdict(TaskDefaults())


def test_tasks_are_listed_without_importing_anything_heavy() -> None:
    code = (
        "import sys; from amlora_dist.tasks.task import builtin_tasks; from amlora_dist.tasks import sources, prompts;"
        "builtin_tasks(); print([m for m in ('torch', 'transformers', 'datasets', 'mlflow', 'ray', 'pyarrow') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
