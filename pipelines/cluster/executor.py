"""One stage as one Ray Train run with fresh worker processes, or in the driver's own process (``workers: 0``)."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amlora_dist.config.loading import home
from amlora_dist.crash_points import reach
from amlora_dist.errors import AmloraError, TrainingError, UserError
from amlora_dist.training.remote_storage import file_system
from amlora_dist.training.stage_spec import StageWork
from pipelines.cluster import resources
from pipelines.cluster.event_channel import ERROR_EVENT, WorkersEnd, line_to

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

    from pipelines.cluster.resources import Demand

log = logging.getLogger(__name__)

Event = dict[str, Any]
OnEvent = Callable[[Event], None]

EVENTS = "progress.jsonl"
ERROR = "error.json"
POLL_S = 0.25
NODES_DEADLINE_S = 10.0
"""How long a run waits at its start for nodes that are on their way, before it says what is missing."""
RECOVERY_DEADLINE_S = 120.0
"""The same after nodes were lost."""
PASSED_ON = ("NCCL_", "TORCH_NCCL_", "GLOO_", "FI_", "UCX_", "DS_", "HF_HUB_", "HF_HOME")
"""How settings of the network libraries, of DeepSpeed and of the Hub begin, which workers on other nodes need too."""


class WorkersLostError(AmloraError):
    """Worker processes or their node died; what they were doing is safe to repeat."""

    exit_code = 4


@dataclass(frozen=True, slots=True)
class Placement:
    """What a stage needs of the cluster."""

    workers: int
    """At most: a stage starts with as many as there are, and not with fewer than ``demand`` says."""
    storage: Path
    """Where Ray Train keeps its own records; absolute, reachable from all nodes."""
    demand: Demand
    """Of the fewest workers."""
    threads: int | None = None
    """Of each worker on CPUs; default: the node's CPUs divided among the workers."""
    batch_size: int = 1
    """Examples of one optimizer step over all workers, who take equal shares."""
    strategy: str = "PACK"
    """Ray's placement of the workers: PACK or SPREAD."""
    url: str | None = None
    """Where Ray Train keeps its records instead, if nodes share no folder."""

    def fitting(self, available: int) -> int:
        """How many of ``available`` workers a stage takes; 0 if they are too few."""
        most = min(available, self.workers)
        return next((n for n in range(most, self.demand.workers - 1, -1) if self.batch_size % n == 0), 0)


def run_in_process(work: StageWork, on_event: OnEvent) -> None:
    """The stage in this process, on its own device, without Ray and DeepSpeed."""
    import torch

    from amlora_dist.training.stage import run_stage

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reach("workers_started")
    run_stage(work, distributed=False, report=on_event, device=device)


