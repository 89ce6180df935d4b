"""One trial, in a process that Ray Tune starts: it drives one durable sequence and reports after every stage."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from amlora_dist.config.loading import from_mapping
from amlora_dist.config.search_space import DIRECTIONS
from amlora_dist.errors import AmloraError, HeldError, is_full
from pipelines.runs.progress import Silent

if TYPE_CHECKING:
    from amlora_dist.training.worker_cache import WorkerCache

LEAVING_S = "300"
"""Seconds for which a stopped trial may close what it has open."""
HELD_DEADLINE_S = 120.0
"""Seconds for which a trial waits for its run to be let go."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where the things of all trials lie. It travels through Ray's memory alone: Tune writes a trial's order to its
    files, and an address may hold a password."""

    home: str
    folder: str
    """That relative paths of the configuration mean, if this node has it."""
    tracking_uri: str
    """MLflow's, where the configuration names none: this process has not the search's variables."""
    config: dict[str, Any]
    """The keys of the configuration that say where things lie (``privacy.DROPPED``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What a trial is to do; plain values, because it travels to another node."""

    number: int
    run_id: str
    mlflow_run: str
    config: dict[str, Any]
    """Of the trial's run (``to_mapping``), without what all trials have in ``Places.config``."""
    objectives: list[str]
    stages: int
    """Of the whole sequence."""
    gpus: float
    threads: int
    """Of a worker on CPUs; 0: as many as there are."""
    share: bool
    verbose: bool


@dataclass(slots=True)
class _FirstStep(Silent):
    """Notes when a trial's first optimizer step is done."""

    at: float | None = field(default=None)

    def step(self, done: int, total: int, loss: float | None, tokens_per_second: float | None) -> None:
        self.at = self.at or time.time()


def run_trial(config: Mapping[str, Any], places: Places) -> None:
    """The trainable: runs in a thread of a Tune actor, which may have run other trials before.

    What a user could fix, and training that failed for good, is reported and not raised: Tune starts a trial again
    when its process dies, and doing this again would only fail again.
    """
    from ray import tune

    from amlora_dist.training.failures import StoppedError
    from pipelines.cluster.library_output import set_up
    from pipelines.runs.sequence import SearchContext, run_sequence

    order = Order(**json.loads(config["order"]))
    os.environ["AMLORA_HOME"], os.environ["MLFLOW_TRACKING_URI"] = places.home, places.tracking_uri
    # Read by Tune in this process: a stopped trial lets go of its run before its process is used again. With the 2 s that
    # Tune gives on its own the next trial would be lost when this one takes longer.
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = LEAVING_S
    with contextlib.suppress(OSError):
        os.chdir(places.folder)
    set_up(verbose=order.verbose)
    run_config = from_mapping(places.config | order.config)
    if run_config.workers == 0 and order.threads:
        import torch

        torch.set_num_threads(order.threads)
    watch = _FirstStep()
    last: dict[str, Any] = {"number": order.number, "stage": 0, "stages": order.stages, "metrics": {}, "curve": []}

    def on_stage(result: dict[str, Any]) -> None:
        last.update(_report(result, order.objectives), first_step=watch.at)
        last["curve"].append({name: last["metrics"].get(name) for name in DIRECTIONS})
        try:
            tune.report({"report": json.dumps(last)})
        except SystemExit:  # how Tune stops a trial between two reports
            raise StoppedError(f"trial {order.number} was stopped by its search") from None

    within = SearchContext(
        run=order.mlflow_run, on_stage=on_stage, share=order.share, gpus=order.gpus, threads=order.threads,
        cache=None if run_config.workers else _cache_of_this_process(),
    )  # fmt: skip
    deadline = time.monotonic() + HELD_DEADLINE_S
    try:
        while True:
            try:
                # The search has compared the data of all its trials.
                run_sequence(
                    run_config, run_id=order.run_id, progress=watch, verbose=order.verbose, within=within,
                    allow_changed_data=True,
                )  # fmt: skip
                return
            except HeldError:  # by a process of a start that was killed, which has not noticed yet
                if time.monotonic() > deadline:
                    raise
    except StoppedError:
        raise SystemExit(0) from None
    except AmloraError as error:
        with contextlib.suppress(SystemExit):
            tune.report({"report": json.dumps(last | {"error": str(error), "outage": is_outage(error)})})


@functools.cache
def _cache_of_this_process() -> WorkerCache:
    """The base model and rows, for all trials that this process runs, one after another."""
    from amlora_dist.training.worker_cache import WorkerCache

    return WorkerCache()


def is_outage(error: AmloraError) -> bool:
    """Whether a trial failed for want of what all trials need: a disk with room, MLflow within reach. Then the search
    ends, and the trial goes on in its next start; to take it for failed would be the end of it."""
    from amlora_dist.registry.connection import StoreError

    return isinstance(error, StoreError) or is_full(error)


def _report(result: Mapping[str, Any], objectives: list[str]) -> dict[str, Any]:
    """What the search keeps of a trial: its matrix, its stages and their metrics so far."""
    metrics = dict(result["metrics"])
    return {
        "stage": len(result["stages"]),
        "tasks": result["tasks"],
        "metrics": metrics,
        "objectives": [metrics.get(name) for name in objectives],
        "accuracy_matrix": result["accuracy_matrix"],
        "records": result["stages"],
        "registered_model": result["registered_model"],
    }
