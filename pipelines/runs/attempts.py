"""A stage on an executor, with as many attempts as the failure policy allows (``retries``)."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from amlora_dist.errors import AmloraError, HeldError, TrainingError, UserError
from pipelines.runs.interrupts import stops_handled
from pipelines.runs.progress import Score
from pipelines.runs.retries import Failure, decide

if TYPE_CHECKING:
    from amlora_dist.registry.leases import Lease
    from amlora_dist.training.stage_spec import StageWork
    from pipelines.cluster.session import Placement
    from pipelines.runs.executor import Event, Executor
    from pipelines.runs.progress import Progress

FINAL = (UserError.exit_code, HeldError.exit_code, 130, 143)
"""Exit codes of errors that are passed on as they are: nothing failed in training."""


class Attempts:
    """Runs stages until each is done or has failed for good.

    Args:
        executor: where they run.
        placement: what they need there, of a cluster.
        lease: of the run, which ends training that no longer counts.
        progress: hears of steps and scores.
    """

    def __init__(self, executor: Executor, placement: Placement, lease: Lease, progress: Progress) -> None:
        self._executor, self._placement, self._lease, self._progress = executor, placement, lease, progress

    def run(self, work: StageWork) -> None:
        """Train (if need be) and score.

        Raises:
            UserError, HeldError, StoppedError: as the stage said.
            TrainingError: it failed for good.
        """
        failures: list[Failure] = []
        while True:
            self._lease.check()
            work.path.mkdir(parents=True, exist_ok=True)
            self._executor.ready(self._placement, again=bool(failures))
            work.upload()
            try:
                with stops_handled(work.path):
                    self._executor.run(work, self._on_event, self._still_ours)
                work.fetch()
                return
            except AmloraError as error:
                with contextlib.suppress(UserError):  # what the attempt ended with is what to say
                    work.fetch()
                failures.append(Failure.of(error, work.progress()))
                verdict = decide(failures)
                if not verdict.retry:
                    if error.exit_code in FINAL:
                        raise
                    raise TrainingError(f"stage {work.task!r}: {verdict.reason}") from error
                self._progress.note(f"stage {work.task!r}: {verdict.reason}")

    def release(self) -> None:
        """Nothing will be run for a while: let go of what others may need."""
        self._executor.release()

    def _still_ours(self) -> None:
        """End training that no longer counts: this driver was paused, and another one took the run."""
        if self._lease.lost:
            self._lease.check()

    def _on_event(self, event: Event) -> None:
        kind = event.get("kind")
        if kind == "step":
            rate = event["tokens"] / event["seconds"] if event["seconds"] else None
            self._progress.step(event["step"], event["steps"], event["loss"], rate)
        elif kind == "trainable":
            total = sum(event["parameters"].values())
            parts = ", ".join(f"{name} {count:,}" for name, count in event["parameters"].items())
            self._progress.note(f"  trains {total:,} parameters in {len(event['modules'])} layers ({parts})")
            self._progress.phase("reading rows")
        elif kind == "statistics":
            self._progress.phase("training")
        elif kind == "resumed":
            self._progress.note(f"  resumed after step {event['step']}")
        elif kind == "scoring":
            self._progress.rows(event["task"], event["mode"], event.get("done", 0), event["rows"])
        elif kind == "scored":
            self._progress.score(
                Score(
                    event["task"], event["mode"], event["metric"], event["accuracy"], event["rows"], event.get("kept") or 0
                )
            )
