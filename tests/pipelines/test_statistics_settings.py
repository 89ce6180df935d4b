"""Settings that only the router's statistics read (``router.depths``, ``router.skip_tokens``) train no adapter again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from amlora_dist.config.loading import load_config
from amlora_dist.registry.bank_folder import read_bank
from amlora_dist.registry.manifest import Manifest
from amlora_dist.registry.store import Store
from pipelines.runs.progress import Silent
from pipelines.runs.sequence import run_sequence
from tests.fork_server import Server
from tests.pipelines.crash_cases import calm, crash, faults, matrix_config
from tests.tiny_config import write_config

pytestmark = pytest.mark.integration

OTHER = ("router.depths=[0]", "router.skip_tokens=1")
MATRICES = ("accuracy_matrix", "ranked_accuracy_matrix", "oracle", "untrained", "metrics")


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.steps = 0

    def note(self, text: str) -> None:
        self.notes.append(text)

    def step(self, done: int, total: int, loss: float | None, tokens_per_second: float | None) -> None:
        self.steps += 1


@pytest.fixture
def home(amlora_home: Path, empty_home: Path) -> Path:
    shutil.copytree(empty_home, amlora_home)
    return amlora_home


def run(config: Path, run_id: str, *overrides: str) -> tuple[dict[str, Any], Notes]:
    notes = Notes()
    return run_sequence(load_config(config, list(overrides)), run_id=run_id, progress=notes), notes


def bank_of(home: Path, run_id: str) -> Manifest:
    """The manifest of a run's last version, whose every file was fetched and checked."""
    store = Store.open(home)
    return read_bank(store.pull_version(store.counted_versions(run_id)[-1], home / "pulled" / run_id)).manifest


@pytest.mark.slow
def test_other_statistics_settings_reuse_every_adapter_and_answer_as_a_run_that_began_with_them(
    tmp_path: Path, home: Path, empty_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path)
    first, trained = run(config, "first")
    assert trained.steps and not any(stage["adapter_of"] for stage in first["stages"])
    shutil.rmtree(home / "storage")
    other, notes = run(config, "other", *OTHER)
    assert notes.steps == 0 and [stage["train_seconds"] for stage in other["stages"]] == [0.0] * 3
    for number, stage in enumerate(other["stages"], start=1):
        assert stage["reused"] and stage["adapter_of"] and stage["reused_from"] == f"models:/first/{number}"
    assert "stage 3 sizes: adapter reused, statistics made again, version 3 of other" in notes.notes
    before, after = bank_of(home, "first"), bank_of(home, "other")
    assert [line.digest for line in after.adapters] == [line.digest for line in before.adapters]
    assert [line.stored for line in after.adapters] == [line.stored for line in before.adapters], "stored once"
    differ = zip(after.statistics, before.statistics, strict=True)
    assert all(one.digest != former.digest and one.stored != former.stored for one, former in differ)
    assert after.router.digest != before.router.digest

    again, notes = run(config, "other", *OTHER)
    assert notes.steps == 0 and all(stage["adapter_of"] for stage in again["stages"]), "told at later starts too"
    third, _ = run(config, "third", *OTHER)
    assert all(stage["reused"] and not stage["adapter_of"] for stage in third["stages"]), "nothing is made again"
    assert third["stages"][0]["reused_from"] == "models:/other/1"
    depths, notes = run(config, "depths", "router.depths=[0, 1]")
    assert notes.steps == 0 and all(stage["adapter_of"] for stage in depths["stages"])
    assert depths["stages"][0]["reused_from"] == "models:/first/1", "where it was trained"

    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(empty_home, elsewhere)
    monkeypatch.setenv("AMLORA_HOME", str(elsewhere))
    fresh, notes = run(config, "fresh", *OTHER)
    assert notes.steps and {key: fresh[key] for key in MATRICES} == {key: other[key] for key in MATRICES}
    made = bank_of(elsewhere, "fresh")
    assert [line.digest for line in made.adapters] == [line.digest for line in after.adapters]
    assert [one.digest for one in made.statistics] == [one.digest for one in after.statistics], "bit for bit"
    assert made.router.digest == after.router.digest
    assert [stage["fingerprint"] for stage in fresh["stages"]] == [stage["fingerprint"] for stage in other["stages"]]


