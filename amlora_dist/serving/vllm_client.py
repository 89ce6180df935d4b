"""vLLM's HTTP API, as far as it is needed here: LoRAs that come and go, streamed answers, scores of next tokens.

Prompts are token ids, and so are answers (``return_token_ids``): the bank's own tokenizer decodes them.
Everything that goes wrong is an ``EngineAwayError`` with one line that names the server; it never waits for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from amlora_dist.errors import UserError
from amlora_dist.serving.jobs import EngineAwayError, Sampling
from amlora_dist.serving.remote_labels import Beginning
from amlora_dist.serving.token_scores import TokenScore

KEY_VARIABLE = "AMLORA_ENGINE_API_KEY"
"""Environment variable with vLLM's ``--api-key``, if it has one."""
CONNECT_S = 5.0
IDLE_S = 1.0
"""For a connection to be kept; vLLM closes one that does nothing for 5 s."""
SILENT_S = 60.0
"""A server that says nothing for so long is given up, and so is an answer that does not stream and takes longer."""
LOAD_S = 120.0
"""For a LoRA to be loaded."""
MOST_TOKENS = 100
"""Tokens of one request whose log probabilities are asked for; vLLM takes 128."""
AT_ONCE = 32
"""Questions of one text that are asked together."""
MAX_REASON = 300
"""Characters of a message of the server's that come into ours."""


