"""The router of a bank whose prompts have format 2: keys for labels, their evidence, and a background for foreign texts.

Keys for labels know what a task's kinds of text are, keys for whole tasks how far a task reaches between them. Each alone
routes some banks better; the router takes the geometric mean of both posteriors,

    p(t | f) ~ sqrt(p_label(t | f) p_task(t | f)),

each at the temperature that held-out rows prefer (a product of experts, Hinton 2002, at half weight each).

A text that belongs to no task goes to the base model. Distances alone find few such texts; Gaussians of generic texts
next to the bank's find most: the text is foreign where

    log sum_k exp(s_k / T) / K - log sum_j exp(s_j / T + log prior_j)

over the K background keys and the bank's J is above a threshold, which is a quantile of the bank's own held-out rows. The
keys of both are those that have not seen the held-out rows: these then look as foreign as any other row of their task.

With ``label_keys: stage`` the labels of a task are told apart by the keys that the bank had after the task's own stage, at
their temperature and with their weight next to the model's: the covariance of later tasks moves the routes alone. They
follow from the statistics of the tasks up to it, so nothing of an earlier bank is read.

Shapes: B texts, T tasks, J keys, K background keys, d features.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from amlora_dist.adapters.keys import (
    Fitted,
    RouterKeys,
    covariance_of,
    depth_choices,
    fit,
    keys_under,
    left_out_rows,
)
from amlora_dist.adapters.settings import GateSettings, LabelKeys
from amlora_dist.adapters.sparsity import absolute_threshold, relative_threshold
from amlora_dist.digests import tensors_digest
from amlora_dist.errors import BankError

if TYPE_CHECKING:
    from amlora_dist.adapters.keys import KeyRule
    from amlora_dist.adapters.statistics import TaskStatistics

SHRINKAGES: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7)
"""Of which held-out rows choose, where the configuration leaves it to them."""
MOST_TAKEN = 0.01
"""Share of a task's held-out rows that a part of the background may win; one that wins more is left out for this bank."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the keys say of texts."""

    gates_BT: Tensor
    """fp32; all 0 where the text is foreign."""
    posterior_BT: Tensor
    """p(t | text) before thresholds, fp64."""
    scores_BJ: Tensor
    """Of every key, fp64: ``RouterKeys.scores``."""
    labels_BJ: Tensor
    """What tells the labels of a task apart, for ``KeyedRouter.of_labels``: the same, or those of each task's own stage."""
    foreign_B: Tensor
    """log of the background's mass over the bank's, fp64; minus infinity without a background."""


