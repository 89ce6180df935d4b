"""From how many held-out rows on is a fitted weight of the keys better than a fixed one?

The keys' evidence for a label weighs beta next to the model's. A bank fits it on its held-out rows, from
``keys.FEWEST_ROWS`` of them on; below, it is ``PRIOR_BETA`` at the temperature ``PRIOR_TEMPERATURE``. Here the dev rows of
a finished bank's tasks are answered with beta fixed at several values, and fitted on n held-out rows, spread evenly over the
tasks, drawn ``--draws`` times; routes, keys and temperature are always those that all held-out rows give, and labels
are told apart by the bank's keys, one adapter a row. ``served`` is the share of right answers (its mean over draws and
seeds), ``worst`` the least of any draw, ``minus all`` the difference to a weight fitted on all held-out rows.

    python benchmarks/beta_prior.py --seeds 0 --bank models:/demo@champion --test 60
    python benchmarks/beta_prior.py --quick
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from frozen_features import FrozenModel
from keys import keys_parser, options, read, statistics_of
from other_rules import Data, at
from served_by_rule import count_right
from sweeps import show, write_json
from torch import Tensor

from amlora_dist.adapters import keys as keys_module
from amlora_dist.adapters.keyed_router import SHRINKAGES, keyed_router
from amlora_dist.adapters.keys import PRIOR_TEMPERATURE, Fitted, depth_choices, fit, fit_betas
from amlora_dist.adapters.settings import GateSettings
from amlora_dist.adapters.statistics import TaskStatistics
from amlora_dist.adapters.targets import default_depths
from amlora_dist.digests import named_seed

PRIORS = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0)
COUNTS = (12, 24, 48, 96)


def main() -> None:
    parser = keys_parser(__doc__)
    parser.add_argument("--draws", type=int, default=10, help="of held-out rows, for each number of them")
    args = parser.parse_args()
    if not args.bank and not args.quick:
        parser.error("--bank: which bank? `make demo` leaves models:/demo@champion")
    with options(parser, args):
        frozen = FrozenModel(args.model, dtype=torch.bfloat16 if args.dtype == "bf16" else torch.float32)
        depths = [*default_depths(frozen.middle), frozen.middle]
        found: dict[str, list[list[float]]] = {}
        for seed, bank in zip(args.seeds, args.bank, strict=True):
            for name, shares in measure(read(frozen, depths, args, seed, bank), depths, args.draws).items():
                found.setdefault(name, []).append(shares)
    every = statistics.fmean(one[0] for one in found["fitted on all"])
    table: list[dict[str, Any]] = []
    for name, seeds in found.items():
        mean = statistics.fmean(statistics.fmean(own) for own in seeds)
        worst = statistics.fmean(min(own) for own in seeds)
        table.append({"beta": name, "served": mean, "worst": worst, "minus all": mean - every, "draws": len(seeds[0])})
    show(f"{len(args.tasks)} tasks, {len(args.seeds)} seeds, split {args.split}", table, tuple(table[0]))
    write_json(args.json, {"tasks": args.tasks, "bank": args.bank, "seeds": args.seeds, "table": table, "shares": found})


def measure(data: Data, depths: list[int], draws: int) -> dict[str, list[float]]:
    """Share of right answers by how beta is chosen, one for each draw."""
    own = statistics_of(data, depths)
    router = keyed_router(own, rule="label", shrinkage=None, gate=GateSettings(), depths=len(depths), label_keys="bank")
    fitted = fit(own, "label", SHRINKAGES, depth_choices(len(own[0].mean), len(depths)))
    evidence = []
    for one in data.asked:
        features = at(one.features, depths)
        evidence.append((router.posterior(features).argmax(dim=1), router.evidence(features).labels_BJ))

    def served(betas: Sequence[float]) -> float:
        right = 0
        for one, (task, labels_BJ), place in zip(data.asked, evidence, range(len(data.names)), strict=True):

            def scores(to: int, places: Tensor, texts: list[str] = one.texts, labels_BJ: Tensor = labels_BJ) -> Tensor:
                assert data.bank is not None
                said = data.bank.likelihoods(to, [texts[row] for row in places.tolist()], data.words[to])
                keys = router.of_labels(labels_BJ[places], to)
                assert keys is not None, "every task has labels"
                return said + betas[to] * keys

            right += count_right(task, [data.words[place][label] for label in one.labels], data.words, scores)
        return right / sum(len(one.labels) for one in data.asked)

    tasks = len(data.names)
    found = {"fitted on all": [served(betas_on(own, fitted))]}
    for prior in PRIORS:
        found[f"{prior:g} T / {PRIOR_TEMPERATURE:g}"] = [served([prior * fitted.temperature / PRIOR_TEMPERATURE] * tasks)]
    for count in COUNTS:
        drawn = [betas_on(sampled(own, count, draw), fitted) for draw in range(draws)]
        found[f"fitted on {count}"] = [served(betas) for betas in drawn]
        found[f"fitted on {count}, one for all tasks"] = [
            served([betas_on(sampled(own, count, draw), fitted, pooled=True)[0]] * tasks) for draw in range(draws)
        ]
    return found


def betas_on(own: Sequence[TaskStatistics], fitted: Fitted, *, pooled: bool = False) -> tuple[float, ...]:
    """Fitted on held-out rows however few they are: for each task, or ``pooled`` for all alike."""
    fewest, keys_module.FEWEST_ROWS = keys_module.FEWEST_ROWS, 1
    try:
        beta, betas = fit_betas(own, fitted.unseen, fitted.temperature)
    finally:
        keys_module.FEWEST_ROWS = fewest
    return (beta,) * len(betas) if pooled else betas


def sampled(own: Sequence[TaskStatistics], count: int, draw: int) -> list[TaskStatistics]:
    """The same statistics with ``count`` of their held-out rows, as many of each task."""
    found = []
    for one in own:
        held = one.held
        assert held is not None and held.loglikelihoods is not None
        generator = torch.Generator().manual_seed(named_seed(draw, "beta", one.task))
        rows = torch.randperm(len(held.labels), generator=generator)[: count // len(own)]
        few = replace(held, features=held.features[rows], labels=held.labels[rows], loglikelihoods=held.loglikelihoods[rows])
        found.append(replace(one, held=few))
    return found


if __name__ == "__main__":
    main()
