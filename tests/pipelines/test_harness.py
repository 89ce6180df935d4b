"""lm-evaluation-harness on a bank: in one process (`amlora evaluate`), and over HTTP by the harness's own clients."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from amlora_dist.config.loading import load_config
from amlora_dist.inference.model import AMLoRAModel
from amlora_dist.serving.bank import ServedBank
from pipelines.cli.main import app
from pipelines.runs.progress import Silent
from pipelines.runs.sequence import run_sequence
from tests.serving.servers import Running, running
from tests.tiny_chat import NOUNS, write_chat_config

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (the extra `evaluate`)")

pytestmark = [pytest.mark.integration, pytest.mark.slow]
CLOSE = 1e-4
"""Scores of one prompt in batches of different sizes, and rounded on their way through JSON."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("harness")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AMLORA_HOME", str(folder / "home"))
        config = load_config(write_chat_config(folder), ["evaluate=last", "training.epochs=1"])
        run_sequence(config, run_id="harness", progress=Silent())
        yield folder


@pytest.fixture(scope="module")
def model(place: Path) -> AMLoRAModel:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AMLORA_HOME", str(place / "home"))
        return AMLoRAModel.from_bank("models:/harness@current", device="cpu")


@pytest.fixture(scope="module")
def server(model: AMLoRAModel) -> Any:
    with running(ServedBank(model, "harness")) as one:
        yield one


@pytest.fixture(scope="module")
def tasks(place: Path, model: AMLoRAModel) -> Path:
    """Tasks of the harness on local rows: choices, whole texts, answers that are written."""
    folder = place / "tasks"
    folder.mkdir()
    rows = []
    for number, noun in enumerate(NOUNS[:6]):
        text = f"Which {noun} is number {number}?"
        response = model.chat([{"role": "user", "content": text}]).text
        rows.append({"text": text, "choices": ["The " + noun, "red", "A camera"], "right": number % 3,
                     "answer": response if number % 2 else "never"})  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = {
        "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}, "test_split": "test",
        "num_fewshot": 0, "metadata": {"version": 1},
    }  # fmt: skip
    own = [
        {"task": "tiny_choices", "output_type": "multiple_choice", "doc_to_text": "{{text}}", "doc_to_choice": "{{choices}}",
         "doc_to_target": "{{right}}", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]},
        {"task": "tiny_texts", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
         "metric_list": [{"metric": "byte_perplexity"}]},
        {"task": "tiny_answers", "output_type": "generate_until", "doc_to_text": "{{text}}", "doc_to_target": "{{answer}}",
         "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False},
         "metric_list": [{"metric": "exact_match"}]},
    ]  # fmt: skip
    for one in own:
        (folder / f"{one['task']}.yaml").write_text(yaml.safe_dump(one | shared, sort_keys=False))
    return folder


def _evaluate(place: Path, tasks: Path, names: str, *options: str) -> dict[tuple[str, str], dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AMLORA_HOME", str(place / "home"))
        dest = place / f"{names}.json"
        given = ["models:/harness@current", "--tasks", names, "--tasks-folder", str(tasks), "-o", str(dest), *options]
        assert not app(["evaluate", *given, "--device", "cpu"], standalone_mode=False)
    written = json.loads(dest.read_text())
    return {(one["task"], one["metric"]): one for one in written["scores"]}


def _over_http(server: Running, tasks: Path, client: str, path: str, names: list[str], **more: Any) -> Any:
    from lm_eval.tasks import TaskManager

    arguments = {"model": "harness", "base_url": f"{server.url}{path}", "num_concurrent": 1, "max_retries": 1, **more}
    return lm_eval.simple_evaluate(
        model=client, model_args=arguments, tasks=names, task_manager=TaskManager(include_path=str(tasks)),
        apply_chat_template="chat" in client, bootstrap_iters=0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def table(place: Path, tasks: Path) -> dict[tuple[str, str], dict[str, Any]]:
    return _evaluate(place, tasks, "tiny_choices,tiny_texts,tiny_answers")


def test_the_bank_and_its_base_model_are_side_by_side(table: dict[tuple[str, str], dict[str, Any]]) -> None:
    assert set(table) == {
        ("tiny_choices", "acc"), ("tiny_choices", "acc_norm"), ("tiny_texts", "byte_perplexity"),
        ("tiny_answers", "exact_match"),
    }  # fmt: skip
    perplexity = table["tiny_texts", "byte_perplexity"]
    assert perplexity["bank"] > 1 and abs(perplexity["bank"] - perplexity["base"]) > 1e-3, "training changed it"
    assert 0 <= table["tiny_choices", "acc"]["base"] <= 1


def test_the_base_model_is_scored_as_transformers_scores_it(model: AMLoRAModel, tasks: Path, table: Any) -> None:
    rows = [json.loads(line)["text"] for line in (tasks / "rows.jsonl").read_text().splitlines()]
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(model.base.path)
    begin = model.tokenizer.bos_token_id
    total, size = 0.0, 0
    for text in rows:
        own = model.tokenizer(text, add_special_tokens=False).input_ids
        ids = [model.tokenizer.eos_token_id if begin is None else begin, *own]
        with torch.no_grad():
            scores = torch.log_softmax(plain(torch.tensor([ids])).logits[0, :-1].float(), -1)
        total += float(scores.gather(1, torch.tensor(ids[1:])[:, None]).sum())
        size += len(text.encode())
    assert table["tiny_texts", "byte_perplexity"]["base"] == pytest.approx(math.exp(-total / size), rel=1e-4)


def test_local_completions_scores_a_served_bank_as_evaluate_does(
    server: Running, tasks: Path, table: Any, model: AMLoRAModel
) -> None:
    names = ["tiny_choices", "tiny_texts", "tiny_answers"]
    found = _over_http(
        server, tasks, "local-completions", "/v1/completions", names, tokenizer=str(model.base.path),
        tokenizer_backend="huggingface", max_length=512,
    )["results"]  # fmt: skip
    for (task, metric), line in table.items():
        assert found[task][f"{metric},none"] == pytest.approx(line["bank"], rel=CLOSE), (task, metric)


def test_local_chat_completions_scores_a_served_bank_as_evaluate_does(server: Running, place: Path, tasks: Path) -> None:
    ours = _evaluate(place, tasks, "tiny_answers", "--chat")["tiny_answers", "exact_match"]
    found = _over_http(server, tasks, "local-chat-completions", "/v1/chat/completions", ["tiny_answers"])["results"]
    assert found["tiny_answers"]["exact_match,none"] == ours["bank"] == 0.5, "every second answer is what the bank says"


def test_what_cannot_be_evaluated_is_named(place: Path, tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AMLORA_HOME", str(place / "home"))
        for options, message in (
            (["--tasks", "nothing_such", "--tasks-folder", str(tasks)], "--tasks: found nothing_such"),
            (["--tasks", "tiny_texts", "--tasks-folder", str(tasks / "none")], "--tasks-folder: found"),
            (["--tasks", "tiny_texts", "-o", "scores.txt"], "expected a .json file"),
        ):
            code = app(["evaluate", "models:/harness@current", *options], standalone_mode=False)
            assert code == 2 and message in capsys.readouterr().err
