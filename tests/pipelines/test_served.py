"""What is scored is what is served: the matrix, the library, MLflow's loader and the server answer every row alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from openai import OpenAI
from typer.testing import CliRunner

from amlora_dist.config.loading import load_config
from amlora_dist.errors import UserError
from amlora_dist.evaluation.answering import EvidenceKind
from amlora_dist.evaluation.scoring import Prediction, read_predictions
from amlora_dist.inference.model import AMLoRAModel
from amlora_dist.registry.pyfunc import BankModel
from amlora_dist.serving.bank import ServedBank
from amlora_dist.tasks.prompts import STYLES
from pipelines.cli.main import app
from pipelines.cli.scoring import Rows, answer_differences, ask, rekey_bank, score
from pipelines.runs.progress import Silent
from pipelines.runs.sequence import run_sequence
from tests.serving.servers import running
from tests.tiny_config import write_config

pytestmark = [pytest.mark.integration, pytest.mark.slow]
TASKS = ("colours", "shapes", "sizes")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished run of three tiny tasks, its home, and its last bank in its model."""
    folder = tmp_path_factory.mktemp("served")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AMLORA_HOME", str(folder / "home"))
        config = load_config(write_config(folder), ["evaluate=all", "router.background=true"])
        result = run_sequence(config, run_id="served", progress=Silent())
        yield folder, result, AMLoRAModel.from_bank("models:/served@current", device="cpu")


