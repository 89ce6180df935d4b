"""The numbers of a comparison, from runs written by hand: no model, no store."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest

from amlora_dist.evaluation.plain_choice import PlainChoice
from amlora_dist.evaluation.scoring import Prediction
from amlora_dist.reporting.comparing import Entry, compare
from amlora_dist.reporting.comparison_report import (
    _floor,
    _floor_means,
    _measure,
    also_table,
    comparison_page,
    method_table,
)
from amlora_dist.reporting.facts import RunFacts, StageFacts
from amlora_dist.reporting.promotion_page import promotion_page

ROWS = {"first": [1.0] * 30 + [0.0] * 10, "second": ([1.0] + [0.0] * 3) * 10}
"""Score of each test row after the last stage, by task."""


def entry(method: str, order: Sequence[str], *, seed: int = 0, also: Sequence[dict[str, Any]] = ()) -> Entry:
    """A run whose every stage scored every task alike."""
    name = "-".join(order)
    means = [sum(ROWS[task]) / len(ROWS[task]) for task in order]
    predictions = {
        task: [
            Prediction(row=n, answer="", output="", ended=True, correct=score, ranked=0, ranked_correct=score > 0)
            for n, score in enumerate(ROWS[task], start=1)
        ]
        for task in order
    }
    stages = []
    for task in order:
        scores = [{"mode": "router", "task": one, "fingerprint": one} for one in order]
        public = {"task": task, "train_seconds": 1.0, "reused": False}
        stages.append(StageFacts(task, "", public, {}, scores))
    result = {
        "tasks": list(order), "method": method, "seed": seed, "untrained": None, "oracle": None, "also": list(also),
        "accuracy_matrix": [means] * 2, "ranked_accuracy_matrix": [means] * 2,
    }  # fmt: skip
    facts = RunFacts(f"{method}.{name}.{seed}", "", "", result, {}, {}, stages, predictions)
    return Entry(method, name, seed, facts)


def interval(entries: Sequence[Entry]) -> list[float]:
    found: list[float] = compare(entries, "seq_lora")["methods"]["seq_lora"]["metrics"]["average_performance"]["interval"]
    return found


def test_more_orders_of_the_same_test_rows_do_not_make_the_interval_over_rows_narrower() -> None:
    one = interval([entry("seq_lora", ["first", "second"])])
    both = interval([entry("seq_lora", ["first", "second"]), entry("seq_lora", ["second", "first"])])
    assert both == pytest.approx(one), "the same rows were scored twice: that is no further evidence about rows"
    assert one[0] < 0.5 < one[1]


def test_equal_runs_of_two_methods_differ_by_exactly_nothing() -> None:
    orders = (["first", "second"], ["second", "first"])
    made = [entry(method, order) for order in orders for method in ("seq_lora", "replay")]
    difference = compare(made, "seq_lora")["differences"]["replay"]
    assert difference["mean"] == 0.0 and difference["interval"] == [0.0, 0.0] and difference["wins"] == 0


def test_test_sets_that_no_stage_learned_are_compared_too() -> None:
    shifted = [{"task": "shifted", "accuracy": score, "ranked_accuracy": None, "rows": 9} for score in (0.25, 0.75)]
    order = ["first", "second"]
    made = [entry("seq_lora", order, seed=n, also=[one]) for n, one in enumerate(shifted)] + [entry("per_task", order)]
    found = compare(made, "seq_lora")
    assert found["also"] == {"seq_lora": {"shifted": 0.5}, "per_task": {}}
    table = also_table(found)
    assert table is not None and table.columns == ["method", "shifted"] and table.rows == [["seq_lora", 0.5]]
    assert also_table(compare(made[-1:], "per_task")) is None


def test_a_comparison_knows_what_its_scores_are_called_and_what_needs_no_learning() -> None:
    one = entry("seq_lora", ["first", "second"])
    found = compare([one], "seq_lora")
    assert found["measure"] == "accuracy" and found["baselines"]["first"] == {"chance": None, "majority": None}
    assert _floor(found, ["first", "second"]) == {} and _floor_means(found) == []
    one.facts.result["task_metrics"] = {"first": "rouge_l", "second": "rouge_l"}
    assert compare([one], "seq_lora")["measure"] == "ROUGE-L"
    one.facts.result["task_metrics"] = {"first": "accuracy", "second": "rouge_l"}
    one.facts.inputs["tasks"] = {"first": {"labels": ["", "x", "y", "z"], "metric": "accuracy"}}
    mixed = compare([one], "seq_lora")
    assert mixed["measure"] == "score"
    assert _floor(mixed, ["second", "first"]) == {"majority label": [None, 1.0], "chance": [None, 0.25]}
    assert _floor_means(mixed) == [], "a mean over one of two tasks is no line next to means over both"
    assert _measure({}) == "accuracy" and _floor({}, ["first"]) == {}, "a comparison of an earlier release"


@pytest.mark.parametrize(("metric", "name"), [("rouge_l", "ROUGE-L"), ("accuracy", "accuracy"), (None, "accuracy")])
def test_the_page_of_a_promotion_calls_scores_by_their_metric(metric: str | None, name: str) -> None:
    scores = {"notes": {"rows": 4, "accuracy": 0.5, "routing_accuracy": 1.0} | ({"metric": metric} if metric else {})}
    page = promotion_page({
        "version": "models:/x/2", "alias": "champion", "replaced": "models:/x/1", "passed": True, "verdict": "passes",
        "margin": 0.02, "checks": [], "scores": scores, "replaced_scores": scores, "mean_accuracy": 0.5,
        "replaced_mean_accuracy": 0.5, "worse_rows": [], "better_rows": 0, "sample": {"name": "s", "sha256": "0" * 64},
        "time": "2026-01-01T00:00:00+00:00",
    })  # fmt: skip
    assert page.tiles[1].label == f"{name}, mean of the tasks"
    html = page.html()
    assert f"A task&#39;s {name} may fall by 0.02" in html and f">{name}</th>" in html


@pytest.mark.integration
def test_the_page_of_a_comparison_names_its_metric_and_shows_what_needs_no_learning() -> None:
    made = [entry(method, ["first", "second"]) for method in ("seq_lora", "replay")]
    for one in made:
        one.facts.inputs["tasks"] = {task: {"labels": ["", "x"], "metric": "accuracy"} for task in ROWS}
    shared = {
        "comparison_id": "c", "seeds": [0], "orders": {"given": list(ROWS)}, "command": "amlora compare", "failed": [],
        "config": {"evaluation": {"split": "test"}, "model": {"source": "m"}}, "learning_rates": [], "tuning": {},
    }  # fmt: skip
    charts = {chart.name: chart for chart in comparison_page(compare(made, "seq_lora") | shared).charts}
    assert charts["tasks"].title == "Accuracy after the last stage"
    assert charts["tasks"].data.rows[2:] == [["majority label", 1.0, 1.0], ["chance", 0.5, 0.5]]
    assert charts["average-performance"].data.rows[2:] == [
        ["majority label, no learning", 1.0, None, None], ["chance, no learning", 0.5, None, None],
    ]  # fmt: skip
    assert {"majority label, all tasks", "chance, all tasks"} <= {str(row[0]) for row in charts["by-stage"].data.rows}
    for one in made:
        one.facts.result["task_metrics"] = dict.fromkeys(ROWS, "rouge_l")
    named = comparison_page(compare(made, "seq_lora") | shared)
    assert "accuracy" not in "".join(chart.svg() for chart in named.charts) and "ROUGE-L" in named.html()


SERVED = {"prompt_format": 2, "evaluation": {"prompts": "served", "split": "test"}, "model": {"source": "m"}}


def told(one: Entry, own: float, freely: float) -> Entry:
    """The same run with its rows scored behind their tasks' own prompts too, and with what was written freely."""
    facts = one.facts
    facts.config, count = SERVED, 40
    for task in facts.tasks:
        before = facts.predictions[task]
        facts.predictions[task] = [
            replace(p, greedy_correct=float(n < freely * count), model_correct=p.correct) for n, p in enumerate(before)
        ]
        facts.predictions[f"own-{task}"] = [replace(p, correct=float(n < own * count)) for n, p in enumerate(before)]
        facts.stages[-1].scores.append({"mode": "own", "task": task, "fingerprint": f"own-{task}"})
    ranked = facts.result["accuracy_matrix"][-1]
    facts.result["last"] = {"own_prompt": [own, own], "greedy_accuracy": [freely, freely], "model_accuracy": ranked}
    return one


