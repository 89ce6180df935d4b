"""What executes stages: one protocol, two implementations. This process is the one here, ``pipelines.cluster.executor`` the
other; the driver of a run knows neither."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from amlora_dist.crash_points import reach

if TYPE_CHECKING:
    from amlora_dist.config.loading import RunConfig
    from amlora_dist.training.stage_spec import StageWork
    from amlora_dist.training.worker_cache import WorkerCache
    from pipelines.cluster.session import WorkerPlacement

Event = dict[str, Any]
"""What a stage tells while it goes on: JSON-able, ``kind`` says what it is."""
OnEvent = Callable[[Event], None]


class Executor(Protocol):
    """Where stages are trained and scored. A context manager: entered by a run, left at its end."""

    def __enter__(self) -> Executor: ...
    def __exit__(self, *error: object) -> None: ...

    def prepare(self, placement: WorkerPlacement | None = None) -> None:
        """A stage will be run soon: begin what takes long, and return at once.

        Args:
            placement: what it will need, where that is known and likely enough to have it started already.
        """

    def gpus(self) -> bool | None:
        """Whether stages run on GPUs; None: as this process would.

        Raises:
            UserError: a cluster is to be joined, and is not there.
        """

    def ready(self, placement: WorkerPlacement, *, again: bool) -> None:
        """Have all that a stage needs; called in the main thread, before each attempt.

        Args:
            placement: what that is, of a cluster.
            again: after a failure, when what is missing may be on its way back.

        Raises:
            UserError: what is missing, all of it.
        """

    def run(self, work: StageWork, on_event: OnEvent, watch: Callable[[], None]) -> None:
        """Train and score one stage.

        Args:
            work: the stage.
            on_event: takes events, in any thread.
            watch: called often while the stage goes on; may raise to end it.

        Raises:
            WorkersLostError: processes or nodes died; it is safe to repeat.
            UserError, TrainingError, StoppedError: of the stage itself.
        """

    def release(self) -> None:
        """Nothing will be run for a while: let go of what others may need."""


def executor_of(config: RunConfig, cache: WorkerCache | None = None, *, verbose: bool = False) -> Executor:
    """What runs the stages of a configuration: workers of a cluster, or (``workers: 0``) this process.

    ``cache``: what this process keeps from run to run.
    """
    if config.workers:
        from pipelines.cluster.executor import ClusterExecutor

        return ClusterExecutor(config.workers, lifetime=config.worker_lifetime, verbose=verbose)
    return InProcess(cache, hold=config.worker_lifetime == "run")


def threads_remark() -> str:
    """What to say before this process computes on CPUs that others use too; empty where nothing is."""
    import torch

    threads, load, cpus = torch.get_num_threads(), os.getloadavg()[0], os.cpu_count() or 1
    if threads < 2 or load <= cpus or torch.cuda.is_available():
        return ""
    return (
        f"{threads} CPU threads, and others use this machine (load {load:.0f} on {cpus} CPUs): they wait for each other;"
        " OMP_NUM_THREADS=1 may be several times faster"
    )


class InProcess:
    """This process, on its own device, without Ray and DeepSpeed.

    Args:
        cache: what this process keeps from stage to stage, if it outlives the run; default: for the run.
        hold: keep it at all; otherwise every stage reads the base model.
    """

    def __init__(self, cache: WorkerCache | None = None, *, hold: bool = True) -> None:
        self._cache, self._hold, self._frozen = cache, hold, False

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self._cache = None
        if self._frozen:
            gc.unfreeze()

    def prepare(self, placement: WorkerPlacement | None = None) -> None:
        """Nothing takes long."""

    def gpus(self) -> None:
        """As this process."""

    def ready(self, placement: WorkerPlacement, *, again: bool) -> None:
        """All is here."""

    def run(self, work: StageWork, on_event: OnEvent, watch: Callable[[], None]) -> None:
        """As the protocol says; ``watch`` is called with every event."""
        import torch

        from amlora_dist.training.stage import run_stage
        from amlora_dist.training.worker_cache import WorkerCache

        if self._cache is None and self._hold:
            self._cache = WorkerCache()
        if self._hold and not self._frozen:
            gc.freeze()
            self._frozen = True

        def report(event: Event) -> None:
            on_event(event)  # first: what has begun is known to who watches
            watch()

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        reach("workers_started")
        run_stage(work, distributed=False, report=report, device=device, cache=self._cache if self._hold else None)

    def release(self) -> None:
        """What is held is this process's own."""
