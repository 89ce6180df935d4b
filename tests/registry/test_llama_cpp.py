"""The exported LoRAs in llama.cpp itself. ``AMLORA_LLAMA_CPP_PYTHON`` names a Python that has xllamacpp, which brings
llama.cpp's own server (`make llama-cpp-env` makes one)."""

from __future__ import annotations

import asyncio
import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from amlora_dist.inference.model import AMLoRAModel
from amlora_dist.registry.server_exports import export_gguf
from amlora_dist.serving import llama_cpp_client
from amlora_dist.serving.llama_cpp_client import LlamaCppClient
from tests.bank_with_base import TASKS, texts_of, write_keyed_bank
from tests.registry.base_gguf import write_base_gguf
from tests.registry.test_gguf import GATE

PYTHON = os.environ.get("AMLORA_LLAMA_CPP_PYTHON")
SERVER = Path(__file__).parents[2] / "benchmarks" / "llama_cpp_server.py"
pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.skipif(
        not PYTHON, reason="AMLORA_LLAMA_CPP_PYTHON names no Python with llama.cpp; `make llama-cpp-env` makes one"
    ),
]
PROMPTS = [[*range(3, 15)], [5, 9, 12, 7], [20, 4, 4, 31, 8, 17, 9], [6]]
START_S = 60.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank, its base model and its rows as GGUF."""
    folder = tmp_path_factory.mktemp("llama-cpp")
    write_keyed_bank(folder / "bank", folder / "base")
    model = AMLoRAModel.from_bank(folder / "bank", device="cpu")
    export_gguf(folder / "gguf", model.bank, model.base)
    write_base_gguf(folder / "base.gguf", model.base)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> AMLoRAModel:
    return AMLoRAModel.from_bank(folder / "bank", device="cpu")


@pytest.fixture
def server(folder: Path) -> Iterator[str]:
    """Address of llama.cpp's server with every row, which has seen no prompt yet."""
    assert PYTHON is not None
    loras = [str(folder / "gguf" / f"{task}.gguf") for task in TASKS]
    child = subprocess.Popen(
        [PYTHON, str(SERVER), str(folder / "base.gguf"), *loras],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert child.stdin is not None and child.stdout is not None
    try:
        assert select.select([child.stdout], [], [], START_S)[0], "llama.cpp did not start"
        yield child.stdout.readline().strip()
    finally:
        child.stdin.close()
        child.kill()
        child.wait(START_S)


def asked(server: str, tokens: Sequence[int], gate: Sequence[float], **more: Any) -> dict[str, Any]:
    """What llama.cpp answers with every adapter at its scale."""
    body = {
        "prompt": list(tokens), "n_predict": 1, "temperature": 0, "n_probs": 1000, "return_tokens": True,
        "cache_prompt": False, "lora": [{"id": number, "scale": scale} for number, scale in enumerate(gate)],
    }  # fmt: skip
    body = {key: value for key, value in (body | more).items() if value is not None}
    found: dict[str, Any] = httpx.post(f"{server}/completion", json=body, timeout=60).raise_for_status().json()
    return found


def difference(server: str, model: AMLoRAModel, tokens: Sequence[int], gate: Sequence[float], **more: Any) -> float:
    """The largest between log probabilities of the next token in llama.cpp and in the bank's own mixture."""
    (scores,) = asked(server, tokens, gate, **more)["completion_probabilities"]
    theirs = {one["id"]: one["logprob"] for one in scores["top_logprobs"]}
    with torch.no_grad():
        logits_V = model(input_ids=torch.tensor([tokens]), task_gate=torch.tensor([gate])).logits[0, -1]
    own_V = logits_V.float().log_softmax(-1)
    assert sorted(theirs) == list(range(len(own_V)))
    return float((own_V - torch.tensor([theirs[token] for token in range(len(own_V))])).abs().max())


def test_base_model_and_scaled_loras_in_llama_cpp_give_the_mixture_s_log_probabilities(
    server: str, model: AMLoRAModel
) -> None:
    none = max(difference(server, model, tokens, (0.0, 0.0, 0.0)) for tokens in PROMPTS)
    mixed = max(difference(server, model, tokens, GATE) for tokens in PROMPTS)
    alone = max(difference(server, model, tokens, (0.0, 1.0, 0.0)) for tokens in PROMPTS)
    print(f"largest difference of a log probability: base {none:.1e}, mixture {mixed:.1e}, one row alone {alone:.1e}")
    assert none <= 1e-5 and mixed <= 1e-3
    assert alone <= 1e-2, "these rows move logits by units, and llama.cpp multiplies fp16 weights by fp16 activations"


def test_greedy_texts_are_the_mixture_s(server: str, model: AMLoRAModel) -> None:
    for tokens in PROMPTS:
        gate = torch.tensor([GATE])
        with torch.no_grad():
            own = model.generate(
                input_ids=torch.tensor([tokens]), attention_mask=torch.ones(1, len(tokens), dtype=torch.long),
                task_gate=gate, max_new_tokens=8, do_sample=False,
            )  # fmt: skip
        found = asked(server, tokens, GATE, n_predict=8, n_probs=0)["tokens"]
        written = [token for token in own[0, len(tokens) :].tolist() if token > 1]
        assert [token for token in found if token > 1] == written and written


def test_the_exported_client_gets_the_bank_s_own_answers_from_the_server(
    server: str, folder: Path, model: AMLoRAModel
) -> None:
    """The third text begins as the first, and is of another task: llama.cpp has kept what the first one's row made of it."""
    first = texts_of("sizes", 1, "x")[0]
    texts = [first, texts_of("shapes", 1)[0], " ".join([first, *texts_of("shapes", 3, "x")])]
    for free in (False, True):
        own = model.answer(texts, free=free)
        assert [one.route.task for one in own] == ["sizes", "shapes", "shapes"]
        for text, answer in zip(texts, own, strict=True):
            done = subprocess.run(
                [sys.executable, str(folder / "gguf" / "client.py"), str(folder / "bank"), text, server,
                 *(["--free"] if free else [])],
                capture_output=True, text=True, timeout=120, check=True,
            )  # fmt: skip
            found = json.loads(done.stdout.splitlines()[-1])
            assert (found["task"], found["answer"]) == (answer.route.task, answer.text)
            assert found["label"] == (None if free else answer.text)


def test_scores_of_given_tokens_are_the_mixture_s_whether_the_server_names_them_or_not(
    server: str, model: AMLoRAModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two prompts in one request; of the likeliest token and others, first all named, then only the two likeliest."""
    tokens = [[3, 20, 30], [7]]

    async def scores() -> list[list[float]]:
        client = LlamaCppClient(server)
        try:
            return await client.next_scores(PROMPTS[:2], tokens, dict(enumerate(GATE)))
        finally:
            await client.close()

    named = asyncio.run(scores())
    monkeypatch.setattr(llama_cpp_client, "LIKELIEST", 2)
    forced = asyncio.run(scores())
    for prompt, wanted, *found in zip(PROMPTS, tokens, named, forced, strict=False):
        with torch.no_grad():
            logits_V = model(input_ids=torch.tensor([prompt]), task_gate=torch.tensor([GATE])).logits[0, -1]
        own = logits_V.float().log_softmax(-1)[wanted].tolist()
        for one in found:
            assert one == pytest.approx(own, abs=1e-3)


def test_what_the_client_leaves_to_llama_cpp_would_be_wrong(server: str, model: AMLoRAModel) -> None:
    """Why it sends every scale and no ``cache_prompt``; where this fails, llama.cpp has fixed it (#28674, #26207)."""
    beginning = PROMPTS[0]
    difference(server, model, [*beginning, 20], (0.0, 1.0, 0.0), cache_prompt=True)
    difference(server, model, PROMPTS[1], (1.0, 0.0, 0.0), cache_prompt=True)
    stale = difference(server, model, [*beginning, 21], (1.0, 0.0, 0.0), cache_prompt=True)
    fresh = difference(server, model, [*beginning, 21], (1.0, 0.0, 0.0))
    assert fresh < 1e-2 < stale
    assert difference(server, model, beginning, (1.0, 1.0, 1.0), lora=None) < 1e-2, "none named: all, whole"
