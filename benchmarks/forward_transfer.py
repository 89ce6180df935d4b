"""Whether a task with few rows learns better on recipes of old adapters than from scratch, and at which L1 coefficient.

amazon with all its rows, then yelp with 64 training rows (SmolLM2-135M-Instruct, prompt style ``options``, rows from the
Hub or ``--data-dir``). From scratch means ``router.recipes: false``: yelp's adapter never sees amazon's. Scored on yelp's
test rows, told the task (its row alone: what was learned) and routed (what a user gets). A difference is that of a
coefficient minus from scratch, a mean over seeds with a paired bootstrap interval (95%) over test rows; ``deviation`` is
its standard deviation over seeds and ``wins`` the seeds in which it is above 0. ``zeros``: share of recipe weights that
are exactly 0.

    python benchmarks/forward_transfer.py --data-dir ROWS --seeds 0 1 2 3 4 --json out.json
    python benchmarks/forward_transfer.py --quick
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

from sweeps import REPOSITORY, config_of, mean, paired, parser_of, show, sweep, write_json

from amlora_dist.reporting.facts import Counted, RunFacts

SCRATCH = "am_lora:router.recipes=false"
KEYS = ("l1", "oracle", "routed", "ranked", "difference", "interval", "deviation", "wins", "routed_difference",
        "routed_interval", "zeros")  # fmt: skip


def main() -> None:
    parser = parser_of(__doc__, "forward-transfer")
    parser.add_argument("--before", nargs="+", default=["amazon"], help="tasks learned before, in order")
    parser.add_argument("--task", default="yelp")
    parser.add_argument("--few", type=int, default=64, help="training rows of that task")
    parser.add_argument("--l1", type=float, nargs="+", default=[0.0, 0.1, 0.3, 1.0, 3.0])
    args = parser.parse_args()
    if args.quick:
        args.l1 = args.l1[:2]
    tasks = [*args.before, {"task": args.task, "max_train": args.few}]
    methods = {f"am_lora:training.l1={value:g}": value for value in args.l1}
    with config_of(args, REPOSITORY / "configs" / "l1_ablation.yaml", ("colours", "shapes")) as (file, overrides):
        more = [] if args.quick else [f"tasks={json.dumps(tasks)}"]
        found = sweep(file, [*overrides, *more], [SCRATCH, *methods], args)
    scratch = found[SCRATCH]
    rows = [line("from scratch", scratch, scratch)]
    rows += [line(value, found[method], scratch) for method, value in methods.items()]
    show(f"{args.task} with {args.few} rows after {', '.join(args.before)}, seeds {args.seeds}", rows, KEYS)
    better = [row for row in rows[1:] if row["interval"] is not None and row["interval"][0] > 0]
    verdict = f"better than from scratch by more than the interval, told the task: {[row['l1'] for row in better] or 'none'}"
    print(verdict)
    write_json(args.json, {"rows": rows, "settings": settings(args)})


def line(name: float | str, runs: list[RunFacts], scratch: list[RunFacts]) -> dict[str, Any]:
    """One row of the table, over the seeds that both have."""
    pairs = [(one, other) for one in runs for other in scratch if one.result["seed"] == other.result["seed"]]
    row: dict[str, Any] = {"l1": name, "seeds": [one.result["seed"] for one in runs]}
    for mode, prefix in (("oracle", ""), ("router", "routed_")):
        mine, theirs = [scores(one, mode) for one, _ in pairs], [scores(other, mode) for _, other in pairs]
        row["oracle" if mode == "oracle" else "routed"] = mean([mean(one) for one in mine])
        apart = [(mean(a) or 0.0) - (mean(b) or 0.0) for a, b in zip(mine, theirs, strict=True)]
        interval = paired(mine, theirs)
        row[f"{prefix}difference"] = None if interval is None else interval.value
        row[f"{prefix}interval"] = None if interval is None else [interval.low, interval.high]
        row[f"{prefix}deviation"] = statistics.stdev(apart) if len(apart) > 1 else None
        row[f"{prefix}wins"] = sum(value > 0 for value in apart)
    row["ranked"] = mean([mean(scores(one, "oracle", of="ranked_correct")) for one in runs])
    recipes = [one.stages[-1].training.get("recipe") for one in runs]
    row["zeros"] = mean([recipe["zeros"] for recipe in recipes if recipe])
    return row


def scores(facts: RunFacts, mode: str, *, of: Counted = "correct") -> list[float]:
    """Score of each test row of the last task."""
    found = facts.row_scores(mode, facts.tasks[-1], of=of)
    assert found is not None, f"{facts.run_id} has no predictions of {facts.tasks[-1]} as {mode}"
    return found


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Where the figures come from."""
    return {key: str(value) if key in ("data_dir", "json") else value for key, value in vars(args).items()}


if __name__ == "__main__":
    main()
