"""``benchmarks/gpu.py``, tried on CPUs: every part gives its figures, and one that fails or hangs stops no other."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.integration


def benchmark(repository: Path, file: Path, *options: str) -> tuple[int, str, list[dict[str, Any]]]:
    """Exit code, its messages, and its rows."""
    command = [sys.executable, str(repository / "benchmarks" / "gpu.py"), "--quick", "--json", str(file), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580)
    return done.returncode, done.stderr, json.loads(file.read_text(encoding="utf-8"))


def test_a_part_that_hangs_is_ended_at_its_deadline_and_reported(repository: Path, tmp_path: Path) -> None:
    code, stderr, rows = benchmark(repository, tmp_path / "gpu.json", "--parts", "machine", "model", "--patience", "0.001")
    assert code == 1 and "failed: machine, model" in stderr
    assert [row["error"] for row in rows if "error" in row] == ["not done after 0 s"] * 2
    assert [row["ended"] for row in rows if "ended" in row] == ["failed", "failed"]


@pytest.mark.slow
def test_every_part_gives_its_figures_on_cpus(repository: Path, tmp_path: Path) -> None:
    code, stderr, rows = benchmark(repository, tmp_path / "gpu.json", "--patience", "4")
    assert code == 0, stderr
    assert {row["part"]: row["ended"] for row in rows if "ended" in row} == dict.fromkeys(
        ("machine", "model", "zero2", "zero3", "serving"), "whole"
    )
    for part in ("zero2", "zero3"):
        stages = [row for row in rows if row["part"] == part and "stage" in row]
        assert [(row["stage"], row["base_reads"]) for row in stages] == [(1, 1), (2, 1)], "one base model for both"
        assert all(row["steps"] == 3 and math.isfinite(row["last_loss"]) and row["peak_gib"] > 0 for row in stages)
    rates = [(row["answers"], row["clients"], row["requests"]) for row in rows if "answers" in row]
    assert rates == [(kind, clients, max(12, 2 * clients)) for kind in ("words", "labels") for clients in (1, 8, 32)]


@pytest.mark.slow
def test_a_part_that_fails_says_why_and_the_next_goes_on(repository: Path, tmp_path: Path) -> None:
    """Without the part that makes the model nothing can be trained on it."""
    code, stderr, rows = benchmark(repository, tmp_path / "gpu.json", "--parts", "zero2", "machine", "--patience", "4")
    assert code == 1 and "failed: zero2" in stderr
    (failed,) = [row for row in rows if "error" in row]
    assert failed["part"] == "zero2" and "rank 0 ended with 1" in failed["error"] and "model.source" in failed["error"]
    assert rows[-1] == {"part": "machine", "ended": "whole", "wall_s": rows[-1]["wall_s"]}
