"""What ``benchmarks/overhead.py`` makes of the times that it has seen."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from tests.fork_server import ROOT


@pytest.fixture
def overhead(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import overhead

    yield overhead
    sys.modules.pop("overhead")


def events(began: float, ready: float, *kinds: str) -> list[dict[str, Any]]:
    worker = {"kind": "worker", "time": began, "entered": ready - 1, "ready": ready}
    return [worker, *({"kind": kind, "time": began + place} for place, kind in enumerate(kinds, start=1))]


def test_the_seconds_between_two_stages_are_split_by_what_ended_when(overhead: Any) -> None:
    driver = [
        {"what": "ready", "began": 10.0, "ended": 12.0}, {"what": "run", "began": 12.0, "ended": 31.0},
        {"what": "publish", "began": 31.0, "ended": 31.5}, {"what": "ready", "began": 32.0, "ended": 32.0},
        {"what": "run", "began": 32.0, "ended": 60.0}, {"what": "publish", "began": 61.0, "ended": 62.0},
    ]  # fmt: skip
    first = events(20.0, 19.0, "trainable", "step", "step", "statistics", "scored")
    second = events(33.0, 19.0, "trainable", "probe", "step", "statistics")
    ends = overhead.moments(0.0, driver, [first, second])
    samples = [(0.0, 0.0), (40.0, 80.0)]
    seconds, cpu = (overhead.splits(unit, ends, samples) for unit in overhead.UNITS)
    assert seconds["first_step"] == 22 and cpu["first_step"] == 44
    assert seconds["first_step_split"] == {
        "driver, while Ray starts": 10, "Ray: controller and workers": 8, "imports in the worker": 1, "plan": 1,
        "model and engine": 1, "first step": 1,
    }  # fmt: skip
    assert seconds["between_stages"] == 36 - 25
    assert seconds["between_stages_split"] == {
        "end of the stage": 6, "publishing": 0.5, "driver": 0.5, "plan": 1, "model and engine": 1,
        "probe of the old adapters": 1, "first step": 1,
    }  # fmt: skip


def test_cpu_seconds_lie_between_those_of_two_looks(overhead: Any) -> None:
    samples = [(10.0, 1.0), (12.0, 5.0)]
    assert [overhead.cpu_at(samples, moment) for moment in (9.0, 10.5, 12.0, 99.0)] == [0.0, 2.0, 5.0, 5.0]
    assert overhead.used("cpu_seconds", samples, 10.5, 11.5) == 2.0
    assert overhead.used("seconds", samples, 10.5, 11.5) == 1.0
