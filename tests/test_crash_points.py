"""What is held at a crash point waits for what another thread does, and for nothing that a dead process did before."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fork_server import ROOT

HELD = "from amlora_dist import crash_points; crash_points.HOLD_DEADLINE_S = 0.1; crash_points.reach('artifacts_uploaded')"


@pytest.mark.parametrize("died_before", [False, True])
def test_a_thread_is_held_until_the_other_point_has_happened_in_this_process_or_in_one_before(
    died_before: bool, tmp_path: Path
) -> None:
    if died_before:
        (tmp_path / "fired.step_done").touch()
    environment = os.environ | {
        "AMLORA_CRASH": "step_done:kill:11,artifacts_uploaded:hold:1",
        "AMLORA_CRASH_ONCE": str(tmp_path / "fired"),
        "PYTHONPATH": str(ROOT),
    }
    held = subprocess.run([sys.executable, "-c", HELD], env=environment, capture_output=True, text=True, timeout=60)
    assert held.returncode == (0 if died_before else 1), held.stderr
    assert ("'artifacts_uploaded': held for" in held.stderr) == (not died_before)
