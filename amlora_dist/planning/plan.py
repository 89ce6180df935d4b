"""A run on a cluster, before it is paid for: memory under every ZeRO stage, the cost of every stage, and what to change."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from amlora_dist.planning.memory import GIB, Memory, MemoryLayout, Offload, TrainedShare, activation_table, memory_of
from amlora_dist.planning.work import Machine, PlannedWork, TaskShape, TrainingPlan, stages

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from amlora_dist.planning.shapes import Shape

SMALL_BUCKET = 50_000_000
MOST_NODES = 1024
CHOICES: tuple[tuple[int, Offload], ...] = (
    (0, "none"), (1, "none"), (1, "optimizer"), (2, "none"), (2, "optimizer"), (3, "none"), (3, "optimizer"),
    (3, "parameters"), (3, "both"), (3, "nvme"),
)  # fmt: skip
"""ZeRO stages and offloads that are compared."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """Bytes are of one GPU and of one node; ``host_memory`` is None where it is not known."""

    nodes: int
    gpus_per_node: int
    gpu_memory: int
    host_memory: int | None = None

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def ranks_per_node(self) -> int:
        return self.gpus_per_node

    def row(self, layout: MemoryLayout, memory: Memory) -> PlanRow:
        """Whether a layout fits."""
        host = self.gpus_per_node * max(memory.host, memory.loading) + memory.reader
        fits = memory.gpu <= self.gpu_memory and (self.host_memory is None or host <= self.host_memory)
        return PlanRow(layout, memory, memory.gpu, fits, host)


@dataclass(frozen=True, slots=True)
class CpuCluster:
    """Nodes without GPUs: each worker takes one CPU. Bytes are of one node."""

    nodes: int
    cpus_per_node: int
    memory_per_node: int
    workers: int = 1

    @property
    def ranks(self) -> int:
        return self.workers

    @property
    def ranks_per_node(self) -> int:
        """On the node that has most."""
        return -(-self.workers // self.nodes)

    def row(self, layout: MemoryLayout, memory: Memory) -> PlanRow:
        """Whether a layout fits: a CPU for each worker, and the workers of a node in its memory."""
        node = self.ranks_per_node * memory.worker
        fits = self.ranks_per_node <= self.cpus_per_node and node <= self.memory_per_node
        return PlanRow(layout, memory, memory.worker, fits, node)


@dataclass(frozen=True, slots=True)
class PlanRow:
    """Memory under one ZeRO stage and offload, at the last stage of the sequence, where the bank is largest."""

    layout: MemoryLayout
    memory: Memory
    total: int
    """Bytes of one GPU, or of one worker on CPUs."""
    fits: bool
    host_per_node: int
    """Most bytes on the host of one node: while it loads, or by offloading, whichever is more; without GPUs all that its
    workers hold."""


@dataclass(frozen=True, slots=True)
class Plan:
    """All of it. ``fix`` is the smallest change that makes the configured layout fit; None when it does."""

    shape: Shape
    cluster: Cluster | CpuCluster
    machine: Machine
    recipe: TrainingPlan
    configured: PlanRow
    rows: list[PlanRow]
    stages: list[PlannedWork]
    fix: dict[str, Any] | None
    remarks: list[str]
    activations: list[dict[str, int]]
    """``memory.activation_table`` for the longest row of the tasks, and for shorter ones."""

    def to_json(self) -> dict[str, Any]:
        """Bytes, counts, FLOPs and hours under names that say so."""
        return {
            "model": {
                "source": self.shape.source,
                "parameters": self.shape.parameters,
                "layers": len(self.shape.layers),
                "adapted_modules": len(self.shape.targets),
                "largest_layer_parameters": self.shape.largest_layer,
            },
            "cluster": asdict(self.cluster),
            "machine": asdict(self.machine),
            "configured": _row_json(self.configured, self.unit),
            "memory": [_row_json(row, self.unit) for row in self.rows],
            "activations": self.activations,
            "stages": [asdict(stage) for stage in self.stages],
            "totals": self.totals(),
            "fits": self.configured.fits,
            "fix": self.fix,
            "remarks": self.remarks,
        }

    @property
    def unit(self) -> str:
        """What a rank computes on: ``gpu``, or ``worker`` on CPUs."""
        return "worker" if isinstance(self.cluster, CpuCluster) else "gpu"

    def totals(self) -> dict[str, float]:
        """Sums over the stages."""
        return {
            "registry_bytes": sum(s.registry_bytes for s in self.stages),
            "steps": sum(s.steps for s in self.stages),
            "tokens": sum(s.tokens for s in self.stages),
            "flops": sum(s.training_flops + s.scoring_flops for s in self.stages),
            "training_hours": sum(s.training_hours for s in self.stages),
            "scoring_hours": sum(s.scoring_hours for s in self.stages),
        }


def _row_json(row: PlanRow, unit: str) -> dict[str, Any]:
    memory = asdict(row.memory) | {unit: row.total}
    return {
        "zero": row.layout.zero,
        "offload": row.layout.offload,
        "gradient_checkpointing": row.layout.checkpointing,
        "micro_batch_size": row.layout.micro_batch,
        "reduce_bucket_size": row.layout.bucket,
        "bytes": memory,
        "host_bytes_per_node": row.host_per_node,
        "fits": row.fits,
    }


def make_plan(
    shape: Shape, tasks: Sequence[TaskShape], recipe: TrainingPlan, layout: MemoryLayout, cluster: Cluster | CpuCluster,
    machine: Machine, *, eager: bool = False, whole_parameters: bool = False,
) -> Plan:  # fmt: skip
    """Work everything out.

    Args:
        shape: of the base model.
        tasks: in order.
        recipe: the run's numbers.
        layout: as configured, on all ranks of the cluster.
        cluster: what there is.
        machine: how fast it is.
        eager: attention keeps its scores.
        whole_parameters: the method, or the base model as it is quantised, cannot work on ZeRO-3's partitions.
    """
    work = stages(shape, tasks, recipe, layout, machine)
    last = work[-1]
    trained = TrainedShare(new=last.adapter, old=last.bank - last.adapter)
    longest = max(task.length + task.answer for task in tasks)
    targets = max(task.answer for task in tasks)
    on_cpus = isinstance(cluster, CpuCluster)
    choices = [
        one for one in CHOICES if not (whole_parameters and one[0] == 3) and not (on_cpus and one[1] != "none")
    ]
    if on_cpus:  # host and worker are one memory; of a bucket only the pages that gradients reach are ever held
        layout = replace(layout, offload="none", bucket=min(layout.bucket, trained.new))

    def row(candidate: MemoryLayout, on: Cluster | CpuCluster = cluster) -> PlanRow:
        candidate = replace(candidate, ranks=on.ranks)
        memory = memory_of(shape, trained, candidate, size=recipe.size, length=longest, targets=targets, eager=eager)
        return on.row(candidate, memory)

    def rows_on(on: Cluster | CpuCluster) -> Iterator[PlanRow]:
        """Every way to lay the stage out, fewest changes first."""
        shares = sorted({layout.micro_batch, max(1, layout.micro_batch // 2), 1}, reverse=True)
        ways = itertools.product(
            [(layout.zero, layout.offload), *(c for c in choices if c[0] >= layout.zero)],
            {layout.checkpointing, True}, shares, sorted({layout.bucket, min(layout.bucket, SMALL_BUCKET)}, reverse=True),
        )  # fmt: skip
        layouts = [
            replace(layout, zero=zero, offload=offload, checkpointing=keep, micro_batch=micro, bucket=bucket)
            for (zero, offload), keep, micro, bucket in ways
            if not (whole_parameters and zero == 3)
        ]
        for candidate in sorted(dict.fromkeys(layouts), key=lambda c: _distance(layout, c)):
            yield row(candidate, on)

    configured = row(layout)
    fix = None
    if not configured.fits:
        found = next((r for r in rows_on(cluster) if r.fits), None)
        nodes = cluster.nodes
        while found is None and nodes < MOST_NODES:
            nodes += 1 if nodes < 16 else nodes // 8
            found = next((r for r in rows_on(replace(cluster, nodes=nodes)) if r.fits), None)
        fix = {} if found is None else _changes(layout, found.layout, cluster.nodes, nodes)
    rows = [row(layout.with_zero(zero, offload)) for zero, offload in choices]
    table = activation_table(
        shape, layout, size=recipe.size, lengths=sorted({-(-longest // n) for n in (4, 2, 1)}), targets=targets, eager=eager,
        ranks=recipe.rank * len(tasks),
    )  # fmt: skip
    remarks = _remarks(shape, recipe, layout, configured, cluster)
    return Plan(shape, cluster, machine, recipe, configured, rows, work, fix, remarks, table)


def _distance(before: MemoryLayout, after: MemoryLayout) -> tuple[int, int, bool, int, int]:
    """How much a change asks for: first how many keys change, then the kind that costs least time."""
    return (
        len(_changes(before, after, 0, 0)),
        ("none", "optimizer", "parameters", "both", "nvme").index(after.offload),
        after.checkpointing != before.checkpointing,
        after.zero,
        before.micro_batch - after.micro_batch,
    )


def _changes(before: MemoryLayout, after: MemoryLayout, nodes: int, needed: int) -> dict[str, Any]:
    out: dict[str, Any] = {}
    if needed != nodes:
        out["--nodes"] = needed
    if after.zero != before.zero:
        out["deepspeed.zero_stage"] = after.zero
    if after.bucket != before.bucket:
        out["deepspeed.zero_optimization.reduce_bucket_size"] = after.bucket
    if after.checkpointing != before.checkpointing:
        out["training.gradient_checkpointing"] = after.checkpointing
    if after.micro_batch != before.micro_batch:
        out["training.micro_batch_size"] = after.micro_batch
    then, now = _devices(before), _devices(after)
    for name in ("offload_optimizer", "offload_param"):
        if now[name] != then[name]:
            out[f"deepspeed.zero_optimization.{name}.device"] = now[name]
    if now["offload_param"] == "nvme" != then["offload_param"]:
        out["deepspeed.zero_optimization.offload_param.nvme_path"] = "/local/nvme"
    return out


def _devices(layout: MemoryLayout) -> dict[str, str]:
    """DeepSpeed's keys for where the optimizer's state and the weights are."""
    parameters = {"parameters": "cpu", "both": "cpu", "nvme": "nvme"}.get(layout.offload, "none")
    return {
        "offload_optimizer": "cpu" if layout.offload in ("optimizer", "both") else "none", "offload_param": parameters
    }  # fmt: skip


def _remarks(
    shape: Shape, recipe: TrainingPlan, layout: MemoryLayout, configured: PlanRow, cluster: Cluster | CpuCluster
) -> list[str]:
    out: list[str] = []
    kind = "workers" if isinstance(cluster, CpuCluster) else "GPUs"
    if isinstance(cluster, CpuCluster) and cluster.ranks_per_node > cluster.cpus_per_node:
        out.append(
            f"workers: {cluster.workers} need {cluster.ranks_per_node} CPUs on a node, there are {cluster.cpus_per_node}"
        )
    if recipe.batch_size < layout.ranks:
        out.append(
            f"training.batch_size {recipe.batch_size} is less than {layout.ranks} {kind}:"
            f" {layout.ranks - recipe.batch_size} of them compute at weight 0 in every step"
        )
    if layout.zero > 0 and layout.bucket > 10 * configured.layout.ranks + 10 * shape.adapter_width * recipe.rank:
        out.append(
            f"reduce_bucket_size {layout.bucket:,} holds {layout.bucket * recipe.size / GIB:.2f} GiB of every GPU for"
            f" {shape.adapter_width * recipe.rank:,} gradients; deepspeed.zero_optimization.reduce_bucket_size"
            f" {SMALL_BUCKET:,} is enough"
        )
    if layout.zero < 3 and cluster.ranks_per_node > 1 and configured.memory.loading > 16 * GIB:
        out.append(
            f"ZeRO {layout.zero}: each of {cluster.ranks_per_node} ranks of a node reads the whole model into host memory"
            f" at first ({configured.host_per_node / GIB:,.0f} GiB a node); ZeRO-3 loads by parts"
        )
    return out
