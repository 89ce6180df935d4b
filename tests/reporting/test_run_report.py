"""What a run's page says, from runs written by hand: no model, no store, no picture."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from amlora_dist.evaluation.scoring import Prediction
from amlora_dist.reporting.answers import OTHER, answer_blocks, confusion_blocks, confusions
from amlora_dist.reporting.backward import ALL, backward_blocks
from amlora_dist.reporting.baselines import CHANCE, MAJORITY, baselines
from amlora_dist.reporting.facts import RunFacts, StageFacts
from amlora_dist.reporting.figures import WIDE, WIDTH
from amlora_dist.reporting.foreign_texts import foreign_blocks
from amlora_dist.reporting.page import TableBlock
from amlora_dist.reporting.run_report import _by_evidence, _learned_text, _retained, run_page

LABELS = {"mood": ["happy", "annoyed"], "route": ["billing", "account", "delivery"]}
ANSWERS = {"mood": ["happy"] * 3 + ["annoyed"], "route": ["billing", "account", "delivery", "account"], "note": ["a text"]}


def predictions(task: str, given: Sequence[str], *, answers: Sequence[str] | None = None) -> list[Prediction]:
    return [
        Prediction(row=n, answer=right, output=given_answer, ended=True, correct=float(given_answer == right),
                   ranked=LABELS[task].index(given_answer) if task in LABELS and given_answer in LABELS[task] else None,
                   gates=[0.25, 0.75], route="route", served=given_answer)
        for n, (right, given_answer) in enumerate(zip(answers or ANSWERS[task], given, strict=True), start=1)
    ]  # fmt: skip


def made(matrix: Sequence[Sequence[float | None]], scored: dict[str, list[Prediction]], **result: Any) -> RunFacts:
    """A run of the tasks of ``scored`` after the last of its stages, one for each line of ``matrix``."""
    tasks = list(scored)
    about = {task: {"labels": LABELS.get(task), "metric": "accuracy" if task in LABELS else "rouge_l"} for task in tasks}
    stages = [StageFacts(task, "", {"task": task, "reused": False}) for task in tasks[: len(matrix)]]
    stages[-1].scores = [{"mode": "router", "task": task, "fingerprint": task} for task in tasks]
    metrics = {task: one["metric"] for task, one in about.items()}
    whole = {"tasks": tasks, "method": "am_lora", "seed": 0, "untrained": None, "oracle": None, "task_metrics": metrics,
             "accuracy_matrix": [list(line) for line in matrix]}  # fmt: skip
    return RunFacts("run", "", "sqlite:///x", whole | result, {}, {"tasks": about}, stages, scored)


@pytest.fixture
def facts() -> RunFacts:
    scored = {
        "mood": predictions("mood", ["happy", "happy", "annoyed", "happy"]),
        "route": predictions("route", ["billing", "account", "billing", "happy"]),
        "note": predictions("note", ["another text"]),
    }
    return made([[0.5, 0.0, 0.0], [0.5, 0.5, 0.0], [0.5, 0.5, 0.4]], scored)


def test_baselines_are_one_over_the_labels_and_the_most_frequent_answer_and_free_text_has_none(facts: RunFacts) -> None:
    found = baselines(facts)
    assert found.chance == [0.5, pytest.approx(1 / 3), None] and found.majority == [0.75, 0.5, None]
    assert [name for name, _ in found.lines] == [MAJORITY, CHANCE]
    assert found.means == [], "a mean over some of the tasks would be next to a mean over all"
    del facts.predictions["mood"]
    assert baselines(facts).majority[0] is None, "rows that were not scored are not guessed"


@pytest.mark.parametrize(
    ("last", "sentence"),
    [
        ([0.5, 0.5], "Nothing was forgotten: no earlier task has less than after its own stage"),
        ([0.75, 0.5], "Nothing was forgotten: no earlier task has less than after its own stage; they gained 0.125"),
        ([0.25, 0.75], "Nothing was forgotten on average: in earlier tasks gains and losses cancel out"
                       " (the one that lost most: mood −0.250)"),
        ([0.25, 0.5], "Later stages changed earlier tasks by −0.125 on average (the one that lost most: mood −0.250)"),
    ],
)  # fmt: skip
def test_the_headline_says_in_a_sentence_what_later_stages_did(
    facts: RunFacts, last: list[float], sentence: str
) -> None:
    facts.result["accuracy_matrix"][-1][:2] = last
    assert _retained(facts).startswith(f". {sentence}")
    assert "+0.000" not in _retained(facts)


def test_a_run_of_one_stage_has_nothing_to_forget(facts: RunFacts) -> None:
    facts.stages = facts.stages[:1]
    assert _retained(facts) == ""


def test_what_is_recorded_of_tasks_is_in_the_order_of_stages(facts: RunFacts) -> None:
    facts.inputs["tasks"] = dict(sorted(facts.inputs["tasks"].items())) | {"mood.shifted": {}}
    assert list(facts.described) == ["mood", "route", "note", "mood.shifted"]


def test_a_stage_has_its_page_next_to_the_run_in_mlflow(facts: RunFacts) -> None:
    assert facts.page_of("b") == "", "not known"
    facts.page = "https://mlflow.example/#/experiments/7/runs/a"
    assert facts.page_of("b") == "https://mlflow.example/#/experiments/7/runs/b" and facts.page_of("") == ""


def test_confusions_count_every_row_by_right_and_given_answer(facts: RunFacts) -> None:
    assert confusions(facts, "mood") == {"happy": {"happy": 2, "annoyed": 1}, "annoyed": {"happy": 1}}
    assert confusions(facts, "route") == {
        "billing": {"billing": 1}, "account": {"account": 1, OTHER: 1}, "delivery": {"billing": 1},
    }  # fmt: skip
    assert confusions(facts, "note") is None, "free text"
    first, second = confusion_blocks(facts)
    assert not isinstance(first, TableBlock) and first.data.rows == [["happy", 2, 1], ["annoyed", 1, 0]]
    assert not isinstance(second, TableBlock) and second.data.columns[-1] == OTHER


def test_a_task_of_many_labels_lists_its_most_frequent_confusions() -> None:
    labels = [f"label {n}" for n in range(20)]
    wrong = predictions("many", [labels[1]] * 20, answers=[labels[0]] * 3 + labels[3:])
    run = made([[0.0]], {"many": wrong})
    run.inputs["tasks"]["many"] |= {"labels": labels}
    (table,) = confusion_blocks(run)
    assert isinstance(table, TableBlock) and table.table.rows[0] == ["label 0", "label 1", 3, 1.0]
    assert len(table.table.rows) == 18 and table.shown is not None and len(table.shown.rows) == 15


def test_right_and_wrong_answers_are_shown_with_their_routes_and_without_a_text(facts: RunFacts) -> None:
    right, wrong = answer_blocks(facts)
    assert isinstance(right, TableBlock) and isinstance(wrong, TableBlock)
    assert [line[:4] for line in right.table.rows] == [
        ["mood", 1, "happy", "happy"], ["mood", 2, "happy", "happy"],
        ["route", 1, "billing", "billing"], ["route", 2, "account", "account"],
    ]  # fmt: skip
    assert ["note", 1, "a text", "another text", 0.0, "route", None] in wrong.table.rows
    assert right.table.rows[0][-2:] == ["route", None], "three stages, two gates: from before the last stage"


def test_at_most_ten_answers_of_either_kind_and_each_task_has_its_turn() -> None:
    many = {task: predictions(task, ["x" * 200] * 30, answers=["y"] * 30) for task in ("mood", "route")}
    (wrong,) = answer_blocks(made([[0.0, 0.0], [0.0, 0.0]], many))
    assert isinstance(wrong, TableBlock) and wrong.shown is not None
    assert [line[0] for line in wrong.table.rows] == ["mood"] * 5 + ["route"] * 5
    assert wrong.table.rows[0][-2:] == ["route", 0.75] and wrong.table.rows[0][3] == "x" * 200
    assert str(wrong.shown.rows[0][3]) == "x" * 79 + "…"


def test_a_drop_that_a_new_task_causes_is_a_line_and_its_rows_are_named(facts: RunFacts) -> None:
    """Row 2 of mood goes to the task that was learned after it."""
    before = [replace(p, route="mood") for p in predictions("mood", ["happy", "happy", "happy", "happy"])]
    after = [*before[:1], replace(before[1], served="billing", correct=0.0, route="route"), *before[2:]]
    facts.predictions |= {"mood-1": before, "mood-2": after}
    facts.stages[0].scores = [{"mode": "router", "task": "mood", "fingerprint": "mood-1"}]
    facts.stages[1].scores = [{"mode": "router", "task": "mood", "fingerprint": "mood-2"}]
    facts.result["accuracy_matrix"] = [[0.75, None, None], [0.5, 0.5, None]]
    facts.stages = facts.stages[:2]
    table, worse = backward_blocks(facts)
    assert isinstance(table, TableBlock) and isinstance(worse, TableBlock)
    lines = [dict(zip(table.table.columns, line, strict=True)) for line in table.table.rows]
    assert [(line["stage"], line["task"], line["change"]) for line in lines] == [(2, "mood", -0.25), (2, ALL, -0.25)]
    assert lines[0]["worse, rerouted"] == lines[0]["changed"] == 1 and lines[0]["better"] == 0
    assert worse.table.rows == [[2, "route", "mood", 2, "happy", "happy", "billing", "mood", "route"]]
    facts.predictions["mood-2"] = [*after[:3], replace(after[3], row=99)]
    (table,) = backward_blocks(facts)
    assert isinstance(table, TableBlock)
    lines = [dict(zip(table.table.columns, line, strict=True)) for line in table.table.rows]
    assert lines[0]["change"] == -0.25 and lines[0]["low"] is lines[0]["changed"] is None, "other rows are not compared"
    facts.result["accuracy_matrix"][1] = [None] * 3
    assert backward_blocks(facts) == [], "earlier tasks were not scored at that stage"


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 15])
def test_a_whole_page_of_two_and_of_fifteen_tasks_fits_screen_and_limit(count: int) -> None:
    tasks = [f"group/task number {n}" for n in range(count)]
    labels = [f"label {n}" for n in range(10)]
    scored = {task: predictions(task, [labels[n % 9] for n in range(40)], answers=labels * 4) for task in tasks}
    gates = [1.0, *([0.0] * (count - 1))]
    for task in tasks:
        scored[task] = [replace(p, gates=gates, route=tasks[0]) for p in scored[task]]
    run = made([[0.5] * count for _ in tasks], scored)
    for task in tasks:
        run.inputs["tasks"][task] = {
            "labels": labels, "metric": "accuracy", "rows": {"test": 40}, "bad_rows": 0, "prompt_style": "question",
            "digests": {"test": "0" * 64},
        }  # fmt: skip
    run.result |= {"ranked_accuracy_matrix": run.result["accuracy_matrix"], "metrics": {}}
    run.page = "http://127.0.0.1:5000/#/experiments/1/runs/a"
    for n, stage in enumerate(run.stages, start=1):
        stage.run = f"r{n}"
        stage.public |= {"version": n, "fingerprint": "0" * 64, "train_seconds": 1.0}
        stage.training = {"losses": [1.0 / (step + 1) for step in range(20)]}
        stage.scores = [{"mode": "router", "task": task, "fingerprint": task} for task in tasks]
    html = run_page(run).html()
    drawings = html.split('<div class="drawing">')[1:]
    widths = [float(re.findall(r'<svg[^>]*? width="([0-9.]+)pt"', one)[0]) / 72 for one in drawings]
    assert len(widths) >= 5 + count and max(widths) <= 1.1 * WIDE
    assert (max(widths) > 1.4 * WIDTH) is (count == 15)
    assert html.count('href="http://127.0.0.1:5000/#/experiments/1/runs/r') == count
    confused = [html.index(f"{task}: right and given answers") for task in tasks]
    assert confused == sorted(confused), "in the order of stages"


OWN_PROMPT = {"prompt_format": 2, "evaluation": {"prompts": "own", "split": "dev"}}
SERVED = {"prompt_format": 2, "evaluation": {"prompts": "served", "split": "test"}}


@pytest.mark.parametrize(
    ("configuration", "method", "says"),
    [
        (SERVED, "am_lora", "over the test rows, as served. Each row's text was asked by itself"),
        (OWN_PROMPT, "am_lora", "over the dev rows, by greedy output behind the task's own prompt"),
        ({}, "am_lora", "Each row was asked behind its own task's prompt"),
        (SERVED, "per_task", "Each row was told its task"),
    ],
)
def test_the_page_says_what_rows_were_asked_with_and_never_that_nothing_was_told_where_something_was(
    facts: RunFacts, configuration: dict[str, Any], method: str, says: str
) -> None:
    facts.config, facts.result["method"] = configuration, method
    text = _learned_text(facts)
    assert says in text and ("nothing told its task" in text) == (configuration is SERVED and method == "am_lora")
    assert "not told" not in text and "without being told" not in text


def test_rows_whose_keys_prefer_another_task_s_label_are_counted_in_the_table_of_the_last_bank(facts: RunFacts) -> None:
    facts.result["last"] = {"keys_accuracy": [0.5, 0.25, None], "keys_elsewhere": [1, 0, 2]}
    (table,) = _by_evidence(facts)
    assert isinstance(table, TableBlock)
    assert table.table.rows[-1] == ["rows whose keys prefer another task's label", 1, 0, 2]
    assert "another task's label" in table.caption and "two kinds of evidence" in table.caption
    facts.result["last"] = {"greedy_accuracy": [0.5, 0.25, 0.0]}
    (table,) = _by_evidence(facts)
    assert isinstance(table, TableBlock) and "evidence:" not in table.caption, "of a method without keys"


def test_what_abstention_would_lose_and_catch_is_counted_at_every_stored_threshold(facts: RunFacts) -> None:
    assert foreign_blocks(facts) == [], "a bank without thresholds"
    facts.foreign_above = [(0.1, 0.0), (0.01, 2.0)]
    assert foreign_blocks(facts) == [], "rows that were scored without a background"
    for task, foreign in (("mood", [-3.0, -1.0, 1.0, 3.0]), ("route", [-3.0] * 4), ("note", [0.0])):
        facts.predictions[task] = [replace(p, foreign=f) for p, f in zip(facts.predictions[task], foreign, strict=True)]
    other = [replace(facts.predictions["mood"][0], foreign=f) for f in (1.0, 5.0, 5.0, 5.0)]
    facts.predictions |= {"other": other, "mood.paraphrase": other}
    facts.result["also"] = [{"task": "other"}, {"task": "mood.paraphrase"}]
    facts.stages[-1].scores += [{"mode": "router", "task": t, "fingerprint": t} for t in ("other", "mood.paraphrase")]
    chart, table = foreign_blocks(facts)
    assert isinstance(table, TableBlock) and not isinstance(chart, TableBlock)
    assert table.table.columns == ["training rows lost", "0.01", "0.1"]
    shares = {str(row[0]): row[1:] for row in table.table.rows}
    assert shares["mood"] == [0.25, 0.5] and shares["route"] == [0.0, 0.0] and shares["note"] == [0.0, 0.0]
    assert shares["all of them"] == [1 / 9, 2 / 9] and shares["other"] == [0.75, 1.0], "above the threshold, not at it"
    assert "mood.paraphrase" not in shares, "its texts are mood's own"
    drawn = {(row[0], row[1]): row[2] for row in chart.data.rows}  # type: ignore[union-attr]
    assert drawn["other", 1] == 0.75 and drawn["lost: training rows", 2] == 0.1
