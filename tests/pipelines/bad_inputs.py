"""Kinds of bad input: what somebody did to a run, its rows, its model or a bank, and what a message must say of it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import yaml
from safetensors.torch import load_file, save_file

from tests.registry.tiny_banks import tiny_bank

Damage = Callable[[Path, Path], "dict[str, str] | None"]
"""Spoils the run in a folder, given the folder and the configuration's file; returns variables to set."""


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


def of_task(changes: dict[str, object], file: str = "", text: str = "") -> Damage:
    """Change the specification of the first task, and write a file of rows."""

    def damage(folder: Path, config: Path) -> None:
        spec = folder / "tasks" / "colours.yaml"
        spec.write_text(yaml.safe_dump(yaml.safe_load(spec.read_text(encoding="utf-8")) | changes), encoding="utf-8")
        if file:
            (folder / "tasks" / "colours" / file).write_text(text, encoding="utf-8")

    return damage


def with_model(spoil: Callable[[Path], object]) -> Damage:
    """A model folder of the run's own, with something done to it."""

    def damage(folder: Path, config: Path) -> None:
        own = folder / "model-own"
        shutil.copytree(folder / "model-llama", own)
        spoil(own)
        edit(model__source=str(own))(folder, config)

    return damage


def without(name: str) -> Damage:
    return with_model(lambda own: (own / name).unlink())


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


class Fault(NamedTuple):
    """What a message must say, each part of it in its own words."""

    file: str
    """Or the environment's variable."""
    key: str
    """And, within a file of rows or tensors, the place."""
    value: str
    fix: str
    command: tuple[str, ...] = ("run", "{folder}/run.yaml", "--run-id", "bad")


WEIGHTS = "adapters/2-agnews/adapter_model.safetensors"
VERIFY = ("verify", "{folder}/bank")
ROWS = "fix the rows, or set on_bad_row: skip"
AGAIN = "fetch the bank again"

