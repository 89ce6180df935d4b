"""A group of workers: one Ray Train run whose processes are handed one stage after another."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from amlora_dist.training.remote_storage import file_system
from pipelines.cluster.event_channel import DriverEnd
from pipelines.cluster.worker import DONE_EVENT, ERROR_EVENT, run_stages
from pipelines.cluster.worker_errors import WorkersLostError, error_of

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

    from amlora_dist.training.stage_spec import StageWork
    from pipelines.cluster.session import WorkerPlacement
    from pipelines.runs.executor import Event, OnEvent

EVENTS = "progress.jsonl"
POLL_S = 0.1
END_S = 30.0
"""For which idle workers may take to end."""
GONE_S = 2.0
"""For which those may that a failure has ended already."""


class WorkerGroup:
    """Workers that live until ``end``, or until a stage fails.

    Args:
        placement: where they go.
        workers: how many.
        gpus: whether each has one.
    """

    def __init__(self, placement: WorkerPlacement, workers: int, *, gpus: bool) -> None:
        self.workers, self.stages = workers, 0
        self.grown = 0
        """Bytes by which the memory of one worker has grown since its first stage, the most of any."""
        self._stage: _RunningStage | None = None
        self._residents: dict[int, int] = {}
        self._channel = DriverEnd(workers, self._on_worker_event)
        threads = 0 if gpus else placement.threads or max(1, (os.cpu_count() or 1) // workers)
        trainer = _trainer(placement, workers, gpus, {"channel": self._channel.handle, "threads": threads})
        self._failed: list[BaseException] = []
        # In a thread: in the main one Ray Train takes SIGINT for itself, and ends the run at once.
        self._thread = threading.Thread(target=fit, args=(trainer, self._failed), name="ray train", daemon=True)
        self._thread.start()

    @property
    def lives(self) -> bool:
        """Whether it can take a stage."""
        return self._thread.is_alive()

    def run(self, work: StageWork, on_event: OnEvent, watch: Callable[[], None]) -> None:
        """Run one stage; ``watch`` is called some times a second and may raise to end it.

        Raises:
            WorkersLostError: a worker or node died; the group is no more.
            UserError, TrainingError, StoppedError: of the stage itself; the group is no more.
        """
        from amlora_dist.training.loop import STOP_FILE

        self.stages += 1
        work.path.mkdir(parents=True, exist_ok=True)
        stage = self._stage = _RunningStage(self.stages, self.workers, on_event, work)
        stop, stopping = work.path / STOP_FILE, False
        try:
            if self.lives:
                self._channel.hand_out(self.stages, work.to_json())
            while not stage.done.wait(POLL_S):  # signals are handled between two waits
                if not self.lives:
                    self._channel.close()
                    raise self._error(stage)
                if stage.broken is not None:
                    raise stage.broken
                if not stopping and stop.exists():
                    self._channel.stop(self.stages)
                    stopping = True
                watch()
        finally:
            self._stage = None
            stage.close()
        for rank, resident in stage.residents.items():
            self.grown = max(self.grown, resident - self._residents.setdefault(rank, resident))

    def end(self) -> None:
        """Let idle workers end, and wait for it."""
        from ray.exceptions import RayError

        if self.lives:
            with contextlib.suppress(RayError):
                self._channel.hand_out(self.stages + 1, "")
                self._thread.join(END_S)
        self._channel.close()

    def abandon(self) -> None:
        """Let go of workers that may be in the middle of a stage: they end when they ask for the next one."""
        self._channel.abandon()
        self._thread.join(GONE_S)

    def _on_worker_event(self, event: Event) -> None:
        stage = self._stage
        if stage is not None and event.pop("number", None) == stage.number:
            stage.take(event)

    def _error(self, stage: _RunningStage) -> BaseException:
        """Why the group is no more, while a stage was at work."""
        from ray.exceptions import RayError
        from ray.train.v2.api.exceptions import TrainingFailedError

        cause = self._failed[0] if self._failed else None
        if cause is None and stage.error_event is None:
            return WorkersLostError("the workers ended without a word")
        if cause is not None and not isinstance(cause, (RayError, TrainingFailedError)):
            return cause
        error = error_of(stage.error_event, cause if isinstance(cause, Exception) else RuntimeError("no reason"), stage.last)
        error.__cause__ = cause
        return error


class _RunningStage:
    """What is known of one stage."""

    def __init__(self, number: int, workers: int, on_event: OnEvent, work: StageWork) -> None:
        self.number, self._workers, self._on_event = number, workers, on_event
        self.done = threading.Event()
        self.error_event: Event | None = None
        self.broken: Exception | None = None
        """What ``on_event`` raised, in the channel's thread; the one that waits raises it again."""
        self.last: Event = {}
        self.residents: dict[int, int] = {}
        """Bytes of memory of each rank at the stage's end."""
        self._file = (work.path / EVENTS).open("a", encoding="utf-8")

    def take(self, event: Event) -> None:
        """Take note of an event; called in the channel's thread, which must not end by it."""
        try:
            self._receive(event)
        except Exception as error:  # noqa: BLE001 (raised by the thread that waits)
            self.broken = error

    def _receive(self, event: Event) -> None:
        kind = event["kind"]
        if kind == DONE_EVENT:
            self.residents[event["rank"]] = event["resident"]
            if len(self.residents) == self._workers:
                self.done.set()
        elif kind == ERROR_EVENT:
            self.error_event = self.error_event or event
        else:
            if kind in ("step", "resumed"):
                self.last.update(event)
            self._file.write(json.dumps(event) + "\n")
            self._file.flush()
            self._on_event(event)

    def close(self) -> None:
        self._file.close()


def fit(trainer: TorchTrainer, failed: list[BaseException]) -> None:
    """Run Ray Train to its end; what it raises goes into ``failed``."""
    try:
        trainer.fit()
    except BaseException as error:  # noqa: BLE001 (handed to the thread that waits)
        failed.append(error)


def _trainer(placement: WorkerPlacement, workers: int, gpus: bool, config: dict[str, Any]) -> TorchTrainer:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig

    storage: dict[str, Any] = {"storage_path": str(placement.storage)}
    if placement.url is not None:
        from pyarrow.fs import FSSpecHandler, PyFileSystem

        system, path = file_system(placement.url)
        storage = {"storage_path": path, "storage_filesystem": PyFileSystem(FSSpecHandler(system))}
    return _trainer_class()(
        run_stages,
        train_loop_config=config,
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo", timeout_s=1800),
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=gpus,
            resources_per_worker={"GPU": placement.demand.gpu_share} if gpus else {"CPU": 1},
            placement_strategy=placement.strategy,
        ),
        run_config=RunConfig(
            name=f"workers-{int(time.time())}-{uuid.uuid4().hex[:8]}",
            **storage,
            # Whether to try again is for the failure policy to say; Ray's own default waits for nodes for ever.
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
        ),
    )


def _trainer_class() -> type[TorchTrainer]:
    """TorchTrainer without the helper processes that stages have no use for.

    Each costs as many seconds of imports as a worker. Ray's data sets are not used here. What removes the placement
    groups of a dead controller is needed on a cluster that lives on; one of our own ends with the driver.
    """
    from ray.train.torch import TorchTrainer

    needless = {"DatasetsCallback"}
    if not os.environ.get("RAY_ADDRESS"):
        needless.add("PlacementGroupCleanerCallback")

    class StageTrainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            return [c for c in super()._create_default_callbacks() if type(c).__name__ not in needless]

    return StageTrainer
