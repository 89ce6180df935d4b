"""What the rules of ``benchmarks/keys.py`` are made of, and those of them that are no Gaussians."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from served_by_rule import AskedBank, betas_of_scores
from torch import Tensor

from amlora_dist.adapters.statistics import TEMPERATURES

MEANS, RIDGES = 5, (1.0, 10.0, 100.0, 1e3, 1e4, 1e5)

Features = dict[int, Tensor]
"""(rows, d) fp32 by layer; layer 0 is the input embeddings."""


@dataclass(frozen=True)
class Rows:
    """Rows of one task."""

    features: Features
    labels: list[int]
    texts: list[str]
    likelihoods: Tensor | None = None
    """(rows, labels) fp64: of held-out rows what ``--bank`` says of their own task's labels."""


@dataclass(frozen=True)
class Data:
    """Rows of all tasks: those that are counted, held out, and asked."""

    seed: int
    names: list[str]
    words: list[tuple[str, ...]]
    train: list[Rows]
    held: list[Rows]
    asked: list[Rows]
    bank: AskedBank | None = None


@dataclass(frozen=True)
class Answers:
    """What a rule, fitted, says: a function of rows' features."""

    scores: Callable[[Features], Tensor]
    """log p(task), (rows, T) fp64, up to a constant."""
    labels: Callable[[Features, int], Tensor] | None
    """log p(label) of a task's labels, (rows, labels) fp64, up to a constant a row; None for a rule without labels."""
    bytes: int
    betas: tuple[float, ...] = ()
    """Weight of ``labels`` next to the model's evidence, for each task."""
    loss: float = 0.0
    """Of held-out rows, at the settings that were chosen, nats."""


def at(features: Features, layers: Sequence[int]) -> Tensor:
    """Features of several layers side by side, (rows, layers x d)."""
    return torch.cat([features[layer] for layer in layers], dim=1)


def flattened(scores_of: Callable[[Features], Tensor], data: Data) -> float:
    """The temperature at which held-out rows find their own task likeliest."""

    def loss(temperature: float) -> float:
        parts = [
            torch.log_softmax(scores_of(one.features) / temperature, dim=1)[:, place].sum()
            for place, one in enumerate(data.held)
        ]
        return -float(sum(parts))

    return min((*(1 / t for t in TEMPERATURES), *TEMPERATURES, 0.01, 0.003), key=loss)


def nearest_means(data: Data) -> Answers:
    """The largest cosine to one of ``MEANS`` means a task over input embeddings."""
    from sklearn.cluster import KMeans

    means = []
    for train in data.train:
        rows = torch.nn.functional.normalize(train.features[0].double(), dim=1)
        count = min(MEANS, len(rows))
        made = KMeans(count, n_init=4, random_state=0).fit(rows.numpy())
        means.append(torch.nn.functional.normalize(torch.from_numpy(made.cluster_centers_), dim=1))

    def cosines(features: Features) -> Tensor:
        rows = torch.nn.functional.normalize(features[0].double(), dim=1)
        return torch.stack([(rows @ own.T).amax(dim=1) for own in means], dim=1)

    temperature = flattened(cosines, data)
    return Answers(lambda features: cosines(features) / temperature, None, 8 * sum(own.numel() for own in means))


def ridge(data: Data, layers: list[int]) -> Answers:
    """Least squares from standardised features onto labels; a task is the sum of its labels' shares."""
    task = torch.tensor([place for place, words in enumerate(data.words) for _ in words])
    first = [sum(map(len, data.words[:place])) for place in range(len(data.words))]

    def stacked(groups: Sequence[Rows]) -> tuple[Tensor, Tensor]:
        rows = torch.cat([at(one.features, layers) for one in groups]).double()
        owner = torch.tensor([first[place] + label for place, one in enumerate(groups) for label in one.labels])
        return rows, owner

    rows, owner = stacked(data.train)
    held, held_owner = stacked(data.held)
    centre, spread = rows.mean(dim=0), rows.std(dim=0).clamp(min=1e-9)
    rows, held = (rows - centre) / spread, (held - centre) / spread
    target = torch.nn.functional.one_hot(owner, len(task)).double()
    gram, moment = rows.T @ rows, rows.T @ (target - target.mean(dim=0))

    def weights_at(weight: float) -> Tensor:
        return torch.linalg.solve(gram + weight * torch.eye(len(gram), dtype=torch.float64), moment)

    def missed(weight: float) -> float:
        return float((((held @ weights_at(weight)).argmax(dim=1)) != held_owner).double().mean())

    weights = weights_at(min(RIDGES, key=missed))
    shift = target.mean(dim=0)

    def scores(features: Features) -> Tensor:
        return (at(features, layers).double() - centre) / spread @ weights + shift

    def tasks(features: Features) -> Tensor:
        found = scores(features)
        return torch.stack([found[:, task == place].amax(dim=1) for place in range(len(data.words))], dim=1)

    temperature = flattened(tasks, data)
    betas = betas_of_scores(
        [scores(one.features) / temperature for one in data.held], [one.likelihoods for one in data.held],
        [one.labels for one in data.held], [len(words) for words in data.words],
    )  # fmt: skip

    def labels(features: Features, place: int) -> Tensor:
        return torch.log_softmax(scores(features)[:, task == place] / temperature, dim=1)

    return Answers(lambda features: tasks(features) / temperature, labels, 8 * (weights.numel() + 2 * len(centre)), betas)
