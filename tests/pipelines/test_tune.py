"""Searches through Ray Tune with a tiny model: what they share, survive, refuse to see, and leave in MLflow.

One search serves most tests; the two that make another belong to `make test-crash` for their length.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from amlora_dist.config.loading import load_config
from amlora_dist.errors import UserError
from amlora_dist.registry.store import Store
from pipelines.runs.progress import Silent
from pipelines.search.driver import run_search
from tests.tiny_config import write_config

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(900)]

SPACE = {"training.learning_rate": {"grid": [0.03, 1e30]}, "training.l1": {"grid": [0.0, 0.5]}}
"""Two rates, of which the second ends every trial with a loss that is not finite."""


class Notes(Silent):
    """What a user reads; ``on_winner`` is called when the search turns to the test split."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.on_winner = lambda: None

    def note(self, text: str) -> None:
        self.lines.append(text)
        if text.startswith("winner"):
            self.on_winner()


class Sealed:
    """Test files that nobody can read until ``open`` is called."""

    def __init__(self, tasks: Path) -> None:
        self._files = {file: file.read_text(encoding="utf-8") for file in tasks.glob("*/test.jsonl")}
        for file in self._files:
            file.write_text("nobody may read this\n", encoding="utf-8")

    def open(self) -> None:
        for file, text in self._files.items():
            file.write_text(text, encoding="utf-8")


def search(config: Path, search_id: str, *overrides: str, notes: Notes | None = None) -> dict[str, Any]:
    return run_search(
        load_config(config, list(overrides)), file=str(config), search_id=search_id, progress=notes or Notes(),
        began=time.time(),
    )  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """One search whose test files are unreadable until it is over, and in which one process is killed."""
    folder = tmp_path_factory.mktemp("search")
    config = write_config(folder, search={"space": SPACE})
    data = yaml.safe_load(config.read_text(encoding="utf-8"))
    data["tasks"] = [str(Path(task).relative_to(folder)) for task in data["tasks"]]  # of the directory of the command
    config.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    sealed, notes = Sealed(folder / "tasks"), Notes()
    notes.on_winner = sealed.open
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("AMLORA_HOME", str(folder / "home"))
        patch.setenv("AMLORA_CRASH", "step_done:kill:20")  # in the second stage of whoever comes there first
        patch.setenv("AMLORA_CRASH_ONCE", str(folder / "died"))
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        result = search(config, "one", notes=notes)
        yield {"result": result, "config": config, "notes": notes.lines, "folder": folder}
        ray.shutdown()


