"""``benchmarks/backward_transfer.py`` asks every version of a run, and tells texts only where they are asked for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.integration
@pytest.mark.slow
def test_every_version_is_asked_and_each_stage_has_a_line_for_each_task_before_it(repository: Path, tmp_path: Path) -> None:
    file = tmp_path / "backward.json"
    command = [sys.executable, str(repository / "benchmarks" / "backward_transfer.py"), "--quick", "--texts", "2"]
    done = subprocess.run([*command, "--json", str(file)], capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text(encoding="utf-8"))
    lines = [(line["stage"], line["task"].partition(" ")[0]) for line in found["table"]]
    assert lines == [(2, "colours"), (2, "all"), (3, "colours"), (3, "shapes"), (3, "all")]
    assert [[score is not None for score in line] for line in found["accuracy"]] == [
        [True, False, False], [True, True, False], [True, True, True],
    ]  # fmt: skip
    assert len(found["changed"]) == sum(line["changed"] for line in found["table"] if not line["task"].startswith("all"))
    assert done.stdout.count("answers changed:") == 2 and "text" not in json.dumps(found["changed"])
