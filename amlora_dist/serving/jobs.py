"""What the engine is given and what it says: a job for each text, and the events of its life."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

from amlora_dist.errors import AmloraError
from amlora_dist.evaluation.requests import Classification, Request, Route
from amlora_dist.serving.bank import ServedBank
from amlora_dist.serving.sampling import Sampling
from amlora_dist.serving.token_scores import TokenScore

__all__ = [
    "Began", "BusyError", "Classified", "Ended", "EngineAwayError", "EngineError", "Event", "Failed", "Job", "LateError",
    "Piece", "Sampling", "StoppingError",
]  # fmt: skip


class BusyError(AmloraError):
    """More texts than the server takes at once; try again later."""


class StoppingError(AmloraError):
    """The server is shutting down, or its engine has died."""


class EngineError(AmloraError):
    """A pass failed; the log says why."""


class EngineAwayError(AmloraError):
    """The server that computes for this one cannot be reached, is too slow or does not do what it must; try again later."""


class LateError(AmloraError):
    """The time of the request is over."""


@dataclass(frozen=True, slots=True)
class Began:
    """The prompt was read."""

    route: Route
    scores: tuple[TokenScore, ...] = ()
    """Of the prompt's own tokens, where the request asks for them."""


@dataclass(frozen=True, slots=True)
class Piece:
    """More of the answer's text."""

    text: str
    scores: tuple[TokenScore, ...] = ()
    """Of its tokens since the last piece, where the request asks for them; together they are those of the end."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The answer is whole: the pieces add up to ``text``."""

    text: str
    reason: str
    """``stop`` (the model ended it, or a stop sequence did) or ``length``."""
    tokens: int
    scores: tuple[TokenScore, ...] = ()
    """Of every token that the model wrote, the one that ended the answer too, where the request asks for them."""


@dataclass(frozen=True, slots=True)
class Classified:
    """The label is there."""

    found: Classification


@dataclass(frozen=True, slots=True)
class Failed:
    """It will not be answered."""

    error: Exception


Event = Began | Piece | Ended | Classified | Failed


@dataclass(eq=False, slots=True)
class Job:
    """One text. ``Ended``, ``Classified`` and ``Failed`` are the last event of a job."""

    bank: ServedBank
    request: Request
    tell: Callable[[Event], None]
    """Called in the engine's thread; must not wait."""
    deadline: float
    """Of ``time.monotonic()``."""
    sampling: Sampling | None = None
    """None: to be classified."""
    stream: bool = False
    """Whether pieces are wanted."""
    heavy: bool = False
    """Part of a request of much work, which gives way to others."""
    cancelled: bool = False
    """Set by anyone: nobody waits for the answer any more."""

    @property
    def prompt_tokens(self) -> int:
        """Tokens that it has brought."""
        return len(self.request.tokens)

    def over(self) -> AmloraError | None:
        """Why no more work should go into it, if so."""
        if self.cancelled:
            return LateError("cancelled by the client")
        if time.monotonic() > self.deadline:
            return LateError("the request took longer than the server allows")
        return None


def grouped(jobs: Iterable[Job], key: Callable[[Job], Hashable]) -> list[list[Job]]:
    """Jobs of the same key together, in the order in which the first of each came."""
    groups: dict[Hashable, list[Job]] = {}
    for job in jobs:
        groups.setdefault(key(job), []).append(job)
    return list(groups.values())


def by_pass(job: Job) -> Hashable:
    """Jobs of which this is equal can share passes at once."""
    return job.bank.group(job.request)
