"""A task whose template reads fields is trained, scored, served and scored again as its rows are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from amlora_dist.config.loading import load_config
from amlora_dist.errors import UserError
from amlora_dist.evaluation.scoring import read_predictions
from amlora_dist.inference.model import AMLoRAModel
from pipelines.cli.scoring import Rows, score
from pipelines.runs.progress import Silent
from pipelines.runs.sequence import run_sequence
from tests.tiny_config import write_config

pytestmark = [pytest.mark.integration, pytest.mark.slow]


def in_two_columns(folder: Path) -> list[dict[str, str]]:
    """The rows of colours with their first two words apart, and a template that shows those again; returns the test rows."""
    for file in (folder / "tasks" / "colours").glob("*.jsonl"):
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        for row in rows:
            first, second, *rest = row["text"].split()
            row |= {"first": f"{first} {second}", "rest": " ".join(rest)}
            del row["text"]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    file = folder / "tasks" / "colours.yaml"
    spec = yaml.safe_load(file.read_text(encoding="utf-8"))
    spec["columns"]["text"] = [{"column": "first", "marker": "a", "neutral": True}, "rest"]
    spec["prompt"] = {"template": "{{ text }}\n{{ fields.first }} what\nAnswer:"}
    file.write_text(yaml.safe_dump(spec), encoding="utf-8")
    lines = (folder / "tasks" / "colours" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_fields_are_the_same_in_training_the_matrix_and_what_is_served(
    tmp_path: Path, amlora_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, tasks=("colours", "shapes"))
    rows = in_two_columns(tmp_path)
    result = run_sequence(load_config(config, ["evaluate=all"]), run_id="fields", progress=Silent())
    model = AMLoRAModel.from_bank("models:/fields@current", device="cpu")
    asked = [{"first": row["first"], "rest": row["rest"]} for row in rows]
    served = model.predict(asked, task=None)
    accuracy = result["accuracy_matrix"][-1][0]
    assert sum(answer == row["label"] for answer, row in zip(served, rows, strict=True)) / len(rows) == accuracy
    kept: Any = [read_predictions(file) for file in (amlora_home / "storage" / "scores").glob("*/predictions.jsonl")]
    assert any([row.served for row in sorted(one, key=lambda row: row.row)] == served for one in kept)
    options = {"device": "cpu"}
    file = str(tmp_path / "tasks" / "colours" / "test.jsonl")
    score("models:/fields@current", Rows(file, column="rest"), "colours", 4, options, as_json=True)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["accuracy"] == accuracy
    routed = [place for place, one in enumerate(model.route(asked)) if one.task == "colours"]
    assert routed
    with pytest.raises(UserError, match="its prompt reads the fields first, rest"):
        model.answer(model.requests(asked[routed[0]])[0].text)
