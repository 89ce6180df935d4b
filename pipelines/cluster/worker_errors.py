"""Why a stage on workers has no result: what a worker reported, as the class it was, or why its process was lost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from amlora_dist.errors import AmloraError, TrainingError, UserError

if TYPE_CHECKING:
    from pipelines.runs.executor import Event


class WorkersLostError(AmloraError):
    """Worker processes or their node died; what they were doing is safe to repeat."""

    exit_code = 4


def error_event(error: AmloraError, rank: int) -> Event:
    """What a worker says of an error, so that ``error_of`` makes it again elsewhere."""
    return {
        "class": type(error).__name__, "message": str(error), "exit_code": error.exit_code, "rank": rank,
        "step": getattr(error, "step", None),
    }  # fmt: skip


def error_of(event: Event | None, error: Exception, last: Mapping[str, Any]) -> AmloraError:
    """What a worker reported before it failed, as the class it was; else why its processes were lost.

    Args:
        event: of ``error_event``; None if no worker reported anything.
        error: Ray's.
        last: the last event about a step; empty if there was none.
    """
    from amlora_dist.training import failures

    if event is None:
        return _lost(error, last)
    known: dict[str, Callable[..., AmloraError]] = {
        kind.__name__: kind for kind in (UserError, TrainingError, failures.StoppedError)
    }
    known |= {kind.__name__: kind for kind in (failures.NonFiniteLossError, failures.DeviceMemoryError)}
    kind = known.get(event["class"], UserError if event["exit_code"] == UserError.exit_code else TrainingError)
    return kind(event["message"], event["step"]) if event.get("step") is not None else kind(event["message"])


LOW_MEMORY = ("low on memory", "OutOfMemoryError", "out of memory")
"""What Ray's memory monitor says of a worker that it killed."""


def _lost(error: Exception, last: Mapping[str, Any]) -> AmloraError:
    from amlora_dist.training.failures import LESS_MEMORY, HostMemoryError, batch_text

    causes = getattr(error, "worker_failures", None) or {}
    where = ""
    if last:
        rows = last.get("next_rows")
        done = int(last["step"])
        where = f", after step {done}" + (f", in {batch_text(done + 1, rows)}" if rows else "")
    killed = [f"rank {rank}" for rank, cause in causes.items() if any(words in str(cause) for words in LOW_MEMORY)]
    if killed or any(words in str(error) for words in LOW_MEMORY):
        who = ", ".join(killed) or "at its start"
        return HostMemoryError(
            f"a worker ({who}) was killed because its node ran out of memory{where}; use fewer workers on a node or larger"
            f" nodes, {LESS_MEMORY}"
        )
    reasons = "; ".join(f"rank {rank}: {_plain(str(cause))}" for rank, cause in causes.items())
    cause = getattr(error, "controller_failure", error)
    return WorkersLostError(f"{reasons or str(cause).strip().splitlines()[0]}{where}")


_CAUSES = {
    "its process died": ("worker process has died", "actor died", "actor is dead", "killed by SIG"),
    "lost its connection to another worker": (
        "Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited", "/gloo/", "GLHF",
    ),
}  # fmt: skip
"""In plain words, what Ray and the network libraries (gloo, NCCL) say at length of a worker; ``-v`` shows it all."""


def _plain(cause: str) -> str:
    """Why a worker was lost, on one line."""
    known = (plain for plain, words in _CAUSES.items() if any(word in cause for word in words))
    return next(known, (cause.strip().splitlines() or ["no reason is known"])[-1][:300])
