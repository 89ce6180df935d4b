"""``amlora plan``: a run's configuration and a cluster as numbers, and the plan as a table."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.table import Table

from amlora_dist.adapters.targets import default_depths
from amlora_dist.config.checks import resolve_tasks
from amlora_dist.config.loading import load_config
from amlora_dist.errors import FaultsError, UserError
from amlora_dist.methods import LORA, excluded, form_of, method_for
from amlora_dist.methods.kinds import Trains
from amlora_dist.planning.memory import FRAGMENTATION, GIB, PROCESS, RESERVED, MemoryLayout
from amlora_dist.planning.plan import Cluster, CpuCluster, Plan, make_plan
from amlora_dist.planning.shapes import shape_of
from amlora_dist.planning.work import Machine, TaskShape, TrainingPlan
from amlora_dist.tasks.sources import at_hand, load_task
from amlora_dist.training.batching import Layout as BatchLayout
from pipelines.cli.tables import console_for

if TYPE_CHECKING:
    from pathlib import Path

    from amlora_dist.config.loading import RunConfig
    from amlora_dist.tasks.task import TaskSpec

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}
OFFLOADED = {
    "none": "", "optimizer": " + optimizer on the host", "parameters": " + weights on the host",
    "both": " + both on the host", "nvme": " + weights on NVMe",
}  # fmt: skip
_UNITS = {"gpu": "GPU", "worker": "worker"}
CHARACTERS_PER_TOKEN = 3
"""Of a label's text: the tokenizer is not there yet, and this counts rather too many tokens."""


def bytes_of(text: str, option: str) -> int:
    """``80GiB``, ``80GB``, ``512Mi`` as bytes.

    Raises:
        UserError: it is not an amount of memory; names the option.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]i?)?b?\s*", text.lower())
    if not found or not float(found[1]):
        raise UserError(f"{option}: found {text!r}, expected an amount of memory such as 80GiB")
    return int(float(found[1]) * UNITS[found[2] or ""])


def cluster_of(
    nodes: int, *, gpus: int | None, gpu_memory: str | None, host_memory: str | None, cpus: int | None, memory: str | None
) -> Cluster | CpuCluster:
    """The cluster that the options of ``amlora plan`` say.

    Raises:
        UserError: an amount is none, or options of both kinds of cluster; names them.
    """
    if cpus is None and memory is None:
        host = None if host_memory is None else bytes_of(host_memory, "--host-memory")
        return Cluster(nodes, gpus or 8, bytes_of(gpu_memory or "80GiB", "--gpu-memory"), host)
    of_gpus = {"--gpus-per-node": gpus, "--gpu-memory": gpu_memory, "--host-memory": host_memory}
    if given := [name for name, value in of_gpus.items() if value is not None]:
        raise UserError(f"{given[0]}: found it with --cpus-per-node or --memory-per-node, expected one kind of cluster")
    if cpus is None or memory is None:
        lacking = "--cpus-per-node 16" if cpus is None else "--memory-per-node 64GiB"
        raise UserError(f"{lacking.split()[0]}: missing for a cluster without GPUs; give it, such as {lacking}")
    return CpuCluster(nodes, cpus, bytes_of(memory, "--memory-per-node"))


def plan_of(
    config_file: Path, overrides: list[str] | None, *, cluster: Cluster | CpuCluster, tflops: float, utilisation: float,
    bandwidth: float | None, rows: int | None,
) -> Plan:  # fmt: skip
    """The plan of a run on ``cluster``, which without GPUs holds the run's own ``workers``. ``rows`` replaces tasks
    whose rows are not at hand and not limited.

    Raises:
        UserError, FaultsError: the configuration, the model or a task is wrong, or rows are not known.
    """
    config, specs = _configuration(config_file, overrides)
    method = method_for(replace(config, dtype="bf16").stage_settings())
    if method.trains is Trains.NOTHING:
        raise UserError(f"method: {config.method!r} trains nothing; there is nothing to plan")
    if (form := form_of(config.method)) != LORA:
        raise UserError(f"method: {config.method!r} trains {form}; only methods that train {LORA} can be planned")
    on_cpus = isinstance(cluster, CpuCluster)
    if isinstance(cluster, CpuCluster):
        cluster = replace(cluster, workers=max(1, config.workers))
    share = BatchLayout.of(config.training.batch_size, cluster.ranks, config.training.micro_batch_size)
    layout = MemoryLayout.of(
        config.deepspeed, zero=config.zero_stage, ranks=cluster.ranks, micro_batch=share.micro,
        checkpointing=config.training.gradient_checkpointing,
    )  # fmt: skip
    shape = shape_of(config.model, config.adapters, config.router)
    recipe = TrainingPlan(
        batch_size=config.training.batch_size,
        epochs=config.training.epochs,
        rank=config.adapters.rank,
        probe_rows=config.training.probe_rows,
        learns_recipe=method.recipe(1).learned,
        holdout=config.router.holdout,
        text_alone=config.prompt_format == 2,
        depths=_depths(config, shape.below_router),
        evaluation_batch=config.evaluation.batch_size,
        cells=config.evaluation.cells,
        untrained=config.evaluation.untrained,
        oracle=config.evaluation.oracle,
        knockout=config.evaluation.knockout,
        size=4 if config.dtype == "fp32" or (on_cpus and config.dtype == "auto") else 2,
    )
    if bandwidth is None:
        between, within = (1.25, 10.0) if on_cpus else (25.0, 300.0)
        bandwidth = between if cluster.nodes > 1 else within
    machine = Machine(gpus=cluster.ranks, tflops=tflops, utilisation=utilisation, bandwidth=bandwidth)
    made = make_plan(
        shape,
        [_task_shape(config, spec, rows) for spec in specs],
        recipe, layout, cluster, machine,
        eager=config.model.attention == "eager",
        whole_parameters="zero_3" in excluded(config.method) or config.model.quantisation != "none",
    )  # fmt: skip
    if config.workers != cluster.ranks and not on_cpus:
        count = cluster.ranks
        remark = f"workers: {config.workers} in the configuration, planned are {count}: run with workers={count}"
        made.remarks.append(remark)
    return made


def _depths(config: RunConfig, router_layer: int) -> int:
    """Layers that the router's features are of, at most: methods with selectors of their own read one."""
    if config.prompt_format == 1:
        return 1
    return 1 + len(default_depths(router_layer) if config.router.depths is None else config.router.depths)


