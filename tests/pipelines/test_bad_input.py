"""Bad input: exit code 2, one message that names file or key, value and mend, and nothing written, no process started."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from pipelines import sequence
from pipelines.cli import app
from tests.registry.tiny_banks import tiny_bank
from tests.tiny_folder import write_config, write_model

Damage = Callable[[Path, Path], "dict[str, str] | None"]
"""Spoils the run in a folder, given the folder and the configuration's file; returns variables to set."""


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


def bank(spoil: Callable[[Path], object]) -> Damage:
    """A small bank in the folder ``bank``, with something done to it."""

    def damage(folder: Path, config: Path) -> None:
        tiny_bank(folder / "bank")
        spoil(folder / "bank")

    return damage


def manifest(**changes: object) -> Damage:
    """A bank whose manifest says something else; a dotted key goes deeper."""

    def spoil(folder: Path) -> None:
        data = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        for key, value in changes.items():
            *above, last = key.split("__")
            inner = data
            for part in above:
                inner = inner[int(part) if part.isdecimal() else part]
            inner[last] = value
        (folder / "manifest.json").write_text(json.dumps(data), encoding="utf-8")

    return bank(spoil)


def not_a_number(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    next(iter(tensors.values())).fill_(float("nan"))
    save_file(tensors, folder / WEIGHTS)


def leads_out(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder.parent / "elsewhere")
    (folder / WEIGHTS).symlink_to(folder.parent / "elsewhere")


def no_database(folder: Path, config: Path) -> None:
    (folder / "text.db").write_text("hello, I am a text" * 100, encoding="utf-8")
    edit(mlflow={"tracking_uri": f"sqlite:///{folder / 'text.db'}"})(folder, config)


def home_below_a_file(folder: Path, config: Path) -> dict[str, str]:
    (folder / "file").touch()
    return {"AMLORA_HOME": str(folder / "file" / "home")}


def at_address(address: str) -> Damage:
    def damage(folder: Path, config: Path) -> dict[str, str]:
        edit(workers=2)(folder, config)
        return {"RAY_ADDRESS": address}

    return damage


WEIGHTS = "adapters/2-agnews/adapter_model.safetensors"
RUN = ["run", "{folder}/run.yaml", "--run-id", "bad"]
VERIFY = ["verify", "{folder}/bank"]

CASES: dict[str, tuple[Damage, list[str]] | tuple[Damage, list[str], list[str]]] = {
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
    # -- banks
    "no bank": (bank(lambda b: shutil.rmtree(b)), ["bank", "no such folder"], VERIFY),
    "a bank without manifest": (bank(lambda b: (b / "manifest.json").unlink()), ["manifest.json", "missing"], VERIFY),
    "a manifest of a future schema": (manifest(schema_version=2), ["manifest.json", "schema_version", "2", "1"], VERIFY),
    "a manifest that was changed": (manifest(stage=7), ["manifest.json", "digest"], VERIFY),
    "a manifest that names ../../x": (manifest(router__file="../../x"), ["manifest.json", "router.file", "../../x"], VERIFY),
    "a manifest that names /etc/passwd": (
        manifest(adapters__0__stored={"version_of": "x", "run": "0" * 32, "artifact_path": "/etc/passwd"}),
        ["manifest.json", "stored.artifact_path", "/etc/passwd"], VERIFY,
    ),
    "a truncated adapter": (bank(lambda b: os.truncate(b / WEIGHTS, 99)), [WEIGHTS, "99 bytes", "fetch the bank"], VERIFY),
    "an empty adapter file": (bank(lambda b: (b / WEIGHTS).write_bytes(b"")), [WEIGHTS, "0 bytes"], VERIFY),
    "NaN in an adapter": (bank(not_a_number), [WEIGHTS, "NaN", "learning_rate"], VERIFY),
    "a pickle beside the weights": (bank(lambda b: (b / "x.pkl").write_bytes(b"x")), ["x.pkl", "no pickle"], VERIFY),
    "a link out of a bank": (bank(leads_out), [WEIGHTS, "leads out"], VERIFY),
    # -- registry
    "a tracking store in plain files": (
        edit(mlflow={"tracking_uri": "file:///mlruns"}), ["mlflow.tracking_uri", "file:///mlruns", "sqlite"]
    ),
    "a tracking server that does not answer": (
        edit(mlflow={"tracking_uri": "http://127.0.0.1:9"}), ["mlflow.tracking_uri", "http://127.0.0.1:9", "start the"]
    ),
    "a database that is none": (no_database, ["text.db", "not a database"]),
    "a home below a file": (home_below_a_file, ["AMLORA_HOME", "file/home", "is no folder"]),
    "a registered model that could be a path": (edit(registered_model="a/b"), ["registered_model", "a/b", "A-Za-z0-9"]),
    # -- cluster
    "more workers than memory": (
        edit(workers=4000, training__batch_size=4000), ["memory", "4000 processes", "lower `workers`"]
    ),
    "workers that do not share a batch": (edit(workers=4), ["training.batch_size", "6 with 4 workers", "multiple"]),
    "no cluster at the address": (at_address("127.0.0.1:9"), ["RAY_ADDRESS", "127.0.0.1:9", "unset"]),
    "an address of Ray's client": (at_address("ray://head:10001"), ["RAY_ADDRESS", "ray://head:10001", "amlora submit"]),
    "an address without a port": (at_address("head"), ["RAY_ADDRESS", "'head'"]),
}  # fmt: skip
REGISTRY = ("a tracking store", "a tracking server", "a database", "a home", "a registered model")
"""These are found out by the store itself, which may be opened."""


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_told_and_nothing_is_written(
    case: str, model: Path, tmp_path: Path, amlora_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage, expected, *other = CASES[case]
    shutil.copytree(model, tmp_path / "model-llama")
    config = write_config(tmp_path)
    for name, value in (damage(tmp_path, config) or {}).items():
        monkeypatch.setenv(name, value)

    def no_store(*args: object, **kwargs: object) -> object:
        raise AssertionError("the store was opened before the input was checked")

    if not case.startswith(REGISTRY):
        monkeypatch.setattr(sequence.Store, "open", no_store)
    before = files(tmp_path)
    command = [part.format(folder=tmp_path) for part in (other[0] if other else RUN)]
    answer = CliRunner().invoke(app, command)
    assert answer.exit_code == 2, answer.output
    for part in expected:
        assert part in answer.stderr, answer.stderr
    assert "Traceback" not in answer.stderr
    assert files(tmp_path) == before, "nothing is written"


def files(folder: Path) -> set[str]:
    """All files, but for the cache of models' digests and locks."""
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {name for name in found if not name.startswith("home/cache/") and not name.endswith(".lock")}


def test_there_are_forty_kinds_of_bad_input_and_more() -> None:
    assert len(CASES) >= 40


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
