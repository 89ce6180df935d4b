"""``training.learning_rate: auto`` in whole runs: raced once, a number ever after."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from amlora_dist.config.loading import load_config, named_keys
from amlora_dist.errors import UserError
from amlora_dist.registry.store import Store
from amlora_dist.training.failures import StoppedError
from amlora_dist.training.loop import STOP_FILE
from pipelines.runs.comparison import plan_comparison
from pipelines.runs.progress import Silent
from pipelines.runs.rates import FILE, KIND, RateSearch
from pipelines.runs.resume_check import going_on
from pipelines.runs.sequence import run_sequence
from tests.fork_server import Server
from tests.pipelines.crash_cases import calm, crash, faults
from tests.tiny_config import write_config

pytestmark = pytest.mark.integration

TRAINING = {
    "epochs": 4, "batch_size": 3, "learning_rate": "auto", "warmup_steps": 0, "checkpoint_every": 5, "probe_rows": 8,
    "keep": "best", "near_tie": 0.0,
}  # fmt: skip
"""36 rows, 9 of them held out: 36 steps, in which three rates race over nine steps each."""


class Notes(Silent):
    def __init__(self, stop_at: tuple[Path, int] | None = None) -> None:
        self.notes: list[str] = []
        self.steps: list[int] = []
        self._stop_at = stop_at

    def note(self, text: str) -> None:
        self.notes.append(text)

    def step(self, done: int, total: int, loss: float | None, tokens_per_second: float | None) -> None:
        self.steps.append(done)
        if self._stop_at is not None and len(self.steps) == self._stop_at[1]:
            for folder in self._stop_at[0].glob("races/*"):
                (folder / STOP_FILE).touch()


@pytest.fixture
def home(amlora_home: Path, empty_home: Path) -> Path:
    shutil.copytree(empty_home, amlora_home)
    return amlora_home


def run(config: Path, run_id: str, *overrides: str, notes: Notes | None = None) -> tuple[dict[str, Any], Notes]:
    notes = notes or Notes()
    made = going_on(load_config(config, list(overrides)), named=named_keys(config, list(overrides)), run_id=run_id)
    return run_sequence(made, run_id=run_id, progress=notes), notes


def stored(home: Path, run_id: str) -> dict[str, Any]:
    store = Store.open(home)
    run = store.find_runs({"amlora.kind": "sequence", "amlora.run_id": run_id})[-1].run
    found: dict[str, Any] = store.load_json(run, "config.json")
    return found


def adapters(result: dict[str, Any], home: Path) -> list[str]:
    from amlora_dist.registry.bank_folder import read_bank

    store = Store.open(home)
    version = store.counted_versions(result["registered_model"])[-1]
    folder = home / "pulled" / str(result["registered_model"])
    return [entry.digest for entry in read_bank(store.pull_version(version, folder)).manifest.adapters]


@pytest.mark.slow
def test_auto_races_once_and_is_the_number_that_won_from_then_on(tmp_path: Path, home: Path) -> None:
    config = write_config(tmp_path, rows=36, tasks=("colours", "shapes"), training=TRAINING)
    tasks = f'tasks=["{tmp_path / "tasks" / "colours.yaml"}"]'
    stopped = Notes(stop_at=(home / "storage", 13))
    with pytest.raises(StoppedError):
        run(config, "raced", tasks, notes=stopped)
    assert stored(home, "raced")["training"]["learning_rate"] == "auto"
    first, notes = run(config, "raced", tasks)
    (race,) = Store.open(home).find_runs({"amlora.kind": KIND})
    entry = Store.open(home).load_json(race.run, FILE)
    assert entry["steps"] == 9 and set(entry["losses"]) == {"0.001", "0.003", "0.01"}
    chosen = entry["chosen"]
    assert stored(home, "raced")["training"]["learning_rate"] == chosen
    assert first["stages"][0]["fingerprint"] == entry["stages"][f"{chosen:g}"]
    assert "  resumed after step 9" in notes.notes, "the winner's steps are the stage's own"
    assert sum(step <= 9 for step in notes.steps) < 27, "what was done before the stop was not done again"
    assert not list((home / "storage" / "races").iterdir()), "no loser is left lying about"

    shutil.rmtree(home / "storage")
    number, notes = run(config, "named", tasks, f"training.learning_rate={chosen}")
    assert number["stages"][0]["fingerprint"] == first["stages"][0]["fingerprint"] and number["stages"][0]["reused"]
    _, notes = run(config, "raced")
    assert not any("won over" in note for note in notes.notes), "a run goes on at its number"
    other, notes = run(config, "other", "training.l1=0.5", "evaluation.cells=last")
    assert any("won over 9 steps" in note for note in notes.notes) and other["stages"][0]["reused"]
    assert len(Store.open(home).find_runs({"amlora.kind": KIND})) == 1
    with pytest.raises(UserError, match=r"training\.learning_rate"):
        run(config, "raced", "training.learning_rate=0.5")

    child = tmp_path / "child"
    child.mkdir()
    more = write_config(child, rows=36, tasks=("sizes",), training=TRAINING, parent="models:/named@current")
    run(more, "child")
    assert stored(home, "child")["training"]["learning_rate"] == chosen
    assert len(Store.open(home).find_runs({"amlora.kind": KIND})) == 1


def test_what_the_winner_trained_is_bit_for_bit_what_its_number_trains(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch, empty_home: Path
) -> None:
    config = write_config(tmp_path, rows=36, tasks=("colours",), training=TRAINING)
    raced, _ = run(config, "raced")
    chosen = stored(home, "raced")["training"]["learning_rate"]
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(empty_home, elsewhere)
    monkeypatch.setenv("AMLORA_HOME", str(elsewhere))
    named, _ = run(config, "named", f"training.learning_rate={chosen}")
    assert not named["stages"][0]["reused"]
    assert adapters(named, elsewhere) == adapters(raced, home)


@pytest.mark.slow
@pytest.mark.crash
def test_a_run_that_is_killed_in_the_middle_of_its_race_ends_as_if_it_had_not_been(
    tmp_path: Path, forking: Server, empty_home: Path
) -> None:
    config = write_config(tmp_path, rows=36, tasks=("colours", "shapes"), training=TRAINING)
    undisturbed = calm(forking.start, tmp_path / "calm", config, empty_home)
    crashed = crash(forking.start, tmp_path / "killed", config, empty_home, "step_done", "kill", 13)
    assert faults(crashed, undisturbed) == [] and crashed.codes == [-9, 0]
    resumed = crashed.stderr.count("resumed after step 9")
    assert resumed == 2, "the first rate was done, and the winner's steps are the stage's own"
    assert not list((tmp_path / "killed" / "home" / "storage" / "races").iterdir())


@pytest.mark.parametrize(
    ("training", "rate", "how"),
    [({"learning_rate": 0.02}, 0.02, "parent"), ({"learning_rate": "auto"}, 3e-3, "default"), (None, 3e-3, "default")],
)
def test_a_bank_from_elsewhere_brings_its_rate_or_the_default_is_taken(
    training: dict[str, Any] | None, rate: float, how: str
) -> None:
    notes = Notes()
    search = RateSearch(None, None, None, notes)  # type: ignore[arg-type]
    chosen = search.of_bank({} if training is None else {"training": training}, "models:/there/1")
    assert (chosen.rate, chosen.facts["how"]) == (rate, how)
    assert f"learning rate {rate:g}" in notes.notes[0] and "models:/there/1" in notes.notes[0]


@pytest.mark.parametrize("overrides", [["training.epochs=2"], ["prompt_format=1"], ["router.holdout=0"]])
def test_without_a_race_auto_is_the_documented_default(tmp_path: Path, home: Path, overrides: list[str]) -> None:
    config = write_config(tmp_path, rows=36, tasks=("colours",), training=TRAINING)
    _, notes = run(config, "short", *overrides, "training.keep=last")
    assert any("learning rate 0.003: the default" in note for note in notes.notes)
    assert stored(home, "short")["training"]["learning_rate"] == 3e-3
    assert not Store.open(home).find_runs({"amlora.kind": KIND})


def test_a_comparison_wants_rates_of_its_own(tmp_path: Path, home: Path) -> None:
    config = write_config(tmp_path, rows=36, tasks=("colours",), training=TRAINING)
    given: dict[str, Any] = {"methods": ["am_lora", "seq_lora"], "seeds": [0], "orders": [], "comparison_id": "c"}
    with pytest.raises(UserError, match=r"found auto.* --learning-rates 0\.001,0\.003,0\.01"):
        plan_comparison(config, [], **given, learning_rates=[])
    assert plan_comparison(config, [], **given, learning_rates=[0.1]).learning_rates == [0.1]
    assert plan_comparison(config, ["training.learning_rate=0.1"], **given, learning_rates=[]).learning_rates == []
