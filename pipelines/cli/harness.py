"""A bank, and its base model, as lm-evaluation-harness asks them (its ``LM``): through the server's own engine.

What the harness's ``local-completions`` and ``local-chat-completions`` receive over HTTP comes from the same calls here:
prompts in tokens are read as they are and routed by their own words, conversations are asked as ``/v1/chat/completions``
asks them. The base model answers the same prompts with a gate of zeros, which adds nothing to it.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from amlora_dist.errors import UserError
from amlora_dist.evaluation.requests import Request
from amlora_dist.methods import LORA
from amlora_dist.serving.bank import ServedBank
from amlora_dist.serving.engine import Engine
from amlora_dist.serving.jobs import Began, Ended, Event, Failed, Job, Sampling
from amlora_dist.serving.settings import ServeSettings
from amlora_dist.serving.token_scores import TokenScore
from amlora_dist.tasks.conversations import messages_of

DEFAULT_NEW_TOKENS = 256
"""Of an answer, where a task of the harness does not say: as its own models have it."""
PATIENCE_S = 24 * 3600.0
"""For the answers to one call of the harness."""
SERVED = 64
"""Texts that are with the engine at once."""


class ChatPrompt(str):
    """A prompt that the harness made of turns: the text is the base model's chat template, and the turns are kept."""

    turns: list[dict[str, str]]


@contextmanager
def harness_models(bank: ServedBank, batch_size: int) -> Iterator[tuple[HarnessModel, HarnessModel]]:
    """The bank as served and its base model, on one engine.

    Args:
        bank: to evaluate.
        batch_size: prompts of one pass.

    Raises:
        UserError: an encoder-decoder, or adapters that are no LoRA: neither can be asked what a prompt is worth.
    """
    if bank.model.base.encoder_decoder:
        raise UserError("evaluate: found an encoder-decoder, expected a causal model: it says nothing of its prompt")
    if (manifest := bank.model.bank.manifest).form != LORA:
        raise UserError(
            f"evaluate: found a bank of method {manifest.method}, expected one of adapters that a gate of zeros turns off"
        )
    engine = Engine(ServeSettings(batch_rows=batch_size, max_concurrency=SERVED))
    engine.start()
    try:
        yield HarnessModel(bank, engine), HarnessModel(bank, engine, base=True)
    finally:
        engine.stop(1.0)