@dataclass(frozen=True, eq=False)
class KeyedRouter:
    """Attention with closed-form keys for labels.

    Args:
        tasks: names.
        labels: how many labels each task has; 0 for free text.
        keys: of the bank.
        temperature: fitted; ``gate.temperature`` overrides it if it is a number.
        beta: weight of the keys' evidence for a label next to the language model's, fitted over all tasks.
        betas: the same for each task, by its own held-out rows and those of all.
        gate: thresholds.
        background: weights (K, d) and bias (K,) of the background's keys; None for none.
        whole: keys for whole tasks, whose posterior is weighed in; None where the keys are such keys already.
        whole_temperature: of these.
        unseen: the bank's keys that the background is compared with: those that have not seen the held-out rows.
        parts: their names.
        foreign_above: by share of own rows lost, the score from which on a text is foreign.
        own: for the same labels as ``keys``, those of each task's own stage, divided by their temperature; None: ``keys``.
    """

    tasks: list[str]
    labels: tuple[int, ...]
    keys: RouterKeys
    temperature: float
    beta: float
    gate: GateSettings
    background: tuple[Tensor, Tensor] | None = None
    whole: RouterKeys | None = None
    whole_temperature: float = 1.0
    unseen: RouterKeys | None = None
    betas: tuple[float, ...] = ()
    parts: tuple[str, ...] = ()
    foreign_above: tuple[tuple[float, float], ...] = ()
    own: RouterKeys | None = None
    kind: str = "posterior"
    needs_features: bool = True

    def __post_init__(self) -> None:
        if not self.betas:
            object.__setattr__(self, "betas", (self.beta,) * len(self.tasks))
        if self.keys.tasks != len(self.tasks) or not len(self.labels) == len(self.betas) == len(self.tasks):
            raise BankError(f"router: keys of {self.keys.tasks} tasks do not fit {len(self.tasks)} tasks")
        if self.keys.weights.dim() != 2 or self.keys.weights.shape[0] != len(self.keys.task):
            raise BankError(f"router: keys {tuple(self.keys.weights.shape)} do not fit {len(self.keys.task)} entries")
        if self.own is not None and (self.own.task, self.own.label) != (self.keys.task, self.keys.label):
            found = f"{len(self.own.task)} keys of own stages do not fit"
            raise BankError(f"router: {found} the {len(self.keys.task)} of the bank")

    @property
    def chosen_temperature(self) -> float:
        """T"""
        chosen = self.gate.temperature
        return self.temperature if chosen == "calibrated" else float(chosen)

    @property
    def threshold(self) -> float | None:
        """The score from which on a text is foreign; None where every text is taken for one of the bank's."""
        if not self.gate.abstention or self.background is None or not self.foreign_above:
            return None
        return min(self.foreign_above, key=lambda one: abs(one[0] - self.gate.lost))[1]

    def evidence(self, features_BD: Tensor) -> Evidence:
        """What the keys say of texts by their features."""
        features = features_BD.detach()
        temperature = self.chosen_temperature
        scores = self.keys.scores(features, temperature)
        posterior = self._weighed(features, self.keys.of_tasks(scores))
        cut = relative_threshold if self.gate.form == "relative" else absolute_threshold
        gates = cut(posterior, self.gate.threshold).float()
        foreign = self.foreign(features)
        if self.threshold is not None:
            gates = gates * (foreign <= self.threshold).float()[:, None]
        labels = scores if self.own is None else self.own.scores(features, 1.0)
        return Evidence(gates, posterior, scores, labels, foreign)

    def foreign(self, features_BD: Tensor) -> Tensor:
        """log of the background's mass over the bank's, (B,) fp64; minus infinity without a background."""
        rows = features_BD.to(self.keys.weights)
        if self.background is None or self.unseen is None:
            return rows.new_full((len(rows),), -torch.inf)
        return _foreign(rows, self.unseen, *self.background, self.chosen_temperature)

    def posterior(self, features_BD: Tensor) -> Tensor:
        """p(t | text) before any threshold, (B, T), fp64: also the prior of selectors."""
        features = features_BD.detach()
        return self._weighed(features, self.keys.of_tasks(self.keys.scores(features, self.chosen_temperature)))

    def _weighed(self, features_BD: Tensor, by_label_BT: Tensor) -> Tensor:
        """The geometric mean with the posterior of the keys for whole tasks."""
        if self.whole is None:
            return by_label_BT
        chosen = self.gate.temperature
        temperature = self.whole_temperature if chosen == "calibrated" else float(chosen)
        by_task_BT = self.whole.of_tasks(self.whole.scores(features_BD, temperature))
        tiny = torch.finfo(torch.float64).tiny
        logs = 0.5 * (by_label_BT.clamp(min=tiny).log() + by_task_BT.clamp(min=tiny).log())
        return torch.softmax(logs, dim=-1) * (by_label_BT + by_task_BT > 0)  # a task that is left out has no share

    def gates(self, features_BD: Tensor | None, batch: int) -> Tensor:
        """See ``Router``; ``features_BD`` (B, d) are required."""
        if features_BD is None or len(features_BD) != batch:
            raise ValueError(f"the posterior router needs features of all {batch} inputs")
        return self.evidence(features_BD).gates_BT

    def of_labels(self, labels_BJ: Tensor, task: int) -> Tensor | None:
        """log p(label | text, task), (B, labels), of ``Evidence.labels_BJ``; None where the task has no keys for labels."""
        count = self.labels[task]
        return self.keys.of_labels(labels_BJ, task, count) if count else None

    def only(self, tasks: Sequence[int]) -> KeyedRouter:
        """The same router, as if the bank held these tasks alone: the gates of the others are 0."""
        whole, unseen = (keys and keys.only(tasks) for keys in (self.whole, self.unseen))
        return replace(self, keys=self.keys.only(tasks), whole=whole, unseen=unseen)

    def to(self, device: torch.device | str) -> KeyedRouter:
        """See ``Router``."""
        background = self.background and (self.background[0].to(device), self.background[1].to(device))
        whole, unseen, own = (keys and keys.to(device) for keys in (self.whole, self.unseen, self.own))
        return replace(self, keys=self.keys.to(device), background=background, whole=whole, unseen=unseen, own=own)

    def tensors(self) -> dict[str, Tensor]:
        """``weights``, ``bias``, ``log_prior`` and, with a background, its own and those that it is compared with."""
        named = {"weights": self.keys.weights, "bias": self.keys.bias, "log_prior": self.keys.log_prior}
        if self.background is not None:
            named |= {"background.weights": self.background[0], "background.bias": self.background[1]}
        for group, keys in (("whole", self.whole), ("unseen", self.unseen), ("own", self.own)):
            if keys is not None:
                named |= {f"{group}.{name}": getattr(keys, name) for name in ("weights", "bias", "log_prior")}
        return {name: tensor.cpu().contiguous() for name, tensor in named.items()}

    def settings(self) -> dict[str, Any]:
        """See ``Router``."""
        keys = {"task": list(self.keys.task), "label": list(self.keys.label), "labels": list(self.labels)}
        return {
            "kind": self.kind, "tasks": self.tasks, "temperature": self.temperature, "beta": self.beta, "keys": keys,
            "betas": list(self.betas),
            "gate": asdict(self.gate), "parts": list(self.parts),
            "foreign_above": [list(one) for one in self.foreign_above],
            **{
                group: keys and {"task": list(keys.task), "label": list(keys.label)}
                for group, keys in (("whole", self.whole), ("unseen", self.unseen))
            },
            "whole_temperature": self.whole_temperature,
            **({} if self.own is None else {"own": {"task": list(self.own.task), "label": list(self.own.label)}}),
        }  # fmt: skip


