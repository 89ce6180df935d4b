"""One request never harms another: what a client may send, however odd, costs others nothing and is answered in words."""

from __future__ import annotations

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from amlora_dist.inference.model import AMLoRAModel
from amlora_dist.serving import engine as engine_module
from amlora_dist.serving import messages as wire
from amlora_dist.serving.bank import ServedBank
from tests.bank_with_base import TASKS, texts_of
from tests.serving.mutations import mutated
from tests.serving.servers import Running, running

pytestmark = pytest.mark.integration  # a running app

TEXTS = [texts_of(task, 4, "hostile")[i] for i in range(4) for task in TASKS]
MESSAGES = [{"role": "user", "content": TEXTS[0]}]


@pytest.mark.parametrize(
    "sampling",
    [{"temperature": 1e-310}, {"temperature": 1e-9}, {"temperature": 1.0, "top_p": 0}, {"temperature": 1, "top_p": 1e-320}],
    ids=str,
)
def test_tiny_temperature_is_greedy_and_touches_nobody_else(
    server: Running, model: AMLoRAModel, sampling: dict[str, float]
) -> None:
    def ask(number: int) -> str:
        more = sampling if number == 0 else {}
        response = server.good("/v1/completions", prompt=TEXTS[number], max_tokens=8, **more)
        return str(response["choices"][0]["text"])

    with ThreadPoolExecutor(11) as pool:
        assert list(pool.map(ask, range(11))) == model.predict(TEXTS[:11], max_new_tokens=8)


def test_a_row_whose_own_token_cannot_be_drawn_fails_alone(
    server: Running, model: AMLoRAModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_arguments: Any) -> int:
        raise RuntimeError("probability tensor contains either inf, nan or element < 0")

    monkeypatch.setattr(engine_module, "drawn", broken)

    def ask(number: int) -> str | int:
        answer = server.post("/v1/completions", prompt=TEXTS[number], max_tokens=8, temperature=float(number == 3))
        return str(answer.json()["choices"][0]["text"]) if answer.status_code == 200 else answer.status_code

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, range(8)))
    expected: list[str | int] = list(model.predict(TEXTS[:8], max_new_tokens=8))
    expected[3] = 500
    assert found == expected


@pytest.mark.parametrize("kind", ["completions", "classifications"])
def test_a_pass_that_one_text_breaks_is_repeated_without_it(
    server: Running, model: AMLoRAModel, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    prefill = model.former.prefill

    def picky(requests: Any, *more: Any) -> Any:
        if any(request.text == TEXTS[2] for request in requests):
            raise RuntimeError("out of memory")
        return prefill(requests, *more)

    right = [one.label for one in model.classify(TEXTS[:8])], model.predict(TEXTS[:8])
    monkeypatch.setattr(model.former, "prefill", picky)
    path, name = f"/v1/{kind}", "prompt" if kind == "completions" else "input"

    def ask(text: str) -> Any:
        answer = server.post(path, **{name: text})
        if answer.status_code != 200:
            return answer.status_code
        response = answer.json()
        return response["choices"][0]["text"] if kind == "completions" else response["data"][0]["label"]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, TEXTS[:8]))
    expected: list[Any] = list(right[kind == "completions"])
    expected[2] = 500
    assert found == expected


EXPLOSIONS: list[tuple[type[Any], dict[str, Any]]] = [
    (wire.CompletionRequest, {"prompt": [1] * 300_000}),
    (wire.CompletionRequest, {"prompt": [None] * 4_000}),
    (wire.CompletionRequest, {"prompt": "red", "stop": [1] * 300_000}),
    (wire.CompletionRequest, {"prompt": "red", "logit_bias": {str(n): 1 for n in range(50_000)}}),
    (wire.CompletionRequest, {"prompt": "red", **{f"k{n}": 1 for n in range(50_000)}}),
    (wire.ChatRequest, {"messages": [{}] * 100_000}),
    (wire.ChatRequest, {"messages": [{"a": 1, "b": 2}] * 1_000}),
    (wire.ChatRequest, {"messages": [{"role": "user", "content": [1] * 1_000}] * 100}),
    (wire.ChatRequest, {"messages": MESSAGES, "tools": [{}] * 100_000}),
    (wire.ChatRequest, {"messages": MESSAGES, "metadata": {str(n): 1 for n in range(50_000)}}),
    (wire.ClassificationRequest, {"input": [None] * 100_000}),
    (wire.ClassificationRequest, {"input": "red", "labels": [1] * 1_000}),
]


