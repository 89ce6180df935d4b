"""What runs on every worker of a group: stage after stage, as their plans come, until there are no more."""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Callable
from typing import Any

from amlora_dist.config.loading import home
from amlora_dist.crash_points import reach
from amlora_dist.errors import AmloraError
from pipelines.cluster.event_channel import WorkerEnd
from pipelines.cluster.library_output import quiet_libraries
from pipelines.cluster.worker_errors import error_event

ERROR_EVENT, DONE_EVENT = "error", "done"


def run_stages(config: dict[str, Any]) -> None:
    """The training function of Ray Train. ``config``: ``channel``, and ``threads`` of this worker (0: as they are)."""
    entered = time.time()
    import psutil
    import torch
    from ray.train import get_context
    from ray.train.torch import get_device

    from amlora_dist.training.engine import join_process_group
    from amlora_dist.training.loop import STOP_FILE
    from amlora_dist.training.stage import run_stage
    from amlora_dist.training.stage_spec import StageWork
    from amlora_dist.training.worker_cache import WorkerCache

    if config["threads"]:
        torch.set_num_threads(config["threads"])
    if os.environ.get("AMLORA_VERBOSE") != "1":
        quiet_libraries()
    join_process_group()  # imports DeepSpeed
    gc.freeze()
    channel, cache = WorkerEnd(config["channel"]), WorkerCache()
    rank, process = get_context().get_world_rank(), psutil.Process()
    report: Callable[[dict[str, Any]], None] = channel.tell if rank == 0 else _ignore
    about = {"kind": "worker", "process": process.create_time(), "entered": entered, "ready": time.time()}
    while (plan := channel.next_plan()) is not None:
        work = StageWork.from_json(plan)
        if work.apart:
            work = work.moved(home() / "storage", home() / "cache")
            work.path.mkdir(parents=True, exist_ok=True)
        report(about)
        reach("workers_started")
        # The driver puts its stop file into the folder of the stage: where that is this node's own, it needs a message.
        stops = channel.stops_in(work.path / STOP_FILE) if rank == 0 and work.apart else contextlib.nullcontext()
        try:
            with stops:
                run_stage(work, distributed=True, report=report, device=get_device(), cache=cache)
        except AmloraError as error:
            channel.tell(error_event(error, rank) | {"kind": ERROR_EVENT}, wait=True)
            raise
        del work
        channel.tell({"kind": DONE_EVENT, "rank": rank, "resident": process.memory_info().rss})


def _ignore(event: dict[str, Any]) -> None:
    """Events of other ranks than 0."""