LOST: tuple[float, ...] = (0.001, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1)
"""Shares of own rows lost for which a threshold is stored."""


def keyed_router(
    statistics: Sequence[TaskStatistics],
    *,
    rule: KeyRule,
    shrinkage: float | None,
    gate: GateSettings,
    depths: int = 1,
    background: Mapping[str, Tensor] | None = None,
    label_keys: LabelKeys = "bank",
    leave_one_out: bool = False,
) -> KeyedRouter:
    """The router of a bank from the statistics of its tasks, in their order.

    Args:
        statistics: with held-out rows.
        rule: whether labels have keys.
        shrinkage: of the covariance; None: held-out rows choose.
        gate: thresholds.
        depths: of the trunk whose states lie side by side in the features; held-out rows choose among them.
        background: mean features (d,) of each part of a background; None for none.
        label_keys: which keys tell the labels of a task apart.
        leave_one_out: whether rows of samples choose next to the held-out ones (``fit``); thresholds they set in any case.
    """
    shrinkages = SHRINKAGES if shrinkage is None else (shrinkage,)
    choices = depth_choices(len(statistics[0].mean), depths)
    fitted = fit(statistics, rule, shrinkages, choices, leave_one_out)
    labels = tuple(0 if one.by_label is None else len(one.by_label.counts) for one in statistics)
    router = KeyedRouter(
        [s.task for s in statistics], labels, fitted.keys, fitted.temperature, fitted.beta, gate, betas=fitted.betas
    )
    if any(label >= 0 for label in fitted.keys.label):
        whole = fit(statistics, "task", shrinkages, [fitted.columns], leave_one_out)
        router = replace(router, whole=whole.keys, whole_temperature=whole.temperature)
        if label_keys == "stage":
            stages = own_keys(statistics, rule, shrinkages, choices, fitted, leave_one_out)
            weights, bias = (torch.cat([getattr(one, name) for one in stages]) for name in ("weights", "bias"))
            router = replace(
                router, own=replace(fitted.keys, weights=weights, bias=bias), betas=tuple(one.beta for one in stages)
            )
    return with_background(router, fitted, statistics, rule, background) if background else router


