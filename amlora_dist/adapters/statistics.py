"""Sufficient statistics of each task's features, and the attention keys that follow from them in closed form.

One Gaussian per task with a shared covariance (linear discriminant analysis). Everything is fp64. A task's statistics
depend on its own rows only, so a bank grows by adding them and no stage touches those of another.

Shapes: n rows of one task, d features, k rows of a factor (at most d, and at most n plus one for each merged part),
T tasks, G temperatures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from amlora_dist.errors import BankError, UserError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

TEMPERATURES: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0)
"""The fixed grid on which every stage stores the likelihood of its held-out rows.

It begins at 1: few held-out rows without a mistake are the likelier the lower T is, but the posterior of estimated
Gaussians is over-confident, never the opposite.
"""

BACKGROUND = "background."
"""Where, among the tensors, the names of the background's means begin."""


def _no_likelihoods() -> Tensor:
    return torch.zeros(len(TEMPERATURES), dtype=torch.float64)


@dataclass(frozen=True, slots=True)
class LabelMeans:
    """Means of the rows of each label of a task, in the order of its labels.

    ``counts`` (L,) int64; ``means`` (L, d) fp64, 0 where a label has no row.
    """

    counts: Tensor
    means: Tensor


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Rows that neither the adapter nor the statistics have seen, by which every later version of the bank is calibrated.

    No text and no tokens, but ``features`` (n, d) fp32; ``labels`` (n,) int64, the place of each row's label, -1 in a
    free-text task; ``loglikelihoods`` (n, L) fp32, nats: what the model says of each label under the task's own row, once
    it is trained, else None.
    """

    features: Tensor
    labels: Tensor
    loglikelihoods: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """By the names under which they are stored."""
        found = {"held.features": self.features.contiguous(), "held.labels": self.labels.contiguous()}
        return found if self.loglikelihoods is None else found | {"held.loglikelihoods": self.loglikelihoods.contiguous()}


@dataclass(frozen=True, slots=True)
class Sample:
    """Some of the rows that the statistics count, for thresholds: each can be left out of the keys in closed form.

    No text and no tokens, but ``features`` (n, d) fp32 and ``labels`` (n,) int64, as of ``HeldOut``.
    """

    features: Tensor
    labels: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """By the names under which they are stored."""
        return {"sample.features": self.features.contiguous(), "sample.labels": self.labels.contiguous()}


@dataclass(frozen=True, slots=True)
class TaskStatistics:
    """What the router needs of one task, from its training rows without the held-out ones.

    ``factor`` is thin: ``factor^T factor`` is the scatter around the task's mean, sum_j (f_j - mean)(f_j - mean)^T,
    exactly (the R of a QR decomposition, so no row of features can be read off it). With ``by_label`` it is the scatter
    around the mean of each row's own label; ``task_factor`` has the other one then too.

    ``held`` is of banks whose prompts have format 2, the other ``holdout_*`` of those before.

    ``holdout_nll[g]`` is ``sum_j -log softmax((W f_j + b) / TEMPERATURES[g])[this task]`` over the ``holdout_count``
    rows that **this** stage kept out of the statistics, under the keys of the bank **as of this stage** (this task
    and the earlier ones). It is computed once, when the stage ends, and never again, for the rows are not kept:
    later tasks, whose rows these ones may be confused with, are counted by the later stages' own held-out rows.

    ``holdout_factor`` is a thin factor of the held-out rows' second moments around ``mean``, the scatter that new rows
    really have: abstention judges distance by it, under the keys of any later bank. ``None`` without held-out rows.
    """

    task: str
    count: int
    mean: Tensor
    factor: Tensor
    holdout_nll: Tensor = field(default_factory=_no_likelihoods)
    holdout_count: int = 0
    holdout_factor: Tensor | None = None
    by_label: LabelMeans | None = None
    held: HeldOut | None = None
    background: dict[str, Tensor] = field(default_factory=dict)
    """Mean features (d,) of generic texts by their part, where they were computed (``tasks.background``)."""
    sample: Sample | None = None
    """Of the rows counted, next to held-out ones; None in banks of before that, and where no row is held out."""

    def with_held(self) -> TaskStatistics:
        """The statistics of all of the task's rows, the held-out ones counted too; these are kept apart."""
        held = self.held
        if held is None or not len(held.labels):
            return self
        labels = [] if self.by_label is None else held.labels.tolist()
        count = 0 if self.by_label is None else len(self.by_label.counts)
        bare = TaskStatistics(self.task, self.count, self.mean, self.factor, by_label=self.by_label)
        whole = merge([bare, TaskStatistics.from_features(self.task, held.features, labels, count)])
        return replace(whole, held=held, background=self.background, sample=self.sample)

    def of_columns(self, columns: Tensor) -> TaskStatistics:
        """What the keys need of these statistics, over some of the features: ``columns`` (c,) int64."""
        by_label = None if self.by_label is None else LabelMeans(self.by_label.counts, self.by_label.means[:, columns])
        held, sample = self.held, self.sample
        held = None if held is None else replace(held, features=held.features[:, columns])
        sample = None if sample is None else replace(sample, features=sample.features[:, columns])
        mean, factor = self.mean[columns], self.factor[:, columns]
        return TaskStatistics(self.task, self.count, mean, factor, by_label=by_label, held=held, sample=sample)

    @property
    def task_factor(self) -> Tensor:
        """A factor of the scatter around the task's mean, (k, d)."""
        if self.by_label is None:
            return self.factor
        shifts = (self.by_label.means - self.mean) * self.by_label.counts.double().sqrt()[:, None]
        return torch.cat([self.factor, shifts])

    @classmethod
    def from_features(cls, task: str, features: Tensor, labels: Sequence[int] = (), label_count: int = 0) -> TaskStatistics:
        """Statistics of the given rows; one rank's share may be empty.

        Args:
            task: name.
            features: ``(n, d)``, any float dtype, every row counted once.
            labels: place of each row's label, for a mean a label; empty for none.
            label_count: labels that the task has; 0 for none.

        Raises:
            UserError: features that are not finite.
        """
        rows = _finite(task, features)
        count, width = rows.shape
        mean = rows.mean(dim=0) if count else rows.new_zeros(width)
        if not label_count:
            return cls(task, count, mean, thin_factor(rows - mean) if count else rows.new_zeros(0, width))
        place = torch.tensor(labels, dtype=torch.long)
        counts = torch.bincount(place, minlength=label_count)
        sums = rows.new_zeros(label_count, width).index_add_(0, place, rows)
        means = sums / counts.clamp(min=1)[:, None]
        factor = thin_factor(rows - means[place]) if count else rows.new_zeros(0, width)
        return cls(task, count, mean, factor, by_label=LabelMeans(counts, means))

    def with_holdout(self, features: Tensor, earlier: Sequence[TaskStatistics], shrinkage: float) -> TaskStatistics:
        """These statistics and what is kept of held-out rows, or of one rank's share of them.

        Args:
            features: ``(n, d)`` held-out rows of this task; may be empty.
            earlier: the statistics of the tasks before this one.
            shrinkage: of the keys.

        Raises:
            UserError: features that are not finite.
        """
        rows = _finite(self.task, features)
        if not len(rows):
            return self
        nll = holdout_nll(rows, len(earlier), *keys([*earlier, self], shrinkage))
        return replace(self, holdout_nll=nll, holdout_count=len(rows), holdout_factor=thin_factor(rows - self.mean))

    def tensors(self) -> dict[str, Tensor]:
        """For a safetensors file of its own; the task's name is kept elsewhere."""
        held = {} if self.holdout_factor is None else {"holdout_factor": self.holdout_factor.contiguous()}
        if self.by_label is not None:
            held |= {"label_counts": self.by_label.counts, "label_means": self.by_label.means.contiguous()}
        if self.held is not None:
            held |= self.held.tensors()
        if self.sample is not None:
            held |= self.sample.tensors()
        held |= {f"{BACKGROUND}{part}": mean.contiguous() for part, mean in self.background.items()}
        return held | {
            "count": torch.tensor(self.count),
            "mean": self.mean.contiguous(),
            "factor": self.factor.contiguous(),
            "holdout_nll": self.holdout_nll.contiguous(),
            "holdout_count": torch.tensor(self.holdout_count),
            "temperatures": torch.tensor(TEMPERATURES, dtype=torch.float64),
        }

    @classmethod
    def from_tensors(cls, task: str, tensors: Mapping[str, Tensor]) -> TaskStatistics:
        """Inverse of ``tensors``.

        Raises:
            BankError: a tensor is missing, of a wrong shape, not finite, or was stored over another grid.
        """
        where = f"statistics of task {task!r}"
        missing = {"count", "mean", "factor", "holdout_nll", "holdout_count", "temperatures"} - set(tensors)
        if missing:
            raise BankError(f"{where}: no tensor {', '.join(sorted(missing))}")
        if tensors["temperatures"].tolist() != list(TEMPERATURES):
            raise BankError(f"{where}: held-out likelihoods over another temperature grid than this version's")
        mean, factor, nll = (tensors[name].double() for name in ("mean", "factor", "holdout_nll"))
        if mean.dim() != 1 or factor.dim() != 2 or factor.shape[1] != len(mean) or nll.shape != (len(TEMPERATURES),):
            raise BankError(f"{where}: shapes mean {tuple(mean.shape)}, factor {tuple(factor.shape)} do not fit")
        held = tensors["holdout_factor"].double() if "holdout_factor" in tensors else None
        if held is not None and (held.dim() != 2 or held.shape[1] != len(mean)):
            raise BankError(f"{where}: holdout_factor {tuple(held.shape)} does not fit {len(mean)} features")
        if not all(bool(torch.isfinite(t).all()) for t in (mean, factor, nll, mean if held is None else held)):
            raise BankError(f"{where}: holds NaN or infinity")
        count, holdout_count = (int(tensors[name].item()) for name in ("count", "holdout_count"))
        if count < 1 or holdout_count < 0:
            raise BankError(f"{where}: count {count}, holdout_count {holdout_count}")
        by_label, rows = _label_means(where, tensors, len(mean)), _held_rows(where, tensors, len(mean))
        sample = _sample(where, tensors, len(mean), 0 if by_label is None else len(by_label.counts))
        parts = {n.removeprefix(BACKGROUND): t.double() for n, t in tensors.items() if n.startswith(BACKGROUND)}
        if any(t.shape != mean.shape or not bool(torch.isfinite(t).all()) for t in parts.values()):
            raise BankError(f"{where}: the background's means do not fit {len(mean)} features, or are not finite")
        return cls(task, count, mean, factor, nll, holdout_count, held, by_label, rows, parts, sample)


