"""A stage that takes an adapter as it is and makes its statistics alone, on any number of ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from amlora_dist.config.loading import load_config
from amlora_dist.errors import TrainingError
from amlora_dist.training.result import Result, read_result
from amlora_dist.training.stage import run_stage
from amlora_dist.training.stage_spec import Parent, StageWork
from tests.methods.stages import stages
from tests.tiny_config import write_config
from tests.training.ranks import on_ranks

pytestmark = pytest.mark.integration

OTHER = ["training.epochs=1", "router.depths=[0]", "router.skip_tokens=0"]


def taken(config: Path, folder: Path, adapters: Path, *overrides: str, digest: str | None = None) -> list[Result]:
    """The stages' results, with the adapters of the stages below ``adapters``."""

    def run(work: StageWork) -> None:
        former = adapters / "stages" / work.task / "trained"
        one = Parent(work.task, digest or read_result(former).adapter.digest(), str(former))
        events: list[dict[str, Any]] = []
        ranked = dist.is_initialized()
        run_stage(replace(work, taken=one), distributed=ranked, report=events.append, device=torch.device("cpu"))
        assert not [event for event in events if event["kind"] in ("step", "trainable")], "nothing is trained"

    done = stages(load_config(config, [*OTHER, *overrides]), folder, run, score=False)
    return [read_result(one.work.trained) for one in done]


def under_zero_3(config: Path, folder: Path, adapters: Path) -> None:
    taken(config, folder, adapters, "deepspeed.zero_stage=3")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two tasks, trained in ``former`` next to it, and with other statistics in ``fresh``."""
    file = write_config(tmp_path_factory.mktemp("statistics"), tasks=("colours", "shapes"))
    stages(load_config(file, ["training.epochs=1"]), file.parent / "former", score=False)
    stages(load_config(file, OTHER), file.parent / "fresh", score=False)
    return file


def results(folder: Path) -> list[Result]:
    return [read_result(folder / "stages" / task / "trained") for task in ("colours", "shapes")]


def test_the_result_is_that_of_a_stage_that_was_trained_with_these_settings(config: Path, tmp_path: Path) -> None:
    made = taken(config, tmp_path / "made", config.parent / "former")
    for one, fresh, former in zip(made, results(config.parent / "fresh"), results(config.parent / "former"), strict=True):
        assert one.adapter.digest() == former.adapter.digest() == fresh.adapter.digest()
        own, theirs = one.continuation(), fresh.continuation()
        assert own.keys() == theirs.keys() and all(torch.equal(own[name], theirs[name]) for name in own), "bit for bit"
        assert not torch.equal(own["mean"], former.continuation()["mean"]), "others than those of before"
        assert (one.training["adapter_of"], one.training["losses"]) == (former.training["fingerprint"], [])
        assert one.training["fingerprint"] == fresh.training["fingerprint"]


def test_an_adapter_that_is_not_the_one_that_was_meant_is_refused(config: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"'colours' in .* is not the one that was meant"):
        taken(config, tmp_path, config.parent / "former", digest="f" * 64)
    assert not list(tmp_path.rglob("trained")), "nothing is left"


@pytest.mark.slow
def test_two_ranks_under_zero_3_make_the_same_statistics(config: Path, tmp_path: Path) -> None:
    on_ranks(2, under_zero_3, config, tmp_path / "made", config.parent / "former")
    for one, fresh in zip(results(tmp_path / "made"), results(config.parent / "fresh"), strict=True):
        assert one.adapter.digest() == fresh.adapter.digest()
        torch.testing.assert_close(one.statistics.mean, fresh.statistics.mean, atol=1e-5, rtol=0)
        held, theirs = one.statistics.held, fresh.statistics.held
        assert held is not None and theirs is not None and torch.equal(held.labels, theirs.labels)
        assert held.loglikelihoods is not None and theirs.loglikelihoods is not None
        assert torch.equal(held.loglikelihoods, theirs.loglikelihoods)
