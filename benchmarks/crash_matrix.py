"""The crash matrix: a run dies at every named point, by every kind of death, and must end as if nothing had happened.

    python benchmarks/crash_matrix.py                      all points without Ray, then all orders of two threads (minutes)
    python benchmarks/crash_matrix.py --workers 2 --zero 2 through Ray Train and DeepSpeed (an hour on two cores)
    python benchmarks/crash_matrix.py --points step_done,alias_moved

Prints one line a point; then, without Ray and if all points were asked for, one line for each order of a stage and the
publication of the one before. Exit code 1 when a result differs from the undisturbed one, with what differs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PYTHONWARNINGS", "ignore")
os.environ.pop("AMLORA_CRASH", None)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from amlora_dist.crash_points import POINTS
from pipelines.cluster.library_output import set_up
from tests.fork_server import Server
from tests.pipelines.crash_cases import (
    DIES_AT_IN_WORKER,
    KINDS,
    ORDERS,
    Start,
    calm,
    crash,
    faults,
    matrix_config,
    nth_of,
    spawned,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=0, help="0: in one process, without Ray")
    parser.add_argument("--zero", type=int, default=2, choices=(0, 1, 2, 3), help="ZeRO stage, with workers")
    parser.add_argument("--points", default=",".join(POINTS), help="comma-separated; default: all")
    options = parser.parse_args()
    set_up(verbose=False)
    points = options.points.split(",")
    if unknown := sorted(set(points) - set(POINTS)):
        parser.error(f"--points: {', '.join(unknown)} unknown; there are {', '.join(POINTS)}")
    began, bad = time.monotonic(), list[str]()
    done: list[str] = []
    with tempfile.TemporaryDirectory(prefix="crash-") as name, ExitStack() as stack:
        folder = Path(name)
        from amlora_dist.registry.store import Store

        Store.open(folder / "empty")
        more = {"workers": options.workers, "deepspeed": {"zero_stage": options.zero}} if options.workers else {}
        config = matrix_config(folder, **more)
        start: Start = spawned if options.workers else stack.enter_context(Server()).start
        undisturbed = calm(start, folder / "calm", config, folder / "empty")
        where = f"{options.workers} workers, ZeRO-{options.zero}" if options.workers else "one process"
        print(f"{where}: {len(undisturbed.versions)} stages, {len(points)} points\n", flush=True)
        print(f"| point | dies in | {' | '.join(KINDS.values())} |")
        print("|---|---|" + "---|" * len(KINDS))
        worker = DIES_AT_IN_WORKER if options.workers else {}
        rows = {point: (point, nth_of(point, options.workers), "") for point in points}
        rows |= ORDERS if not options.workers and set(points) == set(POINTS) else {}
        for name, (point, nth, meanwhile) in rows.items():
            cells = []
            for kind in KINDS:
                place = folder / f"case-{len(done)}"
                done.append(name)
                try:
                    case = crash(start, place, config, folder / "empty", point, kind, nth, meanwhile=meanwhile)
                except (AssertionError, subprocess.TimeoutExpired) as error:  # the others are of interest all the same
                    bad.append(f"{name} by {KINDS[kind]}: {error}")
                    cells.append("NO END")
                    continue
                wrong = faults(case, undisturbed)
                bad += [f"{name} by {KINDS[kind]}: {fault}" for fault in wrong]
                ends = ", ".join(map(str, case.codes))
                cells.append(f"{'DIFFERS' if wrong else 'equal'} (exit {ends}; {case.seconds:.1f} s)")
            print(f"| {name} | {'worker' if point in worker else 'driver'} | {' | '.join(cells)} |", flush=True)
    print(f"\n{len(done)} cases, {len(bad)} differ; {time.monotonic() - began:.0f} s")
    for line in bad:
        print(line)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
