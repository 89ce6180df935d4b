"""Keys of a bank: one Gaussian a task or a label, in closed form, and what is fitted on held-out rows.

With the common covariance of ``statistics.Covariance`` the scores of a text's features f are w_j . f + b_j,
w_j = Sigma^-1 mu_j, b_j = -1/2 mu_j . w_j (linear discriminant analysis). At temperature T

    p(j | f) = softmax_j((w_j . f + b_j) / T + log prior_j)

where every task has the prior 1/T_tasks, spread evenly over its labels. A task's posterior is the sum of its keys'. Keys
are made again at every version from sums over rows, so that a bank grows by adding a task's statistics to the others'.

Shapes: J keys, T tasks, n rows, d features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from amlora_dist.adapters.leave_one_out import LeftOut, leave_out
from amlora_dist.adapters.statistics import TEMPERATURES, Covariance

if TYPE_CHECKING:
    from amlora_dist.adapters.statistics import TaskStatistics

KeyRule = Literal["task", "label"]
KEYS_RULE = 3
"""Raised when the same statistics would make another router than before: scores of served answers are then computed again,
and no adapter is trained again."""
BETAS: tuple[float, ...] = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0)
"""Grid of the weight of the keys' evidence next to the language model's."""
PRIOR_BETA = 0.25
"""Of banks with too few held-out rows to fit one, for keys at ``PRIOR_TEMPERATURE``: flatter keys weigh more."""
PRIOR_TEMPERATURE = 3.0
SCALES: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
"""Grid of a common temperature of both kinds of evidence: what is fitted is how much one weighs against the other, not how
sure both are together, for a model that was trained on few rows is surer than it should be."""
FEWEST_ROWS = 48
"""Held-out rows from which on beta is fitted."""
POOLED_ROWS = 16.0
"""So many rows the mean over all tasks counts in the weight of one."""


@dataclass(frozen=True, slots=True, eq=False)
class RouterKeys:
    """Keys and whose they are."""

    weights: Tensor
    """(J, d) fp64"""
    bias: Tensor
    """(J,) fp64"""
    task: tuple[int, ...]
    """Of each key its task, by place in the bank."""
    label: tuple[int, ...]
    """Of each key its label, by place in its task; -1 for a key of a whole task."""
    log_prior: Tensor
    """(J,) fp64"""

    @property
    def tasks(self) -> int:
        """T"""
        return max(self.task) + 1

    def scores(self, features_nd: Tensor, temperature: float) -> Tensor:
        """(w_j . f + b_j) / T, (n, J) fp64: small differences of large numbers."""
        return (features_nd.to(self.weights) @ self.weights.T + self.bias) / temperature

    def of_tasks(self, scores_nJ: Tensor) -> Tensor:
        """p(t | f), (n, T)"""
        place = torch.tensor(self.task, device=scores_nJ.device)
        shares = torch.softmax(scores_nJ + self.log_prior, dim=-1)
        return shares.new_zeros(len(shares), self.tasks).index_add_(1, place, shares)

    def of_labels(self, scores_nJ: Tensor, task: int, labels: int) -> Tensor | None:
        """log p(label | f, task), (n, labels); None where the task has no keys for labels.

        A label that no row of the statistics had takes the least of the others.
        """
        own = [j for j, (t, label) in enumerate(zip(self.task, self.label, strict=True)) if t == task and label >= 0]
        if not own:
            return None
        places = torch.tensor([self.label[j] for j in own], device=scores_nJ.device)
        found = torch.log_softmax(scores_nJ[:, own], dim=-1)
        out = found.amin(dim=-1, keepdim=True).repeat(1, labels)
        return out.index_copy(1, places, found)

    def best_task(self, scores_nJ: Tensor) -> Tensor:
        """The task of the key that is likeliest of all, (n,): not always the likeliest task."""
        place = torch.tensor(self.task, device=scores_nJ.device)
        return place[(scores_nJ + self.log_prior).argmax(dim=-1)]

    def to(self, device: torch.device | str) -> RouterKeys:
        """The same on another device."""
        return RouterKeys(
            self.weights.to(device), self.bias.to(device), self.task, self.label, self.log_prior.to(device)
        )

    def only(self, tasks: Sequence[int]) -> RouterKeys:
        """The same keys, as if the bank held these tasks alone: the others have no prior."""
        own = torch.tensor([task in set(tasks) for task in self.task], device=self.log_prior.device)
        prior = self.log_prior.masked_fill(~own, -torch.inf)
        return replace(self, log_prior=prior - prior.logsumexp(dim=0))


def make_keys(statistics: Sequence[TaskStatistics], rule: KeyRule, shrinkage: float) -> RouterKeys:
    """Keys of a bank.

    Args:
        statistics: one per task, in the bank's order.
        rule: ``label``: a key for every label of a labelled task, one for a task of free text; ``task``: one a task.
        shrinkage: of the covariance.

    Raises:
        UserError: as ``Covariance``.
    """
    return keys_under(covariance_of(statistics, rule, shrinkage), statistics, rule)


def keys_under(covariance: Covariance, statistics: Sequence[TaskStatistics], rule: KeyRule) -> RouterKeys:
    """The same under a covariance that is given."""
    means: list[Tensor] = []
    task: list[int] = []
    label: list[int] = []
    log_prior: list[float] = []
    every = -torch.tensor(float(len(statistics))).log().item()
    for place, one in enumerate(statistics):
        if rule == "task" or one.by_label is None:
            rows, labels = [one.mean], [-1]
        else:
            labels = [number for number, count in enumerate(one.by_label.counts.tolist()) if count]
            rows = [one.by_label.means[number] for number in labels]
        means += rows
        task += [place] * len(rows)
        label += labels
        log_prior += [every - torch.tensor(float(len(rows))).log().item()] * len(rows)
    means_JD = torch.stack(means)
    weights = covariance.solve(means_JD)
    prior = torch.tensor(log_prior, dtype=torch.float64)
    return RouterKeys(weights, -0.5 * (means_JD * weights).sum(dim=1), tuple(task), tuple(label), prior)


def covariance_of(statistics: Sequence[TaskStatistics], rule: KeyRule, shrinkage: float) -> Covariance:
    """Of the keys of a bank, and of what is next to them."""
    return Covariance(statistics, shrinkage, within_labels=rule == "label", by_feature=True)


@dataclass(frozen=True, slots=True)
class LeftOutRows:
    """Rows of one task's sample, each left out of the keys (``leave_one_out``); those that cannot be are not among them."""

    task: int
    """Its place in the bank."""
    labels: Tensor
    """(n,) int64, as of ``Sample``."""
    left_out: LeftOut
    scores: Tensor
    """(n, J) fp64 at temperature 1."""


