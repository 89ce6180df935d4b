"""The same run id, started again after somebody has changed its versions, its aliases or its data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from amlora_dist.config.loading import load_config, named_keys
from amlora_dist.errors import UserError
from amlora_dist.registry import tags
from amlora_dist.registry.store import Store
from pipelines.runs.progress import Silent
from pipelines.runs.resume_check import going_on
from pipelines.runs.sequence import run_sequence
from tests.tiny_config import write_config, write_model

pytestmark = pytest.mark.integration

QUICK = ("training.epochs=1", "evaluation.untrained=false", "evaluation.oracle=false")


@pytest.fixture
def home(amlora_home: Path, empty_home: Path) -> Path:
    shutil.copytree(empty_home, amlora_home)
    return amlora_home


def run(config: Path, run_id: str, *overrides: str, **options: Any) -> dict[str, Any]:
    return run_sequence(load_config(config, [*QUICK, *overrides]), run_id=run_id, progress=Silent(), **options)


def take_away(folder: Path, task: str, split: str) -> None:
    """One row less."""
    file = folder / "tasks" / task / f"{split}.jsonl"
    file.write_text("".join(file.read_text(encoding="utf-8").splitlines(keepends=True)[:-1]), encoding="utf-8")


def test_what_auto_meant_when_a_run_began_it_means_for_the_run(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPUs of a cluster come and go: no stage is trained again in another dtype for it."""
    config = write_config(tmp_path, tasks=("colours",))
    first = run(config, "one", "dtype=auto")
    store = Store.open(home)
    parent = store.find_runs({tags.KIND: "sequence", tags.RUN_ID: "one"})[-1].run
    assert store.load_json(parent, "config.json")["dtype"] == "fp32"
    monkeypatch.setattr("pipelines.runs.executor.InProcess.gpus", lambda self: True)
    given = [*QUICK, "dtype=auto"]
    taken_up = going_on(load_config(config, given), named=named_keys(config, given), run_id="one")
    again = run_sequence(taken_up, run_id="one", progress=Silent())
    assert [(stage["version"], stage["reused"]) for stage in again["stages"]] == [(first["stages"][0]["version"], True)]
    stored = store.load_json(parent, "config.json") | {"dtype": "auto"}  # as 0.1 kept it
    store.log_json(parent, "config.json", stored)
    with pytest.raises(UserError, match="dtype: fp32 then, bf16 now"):
        run(config, "one", "dtype=auto", "model.attention=eager")


def test_current_goes_back(tmp_path: Path, home: Path) -> None:
    """A stage that is published again gets MLflow's highest number, and is not the newest for it."""
    config = write_config(tmp_path, tasks=("colours", "shapes"))
    run(config, "two")
    store = Store.open(home)
    store.connection.client.delete_model_version("two", "1")
    again = run(config, "two")
    assert [stage["version"] for stage in again["stages"]] == [3, 2]
    for uri in ("models:/two@current", "models:/two/latest", "models:/two"):
        assert store.resolve(uri).number == 2, uri


def test_while_the_last_version_is_gone_current_means_no_earlier_one(tmp_path: Path, home: Path) -> None:
    config = write_config(tmp_path, tasks=("colours", "shapes"))
    run(config, "two")
    store = Store.open(home)
    store.connection.client.delete_model_version("two", "2")
    store.ensure_current("two", lambda: None)
    with pytest.raises(UserError, match="no alias 'current'"):
        store.resolve("models:/two@current")
    assert run(config, "two")["stages"][1]["version"] == 3
    assert store.resolve("models:/two@current").number == 3


