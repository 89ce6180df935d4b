"""What the stages of a sequence cost: steps, tokens, FLOPs, bytes over the network, hours, bytes that stay.

A product of a matrix of p elements with one token is 2 p FLOPs. Base weights are frozen, so a backward pass costs what
the forward pass of the layers it goes through costs (gradients of activations alone), not twice as much. Under ZeRO-3
every pass gathers the weights it uses: with few tokens in a pass this, not arithmetic, is the time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from amlora_dist.planning.memory import MemoryLayout
    from amlora_dist.planning.shapes import Shape

SAMPLED = 64
"""Rows of a task whose features are stored at most, next to those of held-out ones (``training.stage_statistics``)."""
FEWEST_HELD, SMALLEST_SHARE = 24, 4
"""Rows that are held out at least, where that is no more than one in so many (the same module)."""
STATISTICS_BATCH = 16
"""Rows of a forward pass when features are taken and recipes are probed (``training.stage``)."""
RETAINED_CHECKPOINTS = 2


@dataclass(frozen=True, slots=True)
class TaskShape:
    """One task, in numbers: rows are "at most", tokens include the prompt's question."""

    name: str
    train_rows: int
    test_rows: int
    length: int
    """Prompt tokens, at most."""
    answer: int
    """Answer tokens, end token included."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What the GPUs do. ``tflops`` and ``bandwidth`` (GB/s into one GPU) are the maker's, ``utilisation`` is stated."""

    gpus: int
    tflops: float
    utilisation: float
    bandwidth: float


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """The numbers of a run that decide its cost."""

    batch_size: int
    epochs: int
    rank: int
    probe_rows: int
    learns_recipe: bool
    holdout: float
    text_alone: bool
    """Prompt format 2, in which features of rows are stored."""
    depths: int
    """Layers whose states are the router's features, side by side."""
    evaluation_batch: int
    cells: str
    untrained: bool
    oracle: bool
    knockout: bool
    size: int
    """Bytes of an element of the model."""


@dataclass(frozen=True, slots=True)
class PlannedWork:
    """One stage. Bytes, FLOPs of all GPUs together, hours."""

    index: int
    task: str
    adapter: int
    """Elements of the new adapter and its recipe."""
    bank: int
    """Elements of all adapters up to and with this one."""
    checkpoint_bytes: int
    """On shared storage, while the stage trains."""
    registry_bytes: int
    """What this version adds to MLflow: adapter, recipe, statistics, router."""
    steps: int
    tokens: int
    """Prompt and answer, all epochs."""
    training_flops: float
    scoring_flops: float
    gathered_bytes: float
    """Into every GPU under ZeRO-3, training and scoring."""
    training_hours: float
    scoring_hours: float


def stages(
    shape: Shape, tasks: Sequence[TaskShape], recipe: TrainingPlan, layout: MemoryLayout, machine: Machine
) -> list[PlannedWork]:
    """The cost of every stage, in order."""
    out: list[PlannedWork] = []
    bank = 0
    for index, task in enumerate(tasks, start=1):
        new = recipe.rank * shape.adapter_width + (index - 1) * len(shape.targets) * recipe.learns_recipe
        bank += new
        steps = math.ceil(task.train_rows / recipe.batch_size) * recipe.epochs
        row = task.length + task.answer
        tokens = task.train_rows * recipe.epochs * row
        training, passes = _training(shape, task, recipe, layout, index, steps)
        scoring, scoring_passes = _scoring(shape, tasks, recipe, layout, index)
        out.append(
            PlannedWork(
                index=index,
                task=task.name,
                adapter=new,
                bank=bank,
                checkpoint_bytes=RETAINED_CHECKPOINTS * 12 * new,
                registry_bytes=recipe.size * recipe.rank * shape.adapter_width
                + 4 * (index - 1) * len(shape.targets) * recipe.learns_recipe
                + _statistics(task, recipe, shape.hidden * recipe.depths)
                + 8 * index * (shape.hidden * recipe.depths + 1),
                steps=steps,
                tokens=tokens,
                training_flops=training,
                scoring_flops=scoring,
                gathered_bytes=passes + scoring_passes,
                training_hours=_hours(training, passes, machine),
                scoring_hours=_hours(scoring, scoring_passes, machine),
            )
        )
    return out


def forward_flops(shape: Shape, *, length: int, ranks: int, top: bool = False) -> float:
    """FLOPs of one token's way up, in a row of ``length``; ``top``: through the layers that train only.

    Args:
        shape: of the base model.
        length: tokens of the row, which attention compares each token with.
        ranks: summed rank of all adapters that lie side by side.
        top: count the layers that gradients pass through, with their adapters, and no others.
    """
    layers = [layer for layer in shape.layers if layer.trains or not top]
    return (
        2.0 * sum(layer.used for layer in layers)
        + 4.0 * length * shape.attention_width * len(layers)
        + 2.0 * ranks * shape.adapter_width
    )


