"""What the sweeps of trained sequences share: durable runs of a grid, their facts, and a table.

A sweep is a comparison as ``amlora compare`` makes it, with its journal in ``AMLORA_HOME``: killed, the same command goes
on, and runs that agree on their first stages train them once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from amlora_dist.config.loading import home, load_config
from amlora_dist.evaluation.intervals import Interval, percentiles, resampled
from amlora_dist.registry.store import Store
from amlora_dist.reporting.facts import RunFacts, read_run
from pipelines.cli.output import stdout_to_stderr
from pipelines.cluster.library_output import set_up
from pipelines.runs.comparison import plan_comparison, run_comparison
from pipelines.runs.progress import progress_for

REPOSITORY = Path(__file__).resolve().parents[1]
LEAST = ("evaluation.cells=last", "evaluation.untrained=false", "workers=0")
"""Only what the tables need is scored."""


def parser_of(doc: str | None, name: str) -> argparse.ArgumentParser:
    """Options that all sweeps have; ``name`` names the sweep in ``AMLORA_HOME``."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="rows as <task>/<split>.jsonl; default: from the Hub")
    parser.add_argument("--rows", type=int, default=256, help="training rows of a task that has no number of its own")
    parser.add_argument("--test", type=int, default=200, help="test rows a task")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--name", default=name, help="of the sweep in AMLORA_HOME; another for other settings")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override the configuration")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--quick", action="store_true", help="a tiny random model: ends within a minute, shows nothing")
    return parser


@contextlib.contextmanager
def config_of(args: argparse.Namespace, file: Path, tasks: tuple[str, ...]) -> Iterator[tuple[Path, list[str]]]:
    """Configuration and overrides of a sweep; with ``--quick`` tiny ``tasks`` in a home that is thrown away."""
    set_up(verbose=False)
    if args.json is not None and not args.json.absolute().parent.is_dir():
        raise SystemExit(f"--json: there is no folder {args.json.absolute().parent}")
    if not args.quick:
        sizes = [f"task_defaults.max_train={args.rows}", f"task_defaults.max_test={args.test}"]
        local = [] if args.data_dir is None else [f"data_dir={args.data_dir.absolute()}"]
        yield file, [*LEAST, *sizes, *local, "training.cache_trunk=true", *args.set]
        return
    sys.path.insert(0, str(REPOSITORY))
    from tests.tiny_config import write_config

    args.seeds = args.seeds[:1]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["AMLORA_HOME"] = f"{folder}/home"
        training = {"epochs": 1, "batch_size": 6, "learning_rate": 3e-2, "warmup_steps": 2, "probe_rows": 8}
        yield write_config(Path(folder), tasks=tasks, training=training), [*LEAST, *args.set]


def sweep(file: Path, overrides: list[str], methods: Sequence[str], args: argparse.Namespace) -> dict[str, list[RunFacts]]:
    """Run what is not done yet; the runs of each method, one a seed. Failed runs are reported and left out."""
    plan = plan_comparison(
        file, overrides, methods=methods, seeds=args.seeds, orders=[], learning_rates=[], comparison_id=args.name
    )
    progress = progress_for()
    with stdout_to_stderr(), contextlib.closing(progress):
        result = run_comparison(plan, command=shlex.join(sys.argv), progress=progress)
    for one in result["failed"]:
        print(f"FAILED {one['run_id']}: {one['reason']}", flush=True)
    failed = {one["run_id"] for one in result["failed"]}
    store = Store.open(home(), load_config(file, overrides).mlflow.tracking_uri)
    (order,) = plan.orders
    found: dict[str, list[RunFacts]] = {}
    for method, contender in zip(methods, plan.contenders, strict=True):
        ids = [plan.run_id(contender, order, seed) for seed in plan.seeds]
        found[method] = [read_run(store, run_id) for run_id in ids if run_id not in failed]
    return found


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of what is known; None if nothing is."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def paired(first: Sequence[list[float]], second: Sequence[list[float]]) -> Interval | None:
    """Mean over seeds of first - second, with a bootstrap interval (95%) over test rows, the same for both.

    Args:
        first: scores of each test row, one list a seed.
        second: the other's, in the same order of seeds and rows.
    """
    if not first or len(first) != len(second):
        return None
    draws = []
    for one, other in zip(first, second, strict=True):
        a, b = ([matrix[0][0] for matrix in resampled([[rows]], seed=0)] for rows in (one, other))
        draws.append([(x or 0.0) - (y or 0.0) for x, y in zip(a, b, strict=True)])
    value = statistics.fmean(
        statistics.fmean(x - y for x, y in zip(a, b, strict=True)) for a, b in zip(first, second, strict=True)
    )
    return percentiles(value, [statistics.fmean(line) for line in zip(*draws, strict=True)])


def show(title: str, rows: Sequence[dict[str, Any]], keys: Sequence[str]) -> None:
    """A table on standard output; what is undefined is a dash."""
    lines = [list(keys), *([shown(row.get(key)) for key in keys] for row in rows)]
    widths = [max(len(line[n]) for line in lines) for n in range(len(keys))]
    print(f"\n{title}")
    for line in lines:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip(), flush=True)


def shown(value: Any) -> str:
    """One cell."""
    if isinstance(value, list):
        return "[" + ", ".join(shown(one) for one in value) + "]"
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def write_json(file: Path | None, content: dict[str, Any]) -> None:
    """Written tmp and renamed; nothing without a file."""
    if file is not None:
        tmp = file.with_name(f"{file.name}.part")
        tmp.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(tmp, file)
