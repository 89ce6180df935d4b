"""``benchmarks/same_answers.py`` asks the bank of a run in every way and counts the answers that were not scored."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.integration
@pytest.mark.slow
def test_matrix_command_line_server_and_pyfunc_answer_every_test_row_alike(repository: Path, tmp_path: Path) -> None:
    file = tmp_path / "same.json"
    command = [sys.executable, str(repository / "benchmarks" / "same_answers.py"), "--quick", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr
    table = json.loads(file.read_text(encoding="utf-8"))["table"]
    assert {line["asked by"]: line["differ"] for line in table} == {"amlora classify": 0, "chat completions": 0, "pyfunc": 0}
    assert all(line["rows"] == 27 for line in table)
