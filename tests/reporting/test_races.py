"""The report says what a raced start of a recipe has gained."""

from __future__ import annotations

import pytest

from amlora_dist.reporting.run_charts import _won_by


def test_a_race_is_reported_in_percent_of_the_held_out_loss_of_the_start_at_zero() -> None:
    losses = {"none": 0.8, "amazon": 0.6, "yelp": 0.7}
    race = {"steps": 12, "losses": losses}
    assert _won_by({"race": race, "recipe_from": "amazon"}) == pytest.approx(0.25)
    assert _won_by({"race": race, "recipe_from": None}) == 0.0, "none of them was better by more than a near-tie"
    assert _won_by({"race": None, "recipe_from": "amazon"}) is None
    assert _won_by({}) is None, "a result of older code"
