"""The durable run: what it publishes, what it reuses, and what starts again. One tiny model, no Ray (``workers: 0``)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from amlora_dist.config.loading import load_config
from amlora_dist.errors import UserError
from amlora_dist.inference.model import AMLoRAModel
from amlora_dist.registry.store import Store
from amlora_dist.training.result import read_result
from pipelines.runs.progress import Silent
from pipelines.runs.results import load_result
from pipelines.runs.sequence import run_sequence
from tests.tiny_config import write_config, write_task

pytestmark = pytest.mark.integration


@pytest.fixture
def home(amlora_home: Path, empty_home: Path) -> Path:
    shutil.copytree(empty_home, amlora_home)
    return amlora_home


def run(config: Path, run_id: str, *overrides: str) -> dict[str, Any]:
    return run_sequence(load_config(config, list(overrides)), run_id=run_id, progress=Silent())


def outcome(result: dict[str, Any], home: Path) -> dict[str, Any]:
    """What must be equal after a crash: the matrices and the digests of everything trained."""
    store = Store.open(home)
    versions = store.counted_versions(result["registered_model"])
    from amlora_dist.registry.bank_folder import read_bank

    bank = read_bank(store.pull_version(versions[-1], home / "pulled"))
    return {
        "accuracy": result["accuracy_matrix"],
        "ranked": result["ranked_accuracy_matrix"],
        "oracle": result["oracle"],
        "untrained": result["untrained"],
        "adapters": [entry.digest for entry in bank.manifest.adapters],
        "router": bank.manifest.router.digest,
        "versions": len(versions),
    }


def test_prompts_without_room_for_an_answer_are_refused_before_anything_is_trained(tmp_path: Path, home: Path) -> None:
    config = write_config(tmp_path, tasks=("colours",))
    rows = tmp_path / "tasks" / "colours" / "train.jsonl"
    first = {"text": "red " + "paint " * 80, "label": "red"}
    rows.write_text(rows.read_text(encoding="utf-8") + json.dumps(first) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"task_defaults\.max_length: .* the model's 64 positions: lower max_length to 62"):
        run(config, "long", "task_defaults.max_length=100")
    assert not list(home.rglob("step-*")) and not list(home.rglob("trained")), "neither a checkpoint nor a result"
    assert run(config, "long-cut", "task_defaults.max_length=62")["stages"][0]["version"] == 1


def test_other_wordings_are_scored_on_the_same_rows_of_a_mirror(tmp_path: Path, home: Path) -> None:
    """What ``data_dir`` holds for a Hub task is found under the task's own name, whatever its variant is called."""
    config = write_config(tmp_path, tasks=("colours",))
    task = yaml.safe_load((tmp_path / "tasks" / "colours.yaml").read_text(encoding="utf-8"))
    task["source"] = {"kind": "hub", "repository": "owner/colours", "revision": "0" * 40}
    task["splits"] = {split: split for split in ("train", "dev", "test")}
    task["prompt"] = {"question": "what", "paraphrases": ["what the", "what a"]}
    hub = tmp_path / "hub.yaml"
    hub.write_text(yaml.safe_dump(task), encoding="utf-8")
    mirror = (f"tasks={json.dumps([str(hub)])}", f"data_dir={tmp_path / 'tasks'}", "task_defaults.prompt_style=question")
    result = run(config, "worded", *mirror, "evaluation.paraphrases=2")
    assert [one["task"] for one in result["also"]] == ["colours.paraphrase1", "colours.paraphrase2"]
    assert all(0.0 <= one["accuracy"] <= 1.0 and one["rows"] == 9 for one in result["also"])


def test_a_sequence_publishes_one_version_per_stage_and_a_second_start_trains_nothing(tmp_path: Path, home: Path) -> None:
    config = write_config(tmp_path)
    first = run(config, "one")
    assert [stage["reused"] for stage in first["stages"]] == [False, False, False]
    assert [stage["version"] for stage in first["stages"]] == [1, 2, 3]
    assert first["registered_model"] == "one"
    assert [len(row) for row in first["accuracy_matrix"]] == [3, 3, 3]
    assert first["accuracy_matrix"][0][2] is None, "after stage 1 the task after the next is not scored"
    assert all(value is not None for value in (*first["accuracy_matrix"][2], *first["untrained"], *first["oracle"]))
    assert first["accuracy_matrix"][2][0] > first["untrained"][0], "it learns"
    store = Store.open(home)
    assert store.resolve("models:/one@current").number == 3 == store.resolve("models:/one/latest").number
    assert store.resolve("models:/one@champion").number == 3, "the first complete run sets it"
    runs = store.find_runs({"amlora.run_id": "one"})
    assert sorted(found.tags["amlora.kind"] for found in runs) == ["sequence", "stage", "stage", "stage"]
    assert {found.status for found in runs} == {"FINISHED"}
    stage_runs = [found for found in runs if found.tags["amlora.kind"] == "stage"]
    assert all(len(store.metric_history(found.run, "loss")) == 16 for found in stage_runs)

    again = run(config, "one")
    assert [stage["reused"] for stage in again["stages"]] == [True, True, True]
    for key in ("accuracy_matrix", "ranked_accuracy_matrix", "oracle", "untrained", "metrics"):
        assert again[key] == first[key]
    assert len(store.counted_versions("one")) == 3
    shown = load_result("one")
    assert shown["accuracy_matrix"] == first["accuracy_matrix"]


