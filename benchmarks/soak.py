"""Soak: sequences through Ray while a random process of ours is killed at random times, with a fixed seed.

    python benchmarks/soak.py --minutes 20
    python benchmarks/soak.py --minutes 2 --quick          two tasks instead of six

A small Ray cluster (a head and two nodes) runs the same sequence again and again, each round in a new home. Drivers,
workers and whole nodes are killed by SIGKILL; a dead driver is started again with the same command, a dead node is
replaced. Every round must end with the undisturbed result: the same matrices, adapters and router, one version a stage,
no lease left, every version whole. At the end no process may be left. Exit code 1 when anything is otherwise; the folder
with all homes and logs then stays, and its path is printed.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import suppress
from pathlib import Path
from types import FrameType

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
os.environ.pop("MLFLOW_TRACKING_URI", None)
os.environ.pop("RAY_ADDRESS", None)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil
import yaml

from tests.fork_server import ROOT
from tests.pipelines.crash_cases import Outcome, Process, calm, outcome_of, spawned
from tests.tiny_config import write_config, write_task

VICTIMS = {"driver": 4, "worker": 4, "node": 2}
"""Who is killed, and how often relative to the others."""
PAUSE_S = (8.0, 50.0)
"""Between two kills. A start of the driver and of its workers takes 20 s to 30 s on two cores: some must get through."""
GIVEN_UP = 4
"""Exit code of a driver that lost workers too often in one place, which says so; the same command goes on."""
ROUND_DEADLINE_S = 1800.0
ENDED_DEADLINE_S = 60.0
WORKER, CONTROLLER = "RayTrainWorker", "TrainController"
"""Words in the titles of Ray's processes."""


class Soak:
    """The cluster, its victims and the log."""

    def __init__(self, folder: Path, seed: int) -> None:
        from ray.cluster_utils import Cluster

        os.environ["PYTHONPATH"] = str(ROOT)  # for the workers of the nodes
        self.folder, self.draw, self.began, self.clock = folder, random.Random(seed), time.monotonic(), time.time()
        self.killed: Counter[str] = Counter()
        self.starts, self.given_up = 0, 0
        self.drivers: list[Process] = []
        self.faults: list[str] = []
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.nodes = [self.cluster.add_node(num_cpus=1) for _ in range(2)]
        self.environment = {"RAY_ADDRESS": self.cluster.address, "AMLORA_RESOURCES_DEADLINE_S": "120"}

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.began:7.1f} s  {text}", flush=True)

    def fault(self, text: str) -> None:
        self.faults.append(text)
        self.say(f"FAULT {text}")

    def start(self, folder: Path, *arguments: str, **environment: str) -> Process:
        self.starts += 1
        self.drivers.append(spawned(folder, *arguments, **environment, **self.environment))
        return self.drivers[-1]

    def kill(self, driver: Process) -> str | None:
        """Kill somebody; None when the one that was drawn does not exist at the moment."""
        victim = self.draw.choices(list(VICTIMS), weights=list(VICTIMS.values()))[0]
        if victim == "driver":
            os.kill(driver.pid, signal.SIGKILL)
            return "driver"
        if victim == "worker":
            workers = sorted(self.ours(WORKER))
            if not workers:
                return None
            with suppress(ProcessLookupError):
                os.kill(self.draw.choice(workers), signal.SIGKILL)
            return "worker"
        node = self.nodes.pop(self.draw.randrange(len(self.nodes)))
        self.cluster.remove_node(node, allow_graceful=False)
        # Not waited for: that is the driver's to do.
        self.nodes.append(self.cluster.add_node(num_cpus=1, wait=False))
        return "node"

    def ours(self, *words: str) -> dict[int, str]:
        """Title by pid of living processes of this cluster with one of the words in it; also those whose raylet died."""
        below = {process.pid for process in psutil.Process().children(recursive=True)}
        found = {}
        for process in psutil.process_iter():
            try:
                orphan = process.ppid() == 1 and process.create_time() >= self.clock
                title = " ".join(process.cmdline())  # a zombie has none
                if (orphan or process.pid in below) and any(word in title for word in words):
                    found[process.pid] = title
            except psutil.Error:
                continue
        return found

    def round(self, number: int, config: Path, empty: Path, undisturbed: Outcome, until: float) -> None:
        """One run, disturbed until it ends or the time for kills is over."""
        folder, home = self.folder / f"round-{number}", self.folder / f"round-{number}" / "home"
        shutil.copytree(empty, home)
        deadline = time.monotonic() + ROUND_DEADLINE_S
        arguments = ["run", str(config), "--run-id", "r", "--json"]
        starts, driver = 1, self.start(folder / "start-1", *arguments, AMLORA_HOME=str(home))
        next_kill = time.monotonic() + self.draw.uniform(*PAUSE_S)
        while (code := driver.poll()) != 0:
            if time.monotonic() > deadline:
                self.fault(f"round {number}: no end within {ROUND_DEADLINE_S:.0f} s: {driver.stderr.strip()[-600:]}")
                return
            if code is not None:
                if code == GIVEN_UP and "given up after" in driver.stderr:
                    self.given_up += 1
                    self.say(f"round {number}: {driver.stderr.strip().splitlines()[-1][:300]}")
                elif code != -signal.SIGKILL:
                    self.fault(f"round {number}: driver {starts} ended with {code}: {driver.stderr.strip()[-600:]}")
                if len(self.faults) > 3:
                    return
                starts += 1
                driver = self.start(folder / f"start-{starts}", *arguments, AMLORA_HOME=str(home))
            if next_kill < time.monotonic() < until:
                if victim := self.kill(driver):
                    self.killed[victim] += 1
                    self.say(f"round {number}: killed a {victim}")
                next_kill = time.monotonic() + self.draw.uniform(*PAUSE_S)
            time.sleep(0.1)
        self.say(f"round {number}: ended after {starts} starts of its driver")
        self.compare(number, home, driver.stdout, undisturbed)

    def compare(self, number: int, home: Path, stdout: str, undisturbed: Outcome) -> None:
        """Result, versions and leases of a round that has ended."""
        found = outcome_of(home, stdout)
        for name in Outcome.__slots__:
            if getattr(found, name) != getattr(undisturbed, name):
                self.fault(f"round {number}: {name}: {getattr(found, name)}, undisturbed {getattr(undisturbed, name)}")
        for torn in torn_versions(home):
            self.fault(f"round {number}: {torn}")

    def end(self) -> None:
        """No worker and no controller may outlive its driver, and nothing the cluster."""
        for driver in self.drivers:
            if driver.poll() is None:
                driver.kill()
        for pid, title in self.left(WORKER, CONTROLLER).items():
            self.fault(f"orphan: {pid} {title}")
        self.cluster.shutdown()
        for pid, title in self.left("ray::", "raylet", "gcs_server", "pipelines.cli").items():
            self.fault(f"left after the cluster: {pid} {title[:200]}")

    def left(self, *words: str) -> dict[int, str]:
        """Those of our processes that do not end in time."""
        deadline = time.monotonic() + ENDED_DEADLINE_S
        while (found := self.ours(*words)) and time.monotonic() < deadline:
            time.sleep(0.5)
        return found


