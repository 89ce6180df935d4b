"""In place of vLLM and llama.cpp, where they are not installed: a server that answers a few of their paths in their form,
with what a bank's own transformers model computes. The real ones are in ``test_vllm`` and ``registry/test_llama_cpp``."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from amlora_dist.inference.model import AMLoRAModel
from tests.answering_server import answering


class StandIn:
    """A server, which a test may change while it runs.

    Args:
        model: computes.
        files: of the LoRAs that llama.cpp has loaded, and the task of each (None: of no task).
        base: what vLLM calls the base model; a LoRA is called by its task, for Ray Serve LLM ``BASE:TASK``.
    """

    def __init__(self, model: AMLoRAModel, files: Mapping[str, str | None], base: str) -> None:
        self.model, self.files, self.base = model, dict(files), base
        self.url = ""
        self.asked: list[dict[str, Any]] = []
        """Bodies of requests, with their ``path``."""
        self.knows_tokens = True
        """Whether vLLM is one that has heard of ``logprob_token_ids``."""
        self.odd: tuple[int, Any] | None = None
        """Status and body, in place of an answer."""

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Status and body of a request."""
        if self.odd is not None:
            return self.odd
        if path == "/lora-adapters":
            return 200, [{"id": n, "path": f"/served/{name}", "scale": 1.0} for n, name in enumerate(self.files)]
        self.asked.append(body | {"path": path})
        return 200, self._vllm(body) if path == "/v1/completions" else self._llama_cpp(body)

    def _vllm(self, body: dict[str, Any]) -> Any:
        name = body["model"].removeprefix(f"{self.base}:")
        gate = [float(task == name) for task in self.model.tasks]
        assert sum(gate) or name == self.base, name
        if "logprob_token_ids" not in body:
            return {"choices": [{"index": 0, "text": self._written(body["prompt"], gate, body["max_tokens"])}]}
        scores_V = self._next(body["prompt"], gate)
        tokens = body["logprob_token_ids"] if self.knows_tokens else [int(scores_V.argmax())]
        top = {f"token_id:{token}": float(scores_V[token]) for token in tokens}
        return {"choices": [{"index": 0, "logprobs": {"top_logprobs": [top]}}]}

    def _llama_cpp(self, body: dict[str, Any]) -> Any:
        scales = {one["id"]: one["scale"] for one in body["lora"]}
        by_task = {task: scales[number] for number, task in enumerate(self.files.values())}
        gate = [by_task[task] for task in self.model.tasks]
        found = []
        for place, prompt in enumerate(body["prompt"]):
            one: dict[str, Any] = {"index": place}
            if (count := body.get("n_probs", 0)) > 0:
                scores_V = self._next(prompt, gate)
                biased_V = scores_V.clone()
                for token, bias in body.get("logit_bias", []):
                    biased_V[token] += bias
                taken = int(biased_V.argmax())
                best = scores_V.argsort(descending=True)[:count].tolist()
                likely = [{"id": token, "logprob": float(scores_V[token])} for token in best]
                one["completion_probabilities"] = [
                    {"id": taken, "logprob": float(scores_V[taken]), "top_logprobs": likely}
                ]
            else:
                one["content"] = self._written(prompt, gate, body["n_predict"])
            found.append(one)
        return found if len(found) > 1 else found[0]

    @torch.no_grad()
    def _next(self, prompt: Sequence[int], gate: Sequence[float]) -> Tensor:
        logits = self.model(input_ids=torch.tensor([prompt]), task_gate=torch.tensor([gate])).logits[0, -1]
        scores_V: Tensor = logits.float().log_softmax(-1)
        return scores_V

    def _written(self, prompt: Sequence[int], gate: Sequence[float], count: int) -> str:
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(self._next(tokens, gate).argmax()))
            if tokens[-1] == self.model.decoder.eos_id:
                break
        return f" {self.model.prompter.decode(tokens[len(prompt) :])} "


@contextlib.contextmanager
def stand_in(model: AMLoRAModel, files: Mapping[str, str | None] = {}, base: str = "base") -> Iterator[StandIn]:
    """One at a free port."""
    one = StandIn(model, files, base)

    def answer(path: str, body: dict[str, Any]) -> tuple[int, str]:
        status, value = one.answer(path, body)
        return status, json.dumps(value)

    with answering(answer) as one.url:
        yield one
