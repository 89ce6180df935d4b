"""``amlora validate`` finds what is wrong with the places of a configuration in the same round as everything else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipelines.cli.main import app
from tests.tiny_config import write_model, write_task


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model", "llama")
    write_task(tmp_path, "colours")
    file = tmp_path / "run.yaml"
    file.write_text(f"name: t\nmodel: {{source: {tmp_path / 'model'}}}\ntasks: [colours.yaml]\nworkers: 0\n")
    return file


def validated(file: Path, *overrides: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["validate", str(file), *overrides])
    return done.exit_code, done.output


def test_what_is_right_is_valid(config: Path) -> None:
    code, output = validated(config)
    assert code == 0 and "valid" in output, output
    assert not (config.parent / ".amlora").exists(), "validate writes nothing"


def test_faults_of_all_places_come_at_once(config: Path) -> None:
    code, output = validated(
        config, f"storage={config}", "mlflow.tracking_uri=:::junk", "router.layer=40", "adapters.targets=[no_such]"
    )
    assert code == 2
    for fault in (
        "4 faults", f"- storage: found {config}, expected a folder", "- mlflow.tracking_uri: found ':::junk'",
        "- router.layer: found 40, expected 0 to 3", "- adapters.targets: 'no_such' matches no linear layer",
    ):  # fmt: skip
        assert fault in output


def test_a_model_s_architecture_tokenizer_and_template_are_looked_at(config: Path) -> None:
    folder = config.parent / "model"
    made_of = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(made_of | {"model_type": "nosuch"}))
    code, output = validated(config, f"storage={config}")
    assert code == 2 and "2 faults" in output and "- model.source: found model_type 'nosuch'" in output
    (folder / "config.json").write_text(json.dumps(made_of))

    (folder / "chat_template.jinja").write_text("{{ bad {% ")
    assert validated(config)[0] == 0, "no task speaks by it"
    task = config.parent / "colours.yaml"
    task.write_text(task.read_text().rstrip() + "\nprompt: {format: chat}\n")
    code, output = validated(config)
    assert code == 2 and "colours.yaml: prompt.format: found chat, but the chat template" in output

    for file in folder.glob("tokenizer*"):
        file.unlink()
    code, output = validated(config, f"storage={config}")
    assert code == 2 and "2 faults" in output and "- model.source: found no tokenizer in" in output


def test_labels_that_are_the_same_to_the_tokenizer_are_named(config: Path) -> None:
    task = config.parent / "colours.yaml"
    task.write_text(task.read_text().replace("- green", "- red"))
    code, output = validated(config)
    assert code == 2 and "colours.yaml" in output and "label" in output, output
