"""What weighs the tasks of a bank for an input: gates (B, T), fp32; what a row lacks to 1 is the zero adapter's.

Routers are immutable and hold no state of a call, so threads and interleaved requests can share one. ``gates`` never
waits for the device. Serving needs what ``tensors`` and ``settings`` hold; the statistics they came from are not read.

Shapes: B inputs, T tasks, d features.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from amlora_dist.adapters.abstention import Background, background
from amlora_dist.adapters.keyed_router import KeyedRouter, keyed_router, keyed_router_from
from amlora_dist.adapters.settings import GateSettings, RouterSettings
from amlora_dist.adapters.sparsity import absolute_threshold, relative_threshold
from amlora_dist.adapters.statistics import calibrate, keys, posterior
from amlora_dist.adapters.subspace_router import SubspaceRouter
from amlora_dist.errors import BankError, UserError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from amlora_dist.adapters.statistics import TaskStatistics

PRIOR_KEY = "prior_router"
"""Under this key the settings of a literal bank hold those of its prior's router."""
ABSTAIN_FROM = 3.0
"""Standard deviations of relative Mahalanobis distance at which abstention begins; one further it is complete."""


class Router(Protocol):
    """Weighs tasks; the mixture turns the weights of tasks into those of adapters by the rows of its recipes."""

    @property
    def kind(self) -> str:
        """Name in the manifest."""

    @property
    def tasks(self) -> list[str]:
        """Names, in the order of the gates' columns."""

    @property
    def needs_features(self) -> bool:
        """Whether ``gates`` reads the features; if not, they may be ``None``."""

    def gates(self, features_BD: Tensor | None, batch: int) -> Tensor:
        """Gates (B, T), fp32, of ``batch`` inputs, on the features' or the router's device."""

    def to(self, device: torch.device | str) -> Router:
        """The same router on another device."""

    def tensors(self) -> dict[str, Tensor]:
        """What must be stored, for safetensors."""

    def settings(self) -> dict[str, Any]:
        """The rest of what must be stored, JSON."""


@dataclass(frozen=True, eq=False)
class PosteriorRouter:
    """Attention with closed-form keys: p(t|f) = softmax((w_t . f + b_t) / T), made sparse, optionally abstaining.

    One dense layer per task, computed by ``statistics.keys`` instead of trained. Scores are fp64, for they are small
    differences of large numbers; it is one (B, d) x (d, T) product.

    Args:
        tasks: names.
        weights: W (T, d), fp64.
        bias: b (T,), fp64.
        temperature: the calibrated one; ``gate.temperature`` overrides it if it is a number.
        gate: threshold, its form, abstention.
        far: what abstention needs; ``None`` if the bank was made without.
    """

    tasks: list[str]
    weights: Tensor
    bias: Tensor
    temperature: float
    gate: GateSettings
    far: Background | None = None
    kind: str = "posterior"
    needs_features: bool = True

    def __post_init__(self) -> None:
        if self.weights.dim() != 2 or len(self.weights) != len(self.tasks) or self.bias.shape != (len(self.tasks),):
            raise BankError(
                f"router: keys {tuple(self.weights.shape)} and {tuple(self.bias.shape)}"
                f" do not fit {len(self.tasks)} tasks"
            )
        if self.gate.abstention and self.far is None:
            raise BankError("router.gate.abstention: this bank stores no background statistics; publish it with them")

    def posterior(self, features_BD: Tensor) -> Tensor:
        """p(t|f) before any threshold, (B, T), fp64: also the prior of ``literal + prior``."""
        chosen = self.gate.temperature
        return posterior(features_BD, self.weights, self.bias, self.temperature if chosen == "calibrated" else chosen)

    def abstention(self, features_BD: Tensor) -> Tensor:
        """Share of the zero adapter for being far from all tasks, (B,), fp64: 0 up to 3 deviations, 1 from 4 on.

        Always 0 with one task: relative distance compares tasks with their common background.
        """
        if self.far is None or len(self.tasks) < 2:
            return torch.zeros(len(features_BD), dtype=torch.float64, device=self.weights.device)
        return (self.far.excess(features_BD, self.weights, self.bias) - ABSTAIN_FROM).clamp(0.0, 1.0)

    def gates(self, features_BD: Tensor | None, batch: int) -> Tensor:
        """See ``Router``; ``features_BD`` (B, d) are required."""
        if features_BD is None or len(features_BD) != batch:
            raise ValueError(f"the posterior router needs features of all {batch} inputs")
        features = features_BD.detach()
        cut = relative_threshold if self.gate.form == "relative" else absolute_threshold
        shares = cut(self.posterior(features), self.gate.threshold)
        if self.gate.abstention:
            shares = shares * (1 - self.abstention(features))[:, None]
        return shares.float()

    def only(self, tasks: Sequence[int]) -> PosteriorRouter:
        """A router over some tasks, as if the bank held no other."""
        keep = list(tasks)
        far = self.far and replace(self.far, mean=self.far.mean[keep], std=self.far.std[keep])
        names = [self.tasks[task] for task in keep]
        return replace(self, tasks=names, weights=self.weights[keep], bias=self.bias[keep], far=far)

    def to(self, device: torch.device | str) -> PosteriorRouter:
        """See ``Router``."""
        far = self.far and Background(**{name: t.to(device) for name, t in self.far.tensors().items()})
        return replace(self, weights=self.weights.to(device), bias=self.bias.to(device), far=far)

    def tensors(self) -> dict[str, Tensor]:
        """``weights``, ``bias`` and, if there is a background, ``far.*``."""
        named = {"weights": self.weights, "bias": self.bias}
        if self.far is not None:
            named |= {f"far.{name}": t for name, t in self.far.tensors().items()}
        return {name: t.cpu().contiguous() for name, t in named.items()}

    def settings(self) -> dict[str, Any]:
        """See ``Router``."""
        return {"kind": self.kind, "tasks": self.tasks, "temperature": self.temperature, "gate": asdict(self.gate)}


