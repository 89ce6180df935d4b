"""A real vLLM behind the app. ``AMLORA_VLLM_PYTHON`` names a Python that has it (`make vllm-env` makes one)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from amlora_dist.inference.model import AMLoRAModel
from amlora_dist.registry.bank_folder import read_bank
from amlora_dist.registry.server_exports import export_vllm, served_base
from amlora_dist.registry.store import Store
from amlora_dist.serving import vllm_engine
from amlora_dist.serving.alias_watcher import Follower
from amlora_dist.serving.bank import ServedBank
from amlora_dist.serving.vllm_engine import VllmEngine
from pipelines.cluster.vllm_process import Vllm, VllmSettings, vllm_for
from tests.bank_with_base import TASKS, texts_of, write_keyed_bank
from tests.ports import free_port
from tests.serving.load import publish
from tests.serving.servers import Running, running
from tests.tiny_config import write_tokenizer

PYTHON = os.environ.get("AMLORA_VLLM_PYTHON")
pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(not PYTHON, reason="AMLORA_VLLM_PYTHON names no Python with vLLM; `make vllm-env` makes one"),
]
FOUR = (*TASKS, "fruit")
ROWS = 25
"""Plain texts of each task."""
RANK = 16
"""The largest row has 14."""
START_S = 900.0


@pytest.fixture(scope="module")
def banks(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two versions on a base model whose heads are as large as vLLM's attention on CPUs wants them."""
    folder = tmp_path_factory.mktemp("banks")
    size = write_tokenizer(folder / "base", closes_prompts=False)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size, hidden_size=128, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    write_keyed_bank(folder / "one", folder / "base", tasks=FOUR)
    write_keyed_bank(folder / "two", folder / "base", tasks=FOUR[::-1])
    return [folder / "one", folder / "two"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def vllm(banks: list[Path], home: Path) -> Iterator[Vllm]:
    """A vLLM that the project's own code starts, with the first version's rows."""
    assert PYTHON is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AMLORA_HOME", str(home))
        settings = VllmSettings(url=None, python=Path(PYTHON), rank=RANK)
        options: dict[str, Any] = {"base": None, "device": "cpu", "dtype": "fp32"}
        with vllm_for(settings, read_bank(banks[0]), "words", "one", options, print) as one:
            yield one


@pytest.fixture(scope="module")
def served(banks: list[Path], vllm: Vllm, home: Path) -> Iterator[Running]:
    """The first version, its texts answered by vLLM."""
    bank = ServedBank.load(banks[0], "words", device="cpu")
    with running(bank, engine=partial(VllmEngine, url=vllm.url, home=home, rank=RANK)) as one:
        yield one


def test_top_answers_are_those_of_the_own_engine(served: Running) -> None:
    texts = [text for task in FOUR for text in texts_of(task, ROWS, "plain")]
    model = served.service.bank.model
    other: list[Any] = []
    asked = 0
    for text, own, label in zip(texts, model.answer(texts), model.classify(texts), strict=True):
        weights = own.route.tasks.values()
        if 0 < max(weights) < 1 - 1e-6:
            continue  # between tasks: the strongest row alone is something else
        asked += 1
        choice = served.good("/v1/completions", prompt=text, routing=True)["choices"][0]
        found = served.good("/v1/classifications", input=text)["data"][0]
        if (choice["text"], found["label"]) != (own.text, label.label):
            other.append((text, choice, found, own, label))
    print(f"{asked} plain rows, {len(other)} with another answer")
    assert asked >= 3 * ROWS and other == []


def test_written_answers_and_scores_of_tokens_are_those_of_the_own_engine(served: Running) -> None:
    bank = served.service.bank
    with running(bank) as own:
        for body in (
            {"prompt": "red blue square", "raw": True, "max_tokens": 6, "logprobs": 3},
            {"prompt": texts_of("shapes", 1)[0], "logprobs": 2},
        ):
            found, expected = (one.good("/v1/completions", **body)["choices"][0] for one in (served, own))
            assert (found["text"], found["finish_reason"]) == (expected["text"], expected["finish_reason"])
            scores, others = found["logprobs"]["token_logprobs"], expected["logprobs"]["token_logprobs"]
            assert scores == pytest.approx(others, abs=1e-2)
            assert found["logprobs"]["tokens"] == expected["logprobs"]["tokens"]
    streamed = served.post("/v1/completions", prompt="red blue square", raw=True, max_tokens=6, stream=True)
    assert streamed.text.rstrip().endswith("[DONE]") and streamed.text.count("data: ") > 3


def test_an_alias_that_moves_under_clients_fails_no_request(
    banks: list[Path], vllm: Vllm, amlora_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_engine, "HEALTH_EVERY_S", 0.5)
    store = Store.open(amlora_home)
    first, second = (publish(store, "words", folder) for folder in banks)
    store.set_alias("words", "champion", first)
    bank = ServedBank.load("models:/words@champion", device="cpu")
    texts = [text for task in FOUR for text in texts_of(task, 4, "moving")]
    answers: list[tuple[int, str]] = []
    stop = threading.Event()
    with running(bank, engine=partial(VllmEngine, url=vllm.url, home=amlora_home, rank=RANK), poll_s=0.2) as server:

        def client(number: int) -> None:
            place = number
            while not stop.is_set():
                answer = server.post("/v1/completions", prompt=texts[place % len(texts)])
                answers.append((answer.status_code, answer.json().get("system_fingerprint") or answer.text))
                place += 1

        follower = Follower(server.service, "models:/words@champion", device="cpu")
        follower.start()
        clients = [threading.Thread(target=client, args=(number,)) for number in range(20)]
        for one in clients:
            one.start()
        try:
            _until(lambda: len(answers) > 20)
            store.set_alias("words", "champion", second)
            _until(lambda: sum(version == second.uri for _, version in answers) > 20)
            _until(lambda: not any("words-v1-" in name for name in _names(vllm)))  # unloaded, while clients ask on
            count = len(answers)
            _until(lambda: len(answers) > count + 20)
        finally:
            stop.set()
            for one in clients:
                one.join(timeout=120)
            follower.stop()
        page = server.client.get("/metrics").text
        print([line for line in page.splitlines() if "failures_total" in line], Counter(status for status, _ in answers))
        assert "amlora_engine_failures_total 0.0" in page
        assert f'amlora_version{{version="{second.uri}"}} 1.0' in page and 'amlora_pass_rows_count{kind="route"}' in page
        assert server.client.get("/").status_code == 200
    assert [one for one in answers if one[0] != 200] == []
    assert {version for _, version in answers} == {first.uri, second.uri}
    assert not any("words-v2-" in name for name in _names(vllm))


def test_the_exported_folder_is_served_by_vllm_itself_and_its_client_asks_for_the_right_row(
    banks: list[Path], tmp_path: Path
) -> None:
    """``serve.sh`` as it is written: no adapter is named to vLLM, which finds each by its own resolver."""
    assert PYTHON is not None
    model = AMLoRAModel.from_bank(banks[0], device="cpu")
    folder = export_vllm(tmp_path / "vllm", model.bank, base=served_base(model.base, None))
    port = free_port()
    cpu = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCH_COMPILE_DISABLE": "1"}
    options = ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(
            ["sh", str(folder / "serve.sh"), *options], stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, **cpu, "PATH": f"{Path(PYTHON).parent}:{os.environ['PATH']}"},
        )  # fmt: skip
    try:
        _until(lambda: server.poll() is not None or _answers(f"http://127.0.0.1:{port}/health"), START_S)
        assert server.poll() is None, (tmp_path / "log").read_text()[-3000:]
        for task in FOUR:
            (text,) = texts_of(task, 1, "exported")
            done = subprocess.run(
                [sys.executable, str(folder / "client.py"), str(banks[0]), text, f"http://127.0.0.1:{port}"],
                capture_output=True, text=True, timeout=300, check=True,
            )  # fmt: skip
            (own,) = model.answer([text], task=model.route(text)[0].task)
            found = json.loads(done.stdout.splitlines()[-1])
            assert (found["task"], found["model"], found["label"], found["answer"]) == (task, task, own.text, own.text)
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait(60)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def _names(vllm: Vllm) -> list[str]:
    return [one["id"] for one in httpx.get(f"{vllm.url}/v1/models", timeout=60).json()["data"]]


def _until(holds: Any, deadline_s: float = 900) -> None:
    start = time.monotonic()
    while not holds():
        assert time.monotonic() - start < deadline_s
        time.sleep(0.2)
