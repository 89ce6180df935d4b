"""The report of a search: what it must show, from a result as ``amlora tune --json`` prints it."""

from __future__ import annotations

import copy
import io
import itertools
from typing import Any

import pytest

from amlora_dist.reporting.search_page import importance, search_page
from pipelines.cli.search_tables import show_search
from pipelines.cli.tables import console_for
from pipelines.search.outcome import reach_of_l1

pytestmark = pytest.mark.integration  # draws whole pages

SPACE = {"training.l1": {"grid": [0.0, 0.1, 1.0]}, "adapters.rank": {"grid": [4, 8]}}


def trial(number: int, values: dict[str, Any], value: float, outcome: str = "finished") -> dict[str, Any]:
    stages = 2 if outcome == "finished" else 1
    curve = [{"average_performance": value + 0.01 * n, "forgetting": None if n == 0 else 0.02} for n in range(stages)]
    stage = {"reused_from": None, "train_seconds": 3.0}
    shared = {"reused_from": "models:/x/1", "train_seconds": 0.0}
    return {
        "number": number, "run_id": f"s-t{number:03d}", "values": values, "outcome": outcome, "error": None,
        "metrics": {"average_performance": value, "forgetting": 0.02 if stages == 2 else None},
        "interval": [value - 0.05, value + 0.05] if number == 1 else None, "curve": curve, "accuracy_matrix": [],
        "stages": [stage, shared][:stages],
    }  # fmt: skip


@pytest.fixture
def result() -> dict[str, Any]:
    """Rank decides, L1 does nothing; the last trial was stopped."""
    points = list(itertools.product([0.0, 0.1, 1.0], [4, 8]))
    trials = [
        trial(n, {"training.l1": l1, "adapters.rank": rank}, 0.5 if rank == 8 else 0.3, "pruned" if n == 6 else "finished")
        for n, (l1, rank) in enumerate(points, start=1)
    ]
    ranking = [2, 4, 1, 3, 5]
    short = {n: {key: trials[n - 1][key] for key in ("number", "run_id", "values", "metrics")} for n in (2, 4)}
    return {
        "search_id": "s", "registered_model": "s", "method": "am_lora", "seed": 0, "algorithm": "grid",
        "scheduler": "halving", "objectives": {"average_performance": "max"}, "split": "dev", "space": SPACE, "stages": 2,
        "tasks": ["a", "b"],
        "trials": trials, "ranking": ranking, "winner": short[2] | {"test": {"metrics": {"average_performance": 0.45}}},
        "runner_up": short[4], "front": None, "tracking_uri": "sqlite:///x",
        "cost": {"stages_total": 12, "stages_trained": 6, "stages_reused": 5, "stages_pruned": 1, "train_seconds": 18.0},
    }  # fmt: skip


def test_the_page_has_every_picture_and_the_numbers_behind_it(result: dict[str, Any]) -> None:
    page = search_page(result)
    charts = {chart.name: chart for chart in page.charts}
    assert set(charts) == {
        "map-average-performance", "map-forgetting", "parallel", "top-five", "importance", "learning-curves", "stages",
    }  # fmt: skip
    assert charts["map-average-performance"].data.rows == [["4", 0.3, 0.3, 0.3], ["8", 0.5, 0.5, None]]
    assert charts["top-five"].data.rows[2][2:] == [pytest.approx(0.25), pytest.approx(0.35)]
    html = page.html()
    assert "l1 0, rank 8" in html and "0.450" in html and "script" not in html
    assert html.count("<svg") == len(charts)


def test_where_l1_was_varied_the_page_says_in_how_many_stages_it_reached_anything(result: dict[str, Any]) -> None:
    def table(made: dict[str, Any]) -> list[Any]:
        return [b for section in search_page(made).sections for b in section.blocks if getattr(b, "name", "") == "l1-reach"]

    assert table(result) == [], "a search of older code, which did not note it, has its page too"
    for one in result["trials"]:
        one["l1"] = reach_of_l1([{"recipe_zeros": None}, {"recipe_zeros": 0.5 if one["values"]["training.l1"] else 0.0}])
    (block,) = table(result)
    assert block.table.rows == [["0", 2, 0], ["0.1", 2, 2], ["1", 2, 2]]
    assert reach_of_l1([]) is None and reach_of_l1([{"task": "a"}]) is None
    show_search(result | {"winner": result["winner"] | {"version": "models:/s/1"}}, console_for(text := io.StringIO()))
    assert "L1 reached" in text.getvalue() and "1/1" in text.getvalue() and "0/1" in text.getvalue()
    result["space"] = {"adapters.rank": SPACE["adapters.rank"]}
    assert table(result) == [], "it was not varied"


def test_importance_is_the_share_of_variance_that_a_parameter_explains(result: dict[str, Any]) -> None:
    found = importance([t for t in result["trials"] if t["number"] != 6], SPACE)
    assert found["adapters.rank"] == pytest.approx(1.0)
    assert found["training.l1"] is not None and found["training.l1"] < 0.3
    flat = copy.deepcopy(result["trials"])
    for one in flat:
        one["metrics"]["average_performance"] = 0.5
    assert importance(flat, SPACE) == {"training.l1": None, "adapters.rank": None}


@pytest.mark.parametrize("kind", [{"uniform": [0.0, 2.0]}, {"loguniform": [0.01, 2.0]}])
def test_a_range_is_shown_in_quarters(kind: dict[str, Any], result: dict[str, Any]) -> None:
    result["space"] = {"training.l1": kind, "adapters.rank": {"choice": [4, 8]}}
    for number, one in enumerate(result["trials"]):
        one["values"]["training.l1"] = 0.02 + 0.35 * number
    page = search_page(result)
    table = next(chart.data for chart in page.charts if chart.name == "map-average-performance")
    assert len(table.columns) <= 5 and all(" to " in column for column in table.columns[1:])


def test_a_search_over_one_path_and_one_trial_has_a_page_too(result: dict[str, Any]) -> None:
    result["space"] = {"adapters.rank": {"grid": [4]}}
    result["trials"] = [trial(1, {"adapters.rank": 4}, 0.3)]
    result |= {"ranking": [1], "runner_up": None, "winner": {**result["trials"][0], "test": result["winner"]["test"]}}
    assert "Search s" in search_page(result).html()
