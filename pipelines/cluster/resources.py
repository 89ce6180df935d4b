"""Whether a run can fit at all, asked before any worker starts: CPUs, GPUs, memory and disk, all that is missing at once.

The demand is a lower bound: what is refused here could never run. Whether a stage that passes has room to breathe is
for ``amlora plan`` to say.
"""

from __future__ import annotations

import math
import os
import shutil
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from amlora_dist.errors import UserError, plain_reason
from amlora_dist.quantisation import BYTES as QUANTISED

if TYPE_CHECKING:
    from amlora_dist.config.loading import RunConfig

GIB = 1 << 30
PROCESS_BYTES = 300 << 20
"""Memory of one worker that has imported torch and done nothing."""
KNOCK_DEADLINE_S = 10.0
DEADLINE = "AMLORA_RESOURCES_DEADLINE_S"
BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True, slots=True)
class Demand:
    """What a run needs at least."""

    workers: int
    parameters: int
    """Of the base model."""
    trainable: int
    """Parameters of the adapter that one stage trains."""
    stages: int
    dtype: str
    zero_stage: int
    gpu_share: float = 1.0
    """Of a GPU, for each worker."""
    keeps_best: bool = False
    """Whether a checkpoint holds the best adapter besides the current one."""
    quantisation: str = "none"
    """Of the base model."""

    @property
    def weights(self) -> int:
        """Bytes of one copy of the base model, at least."""
        return int(self.parameters * QUANTISED.get(self.quantisation, BYTES[self.dtype]))

    @property
    def memory(self) -> int:
        """Bytes over all nodes: the weights, in every process or (ZeRO-3) once; master weights, moments and gradients of
        what trains; and the processes themselves."""
        copies = 1 if self.zero_stage == 3 else max(self.workers, 1)
        return self.weights * copies + 16 * self.trainable + PROCESS_BYTES * max(self.workers, 1)

    @property
    def disk(self) -> int:
        """Bytes: the checkpoints that one stage keeps and the one it writes, and every adapter in store and working copy."""
        from amlora_dist.training.checkpoint import KEEP

        return (16 if self.keeps_best else 12) * self.trainable * (KEEP + 1) + 2 * 4 * self.trainable * self.stages


@dataclass(frozen=True, slots=True)
class Supply:
    """What there is; None where nobody knows."""

    cpus: float | None = None
    gpus: float | None = None
    memory: int | None = None
    """Bytes over all nodes."""
    largest_node: int | None = None
    """Bytes of memory of the largest node."""
    disk: int | None = None
    storage: Path | None = None
    """Whose disk it is."""


def shortfalls(demand: Demand, supply: Supply) -> list[str]:
    """What the run lacks, each with the fix; empty when it can fit."""
    found = []
    count = demand.workers
    if supply.gpus:
        if supply.gpus < count * demand.gpu_share:
            found.append(_too_few(count, "GPUs", supply.gpus, demand.gpu_share))
    elif supply.cpus is not None and supply.cpus < count:
        found.append(_too_few(count, "CPUs", supply.cpus))
    if not supply.gpus and supply.memory is not None and supply.memory < demand.memory:
        found.append(
            f"workers: {count} need {_size(demand.memory)} of memory at least, with {demand.parameters:,} parameters in"
            f" {demand.dtype}; there are {_size(supply.memory)}: lower `workers`, or set dtype=bf16 or"
            " deepspeed.zero_stage=3"
        )
    each = PROCESS_BYTES + (demand.weights if demand.zero_stage < 3 else 0)
    if not supply.gpus and not found and supply.largest_node is not None and supply.largest_node < each:
        found.append(
            f"workers: one needs {_size(each)} of memory at least on one node, the largest node has"
            f" {_size(supply.largest_node)}: set deepspeed.zero_stage=3, or take larger nodes"
        )
    if supply.disk is not None and supply.disk < demand.disk:
        found.append(
            f"storage: {supply.storage} needs {_size(demand.disk)} at least for checkpoints and adapters, its disk has"
            f" {_size(supply.disk)}: make room, or name a folder on another disk (default: in AMLORA_HOME)"
        )
    return found


def require(lacking: Sequence[str]) -> None:
    """End here if something is lacking.

    Raises:
        UserError: names everything.
    """
    if lacking:
        raise UserError("configuration: this run can never fit here:\n" + "\n".join(f"  - {one}" for one in lacking))


