"""What the adapters learn, by the layers that they adapt and by the learning rate: accuracy, seconds and bytes.

A comparison of am_lora with itself: each of ``--targets`` at each of ``--rates``, scored on the **dev** rows after the last
stage. *Told, model alone* is what the adapters know: the right task named, the best of its labels by the model's likelihood.
*As served* is plain text with the keys' evidence. Differences are to the first combination, paired over rows and seeds.
Seconds are those of the training steps of all stages, megabytes those of one task's adapter. Killed, the same command goes
on.

    OMP_NUM_THREADS=1 python benchmarks/targets.py configs/demo.yaml --rows 96 --test 60 --rates 2e-3 5e-3 1e-3
    OMP_NUM_THREADS=1 python benchmarks/targets.py configs/standard_cl_order1.yaml --data-dir ROWS --test 60 \\
        --rates 3e-3 6e-3 1e-3 --set task_defaults.prompt_style=bare --name targets-order1
    python benchmarks/targets.py --quick
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sweeps import REPOSITORY, config_of, mean, paired, parser_of, show, sweep, write_json

from amlora_dist.config.loading import home
from amlora_dist.registry.pulling import manifest_of
from amlora_dist.registry.store import Store
from amlora_dist.reporting.facts import RunFacts

KEYS = (
    "targets", "rate", "told, model alone", "minus the first", "from", "to", "as served", "seconds", "megabytes", "seeds",
)  # fmt: skip


def main() -> None:
    """See the module."""
    parser = parser_of(__doc__, "targets")
    demo = REPOSITORY / "configs" / "demo.yaml"
    parser.add_argument("config", type=Path, nargs="?", default=demo, help="default: the demo's")
    parser.add_argument("--targets", nargs="+", default=["mlp", "all-linear", "attention", "auto"], help="auto: q and v")
    parser.add_argument("--rates", nargs="+", default=["3e-3", "6e-3", "1e-3"])
    args = parser.parse_args()
    if args.quick:
        args.targets, args.rates = args.targets[:2], args.rates[:1]
    pairs = [(targets, rate) for targets in args.targets for rate in args.rates]
    methods = [f"am_lora:adapters.targets={targets}:training.learning_rate={rate}" for targets, rate in pairs]
    with config_of(args, args.config, ("colours", "shapes")) as (config, overrides):
        found = sweep(config, [*overrides, "evaluation.split=dev"], methods, args)
        store = Store.open(home())
        first = found[methods[0]]
        rows = [
            {"targets": targets, "rate": rate} | facts_of(store, found[method], first)
            for (targets, rate), method in zip(pairs, methods, strict=True)
        ]
    show(f"{args.config.name}, seeds {args.seeds}, {len(first[0].tasks) if first else 0} tasks, dev rows", rows, KEYS)
    write_json(args.json, {"config": args.config.name, "seeds": args.seeds, "set": args.set, "rows": rows})


def facts_of(store: Store, runs: Sequence[RunFacts], first: Sequence[RunFacts]) -> dict[str, Any]:
    """One row of the table; differences over the seeds that both have."""
    both = [(one, other) for one in runs for other in first if one.result["seed"] == other.result["seed"]]
    difference = paired([told(one) for one, _ in both], [told(other) for _, other in both])
    return {
        "told, model alone": mean([mean(told(run)) for run in runs]),
        "minus the first": difference and difference.value, "from": difference and difference.low,
        "to": difference and difference.high,
        "as served": mean([run.result["metrics"]["average_performance"] for run in runs]),
        "seconds": mean([sum(stage.public["train_seconds"] for stage in run.stages) for run in runs]),
        "megabytes": mean([megabytes(store, run) for run in runs]), "seeds": [mean(told(run)) for run in runs],
    }  # fmt: skip


def told(run: RunFacts) -> list[float]:
    """Of every row of the last bank, task after task: whether the model alone, told the task, finds the label."""
    return [float(bool(row.model_correct)) for task in run.tasks for row in run.cell("oracle", task) or []]


def megabytes(store: Store, run: RunFacts) -> float:
    """Mean over the tasks' adapters."""
    version = store.resolve(f"models:/{run.result['registered_model']}/{run.stages[-1].public['version']}")
    manifest = manifest_of(store, version)
    files = manifest.files or {}  # a bank that this script made names its files
    return statistics.fmean(files[f"{entry.folder}/adapter_model.safetensors"].size for entry in manifest.adapters) / 1e6


if __name__ == "__main__":
    main()
