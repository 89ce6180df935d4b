"""What tests share that stop or kill whole runs: one small run, what comes of it undisturbed, and a home to start it in."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.fork_server import Server
from tests.pipelines.crash_cases import Outcome, calm, matrix_config


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return matrix_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def undisturbed(forking: Server, config: Path, empty_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return calm(forking.start, tmp_path_factory.mktemp("calm"), config, empty_home)


@pytest.fixture
def home(tmp_path: Path, empty_home: Path) -> Path:
    shutil.copytree(empty_home, tmp_path / "home")
    return tmp_path / "home"