def least_demand(config: RunConfig, *, gpu_share: float = 1.0) -> Demand:
    """What a configuration needs at least, as far as this machine can tell: neither rows nor weights are read, nothing is
    fetched, and a model of which no ``config.json`` is at hand counts as nothing."""
    from amlora_dist.methods import method_class
    from amlora_dist.methods.kinds import Trains
    from amlora_dist.planning.shapes import shape_at_hand

    shape = shape_at_hand(config.model, config.adapters, config.router)
    trains = method_class(config.method).trains is not Trains.NOTHING
    width = shape.adapter_width if shape is not None and trains else 0
    return Demand(
        config.workers if config.min_workers is None else config.min_workers,
        0 if shape is None else shape.parameters,
        config.adapters.rank * width, len(config.tasks), "fp32" if config.dtype == "fp32" else "bf16", config.zero_stage,
        gpu_share, quantisation="nf4" if config.parent is not None else config.model.quantisation,  # a parent's may be any
    )  # fmt: skip


def check_folder(folder: Path, name: str = "AMLORA_HOME") -> None:
    """See that what ``name`` says is a folder that can be written, or can be made.

    Raises:
        UserError: it is not.
    """
    try:
        folder.resolve().is_dir()
        above = _existing(folder)
    except (OSError, RuntimeError, ValueError) as error:  # a name that no disk takes, links in a circle
        raise UserError(
            f"{name}: found {folder}, expected a folder that can be written ({plain_reason(error)}); set it to another"
        ) from None
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        what = "cannot be written" if above.is_dir() else "is no folder"
        raise UserError(
            f"{name}: found {folder}, expected a folder that can be written ({above} {what}); set it to another folder"
        )


def check_file(file: Path, name: str) -> None:
    """See that the file that ``name`` says can be written, or can be made with its folders.

    Raises:
        UserError: it cannot.
    """
    if file.is_dir():
        raise UserError(f"{name}: found the folder {file}, expected a file; name one in it, such as {file / 'page.html'}")
    check_folder(file.absolute().parent, name)


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def local_supply(storage: Path, *, alone: bool) -> Supply:
    """This machine: the disk of the storage and, when nothing runs elsewhere, GPUs and memory."""
    import psutil

    disk = shutil.disk_usage(_existing(storage)).free
    if not alone:
        return Supply(disk=disk, storage=storage)
    import torch

    gpus = torch.cuda.device_count()
    return Supply(gpus=gpus, memory=psutil.virtual_memory().available, disk=disk, storage=storage)


def in_cluster() -> Supply:
    """The nodes of the Ray cluster that this process has joined."""
    import ray

    return supply_of([node["Resources"] for node in ray.nodes() if node["Alive"]])


def supply_of(nodes: Sequence[Mapping[str, float]]) -> Supply:
    """What nodes have together, each given by Ray's names of its resources; memory in bytes."""
    memory = [int(node.get("memory", 0) + node.get("object_store_memory", 0)) for node in nodes]
    return Supply(
        cpus=sum(node.get("CPU", 0.0) for node in nodes),
        gpus=sum(node.get("GPU", 0.0) for node in nodes),
        memory=sum(memory),
        largest_node=max(memory, default=0),
    )


def check_ray_address() -> None:
    """See that somebody listens where ``RAY_ADDRESS`` points, before anything is written or waited for.

    Raises:
        UserError: nobody does, or it is no address of a cluster's head.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    if address in ("", "auto", "local"):
        return
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdecimal() or int(port) > 65535:
        raise UserError(
            f"RAY_ADDRESS: found {address!r}, expected HOST:PORT of the cluster's head; unset it to use this machine, or"
            " use `amlora submit` from outside the cluster"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_DEADLINE_S).close()
    except OSError as error:
        raise UserError(
            f"RAY_ADDRESS: found {address!r}, expected the address of a Ray cluster that answers ({plain_reason(error)}):"
            " start it, fix the address, or unset RAY_ADDRESS to use this machine"
        ) from error


def deadline_s(default: float, environment: Mapping[str, str] = os.environ) -> float:
    """Seconds to wait for nodes that are on their way: ``AMLORA_RESOURCES_DEADLINE_S``, for clusters that grow."""
    value = environment.get(DEADLINE)
    if value is None:
        return default
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise UserError(f"{DEADLINE}: found {value!r}, expected seconds, such as 600")
    return seconds


def _too_few(workers: int, kind: str, have: float, each: float = 1.0) -> str:
    need = f"{workers} workers need {workers * each:g} {kind}"
    return f"workers: {need}, the cluster has {have:g}: lower `workers`, or add nodes"


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / (1 << 20):.1f} MiB"
