"""What every test stands on: a home of its own, no network, one thread."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before torch is imported: two workers and the tests' own process share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def amlora_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``AMLORA_HOME`` of one test; subprocesses inherit it."""
    folder = tmp_path / "home"
    monkeypatch.setenv("AMLORA_HOME", str(folder))
    return folder


@pytest.fixture(scope="session")
def repository() -> Path:
    """The folder that holds ``configs/`` and the two packages."""
    return REPOSITORY