class NotLoadedError(EngineAwayError):
    """The server does not know a model; it may have been started again since it was loaded."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model of the server's list."""

    name: str
    root: str
    """Folder or Hub id."""
    is_base: bool
    positions: int | None
    """Tokens of prompt and answer together that it has room for."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """More of an answer."""

    tokens: tuple[int, ...]
    scores: tuple[TokenScore, ...] = ()
    """Of each token, where they were asked for."""


class VllmClient:
    """See the module. Belongs to one event loop.

    Args:
        url: ``http://HOST:PORT``, without ``/v1``.
        named: how the caller calls it, for messages.

    Raises:
        UserError: it is none.
    """

    def __init__(self, url: str, named: str = "--engine-url") -> None:
        self.url = checked_url(url, named)
        key = os.environ.get(KEY_VARIABLE)
        self._http = httpx.AsyncClient(
            base_url=self.url, headers={"authorization": f"Bearer {key}"} if key else None,
            timeout=httpx.Timeout(SILENT_S, connect=CONNECT_S, pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=IDLE_S),
        )  # fmt: skip

    async def close(self) -> None:
        """Let its connections go."""
        await self._http.aclose()

    async def healthy(self) -> None:
        """Raise EngineAwayError where the server does not say that it is well."""
        async with self._asked("GET", "/health", timeout=CONNECT_S):
            pass

    async def models(self) -> list[ServedModel]:
        """What it serves, its base model among them."""
        async with self._asked("GET", "/v1/models") as answer:
            with self._understood():
                return [_model(one) for one in answer.json()["data"]]

    async def load(self, name: str, folder: str) -> None:
        """Load a LoRA from a folder that the server sees.

        Raises:
            UserError: the server takes none, or not this one; its message says why.
            EngineAwayError: it does not answer.
        """
        try:
            async with self._asked(
                "POST", "/v1/load_lora_adapter", timeout=LOAD_S, json={"lora_name": name, "lora_path": folder}
            ):
                return
        except NotLoadedError as error:
            raise UserError(
                f"{error}; it loads no LoRA at run time: start it with --enable-lora and "
                f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, where it sees {folder}"
            ) from error
        except _AnsweredError as error:
            if "already been loaded" in str(error) and await self._has(name, folder):
                return  # another replica was quicker
            raise UserError(
                f"vLLM at {self.url} does not take the row {name!r} from {folder}: {error.reason}; it must see that folder, "
                "be started with --enable-lora, and have a --max-lora-rank of at least --engine-rank"
            ) from error

    async def unload(self, name: str) -> None:
        """Forget a LoRA; one that it does not know is forgotten already."""
        with contextlib.suppress(NotLoadedError):
            async with self._asked("POST", "/v1/unload_lora_adapter", json={"lora_name": name}):
                pass

    async def _has(self, name: str, folder: str) -> bool:
        return any(one.name == name and one.root == folder for one in await self.models())

    async def next_scores(
        self, model: str, prompt: Sequence[int], tokens: Sequence[int], *, silent_s: float = SILENT_S
    ) -> list[float]:
        """Log probability of each of some tokens behind a prompt, nats.

        ``prompt_logprobs`` would score whole labels in one request; with a LoRA they end vLLM 0.32 on CPUs, for everybody.

        Args:
            model: a LoRA, or the base model.
            prompt: token ids.
            tokens: distinct ids.
            silent_s: seconds that the server may take.
        """
        found: list[float] = []
        for start in range(0, len(tokens), MOST_TOKENS):
            some = list(tokens[start : start + MOST_TOKENS])
            scores = dict(await self._next(model, prompt, silent_s, logprobs=1, logprob_token_ids=some))
            if unsaid := [token for token in some if token not in scores]:
                raise EngineAwayError(
                    f"vLLM at {self.url} says nothing of token {unsaid[0]}, which it was asked for (logprob_token_ids): "
                    "labels need a newer vLLM, such as 0.32"
                )
            found += [scores[token] for token in some]
        return found

    async def likeliest(self, model: str, prompt: Sequence[int], top: int) -> list[tuple[int, float]]:
        """The likeliest tokens behind a prompt with their log probabilities, the best first."""
        return (await self._next(model, prompt, SILENT_S, logprobs=top))[:top] if top else []

    async def _next(self, model: str, prompt: Sequence[int], silent_s: float, **asked: Any) -> list[tuple[int, float]]:
        """What the server names in the place behind a prompt."""
        body = {"model": model, "prompt": list(prompt), "max_tokens": 1, "temperature": 0.0,
                "return_tokens_as_token_ids": True, **asked}  # fmt: skip
        async with self._asked("POST", "/v1/completions", timeout=silent_s, json=body) as answer:
            with self._understood():
                return _named(answer.json()["choices"][0]["logprobs"]["top_logprobs"][0])

    async def completed(self, model: str, prompt: Sequence[int], new_tokens: int) -> str:
        """The greedy text behind a prompt, in the server's own words.

        Args:
            model: a LoRA, or the base model.
            prompt: token ids.
            new_tokens: at most.
        """
        # repetition_penalty: given, or the generation_config.json of the model's folder would have its way.
        body = {"model": model, "prompt": list(prompt), "max_tokens": new_tokens, "temperature": 0.0,
                "repetition_penalty": 1.0}  # fmt: skip
        async with self._asked("POST", "/v1/completions", json=body) as answer:
            with self._understood():
                return written(answer.json()["choices"][0]["text"])

    async def write(
        self, model: str, prompt: Sequence[int], sampling: Sampling, *, eos_id: int, top: int | None = None
    ) -> AsyncGenerator[Chunk, None]:
        """An answer's tokens as they come, the one that ends it too.

        Args:
            model: a LoRA, or the base model.
            prompt: token ids.
            sampling: how; its stop sequences are the caller's to look for.
            eos_id: ends the answer, and nothing else does.
            top: how many of the likeliest tokens to name next to each; None: no scores.
        """
        body: dict[str, Any] = {
            "model": model, "prompt": list(prompt), "max_tokens": sampling.new_tokens, "stream": True,
            "return_token_ids": True, "ignore_eos": True, "stop_token_ids": [eos_id],
            # Given, or the generation_config.json of the model's folder would have its way.
            "temperature": sampling.temperature if sampling.draws else 0.0,
            "top_p": sampling.top_p if sampling.draws else 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0,
        }  # fmt: skip
        if sampling.seed is not None and sampling.draws:
            body["seed"] = sampling.seed
        if top is not None:
            body |= {"logprobs": top, "return_tokens_as_token_ids": True}
        async with self._asked("POST", "/v1/completions", stream=True, json=body) as answer:
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    return
                if line.startswith("data: "):
                    with self._understood():
                        found = json.loads(line.removeprefix("data: "))
                        if "error" in found:
                            raise EngineAwayError(f"vLLM at {self.url}: {_reason(found)}")
                        for choice in found["choices"]:
                            tokens = tuple(choice.get("token_ids") or ())
                            yield Chunk(tokens, () if top is None else _of_answer(tokens, choice.get("logprobs"), top))

    @contextlib.asynccontextmanager
    async def _asked(
        self, method: str, path: str, *, timeout: float | None = None, stream: bool = False, json: Any = None
    ) -> AsyncIterator[httpx.Response]:
        """The answer to a request, if it is a good one."""
        request = self._http.build_request(
            method, path, json=json, timeout=httpx.USE_CLIENT_DEFAULT if timeout is None else timeout
        )
        answer: httpx.Response | None = None
        try:
            if stream:
                answer = await self._sent(request)
            else:
                answer = await asyncio.wait_for(self._whole(request), SILENT_S if timeout is None else timeout)
            if answer.status_code != 200:
                await answer.aread()
            if answer.status_code != 200:
                raise self._fault(answer)
            yield answer
        except (httpx.TimeoutException, asyncio.TimeoutError) as error:
            raise EngineAwayError(f"vLLM at {self.url} did not answer {path} in time ({type(error).__name__})") from error
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise EngineAwayError(f"vLLM at {self.url} cannot be reached: {reason[:MAX_REASON]}") from error
        finally:
            if answer is not None:
                await answer.aclose()

    async def _whole(self, request: httpx.Request) -> httpx.Response:
        """The answer with its body."""
        answer = await self._sent(request)
        try:
            await answer.aread()
        except BaseException:
            await answer.aclose()
            raise
        return answer

    async def _sent(self, request: httpx.Request) -> httpx.Response:
        """The head of the answer; asked once more where the server closed the connection instead, as it does with idle ones:
        a request that is sent twice does no harm here."""
        try:
            return await self._http.send(request, stream=True)
        except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
            return await self._http.send(request, stream=True)

    def _fault(self, answer: httpx.Response) -> EngineAwayError:
        try:
            reason = _reason(answer.json())
        except ValueError:
            reason = answer.text[:MAX_REASON]
        if answer.status_code == 404:
            return NotLoadedError(f"vLLM at {self.url} answered 404: {reason}")
        if answer.status_code == 401:
            reason = f"it asks for its API key; put it into {KEY_VARIABLE}"
        return _AnsweredError(f"vLLM at {self.url} answered {answer.status_code}: {reason}", reason)

    @contextlib.contextmanager
    def _understood(self) -> Any:
        """Inside, what is no answer of vLLM's raises an error that says so."""
        try:
            yield
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise EngineAwayError(f"{self.url} answers, but not as vLLM does ({type(error).__name__}: {error})") from error


