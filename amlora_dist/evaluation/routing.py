"""What the router did, as data: from gates (B, T) and the tasks the inputs truly came from.

One row per input, so no padding and no dummy row of a synchronised pass may be among them; the caller leaves those out.
A row's gates are those of the tasks of the bank; what they lack to 1 is the share of the zero adapter.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

ROUNDING = 1e-6
"""What fp32 gates may lack to 1 without the zero adapter having a share."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingStatistics:
    """Routing of scored inputs; rows are the tasks they came from, columns the adapters of the bank in its order.

    Everything undefined (a task without inputs, the accuracy of a task that the bank has not learned) is ``None``.
    """

    tasks: list[str]
    """Tasks that inputs came from: all of the bank's columns need not be among them, nor they among the columns."""
    adapters: list[str]
    inputs: list[int]
    """Inputs per task."""
    mass: list[list[float] | None]
    """Attention mass, task x adapter: mean gate over the task's inputs."""
    zero_mass: list[float | None]
    """Mean share of the zero adapter per task; a row of ``mass`` and this sum to 1 unless gates exceed 1."""
    accuracy: list[float | None]
    """Share of a task's inputs whose largest gate is its own adapter's; abstaining (all gates 0) is wrong."""
    effective: list[float | None]
    """Mean over inputs of exp(H(g)), H the entropy of an input's gates rescaled to sum 1; 0 where all gates are 0."""
    zeros: list[float | None]
    """Share of gates that are exactly 0."""
    abstention: list[float | None]
    """Share of inputs whose zero adapter weighs more than any adapter."""
    overall_accuracy: float | None
    """Over the inputs of learned tasks, each input counted once."""
    overall_effective: float | None
    overall_zeros: float | None
    overall_abstention: float | None

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingDrift:
    """How far routing among the old tasks moved between two banks, on the same inputs."""

    inputs: int
    moved: float | None
    """Mean total variation between the two gates over the old tasks, each rescaled to sum 1 over them."""
    changed: float | None
    """Share of inputs whose largest gate among the old tasks is another one."""
    taken: float | None
    """Mean gate that went to tasks that the earlier bank did not have."""

    def to_json(self) -> dict[str, Any]:
        """Plain numbers."""
        return asdict(self)


def _matrix(gates: Tensor | Sequence[Sequence[float]], columns: int) -> Tensor:
    # From lists of lists an empty one has no columns, hence the reshape.
    out = torch.as_tensor(gates).detach().to("cpu", torch.float64)
    out = out.reshape(0, columns) if not out.numel() else out
    if out.dim() != 2 or out.shape[1] != columns:
        raise ValueError(f"gates of shape {tuple(out.shape)}, expected (inputs, {columns} adapters)")
    return out


def effective_adapters(gates_BT: Tensor) -> Tensor:
    """exp(H(g)) of each row rescaled to sum 1, (B,): 1 for one-hot, T for uniform, 0 for a row of zeros."""
    total = gates_BT.sum(dim=1, keepdim=True)
    shares = gates_BT / total.clamp(min=1e-300)
    entropy = -torch.special.xlogy(shares, shares).sum(dim=1)
    return torch.where(total[:, 0] > 0, entropy.exp(), torch.zeros_like(entropy))


def routing_statistics(
    gates: Tensor | Sequence[Sequence[float]],
    true_tasks: Tensor | Sequence[int],
    *,
    tasks: Sequence[str],
    adapters: Sequence[str],
) -> RoutingStatistics:
    """Summarise the gates of scored inputs.

    Args:
        gates: (B, T), one row per input, T = len(adapters).
        true_tasks: (B,) index into ``tasks`` of the task an input came from.
        tasks: names of the tasks that were scored, learned or not.
        adapters: names of the bank's tasks, in the order of the gates' columns.

    Raises:
        ValueError: shapes or indices that do not fit.
    """
    gates_BT = _matrix(gates, len(adapters))
    truth = torch.as_tensor(true_tasks, dtype=torch.long).cpu().reshape(-1)
    if len(truth) != len(gates_BT):
        raise ValueError(f"{len(gates_BT)} rows of gates for {len(truth)} true tasks")
    if bool(((truth < 0) | (truth >= len(tasks))).any()):
        raise ValueError(f"true tasks from {int(truth.min())} to {int(truth.max())}, expected 0 to {len(tasks) - 1}")
    column = {name: i for i, name in enumerate(adapters)}
    largest, choice = gates_BT.max(dim=1)
    zero_share = (1 - gates_BT.sum(dim=1)).clamp(min=0)
    zero_share = torch.where(zero_share < ROUNDING, 0.0, zero_share)
    own = torch.tensor([column.get(name, -1) for name in tasks], dtype=torch.long)[truth]
    right = (choice == own) & (largest > 0)
    effective = effective_adapters(gates_BT)
    zeros = (gates_BT == 0).double().mean(dim=1)
    abstained = zero_share > largest

    of_task = [truth == t for t in range(len(tasks))]

    def per_task(values: Tensor) -> list[float | None]:
        return [_mean(values[chosen]) for chosen in of_task]

    return RoutingStatistics(
        tasks=list(tasks),
        adapters=list(adapters),
        inputs=[int(chosen.sum()) for chosen in of_task],
        mass=[gates_BT[chosen].mean(dim=0).tolist() if bool(chosen.any()) else None for chosen in of_task],
        zero_mass=per_task(zero_share),
        accuracy=[_mean(right[chosen]) if tasks[t] in column else None for t, chosen in enumerate(of_task)],
        effective=per_task(effective),
        zeros=per_task(zeros),
        abstention=per_task(abstained),
        overall_accuracy=_mean(right[own >= 0]),
        overall_effective=_mean(effective),
        overall_zeros=_mean(zeros),
        overall_abstention=_mean(abstained),
    )


def routing_drift(
    before: Tensor | Sequence[Sequence[float]], after: Tensor | Sequence[Sequence[float]], *, old: int, new: int
) -> RoutingDrift:
    """Compare the gates that two banks gave to the same inputs, in the same order.

    Args:
        before: (B, old) gates of the earlier bank.
        after: (B, new) gates of the later bank, whose first ``old`` columns are the earlier bank's tasks.
        old: tasks of the earlier bank.
        new: tasks of the later bank.
    """
    if new < old:
        raise ValueError(f"a bank of {new} tasks cannot follow one of {old}")
    first, second = _matrix(before, old), _matrix(after, new)
    if len(first) != len(second):
        raise ValueError(f"gates of {len(first)} inputs before and {len(second)} after")
    taken = second[:, old:].sum(dim=1)
    moved = 0.5 * (_rescaled(first) - _rescaled(second[:, :old])).abs().sum(dim=1)
    changed = first.argmax(dim=1) != second[:, :old].argmax(dim=1) if old else moved
    return RoutingDrift(inputs=len(first), moved=_mean(moved), changed=_mean(changed), taken=_mean(taken))


def _rescaled(gates_BT: Tensor) -> Tensor:
    """To sum 1 over the tasks; a row without any mass stays zero."""
    total = gates_BT.sum(dim=1, keepdim=True)
    return torch.where(total > 0, gates_BT / total.clamp(min=1e-300), gates_BT)


def _mean(values: Tensor) -> float | None:
    return values.double().mean().item() if len(values) else None