class HarnessModel(TemplateLM):
    """What the harness asks.

    Args:
        bank: as served.
        engine: that answers.
        base: whether its base model is asked in its place.
    """

    def __init__(self, bank: ServedBank, engine: Engine, *, base: bool = False) -> None:
        super().__init__()
        self.bank, self.engine, self.base = bank, engine, base
        self.tokenizer = bank.model.tokenizer
        positions = getattr(bank.model.transformer.config, "max_position_embeddings", None)
        self.max_length = int(positions or 2048) - 1
        """Tokens of a prompt: one more is written behind it."""

    # ---- tokens, as the harness's own models make them ---------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The token that ends an answer."""
        return self.bank.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What an empty prompt begins with."""
        begin = self.tokenizer.bos_token_id
        return self.bank.eos_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        """Names the chat template for the harness's records."""
        return str(self.bank.model.base.source)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_more: Any) -> list[int]:
        """Ids of a text, without a beginning of sequence unless it is asked for."""
        found = self.tokenizer(string, add_special_tokens=bool(add_special_tokens), verbose=False)["input_ids"]
        return [int(token) for token in found]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> ChatPrompt:
        """A conversation as one prompt, by the base model's template."""
        made = ChatPrompt(
            self.tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )  # fmt: skip
        made.turns = chat_history
        return made

    # ---- what is asked -----------------------------------------------------------------------------------------

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_more: Any) -> list[tuple[float, bool]]:
        """Of each (pair, context, continuation): summed log probability of the continuation's tokens, nats, and whether
        each is the likeliest."""
        asked = []
        for _, context, continuation in requests:
            truncated = [*context, *continuation][-self.max_length :]
            asked.append(self._raw(truncated, new_tokens=1, echo=True))
        found = []
        answers = self._answered(asked, [Sampling(new_tokens=1)] * len(asked))
        for (_, _, continuation), (scores, _) in zip(requests, answers, strict=True):
            own = scores[len(scores) - len(continuation) :]
            logprobs = [score.logprob or 0.0 for score in own]
            greedy = all(score.logprob == score.top[0][1] for score in own if score.top)
            found.append((sum(logprobs), greedy))
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log probability of whole texts, in windows of the model's length that do not overlap."""
        windows, owner = [], []
        for place, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for pair in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length - 1, 1):
                windows.append((None, *make_disjoint_window(pair)))
                owner.append(place)
        totals = [0.0] * len(requests)
        for place, (logprob, _) in zip(owner, self._loglikelihood_tokens(windows), strict=True):
            totals[place] += logprob
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers, greedy unless the task asks for draws; conversations are answered as the chat endpoint answers them."""
        asked, ways = [], []
        for context, options in (request.args for request in requests):
            way = self._sampling(dict(options))
            asked.append(self._request(context, way.new_tokens))
            ways.append(way)
        return [end.text for _, end in self._answered(asked, ways)]

    # ---- inside ------------------------------------------------------------------------------------------------

    def _sampling(self, options: dict[str, Any]) -> Sampling:
        stops = handle_stop_sequences(options.get("until"), eos=self.tokenizer.eos_token)
        new_tokens = int(options.get("max_gen_toks") or options.get("max_tokens") or DEFAULT_NEW_TOKENS)
        return Sampling(
            new_tokens=min(new_tokens, self.max_length // 2),
            temperature=float(options.get("temperature") or 0.0),
            top_p=float(options.get("top_p") or 1.0),
            stops=tuple(stop for stop in stops if stop),
        )

    def _request(self, context: str, new_tokens: int) -> Request:
        if isinstance(context, ChatPrompt) and not self.base:
            chat = self.bank.model.prompter.asked(messages_of(context.turns))
            return self.bank.to_generate(chat.text, question=chat.question, turns=chat.turns, new_tokens=new_tokens)
        tokens = self.tok_encode(context)[-(self.max_length - new_tokens) :]
        return self._raw(tokens or [self.prefix_token_id], new_tokens=new_tokens, echo=False)

    def _raw(self, tokens: list[int], *, new_tokens: int, echo: bool) -> Request:
        top = 1 if echo else None
        made = self.bank.to_generate(tokens, raw=True, new_tokens=new_tokens, top=top, echo=echo)
        if self.base:
            made.gate = torch.zeros(len(self.bank.tasks), device=self.bank.model.device)
        return made

    def _answered(
        self, requests: Sequence[Request], ways: Sequence[Sampling]
    ) -> list[tuple[tuple[TokenScore, ...], Ended]]:
        """Scores of each prompt's tokens, and its answer, in their order."""
        began: dict[int, tuple[TokenScore, ...]] = {}
        ended: dict[int, Ended] = {}
        events: queue.Queue[tuple[int, Event]] = queue.Queue()
        deadline = time.monotonic() + PATIENCE_S
        waiting = list(enumerate(zip(requests, ways, strict=True)))[::-1]
        inside = 0
        while waiting or inside:
            while waiting and inside < SERVED:
                place, (request, way) = waiting.pop()

                def tell(event: Event, place: int = place) -> None:
                    events.put((place, event))

                self.engine.submit([Job(self.bank, request, tell, deadline, way)])
                inside += 1
            place, event = events.get(timeout=max(1.0, deadline - time.monotonic()))
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Began):
                began[place] = event.scores
            elif isinstance(event, Ended):
                ended[place], inside = event, inside - 1
        return [(began[place], ended[place]) for place in range(len(requests))]
