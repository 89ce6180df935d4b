"""The report says what a raced start of a recipe has gained."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from amlora_dist.reporting.facts import StageFacts
from amlora_dist.reporting.page import TableBlock
from amlora_dist.reporting.run_charts import _won_by, training_blocks
from pipelines.cli.tables import _rate_line


def test_a_race_is_reported_in_percent_of_the_held_out_loss_of_the_start_at_zero() -> None:
    losses = {"none": 0.8, "amazon": 0.6, "yelp": 0.7}
    race = {"steps": 12, "losses": losses}
    assert _won_by({"race": race, "recipe_from": "amazon"}) == pytest.approx(0.25)
    assert _won_by({"race": race, "recipe_from": None}) == 0.0, "none of them was better by more than a near-tie"
    assert _won_by({"race": None, "recipe_from": "amazon"}) is None
    assert _won_by({}) is None, "a result of older code"
    diverged = {"steps": 12, "losses": losses | {"none": None}}
    assert _won_by({"race": diverged, "recipe_from": "amazon"}) == 1.0, "the start at zero diverged"


def facts_of(rate: dict[str, Any] | None) -> Any:
    race = {"steps": 12, "losses": {"none": 0.8, "a": 0.6}, "losers_seconds": 3.5}
    public = {"task": "b", "train_seconds": 20.0, "recipe_from": "a", "race": race, "kept_step": 9, "held_seconds": 1.25}
    return SimpleNamespace(stages=[StageFacts("b", "", public)], inputs={} if rate is None else {"rate": rate})


def tables(rate: dict[str, Any] | None) -> dict[str, TableBlock]:
    return {block.name: block for block in training_blocks(facts_of(rate)) if isinstance(block, TableBlock)}


def test_what_races_and_looks_cost_can_be_read_off_a_report() -> None:
    cost = tables(None)["cost"].table
    row = dict(zip(cost.columns, cost.rows[0], strict=True))
    assert (row["its losers, s"], row["looks at held-out rows, s"], row["training, s"]) == (3.5, 1.25, 20.0)
    assert "rates" not in tables(None), "a number was given, or nobody noted how it was found"


def test_a_report_and_a_run_say_how_the_rate_was_found_and_what_the_losers_took() -> None:
    losses, seconds = {"0.001": 0.9, "0.003": 0.7, "0.01": None}, {"0.001": 4.0, "0.003": 5.0, "0.01": 2.0}
    raced = {"chosen": 0.003, "how": "race", "steps": 9, "losses": losses, "seconds": seconds}
    block = tables(raced)["rates"]
    assert block.table.rows == [["0.001", 0.9, 4.0, False], ["0.003", 0.7, 5.0, True], ["0.01", None, 2.0, False]]
    assert "first 9 steps" in block.caption and "losers took 6 s" in block.caption
    assert "0.003 won over 9 steps" in _rate_line(raced) and "0.01 diverged" in _rate_line(raced)
    assert "the losers took 6 s" in _rate_line(raced)
    old = {key: value for key, value in raced.items() if key != "seconds"}
    assert "losers" not in tables(old)["rates"].caption + _rate_line(old), "of a race of older code nobody noted it"
    for how, words in (("parent", "bank"), ("default", "default")):
        assert words in str(tables({"chosen": 0.003, "how": how})["rates"].table.rows)
        assert words in _rate_line({"chosen": 0.003, "how": how})
