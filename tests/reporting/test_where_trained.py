"""The curve of a stage that took its adapter is that of where it was trained, however often it was taken since."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from amlora_dist.registry import tags
from amlora_dist.registry.store import Store
from amlora_dist.reporting.facts import _trained


def noted(**runs: tuple[str, dict[str, Any]]) -> Store:
    """A store of stages' runs by name, each of a fingerprint and with what is noted of its training."""

    def find_runs(wanted: dict[str, str]) -> list[Any]:
        fingerprint = wanted[tags.TRAINING_FINGERPRINT]
        return [SimpleNamespace(run=name) for name, (own, _) in runs.items() if own == fingerprint]

    return cast(Store, SimpleNamespace(find_runs=find_runs, load_json=lambda run, _: {"training": runs[run][1]}))


@pytest.mark.parametrize("kept", [True, False], ids=["the run that trained it is there", "it was deleted"])
def test_stages_that_took_an_adapter_from_each_other_have_the_curve_of_who_trained_it(kept: bool) -> None:
    # one trains; two makes other statistics; the version of one is lost, and three, with its settings, takes two's adapter
    three: dict[str, Any] = {"losses": [], "adapter_of": "second"}
    runs = {"three": ("first", three), "two": ("second", {"losses": [], "adapter_of": "first"})}
    if kept:
        runs["one"] = ("first", {"losses": [[1, 0.5]]})
    assert _trained(noted(**runs), "first") == ({"losses": [[1, 0.5]]} if kept else None)
