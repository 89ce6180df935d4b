"""The space of a search: what it draws, and every way in which it can be wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from amlora_dist.config.loading import load_config, with_values
from amlora_dist.config.search_space import dimensions, nested, points
from amlora_dist.errors import FaultsError, UserError

SPACE: dict[str, Any] = {"training.l1": {"grid": [0.0, 0.1]}, "adapters.rank": {"choice": [2, 4, 8]}}


@pytest.fixture
def config(tmp_path: Path, repository: Path) -> Path:
    """A search that is right; its model and tasks are never opened here."""
    data = {
        "name": "space", "workers": 0, "model": {"source": "owner/model"},
        "tasks": ["helpdesk/email_route", "helpdesk/chat_mood"], "search": {"space": SPACE},
    }  # fmt: skip
    file = tmp_path / "search.yaml"
    file.write_text(yaml.safe_dump(data), encoding="utf-8")
    return file


def change(file: Path, **search: Any) -> None:
    data = yaml.safe_load(file.read_text(encoding="utf-8"))
    data["search"] |= search
    file.write_text(yaml.safe_dump(data), encoding="utf-8")


def test_a_grid_has_every_point_once_and_a_limit_takes_some_of_them() -> None:
    found, faults = dimensions(nested(SPACE))
    assert not faults
    whole = points(found, algorithm="grid", num_samples=None, seed=0)
    assert whole == [{"training.l1": l1, "adapters.rank": rank} for l1 in (0.0, 0.1) for rank in (2, 4, 8)]
    some = points(found, algorithm="grid", num_samples=4, seed=0)
    assert len(some) == 4 and all(point in whole for point in some)
    assert some == points(found, algorithm="grid", num_samples=4, seed=0)


def test_random_points_stay_in_their_range_and_depend_on_seed_and_number_alone() -> None:
    space = {
        "a": {"uniform": [1, 2]}, "b": {"loguniform": [1e-4, 1e-2]}, "c": {"randint": [3, 5]}, "d": {"choice": ["x", "y"]},
    }  # fmt: skip
    found, _ = dimensions(space)
    drawn = points(found, algorithm="random", num_samples=200, seed=1)
    assert all(1 <= p["a"] <= 2 and 1e-4 <= p["b"] <= 1e-2 for p in drawn)
    assert {p["c"] for p in drawn} == {3, 4} and {p["d"] for p in drawn} == {"x", "y"}
    assert sum(p["b"] < 1e-3 for p in drawn) > 60, "as many below a tenth of the range as above, on its scale"
    assert points(found, algorithm="random", num_samples=3, seed=1) == drawn[:3]
    assert points(found, algorithm="random", num_samples=3, seed=2) != drawn[:3]


def test_random_draws_are_crossed_with_the_grid() -> None:
    found, _ = dimensions({"l1": {"grid": [0, 1]}, "rate": {"uniform": [0, 1]}})
    drawn = points(found, algorithm="random", num_samples=3, seed=0)
    assert [p["l1"] for p in drawn] == [0, 1] * 3
    assert len({p["rate"] for p in drawn}) == 3


def test_overrides_reach_into_the_space_however_its_paths_are_written(config: Path) -> None:
    loaded = load_config(config, ["search.space.training.l1={grid: [0.5]}", "search.algorithm=grid"])
    assert loaded.search is not None
    found, _ = dimensions(loaded.search.space)
    assert {d.path: d.values for d in found} == {"training.l1": (0.5,), "adapters.rank": (2, 4, 8)}


def test_values_are_put_into_a_configuration_under_its_own_checks(config: Path) -> None:
    loaded = load_config(config)
    made = with_values(loaded, {"training.l1": 0.3, "tasks[1].max_train": 5, "router.gate.threshold": 0.2})
    assert (made.training.l1, made.router.gate.threshold) == (0.3, 0.2)
    assert made.tasks[1] == {"task": "helpdesk/chat_mood", "max_train": 5}
    assert made.search is None
    with pytest.raises(FaultsError, match=r"adapters\.rank"):
        with_values(loaded, {"adapters.rank": 0})


BAD: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "empty choice": ({"space": {"training.l1": {"choice": []}}}, ("search.space.training.l1", "at least one value")),
    "empty space": ({"space": {}}, ("search.space", "at least 1")),
    "log of zero": (
        {"space": {"training.l1": {"loguniform": [0, 1]}}}, ("search.space.training.l1", "ends above 0", "logarithm")),
    "unknown path": (
        {"space": {"training.epoch": {"choice": [1]}}}, ("search.space.training.epoch", "unknown key", "'epochs'")),
    "unknown section": ({"space": {"trainin.l1": {"choice": [0.1]}}}, ("search.space.trainin.l1", "unknown")),
    "a path that changes nothing": (
        {"space": {"workers": {"choice": [0, 2]}}}, ("search.space.workers", "cannot change the result")),
    "scoring": (
        {"space": {"evaluation.batch_size": {"choice": [1, 2]}}}, ("evaluation.batch_size", "cannot change the result")),
    "a grid of a million": (
        {"space": {"training.l1": {"grid": list(range(1000))}, "training.epochs": {"grid": list(range(1, 1001))}}},
        ("a grid of 1,000,000 trials", "search.num_samples")),
    "a range in a grid": ({"space": {"training.l1": {"uniform": [0, 1]}}}, ("search.space.training.l1", "random")),
    "fractions of a whole number": (
        {"space": {"adapters.rank": {"uniform": [2, 8]}}, "algorithm": "random", "num_samples": 2},
        ("search.space.adapters.rank", "uniform with 5.7", "a whole number")),
    "ends the wrong way": (
        {"space": {"training.l1": {"uniform": [1, 0]}}, "algorithm": "random"}, ("a low end below the high end",)),
    "unknown kind": ({"space": {"training.l1": {"chioce": [1]}}}, ("search.space.training.l1", "did you mean 'choice'?")),
    "no kind": ({"space": {"training.l1": [0, 1]}}, ("search.space.training.l1", "{choice: [...]}")),
    "a value that is wrong there": (
        {"space": {"adapters.rank": {"grid": [4, 0]}}}, ("search.space.adapters.rank", "grid with 0", "at least 1")),
    "a value of another type": ({"space": {"adapters.rank": {"grid": ["four"]}}}, ("adapters.rank", "a whole number")),
    "twice the same": ({"space": {"adapters.rank": {"grid": [4, 4]}}}, ("adapters.rank", "each value once")),
    "no samples": ({"algorithm": "random"}, ("search.num_samples", "the number of trials")),
    "no samples wanted": ({"num_samples": 0}, ("search.num_samples", "at least 1")),
    "two objectives": ({"objective": ["average_performance", "forgetting"]}, ("search.objective", "optuna")),
    "unknown objective": ({"objective": "accuracy"}, ("search.objective",)),
    "unknown key": ({"sampels": 3}, ("search.sampels", "num_samples")),
    "a grid for optuna": (
        {"algorithm": "optuna", "num_samples": 3}, ("search.space.training.l1", "choice under search.algorithm: optuna")),
    "halving for optuna": (
        {"algorithm": "optuna", "num_samples": 3, "scheduler": "halving", "space": {"training.l1": {"choice": [0, 1]}}},
        ("search.scheduler: found halving under search.algorithm: optuna, expected none", "random goes with halving")),
    "a scheduler that is gone": (
        {"scheduler": "asha"}, ("search.scheduler: found 'asha', expected none or halving", "write halving")),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_space_is_reported_in_one_message_before_anything_starts(name: str, config: Path) -> None:
    search, parts = BAD[name]
    change(config, **search)
    with pytest.raises(FaultsError) as caught:
        load_config(config)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_all_faults_of_a_space_are_reported_at_once_with_their_lines(config: Path) -> None:
    space = {"training.l1": {"choice": []}, "training.l2": {"choice": [1]}, "adapters.rank": {"grid": [0]}}
    change(config, space=space)
    with pytest.raises(FaultsError, match="3 faults") as caught:
        load_config(config)
    assert str(caught.value).count("line ") >= 3


def plan(config: Path) -> Any:
    from pipelines.search.plan import plan_search

    return plan_search(load_config(config), str(config))


@pytest.mark.parametrize(
    ("space", "more", "path"),
    [
        ({"training.l1": {"grid": [0.0, 0.1]}}, {"tasks": ["helpdesk/email_route"]}, "training.l1"),
        ({"training.l1": {"grid": [0.0, 0.1]}}, {"router": {"recipes": False}}, "training.l1"),
        ({"method_settings.ortho_weight": {"grid": [1.0, 2.0]}}, {}, "method_settings.ortho_weight"),
        ({"router.gate.threshold": {"grid": [0.1, 0.2]}}, {"method": "seq_lora"}, "router.gate.threshold"),
        ({"task_defaults.max_test": {"grid": [5, 9]}}, {}, "task_defaults.max_test"),
    ],
)
def test_a_path_that_this_configuration_does_not_read_is_refused(
    space: dict[str, Any], more: dict[str, Any], path: str, config: Path
) -> None:
    data = yaml.safe_load(config.read_text(encoding="utf-8")) | more | {"search": {"space": space}}
    config.write_text(yaml.safe_dump(data), encoding="utf-8")
    with pytest.raises(FaultsError, match="does not read") as caught:
        plan(config)
    assert path in str(caught.value)


def test_a_path_that_matters_somewhere_in_the_space_is_taken(config: Path) -> None:
    change(config, space={"training.l1": {"grid": [0.0, 0.1]}, "router.recipes": {"grid": [False, True]}})
    assert plan(config).trials == 4


def test_rows_of_the_next_task_among_a_stages_own_can_be_searched(config: Path) -> None:
    change(config, space={"boundary_mix": {"grid": [0.0, 0.2]}})
    assert plan(config).order == [1, 2]
    alone = yaml.safe_load(config.read_text(encoding="utf-8")) | {"tasks": ["helpdesk/email_route"]}
    config.write_text(yaml.safe_dump(alone), encoding="utf-8")
    with pytest.raises(FaultsError, match="does not read"):
        plan(config)


def test_trials_of_different_lengths_are_refused(config: Path) -> None:
    change(config, space={"tasks": {"choice": [["helpdesk/email_route"], ["helpdesk/email_route", "helpdesk/chat_mood"]]}})
    with pytest.raises(FaultsError, match="trials of 1 and 2 stages"):
        plan(config)


def test_a_configuration_without_a_search_says_so(config: Path) -> None:
    data = yaml.safe_load(config.read_text(encoding="utf-8"))
    del data["search"]
    config.write_text(yaml.safe_dump(data), encoding="utf-8")
    with pytest.raises(UserError, match="no `search` section"):
        plan(config)


def test_trials_that_start_together_share_no_first_stage(config: Path) -> None:
    change(config, space={"adapters.rank": {"grid": [2, 4, 8]}, "training.l1": {"grid": [0.0, 0.1]}})
    made = plan(config)
    ranks = [made.listed[number - 1]["adapters.rank"] for number in made.order]
    assert sorted(made.order) == [1, 2, 3, 4, 5, 6]
    assert ranks == [2, 4, 8, 2, 4, 8]


def test_trials_see_the_dev_split_alone_and_the_champion_the_test_split(config: Path) -> None:
    made = plan(config)
    trial = made.config({"training.l1": 0.1})
    assert (trial.evaluation.split, trial.evaluation.sealed, trial.evaluation.cells) == ("dev", ("test",), "seen")
    assert (trial.training.l1, trial.registered_model, trial.search) == (0.1, None, None)
    champion = made.champion({"training.l1": 0.1}, "model")
    assert (champion.evaluation.split, champion.evaluation.sealed) == ("test", ())


def test_the_shipped_search_is_right(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    made = plan(Path("configs/search.yaml"))
    assert made.trials == 6 and made.stages == 4


@pytest.mark.parametrize(
    ("search", "cells"),
    [
        ({}, "last"),
        ({"scheduler": "halving"}, "seen"),
        ({"objective": "forgetting"}, "seen"),
    ],
)
def test_trials_are_scored_after_every_stage_where_that_is_read_whatever_the_champion_wants(
    search: dict[str, Any], cells: str, config: Path
) -> None:
    data = yaml.safe_load(config.read_text(encoding="utf-8")) | {"evaluate": "last"}
    config.write_text(yaml.safe_dump(data), encoding="utf-8")
    change(config, **search)
    made = plan(config)
    assert made.config({"training.l1": 0.1}).evaluation.cells == cells
    assert made.champion({"training.l1": 0.1}, "model").evaluation.cells == "last"