@pytest.mark.slow
def test_what_may_change_an_adapter_trains_it_again(tmp_path: Path, home: Path) -> None:
    config = write_config(tmp_path, tasks=("colours", "shapes"))
    quick = ("training.epochs=1", "evaluation.untrained=false", "evaluation.oracle=false")
    run(config, "first", *quick)
    for number, change in enumerate(("training.learning_rate=0.01", "router.holdout=0.5", "router.layer=1"), start=1):
        changed, notes = run(config, f"changed-{number}", *quick, change, "router.depths=[0]")
        assert notes.steps and not any(stage["reused"] for stage in changed["stages"]), change
    recipes, _ = run(config, "recipes", *quick, "training.l1=0.5", "router.depths=[0]")
    assert [bool(stage["adapter_of"]) for stage in recipes["stages"]] == [True, False], "the first stage has no recipe"
    assert [stage["reused"] for stage in recipes["stages"]] == [True, False]


def test_a_run_on_a_bank_with_other_statistics_takes_the_adapters_that_were_trained_on_the_same_adapters(
    tmp_path: Path, home: Path
) -> None:
    quick = ("training.epochs=1", "evaluation.untrained=false", "evaluation.oracle=false")
    config = write_config(tmp_path, tasks=("colours",))
    run(config, "base", *quick)
    run(config, "base-1", *quick, *OTHER)
    run(write_config(tmp_path, tasks=("shapes",), parent="models:/base@current"), "more", *quick)
    more = write_config(tmp_path, tasks=("shapes",), parent="models:/base-1@current")
    further, notes = run(more, "more-1", *quick, *OTHER)
    assert notes.steps == 0 and further["stages"][0]["adapter_of"]
    before, after = bank_of(home, "more"), bank_of(home, "more-1")
    assert after.tasks == ["colours", "shapes"]
    assert [line.digest for line in after.adapters] == [line.digest for line in before.adapters]


def test_learning_rates_that_raced_for_an_adapter_do_not_race_for_its_statistics(tmp_path: Path, home: Path) -> None:
    training = {"epochs": 4, "batch_size": 3, "learning_rate": "auto", "warmup_steps": 0, "probe_rows": 8, "near_tie": 0.0}
    config = write_config(tmp_path, rows=36, tasks=("colours",), training=training)
    quick = ("evaluation.untrained=false", "evaluation.oracle=false")
    run(config, "raced", *quick)
    other, notes = run(config, "other", *quick, *OTHER)
    assert notes.steps == 0 and other["stages"][0]["adapter_of"]
    assert any("won over 9 steps" in note for note in notes.notes)
    assert len(Store.open(home).find_runs({"amlora.kind": "race"})) == 1


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory, forking: Server, empty_home: Path) -> tuple[Path, Path]:
    """A configuration, and a home with a run of it under other statistics."""
    folder = tmp_path_factory.mktemp("learned")
    config, home = matrix_config(folder), folder / "home"
    shutil.copytree(empty_home, home)
    command = forking.start(folder / "start", "run", str(config), "--run-id", "learned", AMLORA_HOME=str(home))
    assert command.wait(400) == 0, command.stderr
    return config, home


@pytest.mark.slow
@pytest.mark.crash
@pytest.mark.parametrize(("point", "nth"), [("adapter_gathered", 2), ("scores_written", 4), ("artifacts_uploaded", 2)])
def test_a_run_that_is_killed_while_it_makes_statistics_ends_as_if_it_had_not_been(
    point: str, nth: int, tmp_path: Path, forking: Server, learned: tuple[Path, Path]
) -> None:
    config, home = learned
    undisturbed = calm(forking.start, tmp_path / "calm", config, home, *OTHER)
    crashed = crash(forking.start, tmp_path / "killed", config, home, point, "kill", nth, *OTHER)
    assert faults(crashed, undisturbed) == [] and crashed.codes == [-9, 0]
    assert "stage 2 shapes: adapter reused, statistics made again" in crashed.stderr
    killed = tmp_path / "killed" / "home"
    assert not list(killed.glob("storage/stages/*/trained.*")) and "  step " not in crashed.stderr


@pytest.mark.slow
def test_runs_that_differ_in_their_statistics_train_together_once(
    tmp_path: Path, forking: Server, empty_home: Path
) -> None:
    config, home = matrix_config(tmp_path), tmp_path / "home"
    shutil.copytree(empty_home, home)
    given = {"one": (), "two": OTHER, "three": ("router.depths=[0]",)}
    started = {
        name: forking.start(tmp_path / name, "run", str(config), "--run-id", name, "--json", *own, AMLORA_HOME=str(home))
        for name, own in given.items()
    }
    stages = []
    for name, command in started.items():
        assert command.wait(400) == 0, (name, command.stderr)
        stages.append(json.loads(command.stdout)["stages"])
    for of_all in zip(*stages, strict=True):
        assert sum(not stage["reused"] for stage in of_all) == 1
    assert len({line.digest for name in given for line in bank_of(home, name).adapters}) == 2
