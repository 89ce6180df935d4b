"""A task that is scored against its rows' texts: the score of every mode sees them, and so does `amlora score`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from amlora_dist.config.loading import load_config
from amlora_dist.evaluation.sari import sari
from amlora_dist.evaluation.scoring import read_predictions
from pipelines.cli.main import app
from pipelines.runs.progress import Silent
from pipelines.runs.sequence import run_sequence
from tests.tiny_chat import write_chat_config

pytestmark = [pytest.mark.integration, pytest.mark.slow]


def test_every_score_of_a_task_sees_the_rows_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AMLORA_HOME", str(tmp_path / "home"))
    config = write_chat_config(tmp_path)
    task = tmp_path / "talk" / "talk.yaml"
    task.write_text(task.read_text() + "metric: sari\n")
    run_sequence(load_config(config, ["evaluate=all", "training.epochs=1"]), run_id="sari", progress=Silent())
    rows = tmp_path / "talk" / "test.jsonl"
    turns = [json.loads(line)["messages"] for line in rows.read_text().splitlines()]
    asked = {number: [turn for turn in row if turn["role"] == "user"][-1]["content"] for number, row in enumerate(turns, 1)}
    scores = {}
    for file in tmp_path.glob("home/storage/scores/*/summary.json"):
        summary = json.loads(file.read_text())
        if summary["task"] != "talk":
            continue
        found = read_predictions(file.with_name("predictions.jsonl"))
        for one in found:
            text = one.output if one.served is None else one.served
            assert one.correct == pytest.approx(sari(text, [one.answer], asked[one.row])), (summary["mode"], one)
        assert any(one.correct != sari(one.served or one.output, [one.answer], "") for one in found)
        assert summary["accuracy"] == pytest.approx(sum(one.correct for one in found) / len(found))
        scores[summary["mode"], len(found[0].gates or ())] = summary["accuracy"]
    assert {mode for mode, _ in scores} >= {"router", "oracle", "untrained"}

    with pytest.raises(SystemExit, match="0"):
        app(["score", "models:/sari@current", str(rows), "--task", "talk", "--json", "--device", "cpu"])
    score = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert score["metric"] == "sari" and score["accuracy"] == pytest.approx(scores["router", 2])