def _label_means(where: str, tensors: Mapping[str, Tensor], width: int) -> LabelMeans | None:
    if "label_means" not in tensors:
        return None
    means, counts = tensors["label_means"].double(), tensors.get("label_counts")
    if counts is None or means.dim() != 2 or counts.shape != (len(means),) or means.shape[1] != width:
        raise BankError(f"{where}: label_means {tuple(means.shape)} do not fit their counts or {width} features")
    if not bool(torch.isfinite(means).all()):
        raise BankError(f"{where}: holds NaN or infinity")
    return LabelMeans(counts.long(), means)


def _held_rows(where: str, tensors: Mapping[str, Tensor], width: int) -> HeldOut | None:
    found, likelihoods = _rows(where, "held", tensors, width), tensors.get("held.loglikelihoods")
    if found is None:
        return None
    if likelihoods is not None and len(likelihoods) != len(found[1]):
        raise BankError(f"{where}: held.features {tuple(found[0].shape)} do not fit their labels or {width} features")
    return HeldOut(*found, None if likelihoods is None else likelihoods.float())


def _sample(where: str, tensors: Mapping[str, Tensor], width: int, labels: int) -> Sample | None:
    found = _rows(where, "sample", tensors, width)
    if found is None:
        return None
    if labels and not bool(((found[1] >= 0) & (found[1] < labels)).all()):
        raise BankError(f"{where}: sample.labels are not of its {labels} labels")
    return Sample(*found)


