"""``benchmarks/keys.py`` counts what a bank would serve if it were routed by each rule, and asks the bank nothing twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.integration
@pytest.mark.slow
def test_every_rule_has_a_share_served_right_and_what_the_bank_said_is_kept(repository: Path, tmp_path: Path) -> None:
    file, kept = tmp_path / "keys.json", tmp_path / "likelihoods.json"
    command = [sys.executable, str(repository / "benchmarks" / "keys.py"), "--quick", "--json", str(file)]
    first, again = (
        subprocess.run([*command, "--likelihoods", str(kept)], capture_output=True, text=True, timeout=280) for _ in range(2)
    )
    assert first.returncode == 0, first.stderr
    assert again.returncode == 0, again.stderr
    assert "asked the bank" in first.stderr and "asked the bank" not in again.stderr
    lines = {line["rule"].strip(): line for line in json.loads(file.read_text(encoding="utf-8"))["rules"]}
    itself = lines.pop("(the bank itself)")
    assert all(0 <= line["served"][0] <= 1 and line["us"][0] > 0 for line in lines.values())
    assert 0 < itself["served"][0] <= 1
    assert sum(line["label"][0] is None for line in lines.values()) == 3
    assert {line["pass"][0] for line in lines.values()} == {0, 0.5, 0.75}


def test_banks_are_given_one_for_each_seed(repository: Path) -> None:
    command = [sys.executable, str(repository / "benchmarks" / "keys.py"), "--seeds", "0", "1", "--bank", "models:/demo/4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "--bank: found 1 for the 2 of --seeds, expected one for each" in done.stderr


@pytest.mark.integration
@pytest.mark.slow
def test_a_weight_fitted_on_as_many_rows_as_there_are_serves_what_all_of_them_give(repository: Path, tmp_path: Path) -> None:
    file = tmp_path / "beta.json"
    command = [sys.executable, str(repository / "benchmarks" / "beta_prior.py"), "--quick", "--draws", "2"]
    done = subprocess.run([*command, "--json", str(file)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    shares = json.loads(file.read_text(encoding="utf-8"))["shares"]
    assert shares["fitted on 96"] == [shares["fitted on all"][0] * 2]
    assert len(shares["fitted on 12"][0]) == 2
