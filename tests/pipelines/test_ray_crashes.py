"""Kill a worker, kill the driver: through Ray and DeepSpeed, the result is the one of an undisturbed run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_folder import write_config

pytestmark = [pytest.mark.crash, pytest.mark.timeout(900)]

SAME = ("accuracy_matrix", "ranked_accuracy_matrix", "untrained", "oracle")


def start(config: Path, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pipelines.cli", "run", str(config), "--run-id", "r", "--json"]
    return subprocess.Popen(
        command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen[str]) -> tuple[dict[str, Any], str]:
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    return json.loads(out), err


def test_a_killed_worker_and_a_killed_driver_change_nothing(tmp_path: Path) -> None:
    config = write_config(tmp_path, tasks=("colours", "shapes"), workers=2, deepspeed={"zero_stage": 2})
    calm, _ = finish(start(config, AMLORA_HOME=str(tmp_path / "calm")))

    # A rank dies at its fifth step, once; later the driver dies while stage 2 trains.
    once = str(tmp_path / "once")
    disturbed = {
        "AMLORA_HOME": str(tmp_path / "disturbed"), "AMLORA_CRASH": "step_done:kill:5", "AMLORA_CRASH_ONCE": once,
    }  # fmt: skip
    process = start(config, **disturbed)
    stages = tmp_path / "disturbed" / "storage" / "stages"
    deadline = time.monotonic() + 300
    while len(list(stages.glob("*/checkpoints/step-*/COMMIT"))) == 0 or len(list(stages.glob("*/checkpoints"))) < 2:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "stage 2 did not start within 300 s"
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    told = process.communicate()[1]
    assert Path(once).exists() and "trying again from the last checkpoint" in told

    result, told = finish(start(config, AMLORA_HOME=str(tmp_path / "disturbed")))
    assert [stage["reused"] for stage in result["stages"]] == [True, False]
    assert {key: result[key] for key in SAME} == {key: calm[key] for key in SAME}
    assert [s["fingerprint"] for s in result["stages"]] == [s["fingerprint"] for s in calm["stages"]]
    digests = [
        [json.loads((home / "storage/stages" / s["fingerprint"] / "trained/training.json").read_text())["adapter"]["digest"]
         for s in calm["stages"]]
        for home in (tmp_path / "calm", tmp_path / "disturbed")
    ]  # fmt: skip
    assert digests[0] == digests[1], "equal bit for bit, at the same world size"
