"""How a parallel run deals its files out to processes: what is costly to start is shared, and what is long goes first.

pytest-xdist gives a process whole files, those with the most tests first. Here files that wait for the same fixture go to
one process, where it is made once; and long files of few tests do not come last, each alone on an idle machine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from xdist.scheduler import LoadScopeScheduling

if TYPE_CHECKING:
    import pytest

TOGETHER = {
    "a process that forks commands": (
        "tests/pipelines/test_crash_matrix.py", "tests/pipelines/test_interruptions.py",
        "tests/pipelines/test_old_journals.py",
    ),
    "a tracking server": (
        "tests/registry/test_store.py", "tests/registry/test_processes.py", "tests/registry/test_pyfunc.py",
        "tests/registry/test_housekeeping.py", "tests/registry/test_outage.py",
    ),
}  # fmt: skip
"""Files by the session's fixture that they share."""
LONGEST = (
    "tests/pipelines/test_ray_crash_points.py", "a process that forks commands", "tests/pipelines/test_ray_stages.py",
    "a tracking server", "tests/pipelines/test_submit.py", "tests/pipelines/test_tune.py",
    "tests/pipelines/test_serving.py", "tests/pipelines/test_apart.py", "tests/pipelines/test_comparison.py",
    "tests/pipelines/test_chat_run.py", "tests/pipelines/test_served.py",
    "tests/journeys/test_readme.py", "tests/journeys/test_application_developer.py", "tests/journeys/test_notebooks.py",
)  # fmt: skip
"""What takes longer than a minute, the longest first, but not all of Ray at once."""
_GROUP = {file: group for group, files in TOGETHER.items() for file in files}


def group_of(nodeid: str) -> str:
    """What a test shares a process with: its file, or several."""
    file = nodeid.partition("::")[0]
    return _GROUP.get(file, file)


def longest_first(items: list[pytest.Item]) -> None:
    """Sort tests: the longest groups, then the others by how many tests they have."""
    counts: dict[str, int] = {}
    for item in items:
        counts[group_of(item.nodeid)] = counts.get(group_of(item.nodeid), 0) + 1
    places = {group: place for place, group in enumerate(LONGEST)}
    items.sort(key=lambda item: (places.get(group := group_of(item.nodeid), len(places)), -counts[group], group))


class ByGroup(LoadScopeScheduling):
    """One process for all tests of a group."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)
