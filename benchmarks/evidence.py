"""What each kind of evidence adds to the served answers of finished runs, paired over their test rows.

Reads the predictions that runs of one configuration with several seeds left in MLflow, and prints the mean accuracy of the
last bank by what answers (both kinds as served, keys alone, model alone, and the oracle rows, told the task), and
the differences to the served answers with 95% bootstrap intervals over test rows, one training run a seed.

    for S in 0 1 2; do amlora run configs/standard_cl_order1.yaml --run-id o1-$S seed=$S data_dir=ROWS workers=0 \\
        evaluation.cells=last evaluation.untrained=false; done
    python benchmarks/evidence.py o1-0 o1-1 o1-2 --json evidence.json
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

from sweeps import paired, show, write_json

from amlora_dist.config.loading import home
from amlora_dist.errors import AmloraError
from amlora_dist.registry.store import Store
from amlora_dist.reporting.facts import RunFacts, read_run

SERVED = "as served"
ROWS = {
    SERVED: ("router", "correct"), "keys alone": ("router", "keys_correct"), "model alone": ("router", "model_correct"),
    "told, both": ("oracle", "correct"), "told, model alone": ("oracle", "model_correct"),
}  # fmt: skip
"""Mode and score of each row of the table."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="ids of finished runs in AMLORA_HOME, one a seed")
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args()
    try:
        store = Store.open(home())
        found = [read_run(store, run) for run in args.runs]
    except AmloraError as error:
        parser.error(str(error))
    served = [scores_of(facts, SERVED) for facts in found]
    table = []
    for name in ROWS:
        scores = [scores_of(facts, name) for facts in found]
        if not all(scores):
            continue
        seeds = [statistics.fmean(rows) for rows in scores]
        difference = None if name == SERVED else paired(served, scores)
        table.append({
            "answers": name, "accuracy": statistics.fmean(seeds), "seeds": seeds,
            "served minus it": None if difference is None else difference.value,
            "from": None if difference is None else difference.low, "to": None if difference is None else difference.high,
        })  # fmt: skip
    columns = ("answers", "accuracy", "seeds", "served minus it", "from", "to")
    show(f"{len(found)} runs of {', '.join(found[0].tasks)}", table, columns)
    write_json(args.json, {"runs": args.runs, "rows": table})


def scores_of(facts: RunFacts, name: str) -> Sequence[float]:
    """Of every test row of the last bank, task after task; empty where one was not scored so."""
    mode, key = ROWS[name]
    rows: list[float] = []
    for task in facts.tasks:
        values = [getattr(one, key) for one in facts.cell(mode, task) or []]
        if not values or any(value is None for value in values):
            return []
        rows += map(float, values)
    return rows


if __name__ == "__main__":
    main()