class RayCluster:
    """The cluster of a run: joined when the first stage needs it, let go at the end."""

    def __init__(self, placement: Placement, *, verbose: bool) -> None:
        self._placement, self._verbose = placement, verbose
        self._started = False
        self._joined = False
        """Whether this object called ``ray.init``; what somebody else did is theirs to end."""
        self._own = False
        """Whether the cluster is this run's own, on this machine: no node will ever join it."""

    def __enter__(self) -> RayCluster:
        return self

    def __exit__(self, *error: object) -> None:
        if self._joined:
            import ray

            ray.shutdown()

    def ready(self, *, again: bool) -> None:
        """Join the cluster, and see that the workers fit in it; called in the main thread, before each attempt.

        Args:
            again: after a failure, when nodes may be on their way back.

        Raises:
            UserError: what is missing, all of it.
        """
        self._start()
        deadline = time.monotonic() + resources.deadline_s(RECOVERY_DEADLINE_S if again else NODES_DEADLINE_S)
        asked: list[dict[str, float]] = []
        try:
            while lacking := resources.missing(self._placement.demand, supply := resources.in_cluster()):
                if self._own or time.monotonic() > deadline:
                    resources.refuse(lacking)
                if (bundles := self._bundles(supply)) != asked:
                    _ask_for(bundles)
                    asked = bundles
                time.sleep(0.5)
        finally:
            if asked:
                _ask_for([])  # the stage's own workers keep the nodes from here on

    def _bundles(self, supply: resources.Supply) -> list[dict[str, float]]:
        """What the workers will take, for an autoscaler; as CPUs where no node with a GPU has come yet."""
        demand = self._placement.demand
        return [{"GPU": demand.gpu_share} if supply.gpus else {"CPU": 1.0}] * demand.workers

    def run(self, work: StageWork, on_event: OnEvent, attempt: int, watch: Callable[[], None]) -> None:
        """Run one stage on fresh workers; ``watch`` is called twice a second and may raise to end it.

        Raises:
            WorkersLostError: a worker or node died.
            UserError, TrainingError, StoppedError: what the stage itself said.
        """
        gpus = self.use_gpus()
        workers = self._workers()
        work.path.mkdir(parents=True, exist_ok=True)
        error_file = work.path / ERROR
        error_file.unlink(missing_ok=True)
        name = f"{work.path.name}-{attempt}-{int(time.time())}"
        last: Event = {}

        def keep(event: Event) -> None:
            if event.get("kind") in ("step", "resumed"):
                last.update(event)
            on_event(event)

        with contextlib.ExitStack() as stack:
            stack.enter_context(_followed(work.path / EVENTS, keep))
            line = stack.enter_context(line_to(work.path, work.path / EVENTS, error_file)) if work.apart else None
            trainer = self._trainer(work, name, gpus, workers, line)
            try:
                _fit(trainer, watch)
                return
            except _FitError as error:
                failed = error.cause
        raise told_by(error_file, failed, last) from failed

    def _trainer(self, work: StageWork, name: str, gpus: bool, workers: int, line: Any) -> TorchTrainer:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig

        url = self._placement.url
        storage: dict[str, Any] = {"storage_path": str(self._placement.storage)}
        if url is not None:
            from pyarrow.fs import FSSpecHandler, PyFileSystem

            system, path = file_system(url)
            storage = {"storage_path": path, "storage_filesystem": PyFileSystem(FSSpecHandler(system))}
        return _trainer_class()(
            _worker,
            train_loop_config={"work": work.to_json(), "threads": self._threads(gpus, workers), "line": line},
            torch_config=TorchConfig(backend="nccl" if gpus else "gloo", timeout_s=1800),
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=gpus,
                resources_per_worker={"GPU": self._placement.demand.gpu_share} if gpus else {"CPU": 1},
                placement_strategy=self._placement.strategy,
            ),
            run_config=RunConfig(
                name=name,
                **storage,
                # Whether to try again is for the failure policy to say; Ray's own default waits for nodes for ever.
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
            ),
        )

    def _start(self) -> None:
        if self._started:
            return
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
        if not os.environ.get("RAY_ADDRESS"):
            # A process each, of seconds of imports, that one machine has no use for.
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
            os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
        import ray

        level = logging.INFO if self._verbose else logging.ERROR
        options: dict[str, Any] = {"log_to_driver": self._verbose, "logging_level": level}
        if not ray.is_initialized():
            if not os.environ.get("RAY_ADDRESS"):
                cpus = max(os.cpu_count() or 1, self._placement.workers)
                # "local": without it Ray would join whatever cluster somebody has started on this machine.
                options |= {"address": "local", "num_cpus": cpus, "include_dashboard": False}
                self._own = True
            elif passed := _passed_on():
                options["runtime_env"] = {"env_vars": passed}
            self._joined = True
            try:
                ray.init(**options)
            except ConnectionError as error:
                raise UserError(
                    f"RAY_ADDRESS: found {os.environ.get('RAY_ADDRESS', '')!r}, expected a Ray cluster that can be joined"
                    f" ({' '.join(str(error).split())[:300]}); start it, or fix the address"
                ) from error
        self._started = True

    def _workers(self) -> int:
        """How many workers the next stage takes of those that are there."""
        import ray

        wanted = self._placement
        if wanted.demand.workers == wanted.workers:
            return wanted.workers
        kind = "GPU" if self.use_gpus() else "CPU"
        have = ray.cluster_resources().get(kind, 0)
        if not (found := wanted.fitting(int(have))):
            raise UserError(
                f"min_workers: no number from {wanted.demand.workers} to {min(int(have), wanted.workers)} ({have:g} {kind}s)"
                f" divides training.batch_size {wanted.batch_size}; lower min_workers, or add nodes"
            )
        return found

    def use_gpus(self) -> bool:
        """Whether workers run on GPUs: where the cluster has any."""
        import ray

        return bool(ray.cluster_resources().get("GPU", 0) > 0)

    def _threads(self, gpus: bool, workers: int) -> int:
        return 0 if gpus else self._placement.threads or max(1, (os.cpu_count() or 1) // workers)


def _ask_for(bundles: list[dict[str, float]]) -> None:
    """Tell the cluster's autoscaler what is waited for: it adds nodes for what is asked, and nothing asks before the nodes
    are there. A cluster of fixed size takes no notice."""
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=bundles)


def _passed_on() -> dict[str, str]:
    """Variables of this process that workers on other nodes must have too; what a job has set, Ray passes on itself."""
    named = {key: value for key, value in os.environ.items() if key.startswith(PASSED_ON)}
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    return {key: value for key, value in named.items() if key not in job.get("runtime_env", {}).get("env_vars", {})}