@dataclass(frozen=True, slots=True)
class VllmModel:
    """A ``RemoteModel``: a LoRA, or the base model, by the name under which it is served."""

    client: VllmClient
    name: str

    async def next_scores(
        self, prompt: Sequence[int], asked: Sequence[tuple[Beginning, Sequence[int]]]
    ) -> list[list[float]]:
        """See ``RemoteModel``; a request for each beginning, ``AT_ONCE`` of them together."""
        found: list[list[float]] = []
        for start in range(0, len(asked), AT_ONCE):
            some = asked[start : start + AT_ONCE]
            questions = [
                asyncio.create_task(self.client.next_scores(self.name, (*prompt, *beginning), tokens))
                for beginning, tokens in some
            ]
            try:
                found += await asyncio.gather(*questions)
            finally:  # where one failed, nobody waits for the others
                for question in questions:
                    question.cancel()
                await asyncio.gather(*questions, return_exceptions=True)
        return found

    async def write(self, prompt: Sequence[int], new_tokens: int) -> str:
        """See ``RemoteModel``."""
        return await self.client.completed(self.name, prompt, new_tokens)


class _AnsweredError(EngineAwayError):
    """The server answered that it does not do it."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


def checked_url(url: str, named: str = "--engine-url") -> str:
    """A server's address without what is added to it. Raises UserError where it is none, under the caller's name of it."""
    try:
        found = httpx.URL(url)
    except (httpx.InvalidURL, TypeError) as error:
        raise UserError(f"{named}: found {url!r} ({error}), expected http://HOST:PORT") from error
    if found.scheme not in ("http", "https") or not found.host or found.query or found.userinfo:
        raise UserError(f"{named}: found {url!r}, expected http://HOST:PORT, a key in {KEY_VARIABLE}")
    return str(found).rstrip("/").removesuffix("/v1")


def _model(card: dict[str, Any]) -> ServedModel:
    most = card.get("max_model_len")
    return ServedModel(
        str(card["id"]), str(card.get("root") or ""), card.get("parent") is None, None if most is None else int(most)
    )


def _reason(body: Any) -> str:
    """The message of an error's body, whatever its form."""
    error = body.get("error", body) if isinstance(body, dict) else body
    message = error.get("message") or error.get("detail") or error if isinstance(error, dict) else error
    return str(message)[:MAX_REASON]


def log_probability(value: Any) -> float:
    """What a server says of a token. Raises ValueError where it is no number, as of a model that overflows."""
    if math.isnan(score := float(value)):
        raise ValueError("a log probability that is no number")
    return score


def written(value: Any) -> str:
    """What a server wrote. Raises ValueError where it is no text."""
    if not isinstance(value, str):
        raise ValueError(f"{type(value).__name__} in place of a text")
    return value


def _named(entry: dict[str, float]) -> list[tuple[int, float]]:
    """Tokens called ``token_id:NUMBER`` with their log probabilities, the best first."""
    found = [(int(name.rpartition(":")[2]), log_probability(score)) for name, score in entry.items()]
    return sorted(found, key=lambda one: -one[1])


def _of_answer(tokens: Sequence[int], found: dict[str, Any] | None, top: int) -> tuple[TokenScore, ...]:
    """Scores of a chunk's tokens."""
    if found is None:
        return ()
    made = []
    for token, score, likely in zip(tokens, found["token_logprobs"], found["top_logprobs"], strict=True):
        made.append(TokenScore(token, float(score), tuple(_named(likely or {})[:top])))
    return tuple(made)