def test_a_method_that_finds_no_task_has_plain_text_written_freely_and_the_task_s_own_prompt_next_to_each_other() -> None:
    order = ["first", "second"]
    made = [told(entry("seq_lora", order), 0.8, 0.25), entry("per_task", order), entry("replay", order)]
    made[1].facts.config = SERVED
    found = compare(made, "seq_lora")
    line = found["methods"]["seq_lora"]
    assert line["asked"] == "plain text" and found["methods"]["per_task"]["asked"] == "told the task"
    assert found["methods"]["replay"]["asked"] == "own prompt", "of a configuration that knows no prompt format"
    assert line["metrics"]["average_performance"]["mean"] == 0.5
    for name, mean in (("told", 0.8), ("by_ranking", 0.5), ("written_freely", 0.25)):
        low, high = line["metrics"][name]["interval"]
        assert line["metrics"][name]["mean"] == pytest.approx(mean) and low < mean < high
        assert found["runs"][0]["metrics"][name] == pytest.approx(mean)
    table = method_table(found | {"tuning": {}, "config": {}})
    shown = {str(row[0]): dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert list(shown) == ["seq_lora", "per_task (told the task)", "replay (own prompt)"]
    assert [shown["seq_lora"][name] for name in ("AP", "written freely", "told, own prompt")] == [0.5, 0.25, 0.8]
    assert shown["replay (own prompt)"]["told, own prompt"] is None
    assert shown["seq_lora"]["plain text"] == "ranks" and shown["seq_lora"]["by ranking"] == 0.5
    assert shown["replay (own prompt)"]["plain text"] is None
    made.append(told(entry("seq_lora", order, seed=1), 0.8, 0.25))
    made[-1].facts.result["plain_text"] = PlainChoice(way="writes", ranks=0.5, writes=0.6, rows=9, of="dev").to_mapping()
    both = method_table(compare(made, "seq_lora") | {"tuning": {}, "config": {}})
    assert both.rows[0][both.columns.index("plain text")] == "ranks 1, writes 1"


@pytest.mark.integration
def test_a_comparison_that_was_stored_before_still_makes_a_table_and_a_report() -> None:
    order = ["first", "second"]
    shared = {
        "comparison_id": "c", "seeds": [0], "orders": {"given": order}, "command": "amlora compare", "failed": [],
        "config": SERVED, "learning_rates": [], "tuning": {},
    }  # fmt: skip
    now = compare([told(entry("seq_lora", order), 0.8, 0.25)], "seq_lora") | shared
    assert "told, own prompt" in comparison_page(now).html() and "which tells it the task" in comparison_page(now).html()
    old = deepcopy(now)
    for one in (old["methods"]["seq_lora"], old["runs"][0]):
        one.pop("asked", None)
        one.pop("plain_text", None)
        del one["metrics"]["told"], one["metrics"]["by_ranking"], one["metrics"]["written_freely"]
    html = comparison_page(old).html()
    assert "told, own prompt" not in html and "plain text" not in html, "what it does not say is not said of it"
    assert method_table(old).rows[0][:2] == ["seq_lora", 0.5]
