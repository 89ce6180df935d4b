"""Log probabilities and echo: what the model thought of each token, as evaluation harnesses ask for it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from amlora_dist.inference.model import AMLoRAModel
from tests.bank_with_base import texts_of
from tests.serving.servers import Running, events

pytestmark = pytest.mark.integration  # a running app
TEXTS = [texts_of(task, 1, "scored")[0] for task in ("colours", "shapes", "sizes")]


def expected(model: AMLoRAModel, prompt: str, count: int) -> tuple[list[int], torch.Tensor]:
    """Tokens of a raw prompt, and the log probabilities (S, V) that follow each, under the gate of the whole prompt."""
    ids = model.tokenizer(prompt)["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long)).logits[0]
    return ids, torch.log_softmax(logits.float(), dim=-1)


@pytest.mark.parametrize("form", ["text", "tokens"])
def test_an_echoed_prompt_has_the_models_own_log_probabilities(server: Running, model: AMLoRAModel, form: str) -> None:
    prompts = [f"{text}\nAnswer:" for text in TEXTS]
    given: Any = prompts if form == "text" else [model.tokenizer(prompt)["input_ids"] for prompt in prompts]
    response = server.good("/v1/completions", model="words", prompt=given, echo=True, logprobs=2, max_tokens=1)
    for prompt, choice in zip(prompts, response["choices"], strict=True):
        ids, scores_SV = expected(model, prompt, 1)
        found = choice["logprobs"]
        assert len(found["tokens"]) == len(ids) + 1, "the prompt's and the one that was written, be it the end"
        assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
        own = [float(scores_SV[place, token]) for place, token in enumerate(ids[1:])]
        assert found["token_logprobs"][1:-1] == pytest.approx(own, abs=1e-4)
        assert found["token_logprobs"][-1] == pytest.approx(float(scores_SV[-1].max()), abs=1e-4)
        greedy = [max(top.values()) for top in found["top_logprobs"][1:]]
        assert greedy == pytest.approx(scores_SV.max(dim=-1).values.tolist(), abs=1e-4)
        assert found["text_offset"][0] == 0 and found["text_offset"] == sorted(found["text_offset"])
        if form == "text":
            assert choice["text"].startswith(prompt)


def test_tokens_of_one_prompt_are_one_prompt(server: Running, model: AMLoRAModel) -> None:
    ids = model.tokenizer(f"{TEXTS[0]}\nAnswer:")["input_ids"]
    (mine,) = server.good("/v1/completions", prompt=ids, max_tokens=4)["choices"]
    (raw,) = server.good("/v1/completions", prompt=f"{TEXTS[0]}\nAnswer:", raw=True, max_tokens=4)["choices"]
    assert mine["text"] == raw["text"]
    assert server.post("/v1/completions", prompt=[*ids, 10_000], max_tokens=4).status_code == 400
    assert server.post("/v1/completions", prompt=ids * 20, max_tokens=4).status_code == 400


def test_without_logprobs_an_echo_is_the_prompt_in_front(server: Running) -> None:
    (choice,) = server.good("/v1/completions", prompt=TEXTS[0], echo=True, max_tokens=2)["choices"]
    assert choice["text"].startswith(TEXTS[0]) and choice["logprobs"] is None


def test_pieces_of_a_stream_have_the_log_probabilities_of_the_whole(server: Running) -> None:
    body: dict[str, Any] = {"prompt": TEXTS[:2], "max_tokens": 5, "logprobs": 1, "echo": True}
    whole = server.good("/v1/completions", **body)["choices"]
    pieces: list[dict[str, list[Any]]] = [{}, {}]
    texts = ["", ""]
    for response in events(server.post("/v1/completions", **body, stream=True))[:-1]:
        for choice in json.loads(response)["choices"]:
            texts[choice["index"]] += choice["text"]
            for key, values in (choice["logprobs"] or {}).items():
                pieces[choice["index"]].setdefault(key, []).extend(values)
    assert texts == [choice["text"] for choice in whole]
    for one, choice in zip(pieces, whole, strict=True):
        assert one["tokens"] == choice["logprobs"]["tokens"] and one["text_offset"] == choice["logprobs"]["text_offset"]
        assert one["token_logprobs"] == pytest.approx(choice["logprobs"]["token_logprobs"], abs=1e-5, nan_ok=True)


def test_a_chat_has_the_likeliest_tokens_of_its_answer(server: Running) -> None:
    turns = [{"role": "user", "content": TEXTS[0]}]
    response = server.good("/v1/chat/completions", messages=turns, logprobs=True, top_logprobs=3, max_tokens=4)["choices"][0]
    for token in response["logprobs"]["content"]:
        assert token["logprob"] <= 0 and len(token["top_logprobs"]) == 3
        assert token["top_logprobs"][0]["logprob"] == pytest.approx(token["logprob"]), "the answer is greedy"
        assert bytes(token["bytes"]).decode() == token["token"]
    bare = server.good("/v1/chat/completions", messages=turns, logprobs=True, max_tokens=4)["choices"][0]
    assert all(token["top_logprobs"] == [] for token in bare["logprobs"]["content"])
    assert bare["message"] == response["message"]


def test_a_harness_scores_continuations_as_it_does_with_other_servers(server: Running, model: AMLoRAModel) -> None:
    """The request and the reading of the answer are lm-evaluation-harness's (``local-completions``)."""
    context, continuation = model.tokenizer(TEXTS[1])["input_ids"], model.tokenizer("red green")["input_ids"]
    response = server.good(
        "/v1/completions", model="words:sizes", prompt=[[*context, *continuation]], max_tokens=1, logprobs=1, seed=1234,
        echo=True, temperature=0,
    )  # fmt: skip
    found = response["choices"][0]["logprobs"]
    total = sum(found["token_logprobs"][len(context) : -1])
    gate = torch.tensor([[0.0, 0.0, 1.0]])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*context, *continuation]]), task_gate=gate).logits[0]
    scores = torch.log_softmax(logits.float(), dim=-1)[len(context) - 1 : -1]
    assert total == pytest.approx(float(sum(scores[n, token] for n, token in enumerate(continuation))), abs=1e-4)
    greedy = all(
        score == max(top.values()) for score, top in
        zip(found["token_logprobs"][len(context) : -1], found["top_logprobs"][len(context) : -1], strict=True)
    )  # fmt: skip
    assert greedy == (scores.argmax(dim=-1).tolist() == continuation)
