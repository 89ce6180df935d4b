"""``training.gradient_checkpointing``: layers are computed again in backward, and nothing else changes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers.models.llama.modeling_llama import LlamaMLP

from amlora_dist.config.loading import load_config
from tests.methods.stages import stages
from tests.tiny_config import write_config
from tests.training.ranks import on_ranks
from tests.training.test_worker_cache import QUICK, learned, runner, zero

ON = "training.gradient_checkpointing=true"
TASKS = ("colours", "shapes")


def trained(file: str, folder: str, overrides: list[str], *, distributed: bool) -> tuple[list[Any], int]:
    """What two stages made, and how often a block of a layer began."""
    began: Counter[str] = Counter()
    forward = LlamaMLP.forward

    def counted(self: LlamaMLP, *given: Any) -> Any:
        began["mlp"] += 1
        return forward(self, *given)

    LlamaMLP.forward = counted  # type: ignore[method-assign]
    try:
        done = stages(load_config(file, overrides), Path(folder), runner(None, distributed=distributed, then=lambda: None))
    finally:
        LlamaMLP.forward = forward  # type: ignore[method-assign]
    return learned(done), began["mlp"]


def off_and_on(file: str, folder: str, settings: list[list[str]]) -> list[tuple[list[Any], list[Any], int, int]]:
    found = []
    for number, more in enumerate(settings):
        off, few = trained(file, f"{folder}/{number}-off", [*QUICK, *more], distributed=True)
        on, many = trained(file, f"{folder}/{number}-on", [*QUICK, *more, ON], distributed=True)
        found.append((off, on, few, many))
    return found


def test_a_stage_computes_its_layers_again_and_learns_the_same(tmp_path: Path) -> None:
    file = str(write_config(tmp_path, tasks=TASKS))
    off, few = trained(file, str(tmp_path / "off"), QUICK, distributed=False)
    on, many = trained(file, str(tmp_path / "on"), [*QUICK, ON], distributed=False)
    assert on == off, "bit for bit"
    assert many > few


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_ranks_compute_their_layers_again_under_zero_2_and_3(tmp_path: Path) -> None:
    file = str(write_config(tmp_path, tasks=TASKS))
    settings = [zero(2), zero(3), zero(3, "stage3_param_persistence_threshold=0")]
    for rank in on_ranks(2, off_and_on, file, str(tmp_path), settings):
        for off, on, few, many in rank:
            assert on == off, "bit for bit"
            assert many > few