def _rows(where: str, name: str, tensors: Mapping[str, Tensor], width: int) -> tuple[Tensor, Tensor] | None:
    """Features and labels of rows that are stored; None where none are."""
    if f"{name}.features" not in tensors:
        return None
    features, labels = tensors[f"{name}.features"].float(), tensors.get(f"{name}.labels")
    if labels is None or features.shape != (len(labels), width):
        raise BankError(f"{where}: {name}.features {tuple(features.shape)} do not fit their labels or {width} features")
    if not bool(torch.isfinite(features).all()):
        raise BankError(f"{where}: holds NaN or infinity")
    return features, labels.long()


def _finite(task: str, features: Tensor) -> Tensor:
    """``features`` (n, d) on the CPU in fp64, or an error."""
    if features.dim() != 2:
        raise ValueError(f"features of task {task!r}: shape {tuple(features.shape)}, expected (rows, features)")
    rows = features.detach().to("cpu", torch.float64)
    bad = (~torch.isfinite(rows).all(dim=1)).sum().item()
    if bad:
        raise UserError(
            f"task {task!r}: the router's features are NaN or infinite in {bad} of {len(rows)} rows;"
            " the base model overflows below router.layer (use dtype: fp32 or bf16)"
        )
    return rows


def thin_factor(rows: Tensor) -> Tensor:
    """R with ``R^T R = rows^T rows``, shape (min(n, d), d), signs fixed: it does not depend on the rows' order."""
    upper: Tensor = torch.linalg.qr(rows, mode="r").R
    signs = torch.where(upper.diagonal() < 0, -1.0, 1.0).to(upper)
    return upper * signs[:, None]


