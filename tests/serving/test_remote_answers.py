"""What the clients of exports do: a bank's answers, with the model's likelihoods from another server."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import time
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from amlora_dist.adapters.keyed_router import Evidence
from amlora_dist.adapters.router import FixedRouter
from amlora_dist.errors import UserError
from amlora_dist.evaluation.answering import EvidenceKind
from amlora_dist.evaluation.label_plan import plan_labels
from amlora_dist.inference.model import AMLoRAModel
from amlora_dist.inference.routed_prompts import RoutedPrompt
from amlora_dist.serving import llama_cpp_client, vllm_client
from amlora_dist.serving.jobs import EngineAwayError
from amlora_dist.serving.llama_cpp_client import LlamaCppClient
from amlora_dist.serving.remote_answers import RemoteAnswer, answered
from amlora_dist.serving.remote_labels import Beginning, best_label, label_scores
from amlora_dist.serving.vllm_client import VllmClient, VllmModel
from amlora_dist.tasks.task_entry import TaskEntry
from tests.bank_with_base import TASKS, described, texts_of, write_keyed_bank, write_working_bank
from tests.ports import free_port
from tests.serving.stand_ins import StandIn, stand_in

pytestmark = pytest.mark.integration  # an HTTP server

TEXTS = [text for task in TASKS for text in texts_of(task, 12, "asked")]
FILES = {"other.gguf": None, **{f"{task}.gguf": task for task in reversed(TASKS)}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("remote")
    write_keyed_bank(folder / "bank", folder / "base")
    return folder


@pytest.fixture
def model(folder: Path) -> AMLoRAModel:
    return AMLoRAModel.from_bank(folder / "bank", device="cpu")


@pytest.fixture
def server(model: AMLoRAModel) -> Iterator[StandIn]:
    with stand_in(model, FILES) as one:
        yield one


def by_vllm(url: str, prompts: Sequence[RoutedPrompt]) -> list[RemoteAnswer]:
    async def ask() -> list[RemoteAnswer]:
        client = VllmClient(url)
        try:
            return [await answered(one, VllmModel(client, one.row or "base")) for one in prompts]
        finally:
            await client.close()

    return asyncio.run(ask())


def by_llama_cpp(url: str, prompts: Sequence[RoutedPrompt]) -> list[RemoteAnswer]:
    async def ask() -> list[RemoteAnswer]:
        client, files = LlamaCppClient(url), {task: f"{task}.gguf" for task in TASKS}
        try:
            return [await answered(one, await client.model(files, one.route.tasks)) for one in prompts]
        finally:
            await client.close()

    return asyncio.run(ask())


def route_all(model: AMLoRAModel, monkeypatch: pytest.MonkeyPatch, gate: Sequence[float]) -> None:
    """Give every text the same weights of the tasks."""
    assert model.answering is not None
    evidence = model.answering.evidence

    def found(*given: Any) -> Evidence:
        one = evidence(*given)
        one.gates_BT[:] = torch.tensor(gate)
        return one

    monkeypatch.setattr(model.answering, "evidence", found)


def test_both_servers_clients_answer_as_the_bank_does_whatever_evidence_counts(
    model: AMLoRAModel, server: StandIn
) -> None:
    assert model.answering is not None
    seen: dict[str, list[str]] = {}
    kinds: tuple[EvidenceKind, ...] = ("both", "model", "keys")
    for kind in kinds:
        model.answering.kind = kind
        server.asked.clear()
        prompts = model.prompts(TEXTS)
        own = [one.text for one in model.answer(TEXTS)]
        assert all(one.plan is not None and not one.between for one in prompts)
        for found in (by_vllm(server.url, prompts), by_llama_cpp(server.url, prompts)):
            assert [one.text for one in found] == [one.label for one in found] == own
        assert bool(server.asked) == (kind != "keys"), "the keys alone need no server"
        seen[kind] = own
    assert seen["both"] != seen["model"] != seen["keys"], "each of them counts"


def test_llama_cpp_computes_the_mixture_of_a_text_between_tasks(
    model: AMLoRAModel, server: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    route_all(model, monkeypatch, (0.6, 0.4, 0.0))
    prompts, own = model.prompts(TEXTS[:12]), [one.text for one in model.answer(TEXTS[:12])]
    assert all(one.between and one.row == "colours" for one in prompts)
    assert [one.label for one in by_llama_cpp(server.url, prompts)] == own
    assert all(one["cache_prompt"] is False and len(one["lora"]) == 4 for one in server.asked)


def test_tokens_that_llama_cpp_does_not_name_are_asked_for_by_themselves(
    model: AMLoRAModel, server: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_cpp_client, "LIKELIEST", 2)
    found = by_llama_cpp(server.url, model.prompts(TEXTS[::4]))
    assert [one.label for one in found] == [one.text for one in model.answer(TEXTS[::4])]
    forced = [one for one in server.asked if "logit_bias" in one]
    assert len(forced) > len(found) and all(one["n_probs"] == 1 for one in forced)


def test_labels_of_several_tokens_are_chosen_as_the_bank_does(model: AMLoRAModel, server: StandIn) -> None:
    entry = TaskEntry(
        kind="words", question="what ?", labels=["red square", "red round", "green flat"], template="{{ text }}\nAnswer:",
        max_length=24,
    )  # fmt: skip
    described(model, "colours", entry)
    texts = TEXTS[:12]
    prompts = model.prompts(texts)
    assert prompts[0].plan is not None and prompts[0].plan.longest == 2
    own = [one.text for one in model.answer(texts)]
    assert len(set(own)) > 1
    assert [one.label for one in by_vllm(server.url, prompts)] == own
    assert [one.label for one in by_llama_cpp(server.url, prompts)] == own


def test_free_text_is_written_where_the_task_wants_it_or_the_caller(model: AMLoRAModel, server: StandIn) -> None:
    entry = TaskEntry(
        kind="words", question="what ?", labels=None, template="{{ text }}\nAnswer:", max_length=24, max_answer_tokens=5
    )
    described(model, "sizes", entry)
    texts = [texts_of("sizes", 1)[0], texts_of("shapes", 1)[0]]
    for free in (False, True):
        prompts = model.prompts(texts, free=free)
        own = [one.text for one in model.answer(texts, free=free)]
        for found in (by_vllm(server.url, prompts), by_llama_cpp(server.url, prompts)):
            assert [one.text for one in found] == own and found[0].label is None
            assert (found[1].label is None) == free


def test_a_text_of_no_task_is_written_by_the_base_model(
    model: AMLoRAModel, server: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    route_all(model, monkeypatch, (0.0, 0.0, 0.0))
    prompts = model.prompts(TEXTS[:3])
    own = [one.text for one in model.answer(TEXTS[:3])]
    assert {one.row for one in prompts} == {None}
    assert [(one.text, one.label) for one in by_vllm(server.url, prompts)] == [(text, None) for text in own]
    assert [(one.text, one.label) for one in by_llama_cpp(server.url, prompts)] == [(text, None) for text in own]
    assert server.asked[0]["model"] == "base" and {one["scale"] for one in server.asked[-1]["lora"]} == {0.0}
    plain = {"repeat_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0, "dry_multiplier": 0.0}
    assert plain.items() <= server.asked[-1].items(), "penalties that the server was started with change no answer"


@pytest.mark.parametrize("number", [1, 2])
def test_a_bank_without_keys_is_answered_as_it_answers_itself(tmp_path: Path, folder: Path, number: int) -> None:
    """One of before 0.2 writes, a later one chooses among the labels of all tasks."""
    stored: dict[str, Any] = {"prompt_format": number, "router": {"max_text_tokens": 24}}
    write_working_bank(
        tmp_path / "bank", folder / "base", router=FixedRouter.newest(TASKS), method="seq_lora",
        training_configuration=stored,
    )  # fmt: skip
    model = AMLoRAModel.from_bank(tmp_path / "bank", device="cpu")
    with stand_in(model) as server:
        found = by_vllm(server.url, model.prompts(TEXTS[::6]))
    assert [one.text for one in found] == [one.text for one in model.answer(TEXTS[::6])]
    assert {one.label is None for one in found} == {number == 1}


def test_clients_of_exports_made_before_find_what_they_read(model: AMLoRAModel) -> None:
    (prompt,) = model.prompts(TEXTS[0])
    assert prompt.route.task == "colours" and prompt.answer_tokens == model.prompter.answer_limit("colours")
    assert model.tokenizer.decode(prompt.tokens) == model.tokenizer.decode(
        model.tokenizer(f"{TEXTS[0]}\nwhat ?\nAnswer:")["input_ids"]
    )


class Counting:
    """A model whose log probabilities are drawn, which counts what it is asked."""

    def __init__(self, seed: int) -> None:
        self.seed, self.questions = seed, 0

    async def next_scores(
        self, prompt: Sequence[int], asked: Sequence[tuple[Beginning, Sequence[int]]]
    ) -> list[list[float]]:
        self.questions += len(asked)
        return [
            [-random.Random(f"{self.seed} {tuple(prompt)} {beginning} {token}").expovariate(0.3) for token in tokens]
            for beginning, tokens in asked
        ]

    async def write(self, prompt: Sequence[int], new_tokens: int) -> str:
        raise AssertionError


@pytest.mark.parametrize("seed", range(20))
def test_the_best_label_is_that_of_all_scores_and_takes_fewer_questions(seed: int) -> None:
    draw = random.Random(seed)
    labels = {tuple(draw.choices(range(2, 7), k=draw.randint(1, 4))) for _ in range(60)}
    plan = plan_labels(sorted(labels), eos_id=1)
    more = [draw.uniform(-3, 0) for _ in labels]

    def best(scores: Sequence[float]) -> int:
        found = [score + own for score, own in zip(scores, more, strict=True)]
        return found.index(max(found))

    whole, part = Counting(seed), Counting(seed)
    scores = asyncio.run(label_scores(whole, (9, 9), plan))
    assert asyncio.run(best_label(part, (9, 9), plan, best)) == best([sum(one) for one in scores])
    assert part.questions < whole.questions


def test_what_goes_wrong_is_said_in_one_line(model: AMLoRAModel, server: StandIn) -> None:
    prompts = model.prompts(TEXTS[:1])
    server.knows_tokens = False
    with pytest.raises(EngineAwayError, match=r"which it was asked for \(logprob_token_ids\): labels need a newer vLLM"):
        by_vllm(server.url, prompts)
    server.files.pop("sizes.gguf")
    with pytest.raises(UserError, match=r"has not loaded sizes\.gguf: start it with serve\.sh"):
        by_llama_cpp(server.url, prompts)
    for odd, message in (
        ((400, {"error": {"message": "exceeds the available context size"}}), "answered 400: exceeds the available"),
        ((200, {"content": "no list"}), "but not as llama.cpp does"),
        ((404, "not found"), "answered 404: not found"),
    ):
        server.odd = odd
        with pytest.raises(EngineAwayError, match=message):
            by_llama_cpp(server.url, prompts)
    with pytest.raises(EngineAwayError, match=r"llama\.cpp at http://127\.0\.0\.1:\d+ cannot be reached"):
        by_llama_cpp(f"http://127.0.0.1:{free_port()}", prompts)


def test_scores_that_are_no_numbers_choose_no_label(
    model: AMLoRAModel, server: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that overflows says NaN: of such scores the first label would be the best."""
    prompts, computed = model.prompts(TEXTS[:1]), server._next
    monkeypatch.setattr(server, "_next", lambda *given: torch.full_like(computed(*given), torch.nan))
    with pytest.raises(EngineAwayError, match=r"but not as vLLM does \(ValueError: a log probability that is no number"):
        by_vllm(server.url, prompts)
    for likeliest in (1000, 0):  # named by the server, and asked for by itself
        monkeypatch.setattr(llama_cpp_client, "LIKELIEST", likeliest)
        with pytest.raises(EngineAwayError, match=r"but not as llama\.cpp does"):
            by_llama_cpp(server.url, prompts)