def _configuration(file: Path, overrides: list[str] | None) -> tuple[RunConfig, list[TaskSpec]]:
    """A run's configuration and tasks; the model's weights need not be there, a plan wants its shape only."""
    config = load_config(file, overrides)
    specs, faults = resolve_tasks(config)
    if faults:
        raise FaultsError(str(file), list(faults.values()))
    return config, specs


def _task_shape(config: RunConfig, spec: TaskSpec, rows: int | None) -> TaskShape:
    train, test = spec.max_train or config.task_defaults.max_train, spec.max_test or config.task_defaults.max_test
    if at_hand(spec, config.data_dir):
        known = load_task(
            spec, defaults=replace(config.task_defaults, on_bad_row="skip"), seed=config.seed, data_dir=config.data_dir,
            splits=("train", config.evaluation.split),
        )  # fmt: skip
        spec, rows_of = known.spec, known.rows
        train, test = len(rows_of["train"]), len(rows_of[config.evaluation.split])
    train, test = train or rows, test or rows
    if train is None or test is None:
        raise UserError(
            f"task {spec.name!r}: its rows are on the Hub and not limited; set task_defaults.max_train and max_test, or"
            " say how many to plan with: --rows N"
        )
    longest = max((len(text) for text in spec.label_texts), default=0)
    answer = spec.max_answer_tokens if spec.free_text else math.ceil(longest / CHARACTERS_PER_TOKEN) + 1
    return TaskShape(spec.name, train, test, int(spec.max_length or config.task_defaults.max_length), answer)