def left_out_rows(
    statistics: Sequence[TaskStatistics], rule: KeyRule, covariance: Covariance, keys: RouterKeys
) -> list[LeftOutRows]:
    """What keys say of the rows of samples as if each had not been counted; nothing of tasks without a sample.

    Args:
        statistics: that the keys were made of.
        rule: of the keys.
        covariance: of the keys.
        keys: ``keys_under`` these.
    """
    at = {whose: place for place, whose in enumerate(zip(keys.task, keys.label, strict=True))}
    found = []
    for place, one in enumerate(statistics):
        if one.sample is None or not len(one.sample.labels):
            continue
        if rule == "task" or one.by_label is None:
            count = len(one.sample.labels)
            own, means, counts = torch.full((count,), at[place, -1]), one.mean.expand(count, -1), torch.tensor(one.count)
        else:
            own = torch.tensor([at.get((place, label), 0) for label in one.sample.labels.tolist()])
            means, counts = one.by_label.means[one.sample.labels], one.by_label.counts[one.sample.labels]
        left = leave_out(one.sample.features, means, counts.expand(len(own)), covariance)
        scores = left.scores(keys.weights, keys.bias, own[left.places])
        found.append(LeftOutRows(place, one.sample.labels[left.places], left, scores))
    return found


@dataclass(frozen=True, slots=True)
class Fitted:
    """Keys with the settings that held-out rows prefer."""

    keys: RouterKeys
    """Of all rows, the held-out ones among them."""
    unseen: RouterKeys
    """Of all but the held-out rows: what these are judged by."""
    shrinkage: float
    columns: Tensor
    """Features that the keys read, (c,) int64; their weights of the others are 0."""
    temperature: float
    beta: float
    betas: tuple[float, ...]


def fit(
    statistics: Sequence[TaskStatistics],
    rule: KeyRule,
    shrinkages: Sequence[float],
    choices: Sequence[Tensor] | None = None,
    leave_one_out: bool = False,
) -> Fitted:
    """Keys, temperature and the weight of their evidence, from statistics and held-out rows alone.

    Features, shrinkage, temperature and weight are chosen with keys that have not seen the held-out rows; the keys that
    serve count these too, for with few rows a mean of a quarter more is a better one.

    Args:
        statistics: one per task, in the bank's order.
        rule: of the keys.
        shrinkages: to choose from; with one, or without held-out rows, the first.
        choices: sets of features to choose from in the same way (``depth_choices``); default: all.
        leave_one_out: whether rows of samples, each left out, choose too. What the model says of their labels is unknown: it
            has learned them, so that held-out rows alone choose the weight.
    """
    width = len(statistics[0].mean)
    found = []
    for columns in choices or [torch.arange(width)]:
        narrow = [one.of_columns(columns) for one in statistics]
        for shrinkage in shrinkages:
            covariance = covariance_of(narrow, rule, shrinkage)
            keys = keys_under(covariance, narrow, rule)
            more = left_out_rows(narrow, rule, covariance, keys) if leave_one_out else ()
            found.append((*fit_temperature(narrow, keys, more), shrinkage, columns, widened(keys, columns, width)))
    _, temperature, shrinkage, columns, keys = min(found, key=lambda one: one[0])
    beta, betas = fit_betas(statistics, keys, temperature)
    whole = make_keys([one.with_held().of_columns(columns) for one in statistics], rule, shrinkage)
    return Fitted(widened(whole, columns, width), keys, shrinkage, columns, temperature, beta, betas)


