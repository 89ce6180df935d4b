"""What tests share that stop or kill whole runs: one small run, what comes of it undisturbed, and a home to start it in."""

from __future__ import annotations

import os
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


@pytest.fixture
def nobodys_own_git(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs this may ignore files everywhere, and may be run by a hook of a repository of its own."""
    home = str(tmp_path_factory.mktemp("home"))
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    own = {"HOME": home, "XDG_CONFIG_HOME": home, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    for name, value in own.items():
        monkeypatch.setenv(name, value)