def show_plan(plan: Plan) -> None:
    """Print it."""
    console = console_for()
    shape, cluster, last = plan.shape, plan.cluster, plan.stages[-1]
    dtype = "fp32" if plan.recipe.size == 4 else "bf16"
    dtype += "" if shape.quantisation == "none" else f" with linear layers in {shape.quantisation}"
    lines = [
        f"model     {shape.source}: {shape.parameters:,} parameters, {dtype}, {_gib(shape.weight_bytes(plan.recipe.size))}",
        f"adapters  rank {plan.recipe.rank} on {len(shape.targets)} linear layers: {plan.stages[0].adapter:,} parameters"
        " each,"
        f" {last.bank:,} in the bank at the end",
        f"cluster   {_cluster(cluster)}",
    ]
    unit = _UNITS[plan.unit]
    lost = f"{_gib(RESERVED)} not ours" if plan.unit == "gpu" else f"{_gib(PROCESS)} for the process"
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
    console.print(
        f"\nMemory of one {unit} at stage {last.index}, GiB (micro-batch {plan.configured.layout.micro_batch}, checkpointing"
        f" {'on' if plan.configured.layout.checkpointing else 'off'}; total with {FRAGMENTATION:.0%} lost and"
        f" {lost})",
        markup=False, soft_wrap=True,
    )  # fmt: skip
    table = Table(box=None, pad_edge=False)
    table.add_column("ZeRO", no_wrap=True)
    for heading in ("weights", "gradients", "optimizer", "activations", "buffers", "total", "host/node"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("fits", no_wrap=True)
    for row in plan.rows:
        m = row.memory
        chosen = (row.layout.zero, row.layout.offload) == (plan.configured.layout.zero, plan.configured.layout.offload)
        name = f"{row.layout.zero}{OFFLOADED[row.layout.offload]}"
        amounts = (m.weights, m.gradients, m.optimizer, m.activations, m.buffers, row.total, row.host_per_node)
        table.add_row(
            name + (" *" if chosen else ""), *(f"{n / GIB:,.3f}" for n in amounts), "yes" if row.fits else "no"
        )
    console.print(table)
    node = "while loading, or by offloading, whichever is more" if plan.unit == "gpu" else "all that its workers hold"
    console.print(f"* as configured; host/node: {node}\n", markup=False)
    _show_activations(plan)
    _show_stages(plan)
    for remark in plan.remarks:
        console.print(f"note: {remark}", markup=False, soft_wrap=True)
    if plan.configured.fits:
        console.print("fits", markup=False)
    elif plan.fix:
        changes = " ".join(f"{key}{' ' if key.startswith('-') else '='}{value}" for key, value in plan.fix.items())
        console.print(f"does not fit as configured; the smallest change that does: {changes}", markup=False, soft_wrap=True)
    else:
        larger = "larger GPUs" if plan.unit == "gpu" else "nodes with more memory"
        console.print(f"does not fit, whatever is changed; take a smaller model or {larger}", markup=False)


def _show_activations(plan: Plan) -> None:
    console = console_for()
    remark = f"Activations of one {_UNITS[plan.unit]}, GiB, without | with checkpointing, by tokens of a row"
    console.print(remark, soft_wrap=True)
    lengths = sorted({entry["length"] for entry in plan.activations})
    by = {(entry["micro_batch"], entry["length"]): entry for entry in plan.activations}
    table = Table(box=None, pad_edge=False)
    table.add_column("micro-batch", no_wrap=True)
    for length in lengths:
        table.add_column(f"{length} tokens", justify="right", no_wrap=True)
    for micro in sorted({micro for micro, _ in by}):
        cells = [by[micro, length] for length in lengths]
        shown = (f"{cell['without'] / GIB:,.3f} | {cell['with_checkpointing'] / GIB:,.3f}" for cell in cells)
        table.add_row(str(micro), *shown)
    console.print(table)
    console.print()


def _show_stages(plan: Plan) -> None:
    console = console_for()
    machine, total = plan.machine, plan.totals()
    console.print(
        f"Stages, at {machine.utilisation:.0%} of {machine.tflops:g} TFLOP/s and {machine.bandwidth:g} GB/s into each of"
        f" {machine.gpus} {_UNITS[plan.unit]}s; rows and tokens are at most",
        markup=False, soft_wrap=True,
    )  # fmt: skip
    table = Table(box=None, pad_edge=False)
    for heading in (
        "stage", "steps", "tokens", "PFLOP", "gathered", "bank", "checkpoints", "version", "training h", "scoring h"
    ):
        table.add_column(heading, justify="left" if heading == "stage" else "right", no_wrap=True)
    for stage in plan.stages:
        table.add_row(
            f"{stage.index} {stage.task}", f"{stage.steps:,}", f"{stage.tokens:,}",
            f"{(stage.training_flops + stage.scoring_flops) / 1e15:,.1f}", f"{stage.gathered_bytes / 1e12:,.2f} TB",
            f"{plan.recipe.size * stage.bank / 1e6:,.1f} MB", f"{stage.checkpoint_bytes / 1e6:,.1f} MB",
            f"{stage.registry_bytes / 1e6:,.1f} MB",
            f"{stage.training_hours:.2f}", f"{stage.scoring_hours:.2f}",
        )  # fmt: skip
    table.add_row(
        "all", f"{total['steps']:,}", f"{total['tokens']:,}", f"{total['flops'] / 1e15:,.1f}",
        f"{sum(s.gathered_bytes for s in plan.stages) / 1e12:,.2f} TB", "", "", f"{total['registry_bytes'] / 1e6:,.1f} MB",
        f"{total['training_hours']:.2f}", f"{total['scoring_hours']:.2f}",
    )  # fmt: skip
    console.print(table)


def _cluster(cluster: Cluster | CpuCluster) -> str:
    if isinstance(cluster, CpuCluster):
        each = f"{cluster.nodes} nodes x {cluster.cpus_per_node} CPUs x {_gib(cluster.memory_per_node)}"
        return f"{each}, {cluster.workers} workers"
    return f"{cluster.nodes} nodes x {cluster.gpus_per_node} GPUs x {_gib(cluster.gpu_memory)}"


def _gib(count: int) -> str:
    return f"{count / GIB:,.1f} GiB"
