"""Bad input: exit code 2, one message that names file or key, value and mend, and nothing written, no process started."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from pipelines import sequence
from pipelines.cli import app
from tests.tiny_folder import write_config, write_model

Damage = Callable[[Path, Path], None]
"""Spoils the run in a folder, given the folder and the configuration's file."""


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny", "llama")


def edit(**changes: object) -> Damage:
    """Change top-level keys of the configuration; a dotted key goes deeper."""

    def damage(folder: Path, config: Path) -> None:
        data = yaml.safe_load(config.read_text(encoding="utf-8"))
        for key, value in changes.items():
            *above, last = key.split("__")
            inner = data
            for part in above:
                inner = inner.setdefault(part, {})
            inner[last] = value
        config.write_text(yaml.safe_dump(data), encoding="utf-8")

    return damage


def rewrite_rows(change: Callable[[list[str]], list[str]], split: str = "train") -> Damage:
    """Change the lines of a split of the first task."""

    def damage(folder: Path, config: Path) -> None:
        file = folder / "tasks" / "colours" / f"{split}.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines()
        file.write_text("".join(line + "\n" for line in change(lines)), encoding="utf-8")

    return damage


def bad_label(lines: list[str]) -> list[str]:
    row = json.loads(lines[16]) | {"label": "purple"}
    return [*lines[:16], json.dumps(row), *lines[17:]]


def empty_text(lines: list[str]) -> list[str]:
    return [json.dumps(json.loads(lines[0]) | {"text": "  "}), *lines[1:]]


def no_label(lines: list[str]) -> list[str]:
    row = json.loads(lines[2])
    del row["label"]
    return [*lines[:2], json.dumps(row), *lines[3:]]


def without(name: str) -> Damage:
    def damage(folder: Path, config: Path) -> None:
        own = folder / "model-own"
        shutil.copytree(folder / "model-llama", own)
        (own / name).unlink()
        edit(model__source=str(own))(folder, config)

    return damage


def remove(path: str) -> Damage:
    return lambda folder, config: (folder / path).unlink()


def twice(folder: Path, config: Path) -> None:
    data = yaml.safe_load(config.read_text(encoding="utf-8"))
    edit(tasks=[data["tasks"][0], data["tasks"][0]])(folder, config)


def no_yaml(folder: Path, config: Path) -> None:
    config.write_text("name: [tiny\n", encoding="utf-8")


CASES: dict[str, tuple[Damage, list[str]]] = {
    "unknown key": (edit(training__learning_rat=0.1), ["training.learning_rat", "learning_rate"]),
    "unknown section": (edit(trainin={"epochs": 1}), ["trainin", "training"]),
    "wrong type": (edit(training__epochs="many"), ["training.epochs", "many", "whole number"]),
    "a word for a switch": (edit(router__recipes="perhaps"), ["router.recipes", "perhaps"]),
    "rank 0": (edit(adapters__rank=0), ["adapters.rank", "0", "1"]),
    "negative rate": (edit(training__learning_rate=-1), ["training.learning_rate", "-1"]),
    "unknown method": (edit(method="am_lore"), ["method", "am_lore", "am_lora"]),
    "unknown router": (edit(router__kind="posteriour"), ["router.kind", "posteriour", "posterior"]),
    "unknown dtype": (edit(dtype="fp8"), ["dtype", "fp8", "bf16"]),
    "unknown layers": (edit(adapters__layers="upper"), ["adapters.layers", "upper"]),
    "unknown ZeRO stage": (edit(deepspeed={"zero_stage": 4}), ["deepspeed", "4"]),
    "a key the product owns": (edit(deepspeed={"train_batch_size": 64}), ["train_batch_size", "64"]),
    "no tasks": (edit(tasks=[]), ["tasks"]),
    "two tasks of one name": (twice, ["colours", "different names"]),
    "unknown task": (edit(tasks=["dbpedai"]), ["dbpedai", "dbpedia"]),
    "missing task file": (edit(tasks=["nowhere/task.yaml"]), ["nowhere/task.yaml"]),
    "missing data file": (remove("tasks/colours/test.jsonl"), ["colours", "test.jsonl"]),
    "unknown label in row 17": (rewrite_rows(bad_label), ["train.jsonl", "17", "purple"]),
    "missing label": (rewrite_rows(no_label), ["train.jsonl", "3", "label"]),
    "empty text": (rewrite_rows(empty_text), ["train.jsonl", "1", "text"]),
    "empty task": (rewrite_rows(lambda lines: []), ["colours", "train"]),
    "a data file that is not JSON": (rewrite_rows(lambda lines: ["colour,label", *lines]), ["train.jsonl", "1", "JSON"]),
    "a row of train in test": (
        lambda folder, config: rewrite_rows(
            lambda lines: [*lines, (folder / "tasks/colours/train.jsonl").read_text("utf-8").splitlines()[0]], "test"
        )(folder, config),
        ["colours", "train"],
    ),
    "missing model folder": (edit(model__source="./no-such-model"), ["model.source", "no-such-model"]),
    "a model folder without weights": (without("model.safetensors"), ["model.source", "weights", "safetensors"]),
    "a model folder without configuration": (without("config.json"), ["model.source", "config.json"]),
    "unknown target module": (edit(adapters__targets=["q_prj"]), ["q_prj", "q_proj", "v_proj"]),
    "a router layer that is not there": (edit(router__layer=40), ["router.layer", "40"]),
    "no prompt fits": (edit(task_defaults__max_length=2), ["max_length", "2"]),
    "a file that is not YAML": (no_yaml, ["line"]),
    "an empty key path": (edit(parent="models:/nothing"), ["parent", "models:/nothing"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_told_and_nothing_is_written(
    case: str, model: Path, tmp_path: Path, amlora_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage, expected = CASES[case]
    shutil.copytree(model, tmp_path / "model-llama")
    config = write_config(tmp_path)
    damage(tmp_path, config)

    def no_store(*args: object, **kwargs: object) -> object:
        raise AssertionError("the store was opened before the input was checked")

    monkeypatch.setattr(sequence.Store, "open", no_store)
    answer = CliRunner().invoke(app, ["run", str(config), "--run-id", "bad"])
    assert answer.exit_code == 2, answer.output
    for part in expected:
        assert part in answer.stderr, answer.stderr
    assert "Traceback" not in answer.stderr
    assert not (amlora_home / "storage").exists() and not (amlora_home / "mlflow.db").exists()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["training.epoch=3"], ["training.epoch", "epochs"]),
        (["training.epochs"], ["key.path=value"]),
        (["training.epochs=two"], ["training.epochs", "two"]),
        (["sed=3"], ["sed", "seed"]),
        (["workers=-1"], ["workers", "-1"]),
        (["tasks[7]=imdb"], ["tasks"]),
    ],
)
def test_bad_overrides_are_told(overrides: list[str], expected: list[str], model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "model-llama")
    answer = CliRunner().invoke(app, ["run", str(write_config(tmp_path)), "--run-id", "bad", *overrides])
    assert answer.exit_code == 2, answer.output
    assert all(part in answer.stderr for part in expected), answer.stderr


def test_every_fault_is_told_at_once(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "model-llama")
    config = write_config(tmp_path)
    for change in (edit(adapters__rank=0), edit(training__epochs="many"), edit(sed=1)):
        change(tmp_path, config)
    answer = CliRunner().invoke(app, ["validate", str(config)])
    assert answer.exit_code == 2
    assert all(part in answer.stderr for part in ("3 faults", "adapters.rank", "training.epochs", "sed"))