def test_an_answer_without_words_is_no_answer(model: AMLoRAModel, server: StandIn) -> None:
    prompts = model.prompts(TEXTS[:1], free=True)
    server.odd = 200, {"choices": [{"text": None}]}
    with pytest.raises(EngineAwayError, match="but not as vLLM does"):
        by_vllm(server.url, prompts)
    computed = server.answer

    def wordless(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        return computed(path, body) if path == "/lora-adapters" else (200, {"content": None})

    server.odd, server.answer = None, wordless  # type: ignore[method-assign]
    with pytest.raises(EngineAwayError, match=r"but not as llama\.cpp does"):
        by_llama_cpp(server.url, prompts)


def test_an_export_of_another_bank_is_refused(model: AMLoRAModel, server: StandIn) -> None:
    (prompt,) = model.prompts(TEXTS[0])
    files = {task: f"{task}.gguf" for task in TASKS}

    async def ask(files: dict[str, str]) -> None:
        client = LlamaCppClient(server.url)
        try:
            await client.model(files, prompt.route.tasks)
        finally:
            await client.close()

    asyncio.run(ask(files))
    fewer = {task: file for task, file in files.items() if task != "sizes"}
    for others, task in ((fewer, "sizes"), (files | {"other": "other.gguf"}, "other")):
        with pytest.raises(UserError, match=f"'{task}'.*export the bank again, or name the one"):
            asyncio.run(ask(others))


def test_addresses_that_are_none_are_refused_by_the_name_that_the_caller_gave_them() -> None:
    for bad in ("localhost:8080", "http://user:secret@host", "http://host:x", "host"):
        for made in (lambda: LlamaCppClient(bad), lambda: VllmClient(bad, "server")):  # noqa: B023
            with pytest.raises(UserError, match=r"^server: found .*expected http://HOST:PORT"):
                made()


def test_a_key_that_llama_cpp_misses_is_asked_for_by_its_variable(model: AMLoRAModel, server: StandIn) -> None:
    server.odd = 401, {"error": {"message": "Invalid API Key"}}
    with pytest.raises(EngineAwayError, match="AMLORA_ENGINE_API_KEY"):
        by_llama_cpp(server.url, model.prompts(TEXTS[:1]))


@contextlib.contextmanager
def dripping() -> Iterator[str]:
    """A server that says a little again and again, and never comes to an end."""
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-length", "1000000")
            self.end_headers()
            with contextlib.suppress(OSError):
                while not over.wait(0.05):
                    self.wfile.write(b" ")

        def do_POST(self) -> None:
            self.do_GET()

        def log_message(self, *_words: Any) -> None:
            """Nothing on standard error."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        over.set()
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)


def test_a_server_that_never_ends_its_answer_is_given_up(
    model: AMLoRAModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = model.prompts(TEXTS[:1], free=True)
    for module in (llama_cpp_client, vllm_client):
        monkeypatch.setattr(module, "SILENT_S", 0.5)

    async def by_both(url: str) -> None:
        one, other = LlamaCppClient(url), VllmClient(url)
        try:
            with pytest.raises(EngineAwayError, match="did not answer /lora-adapters in time"):
                await asyncio.wait_for(one.adapters(), 20)
            with pytest.raises(EngineAwayError, match="did not answer /v1/completions in time"):
                await asyncio.wait_for(answered(prompts[0], VllmModel(other, "base")), 20)
        finally:
            await one.close()
            await other.close()

    with dripping() as url:
        asyncio.run(by_both(url))


def test_llama_cpp_has_time_for_each_prompt_of_a_request(
    model: AMLoRAModel, server: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_cpp_client, "SILENT_S", 2.0)
    computed = server.answer

    def slow(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        time.sleep(0.8 * len(body["prompt"]))
        return computed(path, body)

    server.answer = slow  # type: ignore[method-assign]

    async def ask() -> list[list[float]]:
        client = LlamaCppClient(server.url)
        try:
            return await client.next_scores([[3, n] for n in range(4, 8)], [[5]] * 4, dict.fromkeys(range(4), 0.0))
        finally:
            await client.close()

    assert len(asyncio.run(ask())) == 4


def test_a_question_that_fails_ends_the_others_of_its_text() -> None:
    left: list[list[int]] = []

    class Failing(VllmClient):
        async def next_scores(self, model: str, prompt: Sequence[int], tokens: Sequence[int], **_: Any) -> list[float]:
            if tokens == [1]:
                raise EngineAwayError("away")
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                left.append(list(tokens))
                raise
            return []

    async def ask() -> None:
        model = VllmModel(Failing("http://127.0.0.1:1"), "base")
        with pytest.raises(EngineAwayError, match="away"):
            await model.next_scores((5,), [((), [2]), ((2,), [1]), ((3,), [4])])
        assert sorted(left) == [[2], [4]], "nobody waits for them any more"

    asyncio.run(ask())
