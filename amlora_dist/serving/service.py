"""What the app answers from: the bank that is served now, the engine, and requests on their way through it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Sequence, Sized

from amlora_dist.errors import AmloraError, UserError
from amlora_dist.evaluation.field_texts import RefusedTextsError
from amlora_dist.evaluation.requests import Request
from amlora_dist.serving.bank import ServedBank
from amlora_dist.serving.engine import Engine
from amlora_dist.serving.engine_interface import AnswerEngine, EngineMaker
from amlora_dist.serving.jobs import Classified, Ended, EngineError, Event, Failed, Job, LateError, Sampling
from amlora_dist.serving.metrics import ServingMetrics
from amlora_dist.serving.settings import ServeSettings

GRACE_S = 30.0
"""The engine looks at deadlines between two passes; who waits for it waits this much longer."""

HEAVY = 256
"""Texts times labels of a request that is work for more than a moment."""
LABEL_CHARACTERS = 32
"""A label that is longer counts as several."""
MOST_SHOWN = 200
"""Characters of what a client sent that come back in a message."""


class UnknownModelError(UserError):
    """The request names a model that is not served here."""


class Service:
    """One replica's worth of a server.

    Args:
        bank: to serve.
        settings: limits.
        engine: makes what answers; default: this project's own.

    Raises:
        AmloraError: the engine cannot serve the bank.
    """

    def __init__(self, bank: ServedBank, settings: ServeSettings, engine: EngineMaker | None = None) -> None:
        self.settings = settings
        self.bank = bank
        """New requests are answered by this one. Replaced whole, never changed."""
        self.metrics = ServingMetrics()
        self.engine: AnswerEngine = engine(settings, self.metrics) if engine else Engine(settings, self.metrics.passed)
        self.engine.load(bank)
        self.metrics.watch(self.engine)
        self.metrics.serving(bank.version)
        self._stopping = False

    def start(self) -> None:
        """Begin to work."""
        self.engine.start()

    def stop(self) -> None:
        """Finish what is inside, take nothing more."""
        self._stopping = True
        self.engine.stop(self.settings.request_timeout_s)

    def swap(self, bank: ServedBank) -> None:
        """Answer new requests by another version, once the engine has it; those inside are finished by the one they came to.

        Raises:
            AmloraError: the engine cannot serve it; the old version stays.
        """
        self.engine.load(bank)
        before, self.bank = self.bank, bank
        self.metrics.serving(bank.version)
        self.engine.retire(before)

    @property
    def status(self) -> str:
        """``ok``, ``stopping``, ``engine_away`` (its vLLM cannot be reached) or ``failed``."""
        if self._stopping:
            return "stopping"
        if not self.engine.alive:
            return "failed"
        return "ok" if self.engine.ready else "engine_away"

    def task_of(self, bank: ServedBank, model: str | None) -> str | None:
        """The task that a request's ``model`` names; None for the bank itself.

        Raises:
            UnknownModelError: neither the bank's name nor ``NAME:TASK``.
        """
        name, colon, task = (model or bank.name).partition(":")
        if name == bank.name and (not colon or task in bank.tasks):
            return task if colon else None
        raise unknown_model(bank, model)

    def check_texts(self, texts: Sequence[Sized], question: str | None, labels: Sequence[str] | None = None) -> None:
        """Refuse what is beyond the limits.

        Raises:
            UserError: too many texts, or a text too long with its question and labels.
            BusyError: no room for so many now; refused before they are tokenised.
        """
        if len(texts) > self.settings.max_texts:
            raise UserError(f"found {len(texts)} texts, expected at most {self.settings.max_texts} in one request")
        extra = [question or "", *(labels or ())]
        most, more = self.settings.max_prompt_characters, sum(map(len, extra))
        for text in texts:
            if len(text) + more > most:
                raise UserError(
                    f"found a text of {len(text)} characters, with question and labels {len(text) + more}; "
                    f"expected at most {most}"
                )
        self.engine.check_room(len(texts), heavy=is_heavy(len(texts), labels or ()))

    def submit(
        self, bank: ServedBank, requests: Sequence[Request], sampling: Sampling | None, *, stream: bool = False
    ) -> Exchange:
        """Send the texts of one request to the engine; from the event loop that will read the answers."""
        exchange = Exchange(time.monotonic() + self.settings.request_timeout_s)
        most = max((bank.labels_of(request) for request in requests), key=len, default=()) if sampling is None else ()
        heavy = is_heavy(len(requests), most)
        for index, request in enumerate(requests):
            exchange.add(index, bank, request, sampling, stream=stream)
            exchange.jobs[-1].heavy = heavy
        self.engine.submit(exchange.jobs)
        return exchange


class Exchange:
    """The texts of one request on their way.

    Args:
        deadline: of ``time.monotonic()``.
    """

    def __init__(self, deadline: float) -> None:
        self.jobs: list[Job] = []
        self._deadline = deadline
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

    def add(self, index: int, bank: ServedBank, request: Request, sampling: Sampling | None, *, stream: bool) -> None:
        """One text more."""

        def tell(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and so has who waits
                self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        self.jobs.append(Job(bank, request, tell, self._deadline, sampling, stream))

    async def events(self) -> AsyncGenerator[tuple[int, Event], None]:
        """Events with the index of their text, until each text has had its last; who stops reading cancels the rest.

        Raises:
            AmloraError: why a text is not answered.
        """
        left = len(self.jobs)
        try:
            while left:
                patience = self._deadline + GRACE_S - time.monotonic()
                try:
                    index, event = await asyncio.wait_for(self._events.get(), max(patience, 0.0))
                except (TimeoutError, asyncio.TimeoutError):
                    raise LateError("the model did not answer within the time of the request") from None
                if isinstance(event, Failed):
                    if isinstance(event.error, RefusedTextsError):
                        raise event.error.at(index, alone=len(self.jobs) == 1) from None
                    if isinstance(event.error, AmloraError):
                        raise event.error
                    raise EngineError("a pass of the model failed; the server's log says more") from event.error
                left -= isinstance(event, (Ended, Classified))
                yield index, event
        finally:
            for job in self.jobs:
                job.cancelled = True

    @property
    def prompt_tokens(self) -> int:
        """Of all texts."""
        return sum(job.prompt_tokens for job in self.jobs)


def is_heavy(texts: int, labels: Sequence[str]) -> bool:
    """Whether so many texts with these labels are of much work."""
    return texts * max(len(labels), sum(map(len, labels)) // LABEL_CHARACTERS) > HEAVY


def unknown_model(bank: ServedBank, model: str | None) -> UnknownModelError:
    """The error that names the models there are."""
    known = ", ".join([bank.name, *(f"{bank.name}:{task}" for task in bank.tasks)])
    found = model if model is None or len(model) <= MOST_SHOWN else f"{model[:MOST_SHOWN]}..."
    return UnknownModelError(f"model: found {found!r}, served are {known}")