def test_what_was_trained_is_pulled_to_another_path_with_the_same_logits_bit_for_bit(tmp_path: Path, home: Path) -> None:
    result = run(write_config(tmp_path, tasks=("colours", "shapes")), "round")
    first = AMLoRAModel.from_bank("models:/round@current", device="cpu")
    elsewhere = Store.open(home).pull("models:/round@current", tmp_path / "elsewhere" / "bank", statistics=False)
    again = AMLoRAModel.from_bank(elsewhere, device="cpu")
    trained = [home / "storage" / "stages" / stage["fingerprint"] / "trained" for stage in result["stages"]]
    assert [adapter.digest() for adapter in again.bank.adapters] == [read_result(one).adapter.digest() for one in trained]
    texts = ["the wall looks red", "a ball is round", "juice"]
    assert torch.equal(again.next_token_logits(texts), first.next_token_logits(texts))


def test_an_appended_task_alone_is_trained_and_other_changes_are_refused(tmp_path: Path, home: Path) -> None:
    config = write_config(tmp_path, tasks=("colours", "shapes"))
    first = run(config, "grow")
    fruit = write_task(tmp_path / "tasks", "fruit")
    longer = [*load_config(config).tasks, str(fruit)]
    grown = run(config, "grow", f"tasks={json.dumps(longer)}")
    assert [stage["reused"] for stage in grown["stages"]] == [True, True, False]
    assert [stage["fingerprint"] for stage in grown["stages"]][:2] == [s["fingerprint"] for s in first["stages"]]
    assert grown["untrained"][2] is not None
    with pytest.raises(UserError, match=r"training\.learning_rate: 0\.03 then, 0\.02 now"):
        run(config, "grow", f"tasks={json.dumps(longer)}", "training.learning_rate=0.02")
    with pytest.raises(UserError, match="appended"):
        run(config, "grow")


def test_another_run_with_the_same_prefix_trains_only_what_differs(tmp_path: Path, home: Path) -> None:
    config = write_config(tmp_path, tasks=("colours", "shapes"))
    first = run(config, "first")
    other = run(config, "second", "training.l1=0.5", "router.gate.threshold=0.3")
    assert [stage["reused"] for stage in other["stages"]] == [True, False], "stage 1 does not read the L1 coefficient"
    assert other["stages"][0]["fingerprint"] == first["stages"][0]["fingerprint"]
    store = Store.open(home)
    version = store.resolve("models:/second/1")
    assert version.tags["amlora.reused_from"] == "models:/first/1"
    pulled = store.pull_version(store.resolve("models:/second/2"), home / "second")
    from amlora_dist.registry.bank_folder import read_bank

    manifest = read_bank(pulled).manifest
    assert [entry.task for entry in manifest.adapters] == ["colours", "shapes"]
    listed = {path for path in manifest.files or {} if path.endswith(".safetensors")}
    parts = {path.relative_to(pulled).as_posix() for path in pulled.rglob("*.safetensors")}
    assert listed == parts and len(parts) == 7, "with those that other versions and runs keep"


def test_a_run_goes_on_from_a_published_bank(tmp_path: Path, home: Path) -> None:
    config = write_config(tmp_path, tasks=("colours", "shapes"))
    run(config, "base")
    more = write_config(tmp_path, tasks=("sizes",), parent="models:/base@current")
    result = run(more, "further")
    assert [stage["reused"] for stage in result["stages"]] == [False]
    store = Store.open(home)
    from amlora_dist.registry.bank_folder import read_bank

    bank = read_bank(store.pull_version(store.resolve("models:/further/1"), home / "further"))
    assert bank.manifest.tasks == ["colours", "shapes", "sizes"]
    whole = run(write_config(tmp_path, tasks=("colours", "shapes", "sizes")), "whole")
    assert whole["stages"][2]["reused"], "the stage was trained already, in another run, on the same bank"