def _trainer_class() -> type[TorchTrainer]:
    """TorchTrainer without the helper processes that a stage has no use for.

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


def _worker(config: dict[str, Any]) -> None:
    """Runs on every worker of the group."""
    entered = time.time()
    import psutil
    import torch
    from ray.train import get_context
    from ray.train.torch import get_device

    from amlora_dist.training.checkpoint import write_text
    from amlora_dist.training.stage import run_stage

    if config["threads"]:
        torch.set_num_threads(config["threads"])
    if os.environ.get("AMLORA_VERBOSE") != "1":
        quiet_libraries()
    work = StageWork.from_json(config["work"])
    if work.apart:
        work = work.moved(home() / "storage", home() / "cache")
        work.path.mkdir(parents=True, exist_ok=True)
    end = WorkersEnd(config["line"], work.path)
    rank = get_context().get_world_rank()
    with contextlib.ExitStack() as stack:
        report: OnEvent = _ignore
        if rank == 0 and work.apart:
            report = end.tell
            end.listen()
        elif rank == 0:
            file = stack.enter_context((work.path / EVENTS).open("a", encoding="utf-8"))

            def report(event: Event) -> None:
                file.write(json.dumps(event | {"time": time.time()}) + "\n")
                file.flush()

        report({"kind": "worker", "process": psutil.Process().create_time(), "entered": entered})
        reach("workers_started")
        try:
            run_stage(work, distributed=True, report=report, device=get_device())
        except AmloraError as error:
            told = {"class": type(error).__name__, "message": str(error), "exit_code": error.exit_code, "rank": rank}
            told["step"] = getattr(error, "step", None)
            write_text(work.path / ERROR, json.dumps(told))
            end.tell(told | {"kind": ERROR_EVENT}, wait=True)
            raise


def quiet_libraries() -> None:
    """Leave warnings and errors of the libraries; their chatter hides them."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in ("DeepSpeed", "deepspeed", "ray", "urllib3", "filelock"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _ignore(event: Event) -> None:
    """Events of other ranks than 0."""


class _FitError(Exception):
    """Ray Train ended with an error of Ray's."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


def _fit(trainer: Any, watch: Callable[[], None]) -> None:
    """Run Ray Train in a thread of its own: in the main thread it takes SIGINT for itself, and ends the run at once."""
    from ray.exceptions import RayError
    from ray.train.v2.api.exceptions import TrainingFailedError

    caught: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # noqa: BLE001 (handed to the thread that waits)
            caught.append(error)

    thread = threading.Thread(target=fit, name="ray train", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(timeout=0.5)  # signals are handled between two waits
        watch()
    if caught and isinstance(caught[0], (RayError, TrainingFailedError)):
        raise _FitError(caught[0])
    if caught:
        raise caught[0]


def told_by(error_file: Path, error: Exception, last: Event) -> AmloraError:
    """What a worker said before it failed, as the class it was; else why its processes were lost.

    Args:
        error_file: where a worker writes what it has to say.
        error: Ray's.
        last: the last event about a step.
    """
    from amlora_dist.training import failures

    known: dict[str, Callable[..., AmloraError]] = {
        kind.__name__: kind for kind in (UserError, TrainingError, failures.StoppedError)
    }
    known |= {kind.__name__: kind for kind in (failures.NonFiniteLossError, failures.DeviceMemoryError)}
    try:
        told = json.loads(error_file.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return _lost(error, last)
    kind = known.get(told["class"], UserError if told["exit_code"] == UserError.exit_code else TrainingError)
    return kind(told["message"], told["step"]) if told.get("step") is not None else kind(told["message"])


LOW_MEMORY = ("low on memory", "OutOfMemoryError", "out of memory")
"""What Ray's memory monitor says of a worker that it killed."""


def _lost(error: Exception, last: Event) -> AmloraError:
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
    told = "; ".join(f"rank {rank}: {_plain(str(cause))}" for rank, cause in causes.items())
    cause = getattr(error, "controller_failure", error)
    return WorkersLostError(f"{told or str(cause).strip().splitlines()[0]}{where}")


_CAUSES = {
    "its process died": ("worker process has died", "actor died", "actor is dead", "killed by SIG"),
    "lost its connection to another worker": (
        "Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited", "/gloo/", "GLHF",
    ),
}  # fmt: skip
"""In plain words, what Ray and the network libraries (gloo, NCCL) say at length of a worker; ``-v`` shows it all."""


def _plain(said: str) -> str:
    """Why a worker was lost, on one line."""
    known = (plain for plain, words in _CAUSES.items() if any(word in said for word in words))
    return next(known, (said.strip().splitlines() or ["no reason is known"])[-1][:300])


@contextlib.contextmanager
def _followed(file: Path, on_event: OnEvent) -> Iterator[None]:
    """Hand on the events that workers append to ``file``, as they come."""
    file.touch()
    stop = threading.Event()

    def follow() -> None:
        with file.open(encoding="utf-8") as lines:
            lines.seek(0, os.SEEK_END)
            rest = ""
            while True:
                ended = stop.is_set()
                rest += lines.read()
                *whole, rest = rest.split("\n")
                for line in whole:
                    with contextlib.suppress(json.JSONDecodeError):
                        on_event(json.loads(line))
                if ended:
                    return
                stop.wait(POLL_S)

    thread = threading.Thread(target=follow, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=10)
