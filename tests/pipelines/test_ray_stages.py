"""Whole sequences through Ray Train and DeepSpeed: two ranks, ZeRO-3, a decoder and an encoder-decoder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from amlora_dist.config.loading import load_config
from pipelines.runs.progress import Silent
from pipelines.runs.sequence import run_sequence
from tests.pipelines.crash_cases import within_one_row
from tests.tiny_config import write_config

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """One cluster for all tests here: starting it takes seconds."""
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def run(config: Path, run_id: str, *overrides: str) -> dict[str, Any]:
    return run_sequence(load_config(config, list(overrides)), run_id=run_id, progress=Silent())


@pytest.mark.parametrize(("kind", "tasks"), [("llama", ("colours", "shapes", "sizes")), ("t5", ("colours", "shapes"))])
def test_tasks_under_zero_3_with_two_ranks_equal_one_process(
    kind: str, tasks: tuple[str, ...], tmp_path: Path, amlora_home: Path
) -> None:
    config = write_config(tmp_path, kind, tasks)
    two = run(config, "two", "workers=2", "deepspeed.zero_stage=3")
    assert [stage["version"] for stage in two["stages"]] == list(range(1, len(tasks) + 1))
    os.environ["AMLORA_HOME"] = str(amlora_home.parent / "alone")
    one = run(config, "one")
    assert one["stages"][0]["fingerprint"] == two["stages"][0]["fingerprint"]
    assert within_one_row(one["accuracy_matrix"], two["accuracy_matrix"])


def test_workers_that_stay_equal_workers_of_one_stage(tmp_path: Path, amlora_home: Path) -> None:
    config = write_config(tmp_path, tasks=("colours", "shapes"))
    found = {}
    for lifetime in ("run", "stage"):
        home = amlora_home.parent / lifetime
        os.environ["AMLORA_HOME"] = str(home)
        result = run(config, "same", "workers=2", "deepspeed.zero_stage=2", f"worker_lifetime={lifetime}")
        stages = [home / "storage" / "stages" / stage["fingerprint"] for stage in result["stages"]]
        adapters = [(stage / "trained" / "adapter_model.safetensors").read_bytes() for stage in stages]
        events = [json.loads(line) for stage in stages for line in (stage / "progress.jsonl").read_text().splitlines()]
        processes = [event["process"] for event in events if event["kind"] == "worker"]
        found[lifetime] = result["accuracy_matrix"], result["metrics"], result["untrained"], result["oracle"], adapters
        assert len(processes) == 2 and (len(set(processes)) == 1) == (lifetime == "run")
    assert found["run"] == found["stage"]
