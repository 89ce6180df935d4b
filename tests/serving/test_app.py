"""The HTTP app on a tiny bank, over real sockets: what it answers is what the model answers, and limits hold."""

from __future__ import annotations

import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from amlora_dist.errors import UserError
from amlora_dist.inference.model import AMLoRAModel
from amlora_dist.serving.bank import ServedBank
from tests.bank_with_base import TASKS, texts_of
from tests.serving.servers import Running, events, running
from tests.tiny_config import TOPICS

pytestmark = pytest.mark.integration  # a running app

TEXTS = [texts_of(task, 4, "served")[i] for i in range(4) for task in TASKS]


def test_the_bank_and_each_of_its_tasks_are_models(server: Running) -> None:
    found = server.client.get("/v1/models").json()["data"]
    assert [one["id"] for one in found] == ["words", *(f"words:{task}" for task in TASKS)]
    assert found[1]["parent"] == "words" and found[1]["labels"] == TOPICS["colours"][0]
    assert server.client.get("/v1/models/words:shapes").json()["task"] == "shapes"
    assert server.client.get("/v1/models/words:fruit").status_code == 404
    assert server.client.get("/v1/models/%0A").status_code == 404, "the path's pattern makes an empty name of it"


def test_completions_are_the_models_answers_with_their_routing(server: Running, model: AMLoRAModel) -> None:
    response = server.good("/v1/completions", model="words", prompt=TEXTS, routing=True)
    expected = model.answer(TEXTS)
    assert [choice["text"] for choice in response["choices"]] == [answer.text for answer in expected]
    assert [choice["routing"]["task"] for choice in response["choices"]] == [answer.route.task for answer in expected]
    reasons = ["stop" if answer.ended else "length" for answer in expected]
    assert [choice["finish_reason"] for choice in response["choices"]] == reasons
    assert response["system_fingerprint"] == server.service.bank.version
    assert response["usage"]["total_tokens"] == response["usage"]["prompt_tokens"] + response["usage"]["completion_tokens"]


def test_a_named_task_uses_its_own_row_and_prompt(server: Running, model: AMLoRAModel) -> None:
    response = server.good("/v1/completions", model="words:sizes", prompt=TEXTS[0], routing=True)
    assert response["choices"][0]["text"] == model.predict(TEXTS[0], task="sizes")[0]
    assert response["choices"][0]["routing"]["tasks"] == {"colours": 0.0, "shapes": 0.0, "sizes": 1.0}


def test_a_raw_prompt_is_sent_as_it_is(server: Running, model: AMLoRAModel) -> None:
    response = server.good("/v1/completions", prompt=f"{TEXTS[0]}\nAnswer:", raw=True, max_tokens=4)
    assert response["choices"][0]["text"] == model.predict(TEXTS[0], max_new_tokens=4)[0]
    assert server.post("/v1/completions", prompt="red " * 80, raw=True).status_code == 400


def test_a_chat_is_text_and_question(server: Running, model: AMLoRAModel) -> None:
    turns: list[dict[str, Any]] = [
        {"role": "system", "content": "what ?"}, {"role": "user", "content": [{"type": "text", "text": TEXTS[1]}]}
    ]  # fmt: skip
    response = server.good("/v1/chat/completions", model="words", messages=turns)
    assert response["choices"][0]["message"]["content"] == model.predict(TEXTS[1], question="what ?")[0]
    assert "routing" not in response["choices"][0]