@pytest.mark.parametrize(("shape", "body"), EXPLOSIONS, ids=[str(n) for n in range(len(EXPLOSIONS))])
def test_error_explosion_many_faults_make_no_list_as_long(shape: type[Any], body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        shape.model_validate(body)
    assert caught.value.error_count() <= 6


def test_error_explosion_of_a_megabyte_is_a_short_answer(server: Running) -> None:
    answer = server.client.post(
        "/v1/completions", content=b'{"prompt": [' + b",".join([b"1"] * 500_000) + b"]}",
        headers={"content-type": "application/json"},
    )  # fmt: skip
    assert answer.status_code == 400 and len(answer.content) < 1000
    assert "found 500000 items, expected at most" in answer.json()["error"]["message"]
    for body in ({"prompt": "red", "x" * 500_000: 1}, {"prompt": "red", "model": "x" * 500_000}):
        answer = server.post("/v1/completions", **body)
        assert answer.status_code in (400, 404) and len(answer.content) < 2000


def test_long_stops_are_at_most_4_of_256_characters(server: Running) -> None:
    assert server.post("/v1/completions", prompt="red", stop=["x" * 256] * 4).status_code == 200
    for stop in (["x"] * 5, ["x" * 257], "x" * 257, ["x" * 4000] * 16):
        answer = server.post("/v1/completions", prompt="red", stop=stop)
        assert answer.status_code == 400 and "stop" in answer.json()["error"]["message"]


USUAL_OF_BOTH: list[dict[str, Any]] = [
    {"top_p": 0}, {"top_p": None}, {"temperature": None}, {"n": 1}, {"n": None}, {"stop": None}, {"stop": []},
    {"logit_bias": {}}, {"logit_bias": None}, {"presence_penalty": 0}, {"frequency_penalty": 0.0}, {"user": "me"},
    {"stream": False}, {"stream_options": None}, {"seed": None}, {"max_tokens": None},
]  # fmt: skip
USUAL: list[tuple[str, dict[str, Any]]] = [
    *(("/v1/completions", {"prompt": TEXTS[0], **more}) for more in (
        *USUAL_OF_BOTH, {"suffix": None}, {"suffix": ""}, {"echo": False}, {"best_of": 1}, {"logprobs": None},
    )),
    *(("/v1/chat/completions", {"messages": MESSAGES, **more}) for more in (
        *USUAL_OF_BOTH, {"response_format": {"type": "text"}}, {"response_format": None}, {"tools": []}, {"tools": None},
        {"tool_choice": "none"}, {"tool_choice": "auto"}, {"parallel_tool_calls": True}, {"functions": []},
        {"function_call": "none"}, {"store": False}, {"store": None}, {"metadata": {}}, {"metadata": None},
        {"metadata": {"ticket": "17"}},
        {"modalities": ["text"]}, {"logprobs": False}, {"top_logprobs": 0}, {"service_tier": "auto"}, {"audio": None},
        {"logprobs": None, "top_logprobs": None}, {"reasoning_effort": None},
        {"verbosity": None}, {"verbosity": "medium"}, {"web_search_options": None}, {"prompt_cache_retention": "24h"},
        {"moderation": None},
        {"prediction": None}, {"safety_identifier": "a"}, {"prompt_cache_key": "b"}, {"max_completion_tokens": None},
    )),
    *(("/v1/chat/completions", {"messages": [*MESSAGES, turn]}) for turn in (
        {"role": "assistant", "type": "text"},
        {"role": "assistant", "content": None}, {"role": "assistant"}, {"role": "assistant", "content": ""},
        {"role": "assistant", "content": None, "tool_calls": [], "refusal": None, "audio": None, "function_call": None,
         "annotations": []},
    )),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body"), USUAL, ids=[str(n) for n in range(len(USUAL))])
def test_usual_values_are_taken_and_change_nothing(
    server: Running, model: AMLoRAModel, path: str, body: dict[str, Any]
) -> None:
    choice = server.good(path, **body)["choices"][0]
    assert (choice["text"] if "text" in choice else choice["message"]["content"]) == model.predict(TEXTS[0])[0]


@pytest.mark.parametrize(
    ("more", "name"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format"), ({"store": True}, "store"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"metadata": {"a": 1}}, "metadata"), ({"metadata": {"a" * 65: "b"}}, "metadata"),
        ({"metadata": dict.fromkeys(map(str, range(17)), "b")}, "metadata"),
        ({"modalities": ["audio"]}, "modalities"), ({"n": 2}, "n"),
        ({"logprobs": 1}, "logprobs"), ({"top_logprobs": 3}, "top_logprobs"), ({"logit_bias": {"1": 2}}, "logit_bias"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"), ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"messages": [{"role": "user", "content": None}]}, "content"), ({"presence_penalty": 1}, "presence_penalty"),
        ({"messages": [{"role": "assistant", "content": None}]}, "user"), ({"service_tier": "flex"}, "service_tier"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]}, "tool_calls"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "content"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_refused_by_name(server: Running, more: dict[str, Any], name: str) -> None:
    answer = server.post("/v1/chat/completions", **{"messages": MESSAGES, **more})
    assert answer.status_code == 400 and name in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "red \ud800"}), ("/v1/completions", {"prompt": ["red", "\udfff"]}),
        ("/v1/completions", {"prompt": "red", "question": "\ud800"}),
        ("/v1/completions", {"prompt": "red", "stop": "\ud800"}),
        ("/v1/completions", {"prompt": "red", "\ud800": 1}),
        ("/v1/completions", {"prompt": "red", "stream_options": {"a": 1, "b": 1, "\ud800": 1}}),
        ("/v1/completions", {"prompt": "red", **dict.fromkeys("abcdefghijklmnopqrstuvwxyz", 1), "\ud800": 1}),
        ("/v1/chat/completions", {"messages": MESSAGES, "response_format": {"type": "text", "\ud800": 1}}),
        ("/v1/chat/completions", {"messages": MESSAGES, "metadata": {"\ud800": 1}, "logit_bias": {"\ud800": 1}}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "\ud800": 1}]}]}),
        ("/v1/completions", {"prompt": "red", "raw": True, "stop": ["\ud800"]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "red \ud800"}]}),
        ("/v1/chat/completions", {"messages": [{"role": "\ud800", "content": "red"}]}),
        ("/v1/chat/completions", {"messages": [{"role": "system", "content": "\ud800"}, *MESSAGES]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}]}),
        ("/v1/classifications", {"input": "red \ud800"}), ("/v1/classifications", {"input": "red", "labels": ["\ud800"]}),
    ],
)  # fmt: skip
def test_surrogate_alone_is_refused_wherever_it_is(server: Running, path: str, body: dict[str, Any]) -> None:
    answer = server.client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]