def merge(parts: Sequence[TaskStatistics]) -> TaskStatistics:
    """One task's statistics from those of disjoint shares of its rows (one per rank), in any order.

    Sums only: N = sum n_i, mean = sum n_i m_i / N, S = sum S_i + sum n_i (m_i - mean)(m_i - mean)^T
    (Chan, Golub and LeVeque 1979). Equal to one rank's to rounding.

    Raises:
        ValueError: no parts, parts of several tasks or widths, or with held-out rows (``merge_holdouts`` comes after).
    """
    if any(part.holdout_count for part in parts):
        raise ValueError("merge takes parts without held-out rows: these are seen from the merged mean")
    if not parts or len({part.task for part in parts}) != 1 or len({len(part.mean) for part in parts}) != 1:
        raise ValueError("merge takes the parts of one task, at least one, over the same features")
    count = sum(part.count for part in parts)
    filled = [part for part in parts if part.count]
    if not filled:
        return parts[0]
    mean = torch.stack([part.mean * part.count for part in filled]).sum(dim=0) / count
    if len(filled) == 1:
        return filled[0]
    labelled = [part.by_label for part in filled if part.by_label is not None]
    if not labelled:
        shifts = torch.stack([(part.mean - mean) * math.sqrt(part.count) for part in filled])
        return TaskStatistics(parts[0].task, count, mean, thin_factor(torch.cat([*(p.factor for p in filled), shifts])))
    counts_L = torch.stack([one.counts for one in labelled]).sum(dim=0)
    sums_LD = torch.stack([one.means * one.counts[:, None] for one in labelled]).sum(dim=0)
    means_LD = sums_LD / counts_L.clamp(min=1)[:, None]
    apart = [(one.means - means_LD) * one.counts.double().sqrt()[:, None] for one in labelled]
    factor = thin_factor(torch.cat([*(part.factor for part in filled), *apart]))
    return TaskStatistics(parts[0].task, count, mean, factor, by_label=LabelMeans(counts_L, means_LD))


