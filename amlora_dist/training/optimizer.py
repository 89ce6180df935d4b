"""AdamW whose recipe group takes a proximal L1 step inside the optimizer's own step.

The step must happen here and nowhere else: under ZeRO the parameters that count are flat fp32 copies which only the
optimizer sees, and anything written to the model's parameters outside is overwritten by them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import nn

if TYPE_CHECKING:
    from amlora_dist.training.settings import TrainingSettings


class ProximalAdamW(torch.optim.AdamW):
    """AdamW with an elementwise L1 proximal step for every group that has ``l1 > 0``.

    For such a group, after Adam's update with learning rate ``lr`` and second moment ``v``::

        c <- sign(c) * max(|c| - lr * l1 / (sqrt(v_hat) + eps), 0)

    which is the proximal operator of ``l1 * ||c||_1`` in the metric of Adam's own step (Yun, Lozano and Yang 2021,
    ProxGen): a weight becomes exactly zero when the loss pulls at it with less than ``l1``. It is elementwise, so it
    means the same on ZeRO's flat partitions as on whole parameters.

    While such a group is ``refit``, there is no shrinkage, and weights that are zero stay so: the others find the values
    that they have without the penalty's pull.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        super().__init__(groups, betas=betas, foreach=False, fused=False)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One AdamW step, then the proximal step of the groups with an L1 coefficient."""
        zeros = [(p, p == 0) for group in self.param_groups if group.get("refit", False) for p in group["params"]]
        loss: float | None = super().step(closure)
        for parameter, where in zeros:
            parameter.masked_fill_(where, 0.0)
        for group in self.param_groups:
            if group.get("l1", 0.0) > 0 and not group.get("refit", False):
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._shrink(parameter, group)
        return loss

    def _shrink(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        correction = 1 - group["betas"][1] ** float(state["step"])
        scale = (state["exp_avg_sq"] / correction).sqrt_().add_(group["eps"])
        threshold = scale.reciprocal_().mul_(group["lr"] * group["l1"])
        shrunk = parameter - parameter.sign() * threshold
        parameter.copy_(torch.where(parameter.abs() > threshold, shrunk, 0.0))


def parameter_groups(
    trainable: Mapping[str, nn.Parameter], settings: TrainingSettings, *, selectors_alone: bool = False
) -> list[dict[str, Any]]:
    """The adapter's group (with ``lora_plus`` one for B, at a multiple of the rate), and the recipe's: no weight decay,
    its own learning rate, L1 as a mean over modules.

    ``trainable`` is keyed by ``a.<module>``, ``b.<module>``, ``recipe.<module>``, ``selector.<name>``. With
    ``selectors_alone`` the adapter learns in phase 1 of the stage and the selectors in phase 2 (``set_rates``).
    """
    recipe = [p for name, p in trainable.items() if name.startswith("recipe.")]
    selectors = [p for name, p in trainable.items() if name.startswith("selector.") and selectors_alone]
    apart = {id(p) for p in (*recipe, *selectors)}
    if settings.lora_plus != 1.0:
        quick = [p for name, p in trainable.items() if name.startswith("b.")]
        apart |= {id(p) for p in quick}
    else:
        quick = []
    other = [p for p in trainable.values() if id(p) not in apart]
    groups: list[dict[str, Any]] = []
    for phase, members, multiple in ((1, other, 1.0), (1, quick, settings.lora_plus), (2, selectors, 1.0)):
        if members:
            rate = settings.rate * multiple
            groups.append(
                {
                    "params": members,
                    "lr": rate,
                    "base_lr": rate,
                    "weight_decay": settings.weight_decay,
                    "l1": 0.0,
                    "phase": phase,
                }
            )
    if recipe:
        rate = settings.recipe_learning_rate
        groups.append(
            {"params": recipe, "lr": rate, "base_lr": rate, "weight_decay": 0.0, "l1": settings.l1 / len(recipe), "phase": 1}
        )
    return groups


def rate_factor(step: int, total: int, settings: TrainingSettings) -> float:
    """Share of the learning rate at 0-based optimizer ``step`` of ``total``: warm-up, then the schedule down to 0."""
    warmup = min(settings.warmup_steps, total // 2)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if settings.schedule == "constant":
        return 1.0
    done = (step - warmup) / max(1, total - warmup)
    return 1.0 - done if settings.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


def set_rates(optimizer: torch.optim.Optimizer, factor: float, phase: int = 1, *, refit: bool = False) -> None:
    """Set the learning rate of a phase's groups to their base rate times ``factor``, of the others to 0; ``refit``: those
    with an L1 coefficient learn on their support, without it."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor if group.get("phase", 1) == phase else 0.0
        group["refit"] = refit and group.get("l1", 0.0) > 0