@pytest.mark.parametrize("alias", ["current", "champion"])
def test_an_alias_that_a_person_has_set_stays(
    alias: str, tmp_path: Path, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = write_config(tmp_path, tasks=("colours", "shapes"))
    run(config, "two")
    store = Store.open(home)
    store.connection.client.set_registered_model_alias("two", alias, "1")
    run(config, "two")
    longer = load_config(write_config(tmp_path, tasks=("colours", "shapes", "sizes"))).tasks
    run(config, "two", f"tasks={json.dumps(longer)}")
    assert store.resolve(f"models:/two@{alias}").number == 1
    assert store.resolve("models:/two/latest").number == 3
    assert ("by somebody and stays there" in caplog.text) == (alias == "current")
    store.connection.client.delete_registered_model_alias("two", alias)
    run(config, "two", f"tasks={json.dumps(longer)}")
    assert store.resolve("models:/two@current").number == 3, "it follows the run again"


def test_data_changed(tmp_path: Path, home: Path) -> None:
    config = write_config(tmp_path)
    first = run(config, "three")
    store = Store.open(home)
    take_away(tmp_path, "colours", "train")
    with pytest.raises(UserError, match=r"task 'colours', split train: 32 rows.*31 rows.*--allow-changed-data"):
        run(config, "three")
    assert len(store.versions("three")) == 3, "nothing was trained"

    seen: list[int] = []

    def watch(text: str) -> None:
        seen.append(store.resolve("models:/three@current").number)

    progress = Silent()
    progress.note = watch  # type: ignore[method-assign]
    again = run_sequence(
        load_config(config, list(QUICK)), run_id="three", progress=progress, allow_changed_data=True
    )
    assert [stage["reused"] for stage in again["stages"]] == [False] * 3
    assert [stage["fingerprint"] for stage in again["stages"]] != [stage["fingerprint"] for stage in first["stages"]]
    assert set(seen) == {3, 6} and sorted(seen) == seen, "it moves once, when the last stage is there"
    assert run(config, "three")["stages"][2]["version"] == 6, "the data of now are those of the run"


def test_data_that_came_back_bring_their_bank_back(tmp_path: Path, home: Path) -> None:
    """What the data of now have taught is the run's newest bank, whatever was trained on others in between."""
    config = write_config(tmp_path, tasks=("colours", "shapes"))
    run(config, "two")
    store = Store.open(home)
    rows = tmp_path / "tasks" / "colours" / "train.jsonl"
    kept = rows.read_text(encoding="utf-8")
    for expected in (4, 2, 4, 2):
        if expected == 4:
            take_away(tmp_path, "colours", "train")
        else:
            rows.write_text(kept, encoding="utf-8")
        result = run(config, "two", allow_changed_data=True)
        assert result["stages"][-1]["version"] == expected
        for uri in ("models:/two@current", "models:/two/latest"):
            assert store.resolve(uri).number == expected, uri
    longer = load_config(write_config(tmp_path, tasks=("colours", "shapes", "sizes"))).tasks
    run(config, "two", f"tasks={json.dumps(longer)}")
    assert store.resolve("models:/two@current").number == 5


def test_test_rows_prompts_labels_and_the_model_are_data_too(tmp_path: Path, home: Path) -> None:
    config = write_config(tmp_path, tasks=("colours",))
    run(config, "one")
    task = tmp_path / "tasks" / "colours.yaml"
    spec = task.read_text(encoding="utf-8")
    rows = tmp_path / "tasks" / "colours" / "test.jsonl"
    kept = rows.read_text(encoding="utf-8")

    take_away(tmp_path, "colours", "test")
    with pytest.raises(UserError, match=r"task 'colours', split test: 9 rows"):
        run(config, "one")
    rows.write_text(kept, encoding="utf-8")

    task.write_text(yaml.safe_dump(yaml.safe_load(spec) | {"prompt": {"template": "{{ text }} what"}}), encoding="utf-8")
    with pytest.raises(UserError, match=r"task 'colours': other prompt"):
        run(config, "one")
    task.write_text(spec, encoding="utf-8")

    shutil.rmtree(tmp_path / "model-llama")
    write_model(tmp_path / "model-llama", "llama")
    (tmp_path / "model-llama" / "generation_config.json").write_text('{"eos_token_id": 1}', encoding="utf-8")
    changed = json.loads((tmp_path / "model-llama" / "config.json").read_text(encoding="utf-8")) | {"rms_norm_eps": 1e-4}
    (tmp_path / "model-llama" / "config.json").write_text(json.dumps(changed), encoding="utf-8")
    with pytest.raises(UserError, match=r"model\.source: digest \w{12} then, \w{12} now"):
        run(config, "one")
    assert len(Store.open(home).versions("one")) == 1
