"""What goes wrong with a vLLM: a server that answers a few of its paths, well or badly. The real one is in ``test_vllm``."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tests.answering_server import answering

Score = Callable[[Sequence[int], int], float]


class FakeVllm:
    """What it does, which a test may change while it runs.

    Args:
        score: log probability of a token behind a prompt.
        eos_id: what it answers to everything.
    """

    def __init__(self, score: Score, eos_id: int) -> None:
        self.score, self.eos_id = score, eos_id
        self.loaded: dict[str, str] = {}
        self.url = ""
        self.refuse_load: tuple[int, dict[str, Any]] | None = None
        self.completions: tuple[int, str] | None = None
        """Status and body, in place of an answer."""
        self.slow_s = 0.0
        self.healthy = True
        self.asked: list[str] = []
        """Models that answers were asked of, in order."""
        self.drops = 0
        """Requests whose connection is closed without an answer."""

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, str]:
        """Status and body of a request."""
        if path == "/health":
            return (200, "") if self.healthy else (503, "")
        if path == "/v1/models":
            base = {"id": "base", "root": "base", "parent": None, "max_model_len": 64}
            rows = [{"id": name, "root": root, "parent": "base"} for name, root in self.loaded.items()]
            return 200, json.dumps({"data": [base, *rows]})
        if path == "/v1/load_lora_adapter":
            if self.refuse_load is not None:
                return self.refuse_load[0], json.dumps(self.refuse_load[1])
            self.loaded[body["lora_name"]] = body["lora_path"]
            return 200, "Success"
        if path == "/v1/unload_lora_adapter":
            known = self.loaded.pop(body["lora_name"], None)
            return (404, json.dumps({"error": {"message": "cannot be found"}})) if known is None else (200, "Success")
        return self._completions(body)

    def _completions(self, body: dict[str, Any]) -> tuple[int, str]:
        self.asked.append(body["model"])
        if body["model"] not in {"base", *self.loaded}:
            return 404, json.dumps({"error": {"message": f"The model `{body['model']}` does not exist."}})
        if body["model"] != "base":
            time.sleep(self.slow_s)
            if self.completions is not None:
                return self.completions
        if body.get("stream"):
            chunk = {"choices": [{"index": 0, "token_ids": [self.eos_id], "text": ""}]}
            return 200, f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"
        top = {f"token_id:{token}": self.score(body["prompt"], token) for token in body["logprob_token_ids"]}
        return 200, json.dumps({"choices": [{"index": 0, "logprobs": {"top_logprobs": [top]}}]})


@contextlib.contextmanager
def fake_vllm(score: Score, eos_id: int) -> Iterator[FakeVllm]:
    """One at a free port."""
    fake = FakeVllm(score, eos_id)

    def answer(path: str, body: dict[str, Any]) -> tuple[int, str] | None:
        if body and fake.drops:
            fake.drops -= 1
            return None
        return fake.answer(path, body)

    with answering(answer) as fake.url:
        yield fake
