"""A vLLM that is not there, is slow or is another one: one clear message each. The real one is in ``test_vllm``."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from amlora_dist.errors import UserError
from amlora_dist.evaluation.requests import Request, Route
from amlora_dist.inference.model import AMLoRAModel
from amlora_dist.inference.routed_prompts import RoutedPrompt
from amlora_dist.serving import vllm_engine
from amlora_dist.serving.bank import ServedBank
from amlora_dist.serving.metrics import ServingMetrics
from amlora_dist.serving.row_routing import routed_to_rows
from amlora_dist.serving.settings import ServeSettings
from amlora_dist.serving.vllm_engine import VllmEngine
from amlora_dist.serving.vllm_start import own_scores
from tests.bank_with_base import TASKS, texts_of, write_keyed_bank, write_working_bank
from tests.ports import free_port
from tests.serving.fake_vllm import FakeVllm, fake_vllm
from tests.serving.servers import Running, running

pytestmark = pytest.mark.integration  # a running app

TEXT = texts_of("colours", 1)[0]


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> AMLoRAModel:
    """A bank that is routed by plain text."""
    folder = tmp_path_factory.mktemp("keyed")
    write_keyed_bank(folder / "bank", folder / "base")
    return AMLoRAModel.from_bank(folder / "bank", device="cpu")


@pytest.fixture
def bank(keyed: AMLoRAModel) -> ServedBank:
    return ServedBank(keyed, "words")


@pytest.fixture
def fake(keyed: AMLoRAModel) -> Iterator[FakeVllm]:
    def score(prompt: Sequence[int], token: int) -> float:
        return own_scores(keyed, [*prompt, token])[-1]

    with fake_vllm(score, int(keyed.tokenizer.eos_token_id)) as one:
        yield one


def engine(url: str, home: Path, rank: int = 64) -> partial[VllmEngine]:
    return partial(VllmEngine, url=url, home=home, rank=rank)


def refused(bank: ServedBank, url: str, home: Path, rank: int = 64) -> str:
    """The message with which a server does not start."""
    with pytest.raises(UserError) as error:
        made = engine(url, home, rank)(ServeSettings(), ServingMetrics())
        made.load(bank)
    return str(error.value)


def test_a_server_that_is_not_there_or_no_vllm_is_named_with_the_option(
    bank: ServedBank, server: Running, tmp_path: Path
) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    message = refused(bank, url, tmp_path)
    assert "--engine-url" in message and url in message and "cannot be reached" in message
    message = refused(bank, server.url, tmp_path)  # one of our own
    assert "--engine-url" in message and "404" in message
    for bad in ("localhost:8000", "ftp://host", "http://user:pass@host"):
        assert "--engine-url" in refused(bank, bad, tmp_path)


def test_a_server_that_takes_no_rows_says_what_it_lacks(bank: ServedBank, fake: FakeVllm, tmp_path: Path) -> None:
    fake.refuse_load = 404, {"detail": "Not Found"}
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True" in refused(bank, fake.url, tmp_path)
    fake.refuse_load = 500, {"error": {"message": "LoRA rank 9 is greater than max_lora_rank 8."}}
    message = refused(bank, fake.url, tmp_path)
    assert "max_lora_rank 8" in message and "--engine-rank" in message and "words-v" in message


def test_another_base_model_behind_the_address_is_found_out(
    bank: ServedBank, fake: FakeVllm, tmp_path: Path
) -> None:
    fake.score = lambda _prompt, _token: -30.0
    message = refused(bank, fake.url, tmp_path)
    assert "is not the bank's" in message and "--model" in message


def test_banks_that_are_no_rows_are_refused(fake: FakeVllm, tmp_path: Path, place: Path) -> None:
    from amlora_dist.adapters.settings import LiteralSettings

    write_working_bank(tmp_path / "literal", place / "base-llama", literal=LiteralSettings())
    literal = ServedBank.load(tmp_path / "literal", "words", device="cpu")
    assert "literal" in refused(literal, fake.url, tmp_path)
    assert "encoder-decoder" in refused(ServedBank.load(place / "t5", "words", device="cpu"), fake.url, tmp_path)


def test_requests_that_vllm_fails_get_503_and_the_time_to_try_again(
    bank: ServedBank, fake: FakeVllm, tmp_path: Path
) -> None:
    with running(bank, engine=engine(fake.url, tmp_path)) as server:
        ask = partial(server.post, "/v1/completions", prompt=TEXT)
        assert ask().status_code == 200
        for broken in ((500, '{"error": {"message": "out of memory"}}'), (200, "<html>"), (200, '{"choices": []}')):
            fake.completions = broken
            answer = ask()
            assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
            error = answer.json()["error"]
            assert error["code"] == "engine_away" and fake.url in error["message"] and "\n" not in error["message"]
        assert "out of memory" not in ask().text
        fake.completions = None
        assert ask().status_code == 200
        assert server.service.engine.texts == 0
        assert "amlora_engine_failures_total 4.0" in server.client.get("/metrics").text


def test_a_connection_that_vllm_closes_costs_nobody_an_answer(bank: ServedBank, fake: FakeVllm, tmp_path: Path) -> None:
    with running(bank, engine=engine(fake.url, tmp_path)) as server:
        fake.drops = 1
        assert server.post("/v1/completions", prompt=TEXT).status_code == 200 and fake.drops == 0
        fake.drops = 2
        answer = server.post("/v1/completions", prompt=TEXT)
        assert answer.status_code == 503 and "cannot be reached" in answer.json()["error"]["message"]


def test_a_vllm_that_does_not_begin_in_time_is_one_that_is_away(bank: ServedBank, fake: FakeVllm, tmp_path: Path) -> None:
    with running(bank, engine=engine(fake.url, tmp_path), request_timeout_s=1.0) as server:
        fake.slow_s = 20.0
        start = time.monotonic()
        answer = server.post("/v1/classifications", input=TEXT)
        assert answer.status_code == 503 and "did not begin to answer" in answer.json()["error"]["message"]
        assert time.monotonic() - start < 15 and server.service.engine.texts == 0


def test_while_vllm_is_away_requests_are_refused_before_any_work(
    bank: ServedBank, fake: FakeVllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_engine, "HEALTH_EVERY_S", 0.05)
    with running(bank, engine=engine(fake.url, tmp_path)) as server:
        fake.healthy = False
        _until(lambda: server.client.get("/healthz").status_code == 503)
        assert server.client.get("/healthz").json()["status"] == "engine_away"
        assert server.service.engine.alive  # a new replica would help nobody
        answer = server.post("/v1/completions", prompt=TEXT)
        assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
        assert "amlora_engine_ready 0.0" in server.client.get("/metrics").text
        fake.healthy = True
        _until(lambda: server.client.get("/healthz").status_code == 200)
        assert server.post("/v1/completions", prompt=TEXT).status_code == 200


def test_rows_that_a_vllm_lost_are_loaded_again_without_a_failed_request(
    bank: ServedBank, fake: FakeVllm, tmp_path: Path
) -> None:
    with running(bank, engine=engine(fake.url, tmp_path)) as server:
        assert len(fake.loaded) == len(bank.tasks)
        fake.loaded.clear()  # started again
        server.good("/v1/completions", prompt=TEXT)
        server.good("/v1/completions", prompt=TEXT, raw=True)
        assert fake.loaded
        fake.loaded.clear()
        fake.refuse_load = 500, {"error": {"message": "no such folder"}}
        answer = server.post("/v1/completions", prompt=TEXT)
        assert answer.status_code == 503 and "no such folder" in answer.json()["error"]["message"]


@pytest.mark.parametrize("kind", ["raw prompts", "prompts of a bank without keys", "labels of a bank without keys"])
def test_callers_whose_texts_share_a_pass_are_routed_each_by_their_own_words(
    keyed: AMLoRAModel, tmp_path: Path, kind: str
) -> None:
    if kind == "raw prompts":
        bank = ServedBank(keyed, "words")
    else:
        write_working_bank(tmp_path / "bank", tmp_path / "base")
        bank = ServedBank.load(tmp_path / "bank", "words", device="cpu")
    texts = [texts_of(task, 1)[0] for task in TASKS]
    to_classify = kind.startswith("labels")

    def asked() -> list[Request]:
        """One request of each of three callers."""
        if to_classify:
            return [bank.to_classify(text) for text in texts]
        return [bank.to_generate(text, raw=kind == "raw prompts", new_tokens=2) for text in texts]

    together = routed_to_rows(bank, asked(), to_classify=to_classify)
    alone = [routed_to_rows(bank, [one], to_classify=to_classify)[0] for one in asked()]
    assert [one.row for one in together] == [one.row for one in alone] == list(TASKS)
    assert [one.request.labels for one in together] == [one.request.labels for one in alone]


def test_a_text_between_tasks_gets_the_strongest_row_and_is_counted(
    bank: ServedBank, fake: FakeVllm, tmp_path: Path
) -> None:
    between = " ".join([*texts_of("sizes", 1, "x"), *texts_of("colours", 3, "x")])
    with running(bank, engine=engine(fake.url, tmp_path)) as server:
        for text, weight, count in ((TEXT, 1.0, 0), (between, 0.9, 1)):
            fake.asked.clear()
            found = server.good("/v1/classifications", input=text, routing=True)["data"][0]["routing"]
            assert found["task"] == "colours" and found["tasks"]["colours"] <= weight
            assert set(fake.asked) == {next(name for name in fake.loaded if name.endswith("-colours"))}
            assert f"amlora_strongest_row_total {count}.0" in server.client.get("/metrics").text


def test_a_text_of_no_task_is_answered_by_the_base_model(
    bank: ServedBank, fake: FakeVllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*given: Any, **more: Any) -> list[RoutedPrompt]:
        """Routed as abstention leaves it: no task has any weight."""
        empty = Route(dict.fromkeys(bank.tasks, 0.0), dict.fromkeys(bank.tasks, 0.0), 1.0)
        return [dataclasses.replace(one, route=empty) for one in routed_to_rows(*given, **more)]

    monkeypatch.setattr(vllm_engine, "routed_to_rows", none)
    with running(bank, engine=engine(fake.url, tmp_path)) as server:
        fake.asked.clear()
        server.good("/v1/completions", prompt=TEXT, raw=True, max_tokens=2)
    assert set(fake.asked) == {"base"}


def test_a_prompt_is_not_scored_with_loras(bank: ServedBank, fake: FakeVllm, tmp_path: Path) -> None:
    with running(bank, engine=engine(fake.url, tmp_path)) as server:
        answer = server.post("/v1/completions", prompt=TEXT, echo=True, logprobs=1)
        assert answer.status_code == 400 and "echo: found true" in answer.json()["error"]["message"]
        assert server.good("/v1/completions", prompt=TEXT, echo=True)["choices"][0]["text"].startswith(TEXT)


def test_prompts_too_long_for_vllm_are_the_clients_fault(bank: ServedBank, fake: FakeVllm, tmp_path: Path) -> None:
    with running(bank, engine=engine(fake.url, tmp_path)) as server:
        server.service.engine._positions = 8  # type: ignore[attr-defined]
        answer = server.post("/v1/completions", prompt=" ".join([TEXT] * 3), raw=True, max_tokens=2)
        assert answer.status_code == 400 and "vLLM has room for 8" in answer.json()["error"]["message"]


def _until(holds: Any, deadline_s: float = 60) -> None:
    start = time.monotonic()
    while not holds():
        assert time.monotonic() - start < deadline_s
        time.sleep(0.05)