def torn_versions(home: Path) -> list[str]:
    """Versions that cannot be pulled whole."""
    from amlora_dist.errors import AmloraError
    from amlora_dist.registry.store import Store

    store, torn = Store.open(home), []
    for version in store.versions("r"):
        try:
            store.pull_version(version, home.parent / "pulled" / str(version.number))
        except AmloraError as error:
            torn.append(f"version {version.number}: {error}")
    return torn


def six_tasks(folder: Path) -> Path:
    """A run of six tasks: the four of the tests, and two of them again with other rows."""
    config = write_config(folder, tasks=("colours", "shapes", "sizes", "fruit"), workers=2, deepspeed={"zero_stage": 2})
    data = yaml.safe_load(config.read_text(encoding="utf-8"))
    for name in ("colours", "shapes"):
        file = write_task(folder / "again", name, train=30)
        spec = yaml.safe_load(file.read_text(encoding="utf-8")) | {"name": f"{name}-again"}
        file.write_text(yaml.safe_dump(spec), encoding="utf-8")
        data["tasks"].append(str(file))
    config.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    return config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0, help="how long processes are killed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="two tasks instead of six")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, _terminate)  # unwinds, so that the cluster is taken down
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    if options.quick:
        config = write_config(folder, tasks=("colours", "shapes"), workers=2, deepspeed={"zero_stage": 2})
    else:
        config = six_tasks(folder)
    from amlora_dist.registry.store import Store

    Store.open(folder / "empty")
    soak = Soak(folder, options.seed)
    rounds = 0
    try:
        undisturbed = calm(soak.start, folder / "calm", config, folder / "empty")
        soak.say(f"undisturbed: {len(undisturbed.versions)} versions")
        until = time.monotonic() + 60 * options.minutes
        while time.monotonic() < until and not soak.faults:
            rounds += 1
            soak.round(rounds, config, folder / "empty", undisturbed, until)
    except Exception as error:  # noqa: BLE001 (what was found so far is reported all the same)
        traceback.print_exc()
        soak.fault(f"{type(error).__name__}: {error}")
    finally:
        try:
            soak.end()
        except Exception as error:  # noqa: BLE001
            soak.fault(f"at the end: {type(error).__name__}: {error}")
        kills = ", ".join(f"{soak.killed[victim]} of a {victim}" for victim in VICTIMS)
        soak.say(
            f"seed {options.seed}: {rounds} rounds, {soak.killed.total()} kills ({kills}), {soak.starts} starts of a driver,"
            f" {soak.given_up} of which gave up and went on when started again; {len(soak.faults)} faults"
        )
    for fault in soak.faults:
        print(fault)
    if soak.faults:
        sys.exit(f"homes and logs are kept in {folder}")
    shutil.rmtree(folder, ignore_errors=True)


def _terminate(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
