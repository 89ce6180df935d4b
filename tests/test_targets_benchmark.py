"""``benchmarks/targets.py`` from the command to its table, on a tiny random model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.slow]


def test_each_set_of_layers_at_each_rate_has_a_row_of_accuracy_seconds_and_bytes(repository: Path, tmp_path: Path) -> None:
    file = tmp_path / "targets.json"
    command = [sys.executable, str(repository / "benchmarks" / "targets.py"), "--quick", "--json", str(file)]
    environment = os.environ | {"AMLORA_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    mlp, every = json.loads(file.read_text())["rows"]
    assert (mlp["targets"], every["targets"]) == ("mlp", "all-linear")
    assert mlp["minus the first"] == 0.0 <= mlp["told, model alone"] <= 1.0
    assert 0 < mlp["megabytes"] < every["megabytes"]  # every layer is more than some
    assert mlp["seconds"] > 0 < every["seconds"]
