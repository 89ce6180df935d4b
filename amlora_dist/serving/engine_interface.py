"""What the app needs of an engine, whichever computes: ours (``engine``) or a vLLM behind it (``vllm_engine``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from amlora_dist.serving.bank import ServedBank
from amlora_dist.serving.jobs import Job
from amlora_dist.serving.metrics import ServingMetrics
from amlora_dist.serving.settings import ServeSettings


class AnswerEngine(Protocol):
    """Answers jobs, and holds the versions of a bank that are served. Its methods may be called from any thread."""

    def load(self, bank: ServedBank) -> None:
        """Make a version ready before the first job of it comes; waits for it.

        Raises:
            AmloraError: it cannot be served.
        """

    def retire(self, bank: ServedBank) -> None:
        """No new requests come to a version; let it go when those inside are done. Does not wait."""

    def start(self) -> None:
        """Begin to work."""

    def stop(self, deadline_s: float) -> None:
        """Take nothing more, finish what is inside, and end; what is not done by then fails."""

    def check_room(self, texts: int, *, heavy: bool) -> None:
        """Refuse what there is no room for, before any work goes into it.

        Args:
            texts: of one request.
            heavy: whether it is of much work; such may fill half of the room.

        Raises:
            BusyError: more texts than ``max_concurrency``.
            StoppingError: it is shutting down.
            EngineAwayError: what it works with cannot be reached.
        """

    def submit(self, jobs: Sequence[Job]) -> None:
        """Take all of these jobs, the texts of one request, or none. Raises as ``check_room``."""

    @property
    def alive(self) -> bool:
        """Whether it works; if not, only a new one helps."""

    @property
    def ready(self) -> bool:
        """Whether it can answer now."""

    @property
    def texts(self) -> int:
        """Texts inside, waiting or at work."""

    @property
    def waiting(self) -> int:
        """Texts that wait for their first pass."""


EngineMaker = Callable[[ServeSettings, ServingMetrics], AnswerEngine]
"""Makes an engine with these limits that notes its figures there."""