def test_undeclared_keys_change_neither_fingerprint_nor_adapter(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path, tasks=("colours", "shapes"))
    plain = run(config, "plain")
    digests = outcome(plain, home)["adapters"]
    undeclared = [
        "router.gate.threshold=0.5", "router.gate.form=absolute", "router.gate.temperature=2.0", "evaluation.batch_size=3",
        "evaluation.oracle=false", "evaluate.cells=last", "training.checkpoint_every=3", "name=other",
        "worker_lifetime=stage",
    ]  # fmt: skip
    elsewhere = tmp_path / "elsewhere"
    monkeypatch.setenv("AMLORA_HOME", str(elsewhere))
    other = run(config, "other", *undeclared)
    assert [stage["reused"] for stage in other["stages"]] == [False, False], "trained again, in an empty store"
    assert [stage["fingerprint"] for stage in other["stages"]] == [stage["fingerprint"] for stage in plain["stages"]]
    assert outcome(other, elsewhere)["adapters"] == digests


def test_rows_whose_gate_is_what_it_was_are_not_scored_again(tmp_path: Path, home: Path) -> None:
    config = write_config(tmp_path)
    every = run(config, "every", "evaluation.knockout=true")
    scores = [json.loads(file.read_text(encoding="utf-8")) for file in (home / "storage" / "scores").glob("*/summary.json")]
    modes = ("untrained", "router", "oracle")
    kept = {mode: sum(score["kept"] for score in scores if score["mode"] == mode) for mode in modes}
    assert kept["untrained"] == 0 and kept["router"] > 0 and kept["oracle"] > 0
    assert sum(score["kept"] for score in scores if score["mode"].startswith("without.")) > 0
    assert all(score["rows"] == 9 for score in scores), "scores count all rows, kept or not"
    own = ("evaluation.prompts=own", "evaluation.cells=seen", "evaluation.untrained=false")  # one prompt under every router
    run(config, "own", *own)
    folder = home / "storage" / "scores"
    scores = [json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("*/summary.json")]
    run(config, "control", "router.kind=uniform", *own)
    stored = [json.loads(file.read_text(encoding="utf-8")) for file in (home / "storage" / "scores").glob("*/summary.json")]
    more = [score["kept"] for score in stored if score not in scores and score["mode"] == "router"]
    assert len(more) == 6 and max(more) == 9, "one adapter alone has the gate 1 under every router"
    rescored = run(config, "rescored", "evaluation.reuse=false")
    assert all(stage["reused"] for stage in rescored["stages"]), "scores alone are made again"
    assert sum(stage["score_seconds"] for stage in rescored["stages"]) > 0
    for key in ("accuracy_matrix", "ranked_accuracy_matrix", "oracle", "untrained"):
        assert rescored[key] == every[key]


def test_a_longer_free_text_answer_is_scored_again_under_the_same_adapter(tmp_path: Path, home: Path) -> None:
    config = write_config(tmp_path, tasks=("colours",))
    task = tmp_path / "tasks" / "colours.yaml"
    spec = yaml.safe_load(task.read_text(encoding="utf-8"))
    del spec["labels"]
    spec["columns"] = {"text": "text", "answer": "label"}

    def answered(tokens: int) -> dict[str, Any]:
        task.write_text(yaml.safe_dump(spec | {"max_answer_tokens": tokens}), encoding="utf-8")
        return run(config, f"tokens-{tokens}", "evaluation.untrained=false", "evaluation.oracle=false")

    answered(1)
    known = len(list((home / "storage" / "scores").iterdir()))
    assert answered(4)["stages"][0]["reused"]
    assert len(list((home / "storage" / "scores").iterdir())) == known + 1


def test_one_setting_moves_checkpoints_and_the_trunks_cache_to_a_folder_that_nodes_share(tmp_path: Path, home: Path) -> None:
    config, shared = write_config(tmp_path, tasks=("colours",)), tmp_path / "shared"
    quick = ("training.epochs=1", "training.cache_trunk=true", "evaluation.untrained=false", "evaluation.oracle=false")
    run(config, "shared", f"storage={shared}", *quick)
    assert list(shared.glob("stages/*/checkpoints/*/COMMIT")) and list(shared.glob("cache/trunk/*/*/*"))
    assert not (home / "storage").exists() and not (home / "cache" / "trunk").exists()


@pytest.mark.parametrize("method", ["seq_lora", "joint"])
def test_a_method_without_a_router_is_scored_alike_with_the_trunks_cache_and_without(
    method: str, tmp_path: Path, home: Path, empty_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its gate is one row, and what the cache keeps of a prompt is one depth of several."""
    config = write_config(tmp_path, tasks=("colours", "shapes"))
    few = (f"method={method}", "training.epochs=1", "evaluation.untrained=false")
    plain = run(config, "plain", *few)
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(empty_home, elsewhere)
    monkeypatch.setenv("AMLORA_HOME", str(elsewhere))
    cached = run(config, "cached", *few, "training.cache_trunk=true")
    assert not any(stage["reused"] for stage in cached["stages"])
    assert cached["accuracy_matrix"] == plain["accuracy_matrix"] and cached["last"] == plain["last"]
