"""Settings that only the router's statistics read (``router.depths``, ``router.skip_tokens``) train no adapter again."""

from __future__ import annotations

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
from tests.pipelines.crash_cases import RUN_ID, Outcome, outcome_of
from tests.tiny_config import write_config

pytestmark = pytest.mark.integration

OTHER = ("router.depths=[1]", "router.skip_tokens=1")
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


def test_other_statistics_settings_reuse_every_adapter_and_answer_as_a_run_that_began_with_them(
    tmp_path: Path, home: Path, empty_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path)
    first, trained = run(config, "first")
    assert trained.steps and not any(stage["statistics_again"] for stage in first["stages"])
    shutil.rmtree(home / "storage")
    other, notes = run(config, "other", *OTHER)
    assert notes.steps == 0 and [stage["train_seconds"] for stage in other["stages"]] == [0.0] * 3
    for number, stage in enumerate(other["stages"], start=1):
        assert stage["reused"] and stage["statistics_again"] and stage["reused_from"] == f"models:/first/{number}"
    assert "stage 3 sizes: adapter reused, statistics made again, version 3 of other" in notes.notes
    before, after = bank_of(home, "first"), bank_of(home, "other")
    assert [line.digest for line in after.adapters] == [line.digest for line in before.adapters]
    assert [line.stored for line in after.adapters] == [line.stored for line in before.adapters], "stored once"
    differ = zip(after.statistics, before.statistics, strict=True)
    assert all(one.digest != former.digest and one.stored != former.stored for one, former in differ)
    assert after.router.digest != before.router.digest

    again, notes = run(config, "other", *OTHER)
    assert notes.steps == 0 and all(stage["statistics_again"] for stage in again["stages"]), "told at later starts too"
    third, _ = run(config, "third", *OTHER)
    assert all(stage["reused"] and not stage["statistics_again"] for stage in third["stages"]), "nothing is made again"
    assert third["stages"][0]["reused_from"] == "models:/other/1"
    back, notes = run(config, "back", "router.depths=[1]")
    assert notes.steps == 0 and back["stages"][0]["reused_from"] == "models:/first/1", "where it was trained"

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


def test_what_may_change_an_adapter_trains_it_again(tmp_path: Path, home: Path) -> None:
    config = write_config(tmp_path, tasks=("colours", "shapes"))
    quick = ("training.epochs=1", "evaluation.untrained=false", "evaluation.oracle=false")
    run(config, "first", *quick)
    for number, change in enumerate(("training.learning_rate=0.01", "router.holdout=0.5", "router.layer=1"), start=1):
        changed, notes = run(config, f"changed-{number}", *quick, change, "router.depths=[0]")
        assert notes.steps and not any(stage["reused"] for stage in changed["stages"]), change
    recipes, _ = run(config, "recipes", *quick, "training.l1=0.5", "router.depths=[0]")
    assert [stage["statistics_again"] for stage in recipes["stages"]] == [True, False], "the first stage has no recipe"
    assert [stage["reused"] for stage in recipes["stages"]] == [True, False]


def test_a_run_on_a_bank_with_other_statistics_takes_the_adapters_that_were_trained_on_the_same_adapters(
    tmp_path: Path, home: Path
) -> None:
    quick = ("training.epochs=1", "evaluation.untrained=false", "evaluation.oracle=false")
    config = write_config(tmp_path, tasks=("colours",))
    run(config, "base", *quick)
    run(config, "base-1", *quick, *OTHER)
    run(write_config(tmp_path, tasks=("shapes",), parent="models:/base@current"), "more", *quick)
    further, notes = run(write_config(tmp_path, tasks=("shapes",), parent="models:/base-1@current"), "more-1", *quick, *OTHER)
    assert notes.steps == 0 and further["stages"][0]["statistics_again"]
    before, after = bank_of(home, "more"), bank_of(home, "more-1")
    assert after.tasks == ["colours", "shapes"]
    assert [line.digest for line in after.adapters] == [line.digest for line in before.adapters]
