"""Files that share a process or start first are there, and every test of a file goes to one process."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.xdist_groups import LONGEST, TOGETHER, group_of, longest_first


def test_every_file_that_is_named_exists(repository: Path) -> None:
    named = [file for files in TOGETHER.values() for file in files] + [name for name in LONGEST if name not in TOGETHER]
    assert [name for name in named if not (repository / name).is_file()] == []
    assert len(set(named)) == len(named)


def test_the_longest_groups_come_first_and_their_tests_stay_together() -> None:
    ids = ["tests/a.py::x", "tests/pipelines/test_interruptions.py::x", "tests/b.py::x", "tests/b.py::y[models:/n@current]",
           "tests/pipelines/test_crash_matrix.py::x", "tests/pipelines/test_ray_stages.py::x"]  # fmt: skip
    items: Any = [SimpleNamespace(nodeid=nodeid) for nodeid in ids]
    longest_first(items)
    assert [group_of(item.nodeid) for item in items] == [
        "a process that forks commands", "a process that forks commands", "tests/pipelines/test_ray_stages.py",
        "tests/b.py", "tests/b.py", "tests/a.py",
    ]  # fmt: skip
