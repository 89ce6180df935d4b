"""A bank without keys that chose to write answers so wherever it is asked: library, server, pyfunc, commands, promotion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from openai import OpenAI

from amlora_dist.config.loading import load_config
from amlora_dist.evaluation.plain_choice import PlainChoice
from amlora_dist.evaluation.scoring import read_predictions
from amlora_dist.inference.loading import pulled
from amlora_dist.inference.model import AMLoRAModel
from amlora_dist.registry.manifest import read_manifest
from amlora_dist.registry.pyfunc import BankModel
from amlora_dist.serving.bank import ServedBank
from pipelines.cli.promotion import Promotion, promote
from pipelines.cli.scoring import Rows, ask
from pipelines.runs import stage_record
from pipelines.runs.executor import InProcess
from pipelines.runs.progress import Silent
from pipelines.runs.sequence import run_sequence
from tests.serving.servers import running
from tests.tiny_config import write_config

TASKS = ("colours", "shapes")
WRITES = PlainChoice(way="writes", ranks=0.25, writes=0.5, rows=16, of="held-out")


@pytest.mark.slow
@pytest.mark.integration
def test_what_a_bank_writes_is_the_same_at_every_door(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, amlora_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stage_record, "decided", lambda _scores, _below: WRITES)
    more = ["method=seq_lora", "evaluation.untrained=false", "evaluation.oracle=false", "training.epochs=2"]
    result = run_sequence(load_config(write_config(tmp_path, tasks=TASKS), more), run_id="plain", progress=Silent())
    model, task = AMLoRAModel.from_bank("models:/plain@current", device="cpu"), TASKS[-1]
    file = tmp_path / "tasks" / task / "test.jsonl"
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    texts = [line["text"] for line in lines]
    wanted = model.predict(texts)
    noted: list[list[Any]] = []
    for summary in amlora_home.glob("storage/scores/*/summary.json"):
        about = json.loads(summary.read_text(encoding="utf-8"))
        if (about["task"], about["mode"]) == (task, "router"):
            noted.append(read_predictions(summary.with_name("predictions.jsonl")))
    assert sorted(wanted) in [sorted(one.output for one in rows) for rows in noted], "of its own stage"
    assert [model.chat([{"role": "user", "content": text}]).text for text in texts] == wanted
    assert BankModel(model).predict(pd.DataFrame({"text": texts})) == wanted
    with running(ServedBank(model, "plain")) as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="unused")
        for text, answer in zip(texts, wanted, strict=True):
            said: Any = [{"role": "user", "content": text}]
            reply = client.chat.completions.create(model="plain", messages=said)
            assert (reply.choices[0].message.content or "") == answer
            parts = client.chat.completions.create(model="plain", messages=said, stream=True)
            assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices).strip() == answer
    capsys.readouterr()
    ask("models:/plain@current", texts[:3], [], {}, as_json=False)
    assert "any: written freely" in " ".join(capsys.readouterr().out.split())
    ask("models:/plain@current", texts[:3], [], {}, as_json=True)
    assert [json.loads(line)["answer"] for line in capsys.readouterr().out.splitlines()] == wanted[:3]
    monkeypatch.setattr(InProcess, "run", lambda *_: pytest.fail("something was trained or scored again"))
    again = run_sequence(load_config(tmp_path / "run.yaml", more), run_id="second", progress=Silent())
    assert again["plain_text"] == result["plain_text"] and again["accuracy_matrix"] == result["accuracy_matrix"]
    manifest = read_manifest(pulled("models:/second@current", None)[1])
    assert manifest.plain_text == WRITES, "a run that takes the stages over publishes the choice too"
    sample = tmp_path / "sample.jsonl"
    sample.write_text("".join(json.dumps(line | {"task": task}) + "\n" for line in lines), encoding="utf-8")
    asked = Promotion(name="plain", number=2, alias="best", require=["accuracy >= 0"], sample=Rows(str(sample)))
    promote(asked, {}, as_json=True)
    shown = json.loads(capsys.readouterr().out)
    assert shown["scores"][task]["accuracy"] == result["accuracy_matrix"][-1][-1] == result["last"]["greedy_accuracy"][-1]