def test_pieces_of_a_stream_add_up_to_the_answer(server: Running, model: AMLoRAModel) -> None:
    answer = server.post(
        "/v1/completions", prompt=TEXTS[:3], max_tokens=6, stream=True, routing=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    *chunks, done = events(answer)
    assert done == "[DONE]"
    texts, reasons, routes = ["", "", ""], ["", "", ""], 0
    for response in map(json.loads, chunks[:-1]):
        for choice in response["choices"]:
            texts[choice["index"]] += choice["text"]
            reasons[choice["index"]] = choice["finish_reason"] or reasons[choice["index"]]
            routes += "routing" in choice
    assert texts == model.predict(TEXTS[:3], max_new_tokens=6)
    assert set(reasons) <= {"stop", "length"} and routes == 3
    last = json.loads(chunks[-1])
    assert last["choices"] == [] and last["usage"]["completion_tokens"] > 0


def test_a_stream_is_sent_while_it_is_written(
    server: Running, model: AMLoRAModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = zip(TEXTS, model.predict(TEXTS, max_new_tokens=6), strict=True)
    text, whole = next((text, answer) for text, answer in answers if len(answer.split()) > 2)
    bank, come, in_time = server.service.bank, threading.Event(), []
    advance = bank.advance

    def waiting(*arguments: Any) -> None:
        in_time.append(come.wait(timeout=20))
        advance(*arguments)

    monkeypatch.setattr(bank, "advance", waiting)
    body = {"prompt": text, "max_tokens": 6, "stream": True, "routing": True}
    with server.client.stream("POST", "/v1/completions", json=body) as answer:
        lines = (line.removeprefix("data: ") for line in answer.iter_lines() if line)
        first = json.loads(next(lines))
        come.set()  # the second token is not thought of before the first event is here
        *rest, done = lines
    assert first["choices"][0]["routing"]["task"] and done == "[DONE]"
    assert "".join(json.loads(chunk)["choices"][0]["text"] for chunk in rest) == whole
    assert in_time and all(in_time)


def test_classifications_are_the_models_labels(server: Running, model: AMLoRAModel) -> None:
    response = server.good("/v1/classifications", model="words", input=TEXTS, routing=True)
    for found, expected in zip(response["data"], model.classify(TEXTS), strict=True):
        assert (found["label"], found["task"]) == (expected.label, expected.task)
        assert found["scores"] == pytest.approx(expected.scores, abs=1e-5)
        assert found["routing"]["tasks"] == pytest.approx(expected.route.tasks, abs=1e-5)
    named = server.good("/v1/classifications", input=TEXTS[0], labels=["apple", "pear"])
    assert named["data"][0]["label"] in ("apple", "pear") and named["data"][0]["task"] is None
    tasked = server.good("/v1/classifications", model="words:sizes", input=TEXTS[0])
    assert set(tasked["data"][0]["scores"]) == set(TOPICS["sizes"][0])


def test_requests_of_many_clients_share_passes_whatever_adapters_they_use(server: Running, model: AMLoRAModel) -> None:
    def rows(kind: str) -> float:
        lines = server.client.get("/metrics").text.splitlines()
        total = sum(float(line.split()[-1]) for line in lines if line.startswith(f'amlora_pass_rows_sum{{kind="{kind}"}}'))
        count = sum(float(line.split()[-1]) for line in lines if line.startswith(f'amlora_pass_rows_count{{kind="{kind}"}}'))
        return total - count

    before = {kind: rows(kind) for kind in ("decode", "classify")}
    together = threading.Barrier(len(TEXTS))

    def ask(text: str) -> tuple[str, str]:
        together.wait(timeout=30)
        response = server.good("/v1/completions", prompt=text, max_tokens=8)
        return response["choices"][0]["text"], server.good("/v1/classifications", input=text)["data"][0]["label"]

    with ThreadPoolExecutor(len(TEXTS)) as pool:
        found = list(pool.map(ask, TEXTS))
    labels = [one.label for one in model.classify(TEXTS)]
    assert found == list(zip(model.predict(TEXTS, max_new_tokens=8), labels, strict=True))
    assert rows("decode") > before["decode"] and rows("classify") > before["classify"]


def test_drawing_with_a_seed_gives_the_same_answer_again(server: Running) -> None:
    def drawn(seed: int) -> str:
        response = server.good("/v1/completions", prompt=TEXTS[0], temperature=1.5, top_p=0.95, seed=seed, max_tokens=12)
        return str(response["choices"][0]["text"])

    assert drawn(1) == drawn(1)
    assert len({drawn(seed) for seed in range(6)}) > 1


def test_a_stop_sequence_ends_the_answer_before_it(server: Running, model: AMLoRAModel) -> None:
    answers = zip(TEXTS, model.predict(TEXTS, max_new_tokens=8), strict=True)
    text, whole = next((text, answer) for text, answer in answers if len(answer.split()) > 2)
    stop = whole.split()[2]
    response = server.good("/v1/completions", prompt=text, max_tokens=8, stop=[stop])["choices"][0]
    assert response["finish_reason"] == "stop" and response["text"] == whole[: whole.index(stop)]
    streamed = events(server.post("/v1/completions", prompt=text, max_tokens=8, stop=stop, stream=True))[:-1]
    assert "".join(json.loads(chunk)["choices"][0]["text"] for chunk in streamed) == response["text"]


def test_openais_own_client_works(server: Running, model: AMLoRAModel) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)
    assert next(one.id for one in client.models.list()) == "words"
    assert client.models.retrieve("words:sizes").id == "words:sizes"
    answer = model.predict(TEXTS[2])[0]
    response = client.completions.create(model="words", prompt=TEXTS[2], extra_body={"routing": True})
    assert response.choices[0].text == answer and response.choices[0].routing["task"] == "sizes"  # type: ignore[attr-defined]
    messages: Any = [{"role": "user", "content": TEXTS[2]}]
    chat = client.chat.completions.create(model="words", messages=messages)
    assert chat.choices[0].message.content == answer and chat.usage is not None
    assert chat.system_fingerprint == server.service.bank.version
    stream = client.chat.completions.create(model="words", messages=messages, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == answer
    with pytest.raises(openai.NotFoundError, match="model: found 'other', served are words"):
        client.chat.completions.create(model="other", messages=messages)
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.completions.create(model="words", prompt="red", max_tokens=0)


MALFORMED: list[tuple[str, str, Any, int, str]] = [
    ("unknown key", "/v1/completions", {"prompt": "red", "promt": "x"}, 400, "promt: Extra inputs"),
    ("a number in quotes", "/v1/completions", {"prompt": "red", "max_tokens": "5"}, 400, "max_tokens"),
    ("no prompt", "/v1/completions", {"model": "words"}, 400, "prompt: Field required"),
    ("blank prompt", "/v1/completions", {"prompt": "  \n"}, 400, "is empty"),
    ("a lone surrogate", "/v1/completions", {"prompt": "red \ud800"}, 400, "unicode string"),
    ("an unknown model with a lone surrogate", "/v1/completions", {"prompt": "red", "model": "\ud800"}, 404, "served are"),
    ("a task that is none", "/v1/completions", {"prompt": "red", "model": "words:fruit"}, 404, "served are"),
    ("too many tokens", "/v1/completions", {"prompt": "red", "max_tokens": 4000}, 400, "expected at most 512"),
    ("more tokens than positions", "/v1/completions", {"prompt": "red", "max_tokens": 64}, 400, "max_length"),
    ("a long prompt", "/v1/completions", {"prompt": "red " * 10000}, 400, "expected at most 32768"),
    ("many prompts", "/v1/completions", {"prompt": ["red"] * 65}, 400, "expected at most 64"),
    ("several answers", "/v1/completions", {"prompt": "red", "n": 2}, 400, "n: "),
    ("a switch for a number", "/v1/completions", {"prompt": "red", "n": True}, 400, "valid integer"),
    ("a number for a switch", "/v1/completions", {"prompt": "red", "echo": 0.0}, 400, "valid boolean"),
    ("hot", "/v1/completions", {"prompt": "red", "temperature": 2.5}, 400, "temperature"),
    ("nobody speaks", "/v1/chat/completions", {"messages": []}, 400, "messages"),
    ("only the system speaks", "/v1/chat/completions", {"messages": [{"role": "system", "content": "x"}]}, 400, "user"),
    ("only a tool speaks", "/v1/chat/completions", {"messages": [{"role": "tool", "content": "x"}]}, 400, "user"),
    ("a stranger", "/v1/chat/completions", {"messages": [{"role": "oracle", "content": "x"}]}, 400, "role"),
    ("labels that are one", "/v1/classifications", {"input": "red", "labels": ["red", "red "]}, 400, "same tokens"),
    ("a label without words", "/v1/classifications", {"input": "red", "labels": ["red", " \u200b"]}, 400,
     "label 2 of 2 is empty"),
    ("an image", "/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400,
     "messages.0.content.0.type: Input should be 'text'"),
    ("longer answers", "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "verbosity": "high"}, 400,
     "verbosity: Input should be 'medium'"),
    ("a search", "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "web_search_options": {}}, 400,
     "web_search_options: "),
    ("no labels", "/v1/classifications", {"input": "red", "labels": []}, 400, "labels"),
    ("a question too long", "/v1/classifications", {"input": "red", "question": "what " * 60}, 400, "max_length"),
    ("a list", "/v1/classifications", [], 400, "dictionary"),
    ("neither text nor fields", "/v1/classifications", {"labels": ["red"]}, 400, "input: Field required (or `fields`"),
    ("text and fields", "/v1/completions", {"prompt": "red", "fields": {"a": "red"}}, 400, "expected one of them"),
    ("fields of no task", "/v1/classifications", {"fields": {"third": "red"}}, 400, "fields: found third"),
    ("fields without words", "/v1/chat/completions", {"fields": {"a": " "}}, 400, "fields: found no words"),
    ("a field that is no text", "/v1/completions", {"fields": {"a": 3}}, 400, "fields"),
    ("no such path", "/v1/embeddings", {}, 404, "Not Found"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "body", "status", "words"), [row[1:] for row in MALFORMED], ids=[row[0] for row in MALFORMED]
)
def test_what_cannot_be_answered_is_refused_in_openais_form(
    server: Running, path: str, body: Any, status: int, words: str
) -> None:
    answer = server.client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    message = answer.json()["error"]["message"]
    assert words in message and "[" not in message.partition(": ")[0] and "function" not in message, "words of the API alone"
    assert server.client.get("/healthz").json()["status"] == "ok"


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff\xfe", b"[" * 100000, b'{"prompt": NaN}', b'{"prompt":' + b"9" * 5000 + b"}"]
)
def test_what_is_no_json_is_refused(server: Running, body: bytes) -> None:
    answer = server.client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["message"].startswith(("body: ", "prompt: "))
    assert server.client.put("/v1/completions").status_code == 405


def test_a_bad_request_does_not_hurt_those_that_share_its_pass(
    server: Running, model: AMLoRAModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    classify = server.service.bank.classify

    def picky(requests: Any) -> Any:
        if any(request.text == "red wall" for request in requests):
            raise UserError("not this one")
        return classify(requests)

    monkeypatch.setattr(server.service.bank, "classify", picky)

    def ask(text: str) -> int | str:
        answer = server.post("/v1/classifications", input=text)
        return str(answer.json()["data"][0]["label"]) if answer.status_code == 200 else answer.status_code

    with ThreadPoolExecutor(9) as pool:
        found = list(pool.map(ask, [*TEXTS[:4], "red wall", *TEXTS[4:8]]))
    assert found.pop(4) == 400
    assert found == [one.label for one in model.classify(TEXTS[:8])]


def test_limits_of_body_concurrency_and_time_have_their_own_answers(model: AMLoRAModel) -> None:
    bank = ServedBank(model, "words")
    with running(bank, max_body_bytes=2000, max_concurrency=2, request_timeout_s=0.2) as server:
        assert server.post("/v1/completions", prompt="x" * 3000).status_code == 413

        def chunks() -> Any:
            yield b"x" * 1500
            yield b"x" * 1500

        assert server.client.post("/v1/completions", content=chunks()).status_code == 413
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=20) as slow:
            slow.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 50\r\n\r\n{")
            assert slow.recv(100).startswith(b"HTTP/1.1 408 ")
        busy = server.post("/v1/completions", prompt=["red"] * 3)
        assert busy.status_code == 429 and busy.headers["retry-after"] == "1"
        begin = bank.begin
        bank.begin = lambda requests: (threading.Event().wait(0.5), begin(requests))[1]  # type: ignore[method-assign]
        late = server.post("/v1/completions", prompt="red", max_tokens=4)
        assert late.status_code == 504 and "longer than the server allows" in late.text
        assert server.client.get("/healthz").status_code == 200
    assert server.service.engine.texts == 0


def test_a_key_is_asked_for_where_there_is_one(model: AMLoRAModel) -> None:
    with running(ServedBank(model, "words"), key="s3cret-ü") as server:
        assert server.client.get("/v1/models").status_code == 401
        for wrong in ("Bearer nope", "s3cret", "Bearer", "Basic s3cret"):
            answer = server.client.get("/v1/models", headers={"authorization": wrong})
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        right = {"authorization": "Bearer s3cret-ü".encode()}
        assert server.client.get("/v1/models", headers=right).status_code == 200
        for open_path in ("/", "/healthz", "/metrics", "/openapi.json"):
            assert server.client.get(open_path).status_code == 200
        schema = server.client.get("/openapi.json").json()
        assert schema["components"]["securitySchemes"] and "401" in schema["paths"]["/v1/models"]["get"]["responses"]


def test_a_pass_that_fails_is_reported_to_its_clients_and_the_next_one_works(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_requests: Any) -> Any:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(server.service.bank, "begin", broken)
        answer = server.post("/v1/completions", prompt="red")
        assert answer.status_code == 500 and "out of memory" not in answer.text
    assert server.good("/v1/completions", prompt="red wall")["choices"]


def test_a_client_that_goes_away_is_not_written_for_any_longer(server: Running) -> None:
    with server.client.stream("POST", "/v1/completions", json={"prompt": "red", "max_tokens": 30, "stream": True}) as answer:
        next(answer.iter_bytes())
    for _ in range(200):
        if server.service.engine.texts == 0:
            break
        threading.Event().wait(0.05)
    assert server.service.engine.texts == 0


def test_health_and_figures_name_the_version(server: Running) -> None:
    version = server.service.bank.version
    assert server.client.get("/healthz").json() == {"status": "ok", "model": "words", "version": version}
    server.good("/v1/completions", prompt=TEXTS[0])
    figures = server.client.get("/metrics").text
    assert f'amlora_version{{version="{version}"}} 1.0' in figures
    assert 'amlora_requests_total{path="/v1/completions",status="200"}' in figures
    assert 'amlora_routed_total{task="colours"}' in figures


def test_shutting_down_finishes_what_is_inside(place: Path) -> None:
    with running(place / "llama", request_timeout_s=20) as server, ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(server.post, "/v1/completions", prompt=text, max_tokens=30) for text in TEXTS[:4]]
        while server.service.engine.texts < 4 and not all(one.done() for one in asked):
            threading.Event().wait(0.005)
        server.service.stop()
        assert [one.result().status_code for one in asked] == [200] * 4
        refused = server.post("/v1/completions", prompt="red")
        assert refused.status_code == 503 and isinstance(refused, httpx.Response)
        assert server.client.get("/healthz").json()["status"] == "stopping"