class FixedRouter:
    """The same gates for every input, whatever it is; the control ``uniform`` and the gates of baselines.

    Args:
        tasks: names.
        row: gate of each task. It need not sum to 1: all ones is the sum of the adapters (inc LoRA).
        device: where the gates are made.
    """

    kind: str = "fixed"
    needs_features: bool = False

    def __init__(self, tasks: Sequence[str], row: Sequence[float], device: torch.device | str = "cpu") -> None:
        if len(row) != len(tasks):
            raise BankError(f"router: {len(row)} fixed gates for {len(tasks)} tasks")
        self.tasks, self.row = list(tasks), tuple(row)
        # Made once: copying it in every call would make the device wait.
        self._row_T = torch.tensor(self.row, dtype=torch.float32, device=device)

    @classmethod
    def newest(cls, tasks: Sequence[str]) -> FixedRouter:
        """The last task's row alone (seq LoRA)."""
        return cls(tasks, (*[0.0] * (len(tasks) - 1), 1.0))

    @classmethod
    def total(cls, tasks: Sequence[str]) -> FixedRouter:
        """All adapters at weight 1 (inc LoRA, O-LoRA)."""
        return cls(tasks, (1.0,) * len(tasks))

    def gates(self, features_BD: Tensor | None, batch: int) -> Tensor:
        """See ``Router``; features are not read."""
        return self._row_T.expand(batch, -1)

    def to(self, device: torch.device | str) -> FixedRouter:
        """See ``Router``."""
        return FixedRouter(self.tasks, self.row, device)

    def tensors(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def settings(self) -> dict[str, Any]:
        """See ``Router``."""
        return {"kind": self.kind, "tasks": self.tasks, "row": list(self.row)}


class UniformRouter(FixedRouter):
    """1/T for every task: the control that knows nothing."""

    kind = "uniform"

    def __init__(self, tasks: Sequence[str], device: torch.device | str = "cpu") -> None:
        super().__init__(tasks, (1.0 / len(tasks),) * len(tasks), device)

    def to(self, device: torch.device | str) -> UniformRouter:
        """See ``Router``."""
        return UniformRouter(self.tasks, device)

    def settings(self) -> dict[str, Any]:
        """See ``Router``."""
        return {"kind": self.kind, "tasks": self.tasks}


@dataclass(frozen=True, eq=False)
class PermutedRouter:
    """Another router whose gates are given to the wrong tasks: the control that has the sparsity but not the aim.

    Args:
        inner: the router whose gates are permuted.
        permutation: column t of the result is column ``permutation[t]`` of the inner gates.
    """

    inner: Router
    permutation: tuple[int, ...]
    kind: str = "permuted"

    def __post_init__(self) -> None:
        if sorted(self.permutation) != list(range(len(self.inner.tasks))):
            raise BankError(f"router: {list(self.permutation)} does not permute {len(self.inner.tasks)} tasks")

    @classmethod
    def shuffled(cls, inner: Router, seed: int) -> PermutedRouter:
        """A derangement drawn from the seed alone (Sattolo's cycle: no task keeps its gate); one task keeps its own."""
        return cls(inner, derangement(len(inner.tasks), seed))

    @property
    def tasks(self) -> list[str]:
        """See ``Router``."""
        return self.inner.tasks

    @property
    def needs_features(self) -> bool:
        """See ``Router``."""
        return self.inner.needs_features

    def gates(self, features_BD: Tensor | None, batch: int) -> Tensor:
        """See ``Router``."""
        gates = self.inner.gates(features_BD, batch)
        return torch.stack([gates[:, column] for column in self.permutation], dim=1)

    def to(self, device: torch.device | str) -> PermutedRouter:
        """See ``Router``."""
        return replace(self, inner=self.inner.to(device))

    def tensors(self) -> dict[str, Tensor]:
        """Those of the inner router."""
        return self.inner.tensors()

    def settings(self) -> dict[str, Any]:
        """See ``Router``."""
        return {"kind": self.kind, "permutation": list(self.permutation), "inner": self.inner.settings()}


def derangement(count: int, seed: int) -> tuple[int, ...]:
    """A cyclic permutation of ``count`` things by Sattolo's algorithm: no fixed point for two or more."""
    generator = torch.Generator().manual_seed(seed)
    order = list(range(count))
    for last in range(count - 1, 0, -1):
        other = int(torch.randint(last, (), generator=generator))
        order[last], order[other] = order[other], order[last]
    return tuple(order)


def posterior_router(statistics: Sequence[TaskStatistics], *, shrinkage: float, gate: GateSettings) -> PosteriorRouter:
    """The router of a bank from the statistics of its tasks, in their order: keys, temperature, background."""
    weights, bias = keys(statistics, shrinkage)
    far = background(statistics, shrinkage)
    return PosteriorRouter([s.task for s in statistics], weights, bias, calibrate(statistics), gate, far)


def build_router(
    settings: RouterSettings,
    statistics: Sequence[TaskStatistics],
    *,
    seed: int,
    text_alone: bool = False,
    background: Mapping[str, Tensor] | None = None,
) -> Router | None:
    """The router that the configuration asks for.

    Args:
        settings: the ``router`` section. ``literal`` weighs by dense layers inside the mixture layers and has a router
            only for its prior.
        statistics: one per task of the bank, in its order.
        seed: of the run, for ``permuted``.
        text_alone: prompts have format 2, whose features are the text's alone.
        background: mean features of each part of a background; None for none.

    Returns:
        ``None`` for ``literal`` without a prior.
    """
    if settings.kind == "uniform":
        return UniformRouter([s.task for s in statistics])
    gate = settings.gate
    if settings.kind == "literal":
        if not settings.literal.prior:
            return None
        gate = replace(gate, threshold=0.0, abstention=False)  # the posterior itself: the selectors make it sparse, or not
    router: PosteriorRouter | KeyedRouter
    if text_alone:
        if gate.abstention and not background:
            raise UserError(
                "router.gate.abstention: found true, but the bank has no background: set router.background to true and"
                " router.holdout above 0, which give it one when its next stage is trained"
            )
        shrinkage = None if settings.shrinkage == "held_out" else settings.shrinkage
        router = keyed_router(
            statistics, rule=settings.keys, shrinkage=shrinkage, gate=gate, depths=len(settings.depths or ()) + 1,
            background=background, label_keys=settings.label_keys,
        )  # fmt: skip
    else:
        router = posterior_router(statistics, shrinkage=settings.fixed_shrinkage, gate=gate)
    return PermutedRouter.shuffled(router, seed) if settings.kind == "permuted" else router


def router_from(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Router:
    """Inverse of ``Router.tensors`` and ``Router.settings``.

    Raises:
        BankError: unknown kind, missing tensors or keys, shapes that do not fit.
    """
    try:
        return _router_from(tensors, settings)
    except (KeyError, TypeError) as error:
        raise BankError(f"router: {error} is missing or of a wrong type in the bank") from error


def _router_from(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Router:
    kind = settings["kind"]
    if kind == "permuted":
        return PermutedRouter(_router_from(tensors, settings["inner"]), tuple(settings["permutation"]))
    tasks = list(settings["tasks"])
    if kind == "uniform":
        return UniformRouter(tasks)
    if kind == "fixed":
        return FixedRouter(tasks, tuple(settings["row"]))
    if kind == "subspace":
        return SubspaceRouter(tasks, tensors["weights"].double())
    if kind == "posterior" and "keys" in settings:
        return keyed_router_from(tensors, settings)
    if kind != "posterior":
        raise BankError(f"router: kind {kind!r} is not known to this version")
    parts = {name.removeprefix("far."): t.double() for name, t in tensors.items() if name.startswith("far.")}
    weights, bias = tensors["weights"].double(), tensors["bias"].double()
    if not (bool(torch.isfinite(weights).all()) and bool(torch.isfinite(bias).all())):
        raise BankError("router: keys hold NaN or infinity")
    far = Background(**parts) if parts else None
    return PosteriorRouter(tasks, weights, bias, float(settings["temperature"]), GateSettings(**settings["gate"]), far)