@pytest.fixture(autouse=True)
def home(world: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(world["folder"])
    monkeypatch.setenv("AMLORA_HOME", str(world["folder"] / "home"))
    return Path(world["folder"] / "home")


def test_trials_train_a_common_stage_once_and_a_failing_trial_does_not_stop_the_others(world: dict[str, Any]) -> None:
    result = world["result"]
    outcomes = {trial["number"]: trial["outcome"] for trial in result["trials"]}
    assert outcomes == {1: "finished", 2: "finished", 3: "failed", 4: "failed"}
    assert "not finite" in result["trials"][2]["error"]
    cost = result["cost"]
    assert (cost["stages_trained"], cost["stages_reused"], cost["stages_total"]) == (5, 1, 12)
    first, second = result["trials"][0]["stages"], result["trials"][1]["stages"]
    assert first[0]["fingerprint"] == second[0]["fingerprint"]
    assert first[1]["fingerprint"] != second[1]["fingerprint"]
    assert [len(row) for row in result["trials"][0]["accuracy_matrix"]] == [3, 3, 3]
    low, high = result["trials"][0]["interval"]
    assert low <= result["trials"][0]["metrics"]["average_performance"] <= high
    assert [point["average_performance"] is not None for point in result["trials"][0]["curve"]] == [True] * 3


def test_the_search_reads_no_test_row_before_it_has_a_winner(world: dict[str, Any]) -> None:
    """Every test file was unreadable until then: one look would have ended a trial."""
    winner = world["result"]["winner"]
    assert winner["number"] == world["result"]["ranking"][0]
    assert winner["test"]["metrics"]["average_performance"] is not None
    again = load_config(world["config"])
    assert again.evaluation.split == "test"


def test_a_trial_whose_process_died_goes_on_inside_its_sequence(world: dict[str, Any]) -> None:
    assert (world["folder"] / "died.step_done").exists(), "a process was killed"
    assert any("its process died" in line for line in world["notes"])


def test_the_winner_is_champion_with_tags_that_say_why(world: dict[str, Any], home: Path) -> None:
    store, winner = Store.open(home), world["result"]["winner"]
    version = store.resolve("models:/one@champion")
    assert version.uri == winner["version"]
    assert version.tags["amlora.search"] == "one"
    assert version.tags["amlora.objective"] == "max average_performance (dev)"
    assert version.tags["amlora.runner_up"].startswith(f"trial {world['result']['runner_up']['number']} (")
    assert version.tags["amlora.reused_from"], "nothing was trained for it"


def test_mlflow_has_trials_below_the_search_and_sequences_below_trials(world: dict[str, Any], home: Path) -> None:
    store = Store.open(home)
    (above,) = store.find_runs({"amlora.kind": "search"})
    assert above.status == "FINISHED" and above.name == "one"
    trials = store.find_runs({"amlora.kind": "trial"})
    assert {run.tags["mlflow.parentRunId"] for run in trials} == {above.run}
    assert sorted(run.status for run in trials) == ["FAILED", "FAILED", "FINISHED", "FINISHED"]
    by_number = {run.tags["amlora.trial"]: run for run in trials}
    (sequence,) = store.find_runs({"amlora.kind": "sequence", "amlora.run_id": "one-t001"})
    assert sequence.tags["mlflow.parentRunId"] == by_number["1"].run
    assert {step for step, _, _ in store.metric_history(by_number["1"].run, "average_performance")} == {1, 2, 3}
    stages = store.find_runs({"amlora.kind": "stage", "amlora.run_id": "one-t001"})
    assert {run.tags["mlflow.parentRunId"] for run in stages} == {sequence.run} and len(stages) == 3
    assert not [run for run in store.find_runs({}) if run.status == "RUNNING"]


def test_no_file_of_ray_tune_holds_the_stores_address(world: dict[str, Any], home: Path) -> None:
    address = Store.open(home).connection.uri.encode()
    files = [file for file in (home / "storage" / "ray").rglob("*") if file.is_file()]
    assert files, "Tune wrote its state"
    assert [file for file in files if address in file.read_bytes()] == []


def test_the_same_command_again_runs_no_trial_and_says_the_same(world: dict[str, Any]) -> None:
    notes = Notes()
    again = search(world["config"], "one", notes=notes)
    assert not any(line.startswith("trial ") for line in notes.lines)
    for key in ("trials", "ranking", "runner_up"):
        assert again[key] == world["result"][key]
    assert again["winner"]["test"]["accuracy_matrix"] == world["result"]["winner"]["test"]["accuracy_matrix"]
    assert again["winner"]["version"] == world["result"]["winner"]["version"]


def test_the_same_id_with_another_space_is_refused(world: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"--search-id 'one' exists with another configuration: search\.space"):
        search(world["config"], "one", "search.space.training.l1={grid: [0.0]}")


def test_data_changed_under_a_search_is_refused_before_anything_starts(world: dict[str, Any]) -> None:
    rows = world["folder"] / "tasks" / "colours" / "train.jsonl"
    kept = rows.read_text(encoding="utf-8")
    rows.write_text("".join(kept.splitlines(keepends=True)[1:]), encoding="utf-8")
    try:
        with pytest.raises(UserError, match=r"--search-id 'one' was begun with other data: task 'colours', split train"):
            search(world["config"], "one")
    finally:
        rows.write_text(kept, encoding="utf-8")


@pytest.mark.crash
def test_data_changed_and_allowed_runs_all_trials_again(world: dict[str, Any], home: Path) -> None:
    small = ("search.space={training.l1: {grid: [0.0, 0.5]}}", "training.epochs=1")
    tasks = f"tasks={json.dumps(load_config(world['config']).tasks[:2])}"
    search(world["config"], "moved", *small, tasks)
    before = Store.open(home).resolve("models:/moved@champion").number
    rows = world["folder"] / "tasks" / "colours" / "train.jsonl"
    kept, notes = rows.read_text(encoding="utf-8"), Notes()
    rows.write_text("".join(kept.splitlines(keepends=True)[1:]), encoding="utf-8")
    try:
        result = run_search(
            load_config(world["config"], [*small, tasks]), file="run.yaml", search_id="moved", progress=notes,
            began=time.time(), allow_changed_data=True,
        )  # fmt: skip
    finally:
        rows.write_text(kept, encoding="utf-8")
    assert sum(line.startswith("trial ") for line in notes.lines) == 2
    assert [trial["outcome"] for trial in result["trials"]] == ["finished", "finished"]
    assert result["trials"][0]["stages"][0]["reused"] is False
    assert Store.open(home).resolve("models:/moved@champion").number > before


@pytest.mark.crash
def test_a_trial_behind_the_others_is_stopped_and_its_run_closed(world: dict[str, Any], home: Path) -> None:
    result = search(
        world["config"], "halved", "search.space={training.learning_rate: {grid: [0.03, 1.0e-9, 0.02]}}",
        "search.scheduler=halving", "search.grace_stages=1", "search.max_concurrent=1",
    )  # fmt: skip
    outcomes = [trial["outcome"] for trial in result["trials"]]
    assert outcomes[1] == "pruned" and set(outcomes) == {"finished", "pruned"}, "none is lost on the way"
    assert len(result["trials"][1]["stages"]) == 1
    assert result["cost"]["stages_pruned"] >= 2
    store = Store.open(home)
    sequences = store.find_runs({"amlora.run_id": "halved-t002", "amlora.kind": "sequence"})
    assert {run.status for run in sequences} == {"KILLED"}
    (run,) = store.find_runs({"amlora.search": "halved", "amlora.trial": "2", "amlora.kind": "trial"})
    assert (run.status, run.tags["amlora.outcome"]) == ("KILLED", "pruned")


def test_a_trial_that_can_never_fit_is_refused_at_once(world: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMLORA_RESOURCES_DEADLINE_S", "0")
    with pytest.raises(UserError, match="4 workers need 4 CPUs, the cluster has 2"):
        search(world["config"], "vast", "workers=4", "training.batch_size=4")


@pytest.mark.crash
def test_optuna_searches_and_its_trials_are_recorded(world: dict[str, Any]) -> None:
    space = "search.space={training.learning_rate: {loguniform: [1.0e-3, 5.0e-2]}, training.l1: {choice: [0.0, 0.5]}}"
    result = search(
        world["config"], "tpe", space, "search.algorithm=optuna", "search.num_samples=2",
        "search.objective=[average_performance, forgetting]", f"tasks={json.dumps(load_config(world['config']).tasks[:2])}",
    )  # fmt: skip
    assert [trial["outcome"] for trial in result["trials"]] == ["finished", "finished"]
    assert set(result["front"]) <= {1, 2} and result["front"]
    assert result["objectives"] == {"average_performance": "max", "forgetting": "min"}