def depth_choices(width: int, depths: int) -> list[Tensor]:
    """Sets of features to choose from: of all depths, and from four depths on of every second one, the deepest among them.

    Args:
        width: features of all depths side by side.
        depths: how many.
    """
    every = torch.arange(width)
    if depths < 4 or width % depths:
        return [every]
    size = width // depths
    return [every, torch.cat([every[at * size : (at + 1) * size] for at in range(depths - 1, -1, -2)][::-1])]


def widened(keys: RouterKeys, columns: Tensor, width: int) -> RouterKeys:
    """Keys over some features as keys over all: 0 at the others."""
    return replace(keys, weights=keys.weights.new_zeros(len(keys.weights), width).index_copy(1, columns, keys.weights))


def fit_temperature(
    statistics: Sequence[TaskStatistics], keys: RouterKeys, more: Sequence[LeftOutRows] = ()
) -> tuple[float, float]:
    """The temperature of the grid at which held-out rows find their own label likeliest among all of the bank's (their own
    task where labels have no keys).

    Args:
        statistics: with held-out rows.
        keys: that have not seen them.
        more: rows that count as these do.

    Returns:
        The sum of its loss, nats, and the temperature; 0 and 1 where no row was held out.
    """
    held = [
        (place, one.held.labels, keys.scores(one.held.features, 1.0))
        for place, one in enumerate(statistics)
        if one.held is not None and len(one.held.labels)
    ]
    held += [(rows.task, rows.labels, rows.scores) for rows in more]
    best = (0.0, 1.0)
    for temperature in TEMPERATURES if held and len(keys.task) > 1 else ():
        loss = 0.0
        for place, labels, at_one in held:
            scores = at_one / temperature
            by_label = statistics[place].by_label
            own = None if by_label is None else keys.of_labels(scores, place, len(by_label.counts))
            loss -= float(keys.of_tasks(scores)[:, place].clamp(min=1e-12).log().sum())
            if own is not None:
                loss -= float(own.gather(1, labels[:, None]).sum())
        if best[0] == 0.0 or loss < best[0]:
            best = (loss, temperature)
    return best


def fit_betas(statistics: Sequence[TaskStatistics], keys: RouterKeys, temperature: float) -> tuple[float, tuple[float, ...]]:
    """The weight of the grid at which held-out rows find their own label likeliest, under their own task's row, at the best
    of ``SCALES``: over all tasks, and for each.

    A task's own rows are few: the mean loss over all counts as ``POOLED_ROWS`` rows more. Fewer than ``FEWEST_ROWS`` rows in
    all say too little: ``PRIOR_BETA``.
    """
    losses: dict[int, Tensor] = {}
    pooled = torch.zeros(len(BETAS), len(SCALES), dtype=torch.float64)
    rows = 0
    for place, one in enumerate(statistics):
        held = one.held
        if held is None or held.loglikelihoods is None or not len(held.labels):
            continue
        model = held.loglikelihoods.double()
        own = keys.of_labels(keys.scores(held.features, temperature), place, model.shape[1])
        if own is None:
            continue
        rows += len(model)
        grid = _label_losses(model, own, held.labels)
        pooled += grid
        losses[place] = grid.amin(dim=1)
    if rows < FEWEST_ROWS:
        prior = PRIOR_BETA * temperature / PRIOR_TEMPERATURE
        return prior, (prior,) * len(statistics)
    of_all = pooled.amin(dim=1)
    beta = BETAS[int(of_all.argmin())]
    shared = POOLED_ROWS * of_all / rows
    each = [BETAS[int((losses[t] + shared).argmin())] if t in losses else beta for t in range(len(statistics))]
    return beta, tuple(each)


def _label_losses(model_nL: Tensor, keys_nL: Tensor, labels_n: Tensor) -> Tensor:
    """Minus the log share of the right label, summed over rows, for each of ``BETAS`` and ``SCALES``."""
    at = torch.arange(len(labels_n))
    grid = [
        [-torch.log_softmax((model_nL + beta * keys_nL) / scale, dim=-1)[at, labels_n].sum() for scale in SCALES]
        for beta in BETAS
    ]
    return torch.stack([torch.stack(line) for line in grid])