CASES: dict[str, tuple[Damage, Fault]] = {
    "unknown key": (
        edit(training__learning_rat=0.1),
        Fault("run.yaml", "training.learning_rat:", "an unknown key", "did you mean 'learning_rate'?"),
    ),
    "unknown section": (
        edit(trainin={"epochs": 1}), Fault("run.yaml", "trainin:", "an unknown key", "did you mean 'training'?")
    ),
    "a key like no other": (
        edit(model__zzz=1), Fault("run.yaml", "model.zzz:", "an unknown key", "one of source, revision, attention")
    ),
    "wrong type": (
        edit(training__epochs="many"), Fault("run.yaml", "training.epochs:", "'many'", "expected a whole number")
    ),
    "a number in quotes": (
        edit(training__epochs="3"), Fault("run.yaml", "training.epochs:", "'3'", "take the quotes away")
    ),
    "a word for a switch": (
        edit(router__recipes="perhaps"), Fault("run.yaml", "router.recipes:", "'perhaps'", "expected true or false")
    ),
    "rank 0": (edit(adapters__rank=0), Fault("run.yaml", "adapters.rank:", "found 0", "a number of at least 1")),
    "negative rate": (
        edit(training__learning_rate=-1), Fault("run.yaml", "training.learning_rate:", "found -1", "a number above 0")
    ),
    "unknown method": (edit(method="am_lore"), Fault("run.yaml", "method:", "'am_lore'", "did you mean 'am_lora'?")),
    "unknown router": (
        edit(router__kind="posteriour"), Fault("run.yaml", "router.kind:", "'posteriour'", "did you mean 'posterior'?")
    ),
    "unknown dtype": (edit(dtype="fp8"), Fault("run.yaml", "dtype:", "'fp8'", "expected auto, fp32 or bf16")),
    "unknown layers": (
        edit(adapters__layers="upper"), Fault("run.yaml", "adapters.layers:", "'upper'", "above_router, all or last:K")
    ),
    "unknown ZeRO stage": (
        edit(deepspeed={"zero_stage": 4}), Fault("run.yaml", "deepspeed.zero_stage:", "found 4", "expected 0, 1, 2 or 3")
    ),
    "a key the product owns": (
        edit(deepspeed={"train_batch_size": 64}),
        Fault("run.yaml", "deepspeed.train_batch_size:", "found 64", "set training.batch_size"),
    ),
    "no tasks": (edit(tasks=[]), Fault("run.yaml", "tasks:", "found []", "a list of at least 1")),
    "two tasks of one name": (twice, Fault("run.yaml", "tasks[1]:", "colours.yaml' again", "give one of them a `name`")),
    "unknown task": (edit(tasks=["dbpedai"]), Fault("run.yaml", "tasks[0]:", "'dbpedai'", "did you mean 'dbpedia'?")),
    "missing task file": (
        edit(tasks=["nowhere/task.yaml"]),
        Fault("run.yaml", "tasks[0]:", "nowhere/task.yaml", "a path begins at the current folder"),
    ),
    "missing data file": (
        remove("tasks/colours/test.jsonl"), Fault("run.yaml", "tasks[0]", "colours/test.jsonl", "put it there, or fix")
    ),
    "missing mirror of the Hub": (
        edit(tasks=["dbpedia"], data_dir="nowhere"),
        Fault("run.yaml", "tasks[0]:", "data_dir nowhere: no folder 'dbpedia'", "put the mirror there, or fix data_dir"),
    ),
    "unknown label in row 17": (
        rewrite_rows(bad_label), Fault("colours/train.jsonl", "row 17", "an unknown label ('purple')", ROWS)
    ),
    "a text of marks that nobody sees": (
        rewrite_rows(lambda lines: [r'{"text": "\u200b\ufeff", "label": "red"}', *lines[1:]]),
        Fault("colours/train.jsonl", "row 1", "an empty text", ROWS),
    ),
    "rows in UTF-16 without a mark": (
        rewrite_rows(lambda lines: [line.encode("utf-16-le").decode() for line in lines]),
        Fault("colours/train.jsonl", "line 1", "not text but a zero byte", "write it as UTF-8"),
    ),
    "missing label": (rewrite_rows(no_label), Fault("colours/train.jsonl", "row 3", "no label", ROWS)),
    "empty text": (rewrite_rows(empty_text), Fault("colours/train.jsonl", "row 1", "an empty text", ROWS)),
    "a text that is a list": (
        rewrite_rows(lambda lines: ['{"text": ["red"], "label": "red"}', *lines[1:]]),
        Fault("colours/train.jsonl", "row 1", "a list in column 'text'", ROWS),
    ),
    "half of a character": (
        rewrite_rows(lambda lines: [lines[0], r'{"text": "the \ud83d wall", "label": "red"}', *lines[2:]]),
        Fault("colours/train.jsonl", "row 2", r"half of a character (\ud83d, at character 5)", ROWS),
    ),
    "empty task": (
        rewrite_rows(lambda lines: []), Fault("colours/train.jsonl", "task 'colours'", "found no rows", "put them there")
    ),
    "a data file that is not JSON": (
        rewrite_rows(lambda lines: ["colour,label", *lines]),
        Fault("colours/train.jsonl", "line 1", "'colour,label'", "fix the line, or set source.format"),
    ),
    "a column that is not there": (
        rewrite_rows(lambda lines: [line.replace('"text"', '"txt"') for line in lines]),
        Fault("colours/train.jsonl", "column 'text'", "it has label, txt", "did you mean 'txt'?"),
    ),
    "many rows of train in test": (
        lambda folder, config: rewrite_rows(
            lambda lines: [*lines, *(folder / "tasks/colours/train.jsonl").read_text("utf-8").splitlines()[:8]], "test"
        )(folder, config),
        Fault("colours/train.jsonl", "rows 1, 2", "is also in test (8 of the 32 rows of train", "on_bad_row: skip"),
    ),
    "Parquet that is none": (
        of_task({"splits": {"train": "colours/train.parquet", "test": "colours/test.jsonl"}}, "train.parquet", "hello"),
        Fault("colours/train.parquet", "expected Parquet", "found 5 bytes", "write it again"),
    ),
    "a row of CSV with a cell too many": (
        of_task(
            {"splits": {"train": "colours/train.csv", "test": "colours/test.jsonl"}}, "train.csv", "text,label\na,b,c\n"
        ),
        Fault("colours/train.csv", "row 1", "a wrong number of cells", ROWS),
    ),
    "a quote of CSV that is never closed": (
        of_task(
            {"splits": {"train": "colours/train.csv", "test": "colours/test.jsonl"}}, "train.csv", 'text,label\na,b\n"c,d\n'
        ),
        Fault("colours/train.csv", "line 3", "a quote that is never closed", "close it"),
    ),
    "a folder that is no data set": (
        of_task({"splits": {"train": "colours", "test": "colours/test.jsonl"}}),
        Fault("tasks/colours,", "tasks[0] (colours)", "found {folder}/tasks/colours, a folder that", "name its files"),
    ),
    "a template that never ends": (
        of_task(
            {"prompt": {"template": "{{text}}{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}"}}
        ),
        Fault("colours.yaml", "prompt.template:", "too many steps", "make the template simpler"),
    ),
    "unknown key of a task": (
        of_task({"colums": {"text": "text"}}), Fault("colours.yaml", "colums:", "an unknown key", "did you mean 'columns'?")
    ),
    "a prompt that is no Jinja": (
        of_task({"prompt": {"template": "{{ text"}}),
        Fault("tasks/colours.yaml", "prompt.template:", "'{{{{ text'", "expected Jinja"),
    ),
    # -- models
    "missing model folder": (
        edit(model__source="./no-such-model"),
        Fault("run.yaml", "model.source:", "'./no-such-model'", "an existing folder, a Hub id (owner/name) or package:NAME"),
    ),
    "a model folder without weights": (
        without("model.safetensors"),
        Fault("run.yaml", "model.source:", "no weights in '{folder}/model-own'", "convert them with save_pretrained"),
    ),
    "a model folder without configuration": (
        without("config.json"),
        Fault("run.yaml", "model.source:", "no config.json in '{folder}/model-own'", "expected a transformers model folder"),
    ),
    "weights that are cut off": (
        with_model(lambda own: os.truncate(own / "model.safetensors", 5000)),
        Fault("run.yaml", "model.source:", "{folder}/model-own/model.safetensors: 5000 bytes", "fetch the model again"),
    ),
    "a kind of model that nobody knows": (
        with_model(lambda own: (own / "config.json").write_text('{"model_type": "nonsense"}', encoding="utf-8")),
        Fault("run.yaml", "model.source:", "model_type 'nonsense'", "upgrade transformers"),
    ),
    "a model's configuration that is not JSON": (
        with_model(lambda own: (own / "config.json").write_text("{", encoding="utf-8")),
        Fault("run.yaml", "model.source:", "no JSON object in '{folder}/model-own/config.json'", "fetch the model again"),
    ),
    "a model without tokenizer": (
        with_model(lambda own: [file.unlink() for file in own.glob("tokenizer*")]),
        Fault("run.yaml", "model.source:", "no tokenizer in {folder}/model-own", "save it next to the model"),
    ),
    "a tokenizer that is cut off": (
        with_model(lambda own: os.truncate(own / "tokenizer.json", 9)),
        Fault("run.yaml", "model.source:", "9 bytes in {folder}/model-own/tokenizer.json", "fetch the model again"),
    ),
    "unknown target module": (
        edit(adapters__targets=["q_prj"]), Fault("run.yaml", "adapters.targets:", "'q_prj'", "did you mean 'q_proj'?")
    ),
    "a router layer that is not there": (
        edit(router__layer=40), Fault("run.yaml", "router.layer:", "found 40", "expected 0 to 3")
    ),
    "no prompt fits": (
        edit(task_defaults__max_length=2),
        Fault("run.yaml", "task_defaults.max_length:", "found 2", "a number of at least 8"),
    ),
    "a file that is not YAML": (no_yaml, Fault("run.yaml", "line 1:", "'name: [tiny'", "expected ',' or ']'")),
    "a parent that is no version": (
        edit(parent="models:/nothing"),
        Fault("run.yaml", "parent:", "'models:/nothing'", "models:/NAME@ALIAS or models:/NAME/VERSION"),
    ),
    # -- banks
    "no bank": (
        bank(lambda b: shutil.rmtree(b)), Fault("{folder}/bank", "bank", "no such folder", "amlora pull", VERIFY)
    ),
    "a bank without manifest": (
        bank(lambda b: (b / "manifest.json").unlink()),
        Fault("bank/manifest.json", "manifest.json", "missing", "give the folder of a bank", VERIFY),
    ),
    "a manifest of a future schema": (
        manifest(schema_version=99),
        Fault("bank/manifest.json", "schema_version:", "found 99", "a newer bank needs a newer amlora-dist", VERIFY),
    ),
    "a manifest that was changed": (manifest(stage=7), Fault("bank/manifest.json", "digest:", "was changed", AGAIN, VERIFY)),
    "a manifest that names ../../x": (
        manifest(router__file="../../x"), Fault("bank/manifest.json", "router.file:", "'../../x'", AGAIN, VERIFY)
    ),
    "a manifest that names /etc/passwd": (
        manifest(adapters__0__stored={"version_of": "x", "run": "0" * 32, "artifact_path": "/etc/passwd"}),
        Fault("bank/manifest.json", "stored.artifact_path:", "'/etc/passwd'", AGAIN, VERIFY),
    ),
    "a truncated adapter": (
        bank(lambda b: os.truncate(b / WEIGHTS, 99)),
        Fault(f"bank/{WEIGHTS}", "a whole safetensors file", "found 99 bytes", AGAIN, VERIFY),
    ),
    "an empty adapter file": (
        bank(lambda b: (b / WEIGHTS).write_bytes(b"")),
        Fault(f"bank/{WEIGHTS}", "a whole safetensors file", "found 0 bytes", AGAIN, VERIFY),
    ),
    "NaN in an adapter": (
        bank(not_a_number),
        Fault(f"bank/{WEIGHTS}", "lora_A.weight:", "NaN or infinity in 16", "lower training.learning_rate", VERIFY),
    ),
    "a pickle next to the weights": (
        bank(lambda b: (b / "x.pkl").write_bytes(b"x")),
        Fault("bank/x.pkl", "x.pkl:", "a file that the manifest does not name", "remove it", VERIFY),
    ),
    "a link out of a bank": (
        bank(leads_out), Fault(f"bank/{WEIGHTS}:", "a link", "leads out of the bank, to {folder}/elsewhere", AGAIN, VERIFY)
    ),
    # -- registry
    "a tracking store in plain files": (
        edit(mlflow={"tracking_uri": "file:///mlruns"}),
        Fault("run.yaml", "mlflow.tracking_uri:", "'file:///mlruns'", "expected http(s)://HOST:PORT or sqlite"),
    ),
    "a tracking store in plain files, by the environment": (
        lambda folder, config: {"MLFLOW_TRACKING_URI": "./mlruns"},
        Fault("error: MLFLOW_TRACKING_URI:", "MLFLOW_TRACKING_URI", "'./mlruns'", "expected http(s)://HOST:PORT or sqlite"),
    ),
    "a tracking server that does not answer": (
        edit(mlflow={"tracking_uri": "http://127.0.0.1:9"}),
        Fault("run.yaml", "mlflow.tracking_uri:", "http://127.0.0.1:9", "start it, or fix the address"),
    ),
    "a database that is none": (
        no_database, Fault("run.yaml", "mlflow.tracking_uri:", "{folder}/text.db", "name another file")
    ),
    "storage that is a file": (
        lambda folder, config: edit(storage=str(config))(folder, config),
        Fault("run.yaml", "storage:", "{folder}/run.yaml is no folder", "set it to another folder"),
    ),
    "a home below a file": (
        home_below_a_file, Fault("AMLORA_HOME:", "AMLORA_HOME", "{folder}/file is no folder", "set it to another folder")
    ),
    "a registered model that could be a path": (
        edit(registered_model="a/b"), Fault("run.yaml", "registered_model:", "'a/b'", "letters, digits, '_', '.' and '-'")
    ),
    "a run id that could be a path": (
        lambda folder, config: None,
        Fault("--run-id", "run", "'../bad'", "letters", ("run", "{folder}/run.yaml", "--run-id", "../bad")),
    ),
    # -- cluster
    "more workers than memory": (
        edit(workers=4000, training__batch_size=4000),
        Fault("run.yaml", "workers:", "4000 need", "lower `workers`, or set dtype=bf16"),
    ),
    "workers that do not share a batch": (
        edit(workers=4), Fault("run.yaml", "training.batch_size:", "6 with 4 workers", "such as 8")
    ),
    "no cluster at the address": (
        at_address("127.0.0.1:9"),
        Fault("RAY_ADDRESS:", "RAY_ADDRESS", "'127.0.0.1:9'", "start it, fix the address, or unset"),
    ),
    "an address of Ray's client": (
        at_address("ray://head:10001"), Fault("RAY_ADDRESS:", "RAY_ADDRESS", "'ray://head:10001'", "expected HOST:PORT")
    ),
    "an address without a port": (
        at_address("head"), Fault("RAY_ADDRESS:", "RAY_ADDRESS", "'head'", "expected HOST:PORT")
    ),
}  # fmt: skip
