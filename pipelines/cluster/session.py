"""The Ray cluster of a run: joined, or started on this machine; and what of it a stage's workers take."""

from __future__ import annotations

import atexit
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amlora_dist.errors import UserError
from pipelines.cluster import resources

if TYPE_CHECKING:
    from pipelines.cluster.resources import Demand

log = logging.getLogger(__name__)

NODES_DEADLINE_S = 10.0
"""How long a run waits at its start for nodes that are on their way, before it says what is missing."""
RECOVERY_DEADLINE_S = 120.0
"""The same after nodes were lost."""
PASSED_ON = ("NCCL_", "TORCH_NCCL_", "GLOO_", "FI_", "UCX_", "DS_", "HF_HUB_", "HF_HOME")
"""How settings of the network libraries, of DeepSpeed and of the Hub begin, which workers on other nodes need too."""


@dataclass(frozen=True, slots=True)
class WorkerPlacement:
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


class RayCluster:
    """The cluster of a run: joined when the first stage needs it, let go at the end."""

    def __init__(self, workers: int, *, verbose: bool) -> None:
        """``workers``: the most that will be wanted; a cluster that is started here has room for them."""
        self._most, self._verbose = workers, verbose
        self._started = False
        self.joined = False
        """Whether this object called ``ray.init``; what somebody else did is theirs to end."""
        self.own = False
        """Whether the cluster is this run's own, on this machine: no node will ever join it."""
        self._beginning: threading.Thread | None = None
        self._begun, self._over = threading.Event(), threading.Event()
        self._failed: BaseException | None = None

    def __enter__(self) -> RayCluster:
        return self

    def __exit__(self, *error: object) -> None:
        self.leave()

    def leave(self, *, shut_down: bool = True) -> None:
        """Let the cluster go.

        Args:
            shut_down: whether Ray is; else it ends with this process, for threads are left that wait for its answers, and
                Ray ends a process that asks it anything afterwards, with an exit code of its own.
        """
        self.wait_for_begin()
        if not shut_down:
            _leave_to_the_end()
            return
        if self.joined:
            _shut_down()
        self._over.set()

    def begin(self, then: Callable[[], None] | None = None) -> None:
        """Start or join it in a thread, while this one does other things; ``ready`` tells what came of it.

        Args:
            then: begins, in that thread, what needs a cluster; what fails of it is tried again where it is needed.
        """
        if self._beginning is None and not self._started:
            self._beginning = threading.Thread(target=self._begin, args=(then,), name="ray start", daemon=True)
            self._beginning.start()

    def _begin(self, then: Callable[[], None] | None) -> None:
        try:
            self._start()
        except BaseException as error:  # noqa: BLE001 (raised by the thread that waits)
            self._failed = error
        else:
            try:
                if then is not None:
                    then()
            except Exception as error:  # noqa: BLE001 (whoever needs it does it again, and says what is wrong)
                log.debug("not begun ahead of time: %s", error)
        self._begun.set()
        self._over.wait()  # Ray's processes end with the thread that has started them

    def wait_for_begin(self) -> None:
        """Until what ``begin`` has begun is there, or has failed."""
        if self._beginning is not None:
            self._begun.wait()

    def ready(self, placement: WorkerPlacement, *, again: bool) -> None:
        """Join the cluster, and see that the workers fit in it; called in the main thread, before each attempt.

        Args:
            placement: the workers.
            again: after a failure, when nodes may be on their way back.

        Raises:
            UserError: what is missing, all of it.
        """
        self._have_begun()
        deadline = time.monotonic() + resources.deadline_s(RECOVERY_DEADLINE_S if again else NODES_DEADLINE_S)
        asked: list[dict[str, float]] = []
        try:
            while lacking := resources.shortfalls(placement.demand, supply := resources.in_cluster()):
                if self.own or time.monotonic() > deadline:
                    resources.require(lacking)
                if (bundles := _bundles(placement.demand, supply)) != asked:
                    _ask_for(bundles)
                    asked = bundles
                time.sleep(0.5)
        finally:
            if asked:
                _ask_for([])  # the stage's own workers keep the nodes from here on

    def joined_gpus(self) -> bool | None:
        """Whether a cluster that is joined has GPUs now; None for one of this machine's own, whose GPUs are this process's.

        Raises:
            UserError: it is not there.
        """
        if not os.environ.get("RAY_ADDRESS"):
            return None
        self._have_begun()
        return self.use_gpus()

    def _have_begun(self) -> None:
        self.wait_for_begin()
        if isinstance(failed := self._failed, UserError):
            raise failed
        if failed is not None:  # such as Ray's own deadline of 30 s, on a machine that is busy
            log.warning("Ray did not start (%s), trying once more", failed)
            self._failed = None
            _shut_down()
        self._start()

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
                cpus = max(os.cpu_count() or 1, self._most)
                # "local": without it Ray would join whatever cluster somebody has started on this machine.
                options |= {"address": "local", "num_cpus": cpus, "include_dashboard": False}
                self.own = True
            elif passed := _passed_on():
                options["runtime_env"] = {"env_vars": passed}
            self.joined = True
            try:
                ray.init(**options)
            except ConnectionError as error:
                raise UserError(
                    f"RAY_ADDRESS: found {os.environ.get('RAY_ADDRESS', '')!r}, expected a Ray cluster that can be joined"
                    f" ({' '.join(str(error).split())[:300]}); start it, or fix the address"
                ) from error
        self._started = True

    def workers(self, wanted: WorkerPlacement) -> int:
        """How many workers the next stage takes of those that are there.

        Raises:
            UserError: no number of them divides the batch.
        """
        import ray

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


def _shut_down() -> None:
    import ray

    ray.shutdown()


_left_to_the_end = threading.Event()


def _leave_to_the_end() -> None:
    """Take back what Ray does when Python ends: its processes notice that their driver is gone."""
    import ray

    atexit.unregister(ray.shutdown)
    _left_to_the_end.set()


def must_end_at_once() -> bool:
    """Whether threads still wait for Ray's answers: Python's own end would take the library from under them, and the
    process would die of that."""
    return _left_to_the_end.is_set()


def _bundles(demand: Demand, supply: resources.Supply) -> list[dict[str, float]]:
    """What the workers will take, for an autoscaler; as CPUs where no node with a GPU has come yet."""
    return [{"GPU": demand.gpu_share} if supply.gpus else {"CPU": 1.0}] * demand.workers


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
