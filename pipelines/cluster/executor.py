"""Stages on the workers of a Ray cluster: a group of workers lives for a run, and is made again when it has to be."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Literal

from pipelines.cluster import resources
from pipelines.cluster.session import RayCluster
from pipelines.cluster.worker_group import WorkerGroup

if TYPE_CHECKING:
    from amlora_dist.training.stage_spec import StageWork
    from pipelines.cluster.session import WorkerPlacement
    from pipelines.runs.executor import OnEvent

GROWTH_SHARE = 0.1
"""Of the largest node's memory: workers of which one has grown by more since its first stage are replaced."""


class ClusterExecutor:
    """The workers of a cluster, as ``pipelines.runs.executor.Executor`` says.

    A group of workers ends after a failure, before a stage that takes another number of workers, and when the memory of
    one has grown past ``GROWTH_SHARE``; with ``lifetime`` ``stage`` after every stage.

    Args:
        workers: the most that a stage takes.
        lifetime: of a group.
        verbose: show what Ray says.
    """

    def __init__(self, workers: int, *, lifetime: Literal["run", "stage"] = "run", verbose: bool = False) -> None:
        self._cluster = RayCluster(workers, verbose=verbose)
        self._lifetime = lifetime
        self._group: WorkerGroup | None = None
        self._over = False
        self._left: list[WorkerGroup] = []
        """Groups that had not ended when they were let go."""

    def __enter__(self) -> ClusterExecutor:
        return self

    def __exit__(self, *error: object) -> None:
        self._over = True
        self._cluster.wait_for_begin()  # it may be about to begin a group
        group, self._group = self._group, None
        cause = error[1] if len(error) > 1 else None
        at_once = cause is not None and not isinstance(cause, Exception)  # a signal: who is starting is not waited for
        if group is not None and not group.stages and not at_once:  # idle workers end when they are asked to
            error = (None,)
        if group is not None and error[0] is None:
            group.end()
        elif group is not None:
            self._abandon(group)
        # Ray ends a process of which a thread still asks it something after it was shut down.
        self._cluster.leave(shut_down=not any(one.lives for one in self._left))

    def prepare(self, placement: WorkerPlacement | None = None) -> None:
        """Start or join the cluster in the background, and in one of our own the workers: they import what they need
        while the driver is at its rows. In a cluster that is joined, others may need what idle workers would hold."""
        self._cluster.begin(None if placement is None else partial(self._begin_group, placement))

    def _begin_group(self, placement: WorkerPlacement) -> None:
        if self._cluster.own and not self._over:
            self._group = WorkerGroup(placement, placement.workers, gpus=self._cluster.use_gpus())

    def gpus(self) -> bool | None:
        """Whether the cluster that is joined has GPUs, of which this process may have none; None where none is joined."""
        return self._cluster.joined_gpus()

    def ready(self, placement: WorkerPlacement, *, again: bool) -> None:
        """Join the cluster, see that the workers fit in it, and have them started."""
        group = self._group
        lost = group is not None and not group.lives  # while it had nothing to do: nodes may be on their way back
        self._cluster.ready(placement, again=again or lost)
        workers, gpus = self._cluster.workers(placement), self._cluster.use_gpus()
        if group is not None and (lost or group.workers != workers):
            self.release()
        if self._group is None:
            self._group = WorkerGroup(placement, workers, gpus=gpus)

    def run(self, work: StageWork, on_event: OnEvent, watch: Callable[[], None]) -> None:
        """Hand the stage to the workers, and wait for its end."""
        group = self._group
        assert group is not None, "ready() comes first"
        try:
            group.run(work, on_event, watch)
        except BaseException:
            self._group = None
            self._abandon(group)
            raise
        memory = resources.in_cluster().largest_node
        if self._lifetime == "stage" or has_outgrown(group.grown, memory):
            self.release()

    def _abandon(self, group: WorkerGroup) -> None:
        group.abandon()
        if group.lives:
            self._left.append(group)

    def release(self) -> None:
        """Let the workers end: others may need what they hold."""
        group, self._group = self._group, None
        if group is not None:
            group.end()


def has_outgrown(grown: int, memory: int | None) -> bool:
    """Whether workers are to be replaced: one has grown by ``grown`` bytes, the largest node has ``memory``."""
    return bool(memory) and grown > GROWTH_SHARE * (memory or 0)