def merge_holdouts(parts: Sequence[TaskStatistics]) -> TaskStatistics:
    """The same statistics with the held-out rows of several ranks, each part from ``with_holdout`` on one share."""
    held = [part for part in parts if part.holdout_count]
    if not held:
        return parts[0]
    if any(part.task != held[0].task or not torch.equal(part.mean, held[0].mean) for part in held):
        raise ValueError("merge_holdouts takes one task's statistics, equal on all ranks but for their held-out rows")
    nll = torch.stack([part.holdout_nll for part in held]).sum(dim=0)
    factor = thin_factor(torch.cat([part.holdout_factor for part in held if part.holdout_factor is not None]))
    count = sum(part.holdout_count for part in held)
    return replace(held[0], holdout_nll=nll, holdout_count=count, holdout_factor=factor)


class Covariance:
    """Sigma = (1 - shrinkage) S/N + shrinkage D of all tasks together, as something to solve with.

    D is diag(S/N) ``by_feature``, else mean(diag(S/N)) I. Hidden states have features of very unlike spread, and those of
    several depths unlike scale: by feature, the wide ones do not hide what the narrow ones tell. S is the pooled scatter
    within tasks (or ``within_labels``) and N the number of rows. With fewer factor rows than features the solve goes
    through the Woodbury identity on a (rows, rows) system, so that d = 8192 needs no d x d matrix; otherwise through the
    Cholesky factor of the dense Sigma. Features without any spread (one row per task) have Sigma = I.

    Raises:
        UserError: Sigma is singular (shrinkage 0 with too few rows).
    """

    def __init__(
        self,
        statistics: Sequence[TaskStatistics],
        shrinkage: float,
        *,
        within_labels: bool = False,
        by_feature: bool = False,
    ) -> None:
        check(statistics)
        width = len(statistics[0].mean)
        self.rows = total = sum(s.count for s in statistics)
        """N"""
        self.flat = False
        """Whether there is no spread, so that Sigma is I whatever N is."""
        self.low_rank = False
        self.scale: Tensor | None = None
        """(d,) by which features are divided before, and solutions after; None for 1."""
        self.factors = [s.factor if within_labels else s.task_factor for s in statistics]
        trace = sum(float(factor.square().sum()) for factor in self.factors)
        power = sum(s.count * float(s.mean.square().sum()) for s in statistics)
        if trace <= 1e-24 * power:  # equal rows leave rounding errors, not a covariance
            self.ridge, self.weight, self.flat = 1.0, 0.0, True
            return
        self.ridge, self.weight = shrinkage * trace / (total * width), (1 - shrinkage) / total
        if by_feature:
            spread = torch.stack([factor.square().sum(dim=0) for factor in self.factors]).sum(dim=0)
            self.scale = spread.clamp(min=1e-9 * trace / width).div(total).sqrt()
            self.factors = [factor / self.scale for factor in self.factors]
            self.ridge = shrinkage
        if self.weight == 0.0:
            return
        rank = sum(map(len, self.factors))
        if self.ridge > 0 and rank < width:
            self.low_rank = True
            self.stack = torch.cat(self.factors)
            system = self.stack @ self.stack.T
            system.diagonal().add_(self.ridge / self.weight)
        else:
            system = torch.zeros(width, width, dtype=torch.float64)
            for factor in self.factors:
                system.addmm_(factor.T, factor, alpha=self.weight)
            system.diagonal().add_(self.ridge)
        self.chol, info = torch.linalg.cholesky_ex(system)
        if int(info):
            raise UserError(
                f"router.shrinkage: {shrinkage} leaves the covariance of {width} features singular with {total} rows"
                " over all tasks; take a value above 0 (0.1 is the default)"
            )

    def solve(self, rows: Tensor) -> Tensor:
        """``rows`` (m, d) -> (m, d), each Sigma^-1 row."""
        if self.scale is not None:
            return self._solve(rows / self.scale) / self.scale
        return self._solve(rows)

    def _solve(self, rows: Tensor) -> Tensor:
        if self.weight == 0.0:
            return rows / self.ridge
        if not self.low_rank:
            return torch.cholesky_solve(rows.T, self.chol).T.contiguous()
        inner = torch.cholesky_solve(self.stack @ rows.T, self.chol)
        return ((rows - inner.T @ self.stack) / self.ridge).contiguous()

    def between(self, rows: Tensor) -> Tensor:
        """``rows`` (m, d) -> (m, m), rows Sigma rows^T."""
        if self.scale is not None:
            rows = rows * self.scale
        seen = [rows @ factor.T for factor in self.factors]
        return self.ridge * (rows @ rows.T) + self.weight * sum((x @ x.T for x in seen), rows.new_zeros(()))