@pytest.fixture(autouse=True)
def at_home(run: Any, amlora_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the home of the run."""
    monkeypatch.setenv("AMLORA_HOME", str(run[0] / "home"))


def texts_of(folder: Path, task: str) -> list[str]:
    lines = (folder / "tasks" / task / "test.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def scored(folder: Path, task: str, mode: str = "router") -> list[Prediction]:
    """What the last bank answered to the test rows of a task."""
    for summary in (folder / "home" / "storage" / "scores").glob("*/summary.json"):
        found = json.loads(summary.read_text(encoding="utf-8"))
        if (found["task"], found["mode"]) == (task, mode):
            rows = read_predictions(summary.with_name("predictions.jsonl"))
            if rows[0].gates is None or len(rows[0].gates) == len(TASKS):
                return sorted(rows, key=lambda row: row.row)
    raise AssertionError(f"no score of {task}")


@pytest.mark.parametrize("task", TASKS)
def test_no_row_differs_between_the_matrix_and_what_is_served(run: Any, task: str) -> None:
    folder, result, model = run
    texts, rows = texts_of(folder, task), scored(folder, task)
    wanted = [row.served for row in rows]
    assert sum(row.served == row.answer for row in rows) / len(rows) == result["accuracy_matrix"][-1][TASKS.index(task)]
    assert model.predict(texts) == wanted
    assert [found.label for found in model.classify(texts)] == wanted
    assert [found.label for found in model.classify(texts, batch_size=1)] == wanted
    assert BankModel(model).predict(pd.DataFrame({"text": texts})) == wanted
    with running(ServedBank(model, "served")) as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="unused")
        for text, answer in zip(texts, wanted, strict=True):
            reply = client.chat.completions.create(model="served", messages=[{"role": "user", "content": text}])
            assert reply.choices[0].message.content == answer
            pieces = client.chat.completions.create(
                model="served", messages=[{"role": "user", "content": text}], stream=True
            )
            assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == answer


def test_each_kind_of_evidence_is_scored_next_to_the_served_answer(run: Any) -> None:
    folder, _, model = run
    for task in TASKS:
        for row in scored(folder, task):
            assert row.route is not None and row.labels and row.loglikelihoods and row.keys
            place = max(range(len(row.labels)), key=row.loglikelihoods.__getitem__)
            assert row.model_correct == float(row.labels[place] == row.answer)
            place = max(range(len(row.labels)), key=row.keys.__getitem__)
            assert row.keys_correct == float(row.labels[place] == row.answer)
            both = [a + model.answering.beta_of(row.route) * b for a, b in zip(row.loglikelihoods, row.keys, strict=True)]
            assert row.served == row.labels[max(range(len(both)), key=both.__getitem__)]


@pytest.mark.parametrize("kind", ["both", "model", "keys"])
def test_the_label_that_is_looked_for_alone_is_the_best_of_all(
    run: Any, kind: EvidenceKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _, model = run
    texts = [text for task in TASKS for text in texts_of(folder, task)]
    monkeypatch.setattr(model.answering, "kind", kind)
    assert model.predict(texts) == [found.label for found in model.classify(texts)]


def test_a_text_read_before_its_question_is_answered_as_its_whole_prompt(run: Any) -> None:
    folder, _, model = run
    texts = [text for task in TASKS for text in texts_of(folder, task)]
    kept = model.next_token_logits(texts, batch_size=7)
    trunk, model.answering._trunk = model.answering._trunk, None
    try:
        assert trunk is not None, "this model's lower half can be kept"
        torch.testing.assert_close(kept, model.next_token_logits(texts, batch_size=5), atol=1e-5, rtol=1e-4)
    finally:
        model.answering._trunk = trunk


def test_no_style_of_prompt_moves_a_route(run: Any) -> None:
    folder, _, model = run
    texts = [text for task in TASKS for text in texts_of(folder, task)]
    before = [route.tasks for route in model.route(texts)]
    entries, made = dict(model.prompter.entries), dict(model.prompter._made)
    try:
        for style in STYLES.values():
            for task in TASKS:
                object.__setattr__(model.prompter.entries[task], "template", style)
            model.prompter._made.clear()
            assert [route.tasks for route in model.route(texts)] == before
            assert [found.route.tasks for found in model.classify(texts, batch_size=16)] == before
    finally:
        for task in TASKS:
            object.__setattr__(entries[task], "template", STYLES["question"])
        model.prompter._made.clear()
        model.prompter._made.update(made)


def test_the_oracle_is_given_the_task_and_nothing_else(run: Any) -> None:
    folder, result, model = run
    for place, task in enumerate(TASKS):
        shown = model.classify(texts_of(folder, task), task=task)
        assert [found.label for found in shown] == [row.served for row in scored(folder, task, "oracle")]
        right = sum(row.served == row.answer for row in scored(folder, task, "oracle"))
        assert right / len(shown) == result["oracle"][place]


def test_rows_of_ones_own_score_as_the_matrix_does(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder, result, _ = run
    for place, task in enumerate(TASKS):
        file = folder / "tasks" / task / "test.jsonl"
        score("models:/served@current", Rows(str(file)), task, 4, {}, as_json=True)
        shown = json.loads(capsys.readouterr().out)
        assert shown["accuracy"] == result["accuracy_matrix"][-1][place] and shown["rows"] == 9
        routed = sum(row.route == task for row in scored(folder, task)) / 9
        assert shown["routing_accuracy"] == pytest.approx(routed)


def test_rows_that_are_no_rows_of_the_task_are_named(run: Any, tmp_path: Path) -> None:
    bad = tmp_path / "rows.jsonl"
    bad.write_text('{"text": "a", "label": "purple-ish"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"rows\.jsonl.*'purple-ish', the labels of 'colours'"):
        score("models:/served@current", Rows(str(bad)), "colours", 4, {}, as_json=True)
    with pytest.raises(UserError, match="--task: found 'colors', the bank's tasks are colours"):
        score("models:/served@current", Rows(str(bad)), "colors", 4, {}, as_json=True)
    with pytest.raises(UserError, match="found no 'answer'"):
        score("models:/served@current", Rows(str(bad), label="answer"), "colours", 4, {}, as_json=True)


def test_changed_answers_between_two_versions_are_counted_and_listed(
    run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _, model = run
    file = folder / "tasks" / "colours" / "test.jsonl"
    answer_differences("models:/served/1", "models:/served/3", Rows(str(file)), 4, {}, as_json=True)
    shown = json.loads(capsys.readouterr().out)
    before = AMLoRAModel.from_bank("models:/served/1", device="cpu").predict(texts_of(folder, "colours"))
    now = model.predict(texts_of(folder, "colours"))
    assert shown["changed"] == sum(one != other for one, other in zip(before, now, strict=True))
    assert [one["after"] for one in shown["answers"]] == [o for b, o in zip(before, now, strict=True) if b != o]


def test_with_label_keys_of_its_own_stage_another_route_alone_changes_an_answer_and_nothing_is_trained_again(
    run: Any,
) -> None:
    folder, _, trained = run
    config = load_config(folder / "run.yaml", ["evaluate=all", "router.background=true", "router.label_keys=stage"])
    run_sequence(config, run_id="steady", progress=Silent())
    models = [AMLoRAModel.from_bank(f"models:/steady/{version}", device="cpu") for version in (1, 2, 3)]
    digests = [[one.digest for one in model.bank.manifest.adapters] for model in (trained, models[-1])]
    assert digests[0] == digests[1]
    for place, task in enumerate(TASKS[:2]):
        texts = texts_of(folder, task)
        found = [model.classify(texts) for model in models[place:]]
        kept = 0
        for answers in zip(*found, strict=True):
            routes = [{name: share for name, share in one.route.tasks.items() if share} for one in answers]
            if all(route == routes[0] for route in routes):
                kept += 1
                assert len({one.label for one in answers}) == 1
                for one in answers[1:]:
                    assert one.scores == pytest.approx(answers[0].scores, abs=1e-4)
        assert kept, "some route is as it was"


def test_a_bank_of_before_routes_plain_text_once_its_keys_are_made_again(run: Any, tmp_path: Path) -> None:
    folder, _, _ = run
    config = load_config(folder / "run.yaml", ["evaluate=last", "prompt_format=1", "evaluation.prompts=own"])
    run_sequence(config, run_id="before", progress=Silent())
    old = AMLoRAModel.from_bank("models:/before@current", device="cpu")
    assert old.answering is None, "a bank of then answers as it did"
    given = [f"{task}={folder / 'tasks' / task / 'train.jsonl'}" for task in TASKS]
    shown = rekey_bank("models:/before@current", tmp_path / "new", given, "label", {})
    assert "3 tasks" in shown
    new = AMLoRAModel.from_bank(tmp_path / "new", device="cpu")
    assert new.answering is not None and len(new.answering.router.keys.task) == 8, "a key for every label"
    before = [adapter.digest() for adapter in old.bank.adapters]
    assert [adapter.digest() for adapter in new.bank.adapters] == before
    routed = [route.task == task for task in TASKS for route in new.route(texts_of(folder, task))]
    assert sum(routed) / len(routed) > 0.6
    with pytest.raises(UserError, match="--rows: found sizes2, expected TASK=FILE"):
        rekey_bank("models:/before@current", tmp_path / "x", [*given[:2], f"sizes2={given[2][6:]}"], "label", {})
    with pytest.raises(UserError, match="--rows: found 'colours' twice, expected one file of each task"):
        rekey_bank("models:/before@current", tmp_path / "x", [*given, given[0]], "label", {})
    with pytest.raises(UserError, match="found no rows of sizes"):
        rekey_bank("models:/before@current", tmp_path / "x", given[:2], "label", {})
    assert not (tmp_path / "x").exists()


def test_texts_of_no_task_go_to_the_base_model_where_that_is_asked_for(run: Any, tmp_path: Path) -> None:
    """On a finished bank, which was published without abstention; a threshold that loses nearly half takes the rest too."""
    folder, _, model = run
    own = [text for task in TASKS for text in texts_of(folder, task)]
    bold = AMLoRAModel.from_bank("models:/served@current", device="cpu", abstain=0.0)
    assert [one.label for one in bold.classify(own)] == [one.label for one in model.classify(own)]
    shy = AMLoRAModel.from_bank("models:/served@current", device="cpu", abstain=0.1)
    assert shy.bank.manifest.digest() == model.bank.manifest.digest(), "it is the same bank"
    found = shy.classify(own)
    threshold = shy.answering.router.threshold if shy.answering is not None else None
    assert threshold is not None and all(one.foreign is not None for one in found)
    assert [one.label is None for one in found] == [one.foreign > threshold for one in found if one.foreign is not None]
    assert sum(one.label is None for one in found) <= len(own) // 3, "most rows are the bank's own"
    for one, free in zip(found, shy.answer(own), strict=True):
        assert one.label is not None or (one.route.task is None and one.scores == {} and free.route.task is None)
    with pytest.raises(UserError, match=r"abstain: found 0\.7, expected a share"):
        AMLoRAModel.from_bank("models:/served@current", device="cpu", abstain=0.7)


def test_the_snippet_of_the_readme_runs_word_for_word(
    run: Any, tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (repository / "README.md").read_text(encoding="utf-8")
    library, client = (part.split("```", 1)[0] for part in text.split("```python\n")[1:])
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["pull", "models:/served@current", "bank/"])
    assert done.exit_code == 0, done.output
    exec(compile(library, "README.md", "exec"), {})  # noqa: S102 (our own words)
    lines = capsys.readouterr().out.splitlines()
    tasks = run[2].tasks
    assert len(lines) == 2 and all(any(f" {task} " in line for task in tasks) for line in lines)
    assert lines[0].endswith(" I can't sign in since you changed the password rules.")
    with running(ServedBank(run[2], "demo")) as server:
        exec(compile(client.replace("http://127.0.0.1:8000", server.url), "README.md", "exec"), {})  # noqa: S102
    assert capsys.readouterr().out.strip() == run[2].predict("I can't sign in since you changed the password rules.")[0]


def test_texts_are_answered_from_the_command_line(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _, model = run
    texts = texts_of(folder, "shapes")[:2]
    ask("models:/served@current", texts, [], {}, as_json=True)
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["answer"] for one in shown] == model.predict(texts)
    assert [one["task"] for one in shown] == [route.task for route in model.route(texts)]
    assert all(0 < one["confidence"] <= 1 for one in shown)
    ask("models:/served@current", texts, [], {}, as_json=False)
    assert texts[0].split()[0] in capsys.readouterr().out