@dataclass(frozen=True, slots=True)
class OwnKeys:
    """What tells a task's labels apart after its own stage."""

    weights: Tensor
    """(labels of the task, d) fp64, divided by the temperature."""
    bias: Tensor
    """(labels of the task,) fp64, divided by the temperature."""
    beta: float
    """Weight of this evidence next to the model's."""


_KNOWN: dict[str, OwnKeys] = {}
"""By what they follow from: a worker or a driver that stays fits the keys of each stage once."""
_KNOWN_LOCK = threading.Lock()
MOST_KNOWN = 128


def own_keys(
    statistics: Sequence[TaskStatistics],
    rule: KeyRule,
    shrinkages: Sequence[float],
    choices: Sequence[Tensor],
    fitted: Fitted,
    leave_one_out: bool = False,
) -> list[OwnKeys]:
    """Of each task, from the statistics of the tasks up to it; ``fitted`` is what all give, the rest as for ``fit``."""
    found = []
    columns = {str(n): chosen for n, chosen in enumerate(choices)}
    reads = tensors_digest(columns, rule=rule, shrinkages=list(shrinkages), leave_one_out=leave_one_out)
    for place, newest in enumerate(statistics):
        reads = tensors_digest(newest.tensors(), before=reads)
        own = _KNOWN.get(reads)
        if own is None:
            last = place == len(statistics) - 1
            own = _newest(fitted if last else fit(statistics[: place + 1], rule, shrinkages, choices, leave_one_out))
            with _KNOWN_LOCK:
                _KNOWN[reads] = own
                while len(_KNOWN) > MOST_KNOWN:
                    del _KNOWN[next(iter(_KNOWN))]
        found.append(own)
    return found


def _newest(fitted: Fitted) -> OwnKeys:
    """Keys of the last task."""
    keys = fitted.keys
    rows = [place for place, task in enumerate(keys.task) if task == keys.tasks - 1]
    return OwnKeys(keys.weights[rows] / fitted.temperature, keys.bias[rows] / fitted.temperature, fitted.betas[-1])