def _statistics(task: TaskShape, recipe: TrainingPlan, width: int) -> int:
    """Bytes of the router's statistics over ``width`` features: factors, and in prompt format 2 features of rows."""
    held = round(recipe.holdout * task.train_rows)
    counted = task.train_rows - held
    if not recipe.text_alone:
        return 8 * (min(counted, width) + min(held, width) + 1) * width
    held = min(max(held, FEWEST_HELD), task.train_rows // SMALLEST_SHARE) if recipe.holdout > 0 else 0
    counted = task.train_rows - held
    rows = held + min(SAMPLED, counted) if held else 0
    return 8 * (min(counted, width) + 1) * width + 4 * rows * width


def _training(
    shape: Shape, task: TaskShape, recipe: TrainingPlan, layout: MemoryLayout, index: int, steps: int
) -> tuple[float, float]:
    """FLOPs of all GPUs, and bytes gathered by each."""
    row, wide = task.length + task.answer, index * recipe.rank
    forward = forward_flops(shape, length=row, ranks=wide)
    upper = forward_flops(shape, length=row, ranks=wide, top=True)
    own = 2.0 * recipe.rank * shape.adapter_width  # gradients of the new adapter's weights
    head = 2.0 * shape.hidden * shape.vocabulary * (task.answer + 1)
    per_row = row * (forward + upper + own + (upper if layout.checkpointing else 0.0)) + 2 * head
    features = task.train_rows * task.length * forward_flops(shape, length=task.length, ranks=0)
    if layout.zero < 3:
        features *= shape.below_router / len(shape.layers)  # the pass ends at the routing layer
    probes = index * min(recipe.probe_rows, task.train_rows) * (row * forward + head)
    probes *= recipe.learns_recipe and index > 1
    flops = task.train_rows * recipe.epochs * per_row + features + probes

    micro = math.ceil(recipe.batch_size / layout.ranks / layout.micro_batch)
    upper_share = sum(layer.parameters for layer in shape.layers if layer.trains) / shape.parameters
    passes = steps * micro * (1 + upper_share * (2 if layout.checkpointing else 1))
    passes += _batches(task.train_rows, STATISTICS_BATCH, layout.ranks)
    if recipe.learns_recipe and index > 1:
        passes += index * _batches(min(recipe.probe_rows, task.train_rows), STATISTICS_BATCH, layout.ranks)
    return flops, passes * _gathered(shape, recipe.size, layout)


def _scoring(
    shape: Shape, tasks: Sequence[TaskShape], recipe: TrainingPlan, layout: MemoryLayout, index: int
) -> tuple[float, float]:
    """Prompts read once and answers decoded token by token, for the cells that ``evaluation`` asks for."""
    last = index == len(tasks)
    upto = {"all": len(tasks), "last": index if last else 0, "seen": index}.get(recipe.cells, index + 1)
    scored = list(tasks[:upto])
    if recipe.untrained and index == 1:
        scored += tasks
    if recipe.oracle and last:
        scored += tasks
    if recipe.knockout and last:
        scored += [*tasks] * index
    flops = passes = 0.0
    for task in scored:
        row = task.length + task.answer
        per_token = forward_flops(shape, length=row, ranks=index * recipe.rank)
        head = 2.0 * shape.hidden * shape.vocabulary * (task.answer + 1)
        flops += task.test_rows * (row * per_token + head)
        # Every decoded token is a pass of its own, and ranking the labels is one more.
        passes += _batches(task.test_rows, recipe.evaluation_batch, layout.ranks) * (task.answer + 2)
    return flops, passes * _gathered(shape, recipe.size, layout)


def _batches(rows: int, batch: int, ranks: int) -> int:
    return math.ceil(math.ceil(rows / ranks) / batch)


def _gathered(shape: Shape, size: int, layout: MemoryLayout) -> float:
    """Bytes that come into a GPU in one pass over the whole model."""
    if layout.zero < 3:
        return 0.0
    return size * shape.parameters * (layout.ranks - 1) / layout.ranks


def _hours(flops: float, gathered: float, machine: Machine) -> float:
    """The longer of arithmetic and network, which overlap at best."""
    arithmetic = flops / (machine.gpus * machine.tflops * 1e12 * machine.utilisation)
    network = gathered / (machine.bandwidth * 1e9)
    return max(arithmetic, network) / 3600
