"""Banks whose router has no keys are served as they are scored too: behind the bank's prompt, by the best of all labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from openai import OpenAI

from amlora_dist.config.loading import load_config
from amlora_dist.evaluation.plain_choice import PlainChoice
from amlora_dist.evaluation.scoring import Prediction, read_predictions
from amlora_dist.inference.model import AMLoRAModel
from amlora_dist.registry.pyfunc import BankModel
from amlora_dist.serving.bank import ServedBank
from pipelines.cli.scoring import Rows, ask, score
from pipelines.runs import stage_record
from pipelines.runs.progress import Silent
from pipelines.runs.sequence import run_sequence
from tests.serving.servers import running
from tests.tiny_config import TOPICS, write_config

pytestmark = [pytest.mark.integration, pytest.mark.slow]
TASKS = ("colours", "shapes")
ALL = tuple(dict.fromkeys(label for task in TASKS for label in TOPICS[task][0]))


@pytest.fixture(scope="module", params=["seq_lora", "joint", "permuted"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Its folder, a finished run of two tiny tasks whose bank has no keys, and the bank in its model."""
    folder = tmp_path_factory.mktemp("without_keys")
    given = {"permuted": ["router.kind=permuted"]}.get(request.param, [f"method={request.param}"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AMLORA_HOME", str(folder / "home"))
        ranks = PlainChoice(way="ranks")  # of the other: test_served_written
        patch.setattr(stage_record, "decided", lambda _scores, _below: ranks)
        config = load_config(write_config(folder, tasks=TASKS), [*given, "evaluate=all", "training.epochs=2"])
        result = run_sequence(config, run_id="plain", progress=Silent())
        yield folder, result, AMLoRAModel.from_bank("models:/plain@current", device="cpu")


def scored(folder: Path, task: str, result: dict[str, Any]) -> list[Prediction]:
    """What the last bank answered to the test rows of a task."""
    found = []
    for summary in (folder / "home" / "storage" / "scores").glob("*/summary.json"):
        about = json.loads(summary.read_text(encoding="utf-8"))
        rows = read_predictions(summary.with_name("predictions.jsonl"))
        if (about["task"], about["mode"]) == (task, "router") and set(rows[0].labels or ()) == set(ALL):
            found.append((about["accuracy"], sorted(rows, key=lambda row: row.row)))
    ((accuracy, rows),) = found
    assert accuracy == result["accuracy_matrix"][-1][TASKS.index(task)]
    return rows


def test_no_row_differs_between_the_matrix_and_what_is_served(
    run: Any, monkeypatch: pytest.MonkeyPatch, amlora_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, result, model = run
    monkeypatch.setenv("AMLORA_HOME", str(folder / "home"))
    assert model.answering is None
    for place, task in enumerate(TASKS):
        file = folder / "tasks" / task / "test.jsonl"
        texts = [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]
        rows = scored(folder, task, result)
        wanted = [row.served for row in rows]
        assert set(wanted) <= set(ALL)
        assert model.predict(texts) == wanted
        assert model.predict(texts, batch_size=1) == wanted
        assert [model.chat([{"role": "user", "content": text}]).text for text in texts[:2]] == wanted[:2]
        assert [found.label for found in model.classify(texts)] == wanted
        assert BankModel(model).predict(pd.DataFrame({"text": texts})) == wanted
        with running(ServedBank(model, "plain")) as server:
            client = OpenAI(base_url=f"{server.url}/v1", api_key="unused")
            for text, answer in zip(texts, wanted, strict=True):
                said = {"role": "user", "content": text}
                reply = client.chat.completions.create(model="plain", messages=[said], max_tokens=40)  # type: ignore[list-item]
                assert reply.choices[0].message.content == answer
        score("models:/plain@current", Rows(str(file)), task, 4, {}, as_json=True)
        shown = json.loads(capsys.readouterr().out)
        assert shown["accuracy"] == result["accuracy_matrix"][-1][place]
        greedy = sum(row.greedy_correct or 0.0 for row in rows) / len(rows)
        assert shown["greedy_accuracy"] == pytest.approx(greedy), "what is written freely is reported next to it"
        ask("models:/plain@current", texts[:3], [], {}, as_json=True)
        assert [json.loads(line)["answer"] for line in capsys.readouterr().out.splitlines()] == wanted[:3]
