"""A search that is killed again and again ends with the table of one that was left alone."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from amlora_dist.registry.store import Store
from tests.tiny_config import write_config

pytestmark = [pytest.mark.crash, pytest.mark.timeout(1800)]

SPACE = {"training.l1": {"grid": [0.0, 0.5]}, "adapters.rank": {"grid": [2, 4]}}

PRUNED = {
    "space": {"training.learning_rate": {"grid": [0.03, 1e-9, 0.02]}, "training.l1": {"grid": [0.0, 0.5]}},
    "scheduler": "halving", "grace_stages": 1,
}  # fmt: skip


def start(config: Path, home: Path, *overrides: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", "tune", str(config), *overrides, "--search-id", "grid", "--json"],
        env=os.environ | {"AMLORA_HOME": str(home)}, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def finish(config: Path, home: Path, *overrides: str) -> dict[str, Any]:
    process = start(config, home, *overrides)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0
    result: dict[str, Any] = json.loads(output)
    return result


def table(result: dict[str, Any]) -> list[Any]:
    """What a user compares: outcomes, matrices, curves and fingerprints of all trials, and the winner's test scores."""
    trials = [
        (t["number"], t["values"], t["outcome"], t["accuracy_matrix"], t["curve"], [s["fingerprint"] for s in t["stages"]])
        for t in result["trials"]
    ]
    return [trials, result["ranking"], result["winner"]["test"]["accuracy_matrix"]]


def wait_for_trials(home: Path, process: subprocess.Popen[str]) -> None:
    """Until the search has proposed something: killing it before that proves little."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if (home / "mlflow.db").exists() and Store.open(home).find_runs({"amlora.kind": "trial"}):
            return
        time.sleep(1)
    raise AssertionError("the search proposed no trial within 300 s")


@pytest.mark.parametrize(("workers", "search"), [(0, {"space": SPACE}), (1, {"space": SPACE}), (0, PRUNED)])
def test_killed_three_times_at_random_the_search_ends_with_the_same_table(
    workers: int, search: dict[str, Any], tmp_path: Path
) -> None:
    config = write_config(tmp_path, search=search, workers=workers)
    calm = finish(config, tmp_path / "calm")
    outcomes = [trial["outcome"] for trial in calm["trials"]]
    assert ("pruned" in outcomes) if "scheduler" in search else outcomes == ["finished"] * 4
    home, draw = tmp_path / "hurt", random.Random(workers)
    killed = 0
    for _ in range(3):
        process = start(config, home)
        wait_for_trials(home, process)
        time.sleep(draw.uniform(2, 25))
        killed += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
    assert killed >= 2
    hurt = finish(config, home)
    assert table(hurt) == table(calm)
    assert hurt["cost"]["stages_trained"] == calm["cost"]["stages_trained"]
    assert not [run for run in Store.open(home).find_runs({}) if run.status == "RUNNING"]


def test_a_second_search_of_the_same_id_gets_the_holders_name(tmp_path: Path) -> None:
    config = write_config(tmp_path, search={"space": SPACE})
    first = start(config, tmp_path / "home")
    try:
        wait_for_trials(tmp_path / "home", first)
        second = start(config, tmp_path / "home")
        second.communicate(timeout=120)
        assert second.returncode == 3
    finally:
        first.kill()
        first.communicate(timeout=60)