def test_host_header_of_another_name_is_refused_on_loopback(model: AMLoRAModel, server: Running) -> None:
    for path in ("/", "/healthz", "/metrics", "/v1/models", "/openapi.json"):
        answer = server.client.get(path, headers={"host": "evil.test"})
        assert answer.status_code == 403 and answer.json()["error"]["code"] == "unknown_host"
    body = {"prompt": "red"}
    for strange in ("evil.test:80", "127.0.0.1.evil.test", "localhost.evil.test", "[::1].evil.test", "", "0x7f.1"):
        assert server.client.post("/v1/completions", json=body, headers={"host": strange}).status_code in (400, 403)
    for own in ("localhost", "LOCALHOST:8000", "localhost.", "127.0.0.1:1", "[::1]:8000", "127.9.9.9"):
        assert server.client.get("/healthz", headers={"host": own}).status_code == 200
    with running(ServedBank(model, "words"), hosts=("Models.Example",)) as named:
        assert named.client.get("/healthz", headers={"host": "models.example:443"}).status_code == 200
        assert named.client.get("/healthz", headers={"host": "evil.test"}).status_code == 403
    with running(ServedBank(model, "words"), hosts=("*",)) as open_to_all:
        assert open_to_all.client.get("/healthz", headers={"host": "evil.test"}).status_code == 200


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x",
                                  "application/jsonx", "text/json"])  # fmt: skip
def test_only_application_json_is_taken(server: Running, kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind}
    answer = server.client.post("/v1/completions", content=b'{"prompt": "red"}', headers=headers)
    assert answer.status_code == 415 and "expected application/json" in answer.json()["error"]["message"]
    with_charset = {"content-type": "Application/JSON; charset=utf-8"}
    assert server.client.post("/v1/completions", content=b'{"prompt": "red"}', headers=with_charset).status_code == 200


HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
GET = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n"
JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"", b""), (b"POST /v1/compl", b""), (HEAD, b""), (HEAD + b"content-length: 50\r\n\r\n{", b"408"),
        (HEAD + b"transfer-encoding: chunked\r\n\r\n1\r\n{\r\n", b"408"),
        (HEAD + b"content-length: 9999999\r\n\r\n{", b"413"), (HEAD + b"content-length: 2\r\n\r\n{}" + HEAD, b"400"),
        (GET + b"GET", b"200"), (GET, b"200"),
        (HEAD + b"x-long: " + b"x" * 200_000, b""),
    ],
    ids=["idle", "half a line", "half a head", "no body", "endless", "large", "pipelined", "next", "idle 2", "long head"],
)  # fmt: skip
def test_slow_sockets_are_closed(model: AMLoRAModel, sent: bytes, status: bytes) -> None:
    with running(ServedBank(model, "words"), read_timeout_s=0.5) as server:
        address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        with socket.create_connection(address, timeout=30) as connection:
            response = b""
            try:
                connection.sendall(sent)
                while part := connection.recv(4096):
                    response += part
            except ConnectionError:
                pass  # closed as well
            assert response.split(b" ")[1:2] == ([status] if status else [])
        assert server.client.get("/healthz").status_code == 200


def test_a_body_that_trickles_in_is_ended_and_its_connection_closed(model: AMLoRAModel) -> None:
    with running(ServedBank(model, "words"), read_timeout_s=0.5) as server:
        address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        with socket.create_connection(address, timeout=30) as connection:
            connection.sendall(HEAD + b"transfer-encoding: chunked\r\n\r\n")
            with pytest.raises(OSError):
                for _ in range(3000):
                    connection.sendall(b"1\r\n \r\n")
                    connection.settimeout(0.01)
                    try:
                        if not connection.recv(4096):
                            raise ConnectionResetError
                    except TimeoutError:
                        continue
                    finally:
                        connection.settimeout(30)


def test_what_is_too_large_is_answered_although_the_client_is_still_sending(model: AMLoRAModel) -> None:
    with running(ServedBank(model, "words"), max_body_bytes=100_000) as server:
        for _ in range(3):
            answer = server.post("/v1/completions", prompt="x" * 3_000_000)
            assert answer.status_code == 413 and answer.headers["connection"] == "close"


@pytest.mark.parametrize("requests", [120, pytest.param(2000, marks=[pytest.mark.crash, pytest.mark.timeout(3600)])])
def test_mutated_requests_meet_no_fault_and_change_no_row_of_another_client(
    model: AMLoRAModel, requests: int
) -> None:
    """Next to every one of them somebody asks something usual and gets the usual answer."""
    right = dict(zip(TEXTS, model.predict(TEXTS, max_new_tokens=6), strict=True))
    labels = {text: one.label for text, one in zip(TEXTS, model.classify(TEXTS), strict=True)}
    with running(ServedBank(model, "words"), max_new_tokens=12, request_timeout_s=30) as server:

        def hostile(number: int) -> str | None:
            path, body = mutated(number)
            answer = httpx.post(f"{server.url}{path}", content=body, headers=JSON, timeout=60)
            if answer.status_code >= 500 or (answer.status_code >= 400 and not answer.json()["error"]["message"]):
                return f"{number}: {answer.status_code} {answer.text[:200]} to {body[:300]!r}"
            return None

        def usual(number: int) -> str | None:
            text = TEXTS[number % len(TEXTS)]
            if number % 3 == 0:
                answer = server.post("/v1/classifications", input=text)
                good = answer.status_code == 200 and answer.json()["data"][0]["label"] == labels[text]
            else:
                answer = server.post("/v1/completions", prompt=text, max_tokens=6)
                good = answer.status_code == 200 and answer.json()["choices"][0]["text"] == right[text]
            return None if good else f"usual {number}: {answer.status_code} {answer.text[:300]}"

        with ThreadPoolExecutor(4) as theirs, ThreadPoolExecutor(4) as others:
            bad, good = theirs.map(hostile, range(requests)), others.map(usual, range(requests))  # at the same time
            found = [*bad, *good]
        assert [fault for fault in found if fault] == []
        assert server.service.engine.texts == 0 and server.service.status == "ok"
