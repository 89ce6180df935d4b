"""A stage that began on some workers and one ZeRO stage goes on with others, and learns the same."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from amlora_dist.config.loading import load_config
from amlora_dist.training.failures import StoppedError
from amlora_dist.training.loop import STOP_FILE
from amlora_dist.training.result import read_result
from amlora_dist.training.stage import run_stage
from amlora_dist.training.stage_spec import StageWork
from tests.methods.stages import stages
from tests.tiny_config import write_config
from tests.training.ranks import on_ranks

STOP_AFTER = 5
"""Optimizer steps of the second stage, whose recipe is trained too."""


def runner(*, distributed: bool, stop: bool) -> Callable[[StageWork], None]:
    def run(work: StageWork) -> None:
        def report(event: dict[str, Any]) -> None:
            if stop and work.index == 2 and event["kind"] == "step" and event["step"] == STOP_AFTER - 1:
                (work.path / STOP_FILE).touch()

        work.path.mkdir(parents=True, exist_ok=True)
        run_stage(work, distributed=distributed, report=report, device=torch.device("cpu"))

    return run


def half(config: Path, folder: Path, zero: int | None) -> None:
    """Stage 1, and stage 2 until it is stopped."""
    overrides = [] if zero is None else [f"deepspeed.zero_stage={zero}"]
    with pytest.raises(StoppedError):
        stages(load_config(config, overrides), folder, runner(distributed=zero is not None, stop=True), score=False)
    if zero is None or dist.get_rank() == 0:
        (folder / "stages" / "shapes" / STOP_FILE).unlink()


def rest(config: Path, folder: Path, zero: int | None) -> list[float]:
    """What is missing; the losses of all steps of stage 2."""
    overrides = [] if zero is None else [f"deepspeed.zero_stage={zero}"]
    done = stages(load_config(config, overrides), folder, runner(distributed=zero is not None, stop=False), score=False)
    losses: list[float] = read_result(done[-1].work.trained).training["losses"]
    return losses


def on_two_ranks(config: Path, folder: Path) -> list[float]:
    """Begin under ZeRO-2; go on under ZeRO-3 what one process began."""
    half(config, folder / "two-then-one", 2)
    return rest(config, folder / "one-then-two", 3)


@pytest.mark.slow
@pytest.mark.integration
def test_a_stage_goes_on_with_other_workers_and_another_zero_stage(tmp_path: Path) -> None:
    training = {
        "epochs": 3, "batch_size": 6, "learning_rate": 1e-2, "warmup_steps": 2, "checkpoint_every": 3, "probe_rows": 8,
    }  # fmt: skip
    config = write_config(tmp_path, tasks=("colours", "shapes"), training=training)
    undisturbed = rest(config, tmp_path / "whole", None)
    assert len(undisturbed) == 12
    half(config, tmp_path / "one-then-two", None)
    shutil.copytree(tmp_path / "one-then-two", tmp_path / "one-then-one")
    one_then_two = on_ranks(2, on_two_ranks, config, tmp_path)
    found = {
        "one process, then one": rest(config, tmp_path / "one-then-one", None),
        "one process, then 2 ranks under ZeRO-3": one_then_two[0],
        "2 ranks under ZeRO-2, then one process": rest(config, tmp_path / "two-then-one", None),
    }
    assert found["one process, then one"] == undisturbed, "equal, bit for bit"
    worst = {name: max(abs(x - y) for x, y in zip(losses, undisturbed, strict=True)) for name, losses in found.items()}
    assert all(value <= 1e-5 for value in worst.values()), worst
