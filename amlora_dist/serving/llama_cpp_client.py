"""llama.cpp's HTTP API, as far as it is needed here: scores of given tokens, and greedy texts, under scaled LoRAs.

Every request names the scale of every LoRA (llama.cpp#28674), and takes nothing from what the server keeps of other prompts:
it does not look whose weights that was computed with (llama.cpp#26207). So each beginning of a label that is asked for costs
a pass over the whole prompt.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from amlora_dist.errors import UserError
from amlora_dist.serving.jobs import EngineAwayError
from amlora_dist.serving.remote_labels import Beginning
from amlora_dist.serving.vllm_client import (
    CONNECT_S,
    KEY_VARIABLE,
    MAX_REASON,
    SILENT_S,
    checked_url,
    log_probability,
    written,
)

LIKELIEST = 1000
"""Tokens that the server names in one place; one that is not among them is asked for by itself."""
FORCED = 1e9
"""Added to a token's logit, it is the one that is taken; what is said of it is as without."""
PLAIN = {"temperature": 0, "repeat_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0, "dry_multiplier": 0.0}
"""Given, or the server's command line and the model's file would have their way."""


@dataclass(frozen=True, slots=True)
class _Place:
    """The first token of an answer."""

    token: int
    logprob: float
    """Nats, whatever was added to its logit."""
    top: dict[int, float]
    """The same of the likeliest."""


class LlamaCppClient:
    """See the module. Belongs to one event loop.

    Args:
        url: ``http://HOST:PORT``.
        named: how the caller calls it, for messages.

    Raises:
        UserError: it is none.
    """

    def __init__(self, url: str, named: str = "server") -> None:
        self.url = checked_url(url, named)
        key = os.environ.get(KEY_VARIABLE)
        self._http = httpx.AsyncClient(
            base_url=self.url, headers={"authorization": f"Bearer {key}"} if key else None
        )

    async def close(self) -> None:
        """Let its connections go."""
        await self._http.aclose()

    async def adapters(self) -> dict[str, int]:
        """The number of each LoRA that it has loaded, by its file's name."""
        found = await self._asked("GET", "/lora-adapters")
        try:
            return {Path(one["path"]).name: int(one["id"]) for one in found}
        except (ValueError, LookupError, TypeError) as error:
            raise self._odd(error) from error

    async def model(self, files: Mapping[str, str], weights: Mapping[str, float]) -> LlamaCppModel:
        """The base model with every LoRA at the weight of its task; LoRAs of no task are turned off.

        Args:
            files: of each task.
            weights: of each task.

        Raises:
            UserError: the files are of other tasks, or the server has not loaded one of them.
        """
        if unlike := sorted(set(files) ^ set(weights)):
            raise UserError(
                f"task {unlike[0]!r} is {'not in the bank' if unlike[0] in files else 'not among the exported files'}: "
                "export the bank again, or name the one that was exported"
            )
        there = await self.adapters()
        if missing := sorted(set(files.values()) - set(there)):
            raise UserError(f"{self.url} has not loaded {', '.join(missing)}: start it with serve.sh")
        scales = dict.fromkeys(there.values(), 0.0) | {there[file]: weights[task] for task, file in files.items()}
        return LlamaCppModel(self, scales)

    async def complete(self, prompts: Sequence[Sequence[int]], scales: Mapping[int, float], **asked: Any) -> list[Any]:
        """What it answers to each prompt, greedily.

        Args:
            prompts: token ids.
            scales: of every LoRA that it has loaded, by its number.
            asked: further fields of the request.
        """
        lora = [{"id": number, "scale": scale} for number, scale in scales.items()]
        body = {"prompt": [list(one) for one in prompts], "cache_prompt": False, **PLAIN, "lora": lora, **asked}
        found = await self._asked("POST", "/completion", body, SILENT_S * max(1, len(prompts)))
        answers = found if isinstance(found, list) else [found]
        try:
            ordered = sorted(answers, key=lambda one: int(one["index"])) if len(answers) > 1 else answers
        except (ValueError, LookupError, TypeError) as error:
            raise self._odd(error) from error
        if len(ordered) != len(prompts):
            raise self._odd(f"{len(ordered)} answers to {len(prompts)} prompts")
        return ordered

    async def next_scores(
        self, prompts: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]], scales: Mapping[int, float]
    ) -> list[list[float]]:
        """Log probability of given tokens behind each prompt, nats.

        Args:
            prompts: token ids.
            tokens: that are asked for behind each.
            scales: of every LoRA.
        """
        found = []
        for prompt, wanted, answer in zip(
            prompts, tokens, await self.complete(prompts, scales, n_predict=1, n_probs=LIKELIEST), strict=True
        ):
            known = self._place(answer).top
            for token in wanted:
                if token not in known:
                    known[token] = await self._forced(prompt, token, scales)
            found.append([known[token] for token in wanted])
        return found

    async def write(self, prompt: Sequence[int], new_tokens: int, scales: Mapping[int, float]) -> str:
        """The greedy text behind a prompt, in the server's own words.

        Args:
            prompt: token ids.
            new_tokens: at most.
            scales: of every LoRA.
        """
        (answer,) = await self.complete([prompt], scales, n_predict=new_tokens)
        try:
            return written(answer["content"])
        except (LookupError, TypeError, ValueError) as error:
            raise self._odd("no content") from error

    async def _forced(self, prompt: Sequence[int], token: int, scales: Mapping[int, float]) -> float:
        """Log probability of an unlikely token: it is made to be taken, and the server says how likely it was without."""
        (answer,) = await self.complete([prompt], scales, n_predict=1, n_probs=1, logit_bias=[[token, FORCED]])
        place = self._place(answer)
        if place.token != token:
            raise self._odd(f"token {place.token} where {token} was asked for")
        return place.logprob

    def _place(self, answer: Any) -> _Place:
        """What it says of an answer's first token."""
        try:
            first = answer["completion_probabilities"][0]
            top = {int(one["id"]): log_probability(one["logprob"]) for one in first["top_logprobs"]}
            return _Place(int(first["id"]), log_probability(first["logprob"]), top)
        except (LookupError, TypeError, ValueError) as error:
            raise self._odd("no log probabilities of tokens") from error

    def _odd(self, reason: object) -> EngineAwayError:
        return EngineAwayError(f"{self.url} answers, but not as llama.cpp does ({reason})")

    async def _asked(self, method: str, path: str, body: Any = None, limit_s: float | None = None) -> Any:
        try:
            limit_s = SILENT_S if limit_s is None else limit_s
            timeout = httpx.Timeout(limit_s, connect=CONNECT_S, pool=None)
            answer = await asyncio.wait_for(self._http.request(method, path, json=body, timeout=timeout), limit_s)
            value = answer.json()
        except (httpx.TimeoutException, asyncio.TimeoutError) as error:
            raise EngineAwayError(f"llama.cpp at {self.url} did not answer {path} in time") from error
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise EngineAwayError(f"llama.cpp at {self.url} cannot be reached: {reason[:MAX_REASON]}") from error
        except ValueError as error:
            raise self._odd(f"{path}: status {answer.status_code}, no JSON") from error
        if answer.status_code != 200:
            fault = value.get("error", value) if isinstance(value, dict) else value
            words = str(fault.get("message", fault) if isinstance(fault, dict) else fault)[:MAX_REASON]
            if answer.status_code == 401:
                words = f"it asks for its API key; put it into {KEY_VARIABLE}"
            raise EngineAwayError(f"llama.cpp at {self.url} answered {answer.status_code}: {words}")
        return value


@dataclass(frozen=True, slots=True)
class LlamaCppModel:
    """A ``RemoteModel``: the base model with every LoRA at a scale of its own."""

    client: LlamaCppClient
    scales: Mapping[int, float]

    async def next_scores(
        self, prompt: Sequence[int], asked: Sequence[tuple[Beginning, Sequence[int]]]
    ) -> list[list[float]]:
        """See ``RemoteModel``; one request."""
        prompts = [(*prompt, *beginning) for beginning, _ in asked]
        return await self.client.next_scores(prompts, [tokens for _, tokens in asked], self.scales)

    async def write(self, prompt: Sequence[int], new_tokens: int) -> str:
        """See ``RemoteModel``."""
        return await self.client.write(prompt, new_tokens, self.scales)
