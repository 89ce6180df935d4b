"""What every test has: a home of its own, no network, one thread."""

from __future__ import annotations

import compileall
import marshal
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from xdist.scheduler import Scheduling

    from tests.fork_server import Server

# Before torch is imported: two workers and the tests' own process share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")  # seven processes that nothing here uses

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a job in the background ignores it, and its children would
    signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    """Compiles the two packages once, and looks at what was written.

    Hundreds of commands of the tests read these files. Python 3.11 renames a compiled file into place without asking
    whether all of it was written: one that a disk cut short fails every later import with ``EOFError``.
    """
    if hasattr(config, "workerinput"):
        return
    for package in ("amlora_dist", "pipelines"):
        compileall.compile_dir(REPOSITORY / package, quiet=2)
        for compiled in (REPOSITORY / package).rglob("*.pyc"):
            try:
                marshal.loads(compiled.read_bytes()[16:])
            except (EOFError, ValueError, TypeError):
                compiled.unlink()


@pytest.hookimpl(tryfirst=True)  # before -m is looked at
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A crash test is an integration test too: ``-m "not integration"`` leaves the quick ones."""
    for item in items:
        if item.get_closest_marker("crash"):
            item.add_marker("integration")
    if hasattr(config, "workerinput"):  # one of several processes
        from tests.xdist_groups import longest_first

        longest_first(items)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> Scheduling | None:
    """Deals whole files out to processes (tests/xdist_groups.py); another ``--dist`` is left to pytest-xdist."""
    if config.getoption("dist") != "loadfile":
        return None
    from tests.xdist_groups import ByGroup

    config.option.loadscopereorder = False  # the order is ours
    return ByGroup(config, log)


@pytest.fixture(autouse=True, scope="session")
def shared_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """``AMLORA_HOME`` of fixtures that several tests share, which are made before a test has its own.

    Without it they would write ``.amlora`` into the working folder, and the next session of tests would find it there.
    """
    folder = tmp_path_factory.mktemp("shared-home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AMLORA_HOME", str(folder))
        yield folder


@pytest.fixture(autouse=True, scope="module")
def default_store() -> None:
    """Fixtures of a module are made before those of its tests: an earlier module's store is not for them either."""
    os.environ.pop("MLFLOW_TRACKING_URI", None)


@pytest.fixture(autouse=True)
def amlora_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``AMLORA_HOME`` of one test; subprocesses inherit it."""
    folder = tmp_path / "home"
    monkeypatch.setenv("AMLORA_HOME", str(folder))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)  # mlflow.set_tracking_uri sets it, for good
    return folder


@pytest.fixture(scope="session")
def repository() -> Path:
    """The folder that holds ``configs/`` and the two packages."""
    return REPOSITORY


@pytest.fixture(scope="session")
def empty_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home whose MLflow tables exist, to be copied: creating them takes seconds."""
    from amlora_dist.registry.store import Store

    folder = tmp_path_factory.mktemp("empty-home")
    Store.open(folder)
    return folder


@pytest.fixture(scope="session")
def forking() -> Iterator[Server]:
    """Starts ``amlora`` commands in children of a process that has imported everything."""
    from tests.fork_server import Server

    with Server() as server:
        yield server