def with_background(
    router: KeyedRouter,
    fitted: Fitted,
    statistics: Sequence[TaskStatistics],
    rule: KeyRule,
    background: Mapping[str, Tensor],
) -> KeyedRouter:
    """``router`` with keys for those parts of a background that hardly take a row of the bank's tasks, and thresholds."""
    names = sorted(background)
    means = torch.stack([background[name].double() for name in names])
    temperature = router.chosen_temperature
    columns = fitted.columns
    narrow = [one.of_columns(columns) for one in statistics]
    covariance = covariance_of(narrow, rule, fitted.shrinkage)
    narrow_weights = covariance.solve(means[:, columns])
    weights = torch.zeros_like(means).index_copy(1, columns, narrow_weights)
    bias = -0.5 * (means * weights).sum(dim=1)
    held = [one.held.features.double() for one in statistics if one.held is not None and len(one.held.labels)]
    taken = torch.zeros(len(names))
    for rows in held:
        wins = (rows @ weights.T + bias) / temperature > _mass(rows, fitted.unseen, temperature)[:, None]
        taken = torch.maximum(taken, wins.float().mean(dim=0))
    remaining = [place for place, share in enumerate(taken.tolist()) if share <= MOST_TAKEN]
    if not remaining or not held:
        return router
    found = [_foreign(rows, fitted.unseen, weights[remaining], bias[remaining], temperature) for rows in held]
    for left in left_out_rows(narrow, rule, covariance, keys_under(covariance, narrow, rule)):
        generic = left.left_out.scores(narrow_weights[remaining], bias[remaining])
        mass = (left.scores / temperature + fitted.unseen.log_prior).logsumexp(dim=-1)
        found.append(_against(generic / temperature, mass))
    scores = torch.cat(found)
    above = tuple((share, float(torch.quantile(scores, 1 - share))) for share in LOST)
    parts = tuple(names[place] for place in remaining)
    own = (weights[remaining].contiguous(), bias[remaining].contiguous())
    return replace(router, background=own, unseen=fitted.unseen, parts=parts, foreign_above=above)


def _mass(rows: Tensor, keys: RouterKeys, temperature: float) -> Tensor:
    """log sum_j exp(s_j / T + log prior_j), (B,)"""
    return (keys.scores(rows, temperature) + keys.log_prior).logsumexp(dim=-1)


def _foreign(rows: Tensor, keys: RouterKeys, weights: Tensor, bias: Tensor, temperature: float) -> Tensor:
    return _against((rows @ weights.T + bias) / temperature, _mass(rows, keys, temperature))


def _against(background_BK: Tensor, mass_B: Tensor) -> Tensor:
    """log sum_k exp(s_k / T) / K over the bank's mass, (B,)"""
    return background_BK.logsumexp(dim=-1) - torch.tensor(float(background_BK.shape[-1])).log() - mass_B


def keyed_router_from(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> KeyedRouter:
    """Inverse of ``KeyedRouter.tensors`` and ``KeyedRouter.settings``; raises KeyError or TypeError where they lack one.

    Raises:
        BankError: numbers that are not finite, or that do not fit.
    """
    named = {name: tensors[name].double() for name in ("weights", "bias", "log_prior")}
    extra = {n: t.double() for n, t in tensors.items() if n.startswith(("background.", "unseen.", "whole.", "own."))}
    if not all(bool(torch.isfinite(t).all()) for t in (*named.values(), *extra.values())):
        raise BankError("router: keys hold NaN or infinity")
    keys = _keys_from(named, settings["keys"])
    whole, unseen, own = (
        _keys_from({name: extra[f"{group}.{name}"] for name in named}, settings[group]) if settings.get(group) else None
        for group in ("whole", "unseen", "own")
    )
    has_background = "background.weights" in extra
    return KeyedRouter(
        list(settings["tasks"]), tuple(settings["keys"]["labels"]), keys,
        float(settings["temperature"]), float(settings["beta"]),
        GateSettings(**settings["gate"]),
        (extra["background.weights"], extra["background.bias"]) if has_background else None,
        whole, float(settings.get("whole_temperature", 1.0)), unseen,
        tuple(map(float, settings.get("betas", ()))),
        tuple(settings["parts"]), tuple((float(a), float(b)) for a, b in settings["foreign_above"]), own,
    )  # fmt: skip


def _keys_from(tensors: Mapping[str, Tensor], whose: Mapping[str, Any]) -> RouterKeys:
    """Keys of their tensors and of the tasks and labels to which they belong."""
    keys = RouterKeys(tensors["weights"], tensors["bias"], tuple(whose["task"]), tuple(whose["label"]), tensors["log_prior"])
    if not len(keys.task) == len(keys.label) == len(keys.bias) == len(keys.log_prior):
        raise BankError(f"router: {len(keys.task)} keys, {len(keys.bias)} biases")
    return keys