def background_of(statistics: Sequence[TaskStatistics]) -> dict[str, Tensor] | None:
    """The background of a bank with these statistics, in its order: the newest that was computed; None for none."""
    return next((one.background for one in reversed(statistics) if one.background), None)


def check(statistics: Sequence[TaskStatistics]) -> None:
    """Refuse what keys cannot be made of: no task, an empty one, tasks over other features."""
    if not statistics:
        raise ValueError("keys need the statistics of at least one task")
    for s in statistics:
        if s.count < 1:
            raise UserError(f"task {s.task!r}: no rows are left for the router's statistics; lower router.holdout")
        if len(s.mean) != len(statistics[0].mean):
            raise UserError(
                f"task {s.task!r}: statistics over {len(s.mean)} features, those of {statistics[0].task!r} over"
                f" {len(statistics[0].mean)}; all stages of a bank need one base model and one router.layer"
            )


def keys(statistics: Sequence[TaskStatistics], shrinkage: float) -> tuple[Tensor, Tensor]:
    """w_t = Sigma^-1 mu_t and b_t = -1/2 mu_t . w_t, so that softmax(W f + b) is the posterior of equal priors.

    Args:
        statistics: one per task, in the bank's order.
        shrinkage: in [0, 1]; 1 gives nearest mean.

    Returns:
        W (T, d) and b (T,), fp64.
    """
    covariance = Covariance(statistics, shrinkage)
    means = torch.stack([s.mean for s in statistics])
    weights = covariance.solve(means)
    return weights, -0.5 * (means * weights).sum(dim=1)


def posterior(features: Tensor, weights: Tensor, bias: Tensor, temperature: float) -> Tensor:
    """softmax((W f + b) / T), features (n, d) -> (n, T) in the dtype of the keys.

    The scores of different tasks share a large part and differ by little, hence fp64 keys even for bf16 features.
    """
    return torch.softmax((features.to(weights) @ weights.T + bias) / temperature, dim=-1)


def holdout_nll(features: Tensor, task: int, weights: Tensor, bias: Tensor) -> Tensor:
    """Negative log-likelihood of one task's held-out rows, summed over them, for each of ``TEMPERATURES``.

    Args:
        features: ``(n, d)`` rows of the task at index ``task`` that are not in its statistics.
        task: index into the keys.
        weights: W (T, d) of the bank as of this stage.
        bias: b (T,).

    Returns:
        (G,) fp64 sums, for ``TaskStatistics.holdout_nll``; zeros for one task, which is certain at any temperature.
    """
    scores = features.to(weights) @ weights.T + bias
    sums = [-torch.log_softmax(scores / temperature, dim=-1)[:, task].sum() for temperature in TEMPERATURES]
    return torch.stack(sums).cpu()


def calibrate(statistics: Sequence[TaskStatistics]) -> float:
    """The temperature of the grid with the least sum of stored held-out likelihoods; 1 for one task or no held-out row.

    Of equal sums the lowest temperature counts.
    """
    total = torch.stack([s.holdout_nll for s in statistics]).sum(dim=0)
    if len(statistics) < 2 or not any(s.holdout_count for s in statistics):
        return 1.0
    return TEMPERATURES[min(range(len(TEMPERATURES)), key=total.tolist().__getitem__)]
