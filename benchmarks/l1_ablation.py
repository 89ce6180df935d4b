"""What each reading of the paper's L1 term does: coefficient against zeros, accuracy and routing, as a table and a plot.

The seven tasks of ``configs/l1_ablation.yaml`` (SmolLM2-135M-Instruct; four tasks with ``--rows`` training rows, then
three with 64), or the first ``--tasks`` of them. The readings are those of docs/method.md, section 2: ``recipe`` is the
default method's, with a proximal step; ``literal``, ``non_zero_slot``, ``old_only`` and ``logits`` are penalties on the
paper's selector with softmax, ``unnormalised`` with ReLU gates. All after the last stage, means over seeds:

- ``zeros``: share of weights that are exactly 0; of ``recipe`` the learned weights of old adapters, of the others the
  gates, over layers, tokens and test rows;
- ``gate_zeros``: of ``recipe`` the share of the router's gates that are 0;
- ``accuracy``, ``ranked``, ``oracle``: average performance, and ``routing``: share of test rows whose largest gate is
  that of their task.

``--gates`` adds the table of METHOD's steps 4 and 5 together: the recipe's coefficient against the threshold lambda_g of
both forms of the sparse gate. It trains nothing more, for gates are read by scoring alone.

    python benchmarks/l1_ablation.py --data-dir ROWS --json out.json --plot out.png
    python benchmarks/l1_ablation.py --data-dir ROWS --readings recipe --gates --json gates.json --name l1-gates
    python benchmarks/l1_ablation.py --quick
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sweeps import REPOSITORY, config_of, mean, parser_of, show, sweep, write_json

from amlora_dist.config.loading import load_config
from amlora_dist.reporting.facts import RunFacts
from amlora_dist.reporting.routing_facts import routing_by_stage

ON_GATES = ("literal", "non_zero_slot", "old_only", "logits", "unnormalised")
READINGS = ("recipe", *ON_GATES)
KEYS = ("reading", "l1", "zeros", "gate_zeros", "accuracy", "ranked", "oracle", "routing", "runs")
GATE_KEYS = ("form", "threshold", "l1", "zeros", "gate_zeros", "accuracy", "ranked", "routing", "runs")


def method_of(reading: str, coefficient: float) -> str:
    """As ``amlora compare --methods`` takes it; at 0 all readings of one map are one."""
    if reading == "recipe":
        return f"am_lora:training.l1={coefficient:g}"
    map_ = "router.literal.map=relu:" if reading == "unnormalised" else ""
    return f"literal:{map_}router.literal.penalty={reading if coefficient else 'none'}:training.l1={coefficient:g}"


def main() -> None:
    parser = parser_of(__doc__, "l1-ablation")
    parser.add_argument("--readings", nargs="+", choices=READINGS, default=list(READINGS))
    parser.add_argument("--l1", type=float, nargs="+", default=[0.0, 0.1, 0.3, 1.0, 3.0])
    parser.add_argument("--tasks", type=int, help="only so many of the seven")
    parser.add_argument("--gates", action="store_true", help="also coefficient x threshold, for both forms of the gate")
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.0, 0.1, 0.3])
    parser.add_argument("--plot", type=Path, help="write a figure here")
    args = parser.parse_args()
    if args.quick:
        args.l1, args.thresholds = [0.0, 1.0], args.thresholds[:2]
    file = REPOSITORY / "configs" / "l1_ablation.yaml"
    cells = {
        (reading, value): method_of(reading, value)
        for reading in args.readings
        for value in args.l1
        if reading != "literal" or value in (min(args.l1), max(args.l1))  # a constant: its ends show it
    }
    gates = {
        (form, cut, value): f"{method_of('recipe', value)}:router.gate.form={form}:router.gate.threshold={cut:g}"
        for form in ("relative", "absolute")
        for cut in args.thresholds
        for value in args.l1
        if args.gates and (form, cut) != ("absolute", 0.0)  # with nothing cut off the two forms are one
    }
    with config_of(args, file, ("colours", "shapes")) as (config, overrides):
        if args.tasks and not args.quick:
            overrides = [*overrides, f"tasks={json.dumps(load_config(file).tasks[: args.tasks])}"]
        found = sweep(config, overrides, list(dict.fromkeys([*cells.values(), *gates.values()])), args)
    rows = [{"reading": name, "l1": value} | facts_of(found[method]) for (name, value), method in cells.items()]
    show(f"L1 readings, seeds {args.seeds}", rows, KEYS)
    crossed = [
        {"form": form, "threshold": cut, "l1": value} | facts_of(found[method])
        for (form, cut, value), method in gates.items()
    ]
    if crossed:
        show("recipe's coefficient x gate's threshold", crossed, GATE_KEYS)
    content = {"rows": rows, "gates": crossed, "tasks": next(iter(found.values()))[0].tasks, "seeds": args.seeds}
    write_json(args.json, content)
    if args.plot:
        plot(rows, args.plot)


def facts_of(runs: Sequence[RunFacts]) -> dict[str, Any]:
    """Means over runs, after their last stage."""
    routing = [routing_by_stage(run) for run in runs]
    return {
        "zeros": mean([zeros_of(run) for run in runs]),
        "gate_zeros": mean([one[-1].statistics.overall_zeros if one else None for one in routing]),
        "accuracy": mean([run.result["metrics"]["average_performance"] for run in runs]),
        "ranked": mean([mean(run.result["ranked_accuracy_matrix"][-1]) for run in runs]),
        "oracle": mean([mean(run.result["oracle"]) if run.result["oracle"] else None for run in runs]),
        "routing": mean([one[-1].learned_accuracy if one else None for one in routing]),
        "runs": len(runs),
    }


def zeros_of(run: RunFacts) -> float | None:
    """Share of exact zeros among the recipe's weights, each counted once, or among the selectors' gates."""
    own = [p.zeros for task in run.tasks for p in run.cell("router", task, len(run.stages)) or []]
    if any(share is not None for share in own):
        return mean(own)
    recipes = [(index, stage.training.get("recipe")) for index, stage in enumerate(run.stages)]
    weighed = [(index, recipe["zeros"]) for index, recipe in recipes if recipe]
    total = sum(index for index, _ in weighed)
    return sum(index * share for index, share in weighed) / total if total else None


def plot(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Zeros, accuracy and routing over the coefficient, a line a reading."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6))
    for axis, key in zip(axes, ("zeros", "accuracy", "routing"), strict=True):
        for reading in dict.fromkeys(row["reading"] for row in rows):
            points = [(row["l1"], row[key]) for row in rows if row["reading"] == reading and row[key] is not None]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=reading)
        axis.set(title=key, xlabel="L1 coefficient", ylim=(-0.03, 1.03))
        axis.set_xscale("symlog", linthresh=0.1)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
