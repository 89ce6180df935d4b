"""What methods add to the loss and keep is the same on two ranks under ZeRO as in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from amlora_dist.config.loading import load_config
from amlora_dist.training.stage import run_stage
from amlora_dist.training.stage_spec import StageWork
from tests.methods.stages import in_this_process, stages
from tests.tiny_config import write_config
from tests.training.ranks import on_ranks

METHODS = {
    "o_lora": ["method_settings.ortho_weight=20"],
    "ewc": ["method_settings.ewc_weight=100", "method_settings.ewc_rows=7"],
    "lwf": ["method_settings.lwf_weight=3"],
    "l2p": ["method_settings.prompt_pool=6", "method_settings.prompt_tokens=3"],
    "am_lora": ["method_settings.memory_rows=8", "training.near_tie=0"],
}
"""What differs between methods in a step; the rest is what every method does."""
NOT_UNDER_ZERO_3 = ("o_lora", "ewc", "l2p", "am_lora")
"""``am_lora``: with a memory."""


def on_this_rank(work: StageWork) -> None:
    run_stage(work, distributed=True, report=lambda event: None, device=torch.device("cpu"))


def learned(file: str, folder: str, zero_stage: int | None) -> dict[str, Any]:
    """By method: the losses of both stages, and the sum of each remembered tensor after the second, what refits came to
    among them."""
    run, where = (in_this_process, []) if zero_stage is None else (on_this_rank, [f"deepspeed.zero_stage={zero_stage}"])
    found = {}
    for name, more in METHODS.items():
        if zero_stage == 3 and name in NOT_UNDER_ZERO_3:
            continue
        config = load_config(file, [f"method={name}", "training.epochs=1", "training.batch_size=12", *more, *where])
        both = stages(config, Path(folder) / name, run, score=False)
        memory = {key: float(tensor.sum()) for key, tensor in both[1].result.method_state.items()}
        memory |= {f"refitted.{path}": float(row.sum()) for path, row in both[1].result.adapter.refitted.items()}
        for task, one in (both[1].result.training.get("memory") or {"tasks": {}})["tasks"].items():
            memory |= {f"{task}, before": one["before"], f"{task}, after": one["after"]}
        found[name] = {"losses": [loss for stage in both for loss in stage.result.training["losses"]], "memory": memory}
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("alone")
    file = str(write_config(folder, tasks=("colours", "shapes")))
    return file, learned(file, str(folder / "stages"), None)


def on_two_ranks(file: str, folder: str) -> dict[str, Any]:
    """All that the tests look at."""
    found: dict[str, Any] = {f"ZeRO-{stage}": learned(file, f"{folder}/zero-{stage}", stage) for stage in (2, 3)}
    return found | {"recipe": recipe_of(file, f"{folder}/recipe", 3)}


@pytest.fixture(scope="module")
def two_ranks(alone: tuple[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """By rank; in one process group, for starting it is slow."""
    return on_ranks(2, on_two_ranks, alone[0], str(tmp_path_factory.mktemp("ranks")))


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_two_ranks_under_zero_equal_one_process(
    zero_stage: int, alone: tuple[str, dict[str, Any]], two_ranks: list[dict[str, Any]]
) -> None:
    _, expected = alone
    first, second = (found[f"ZeRO-{zero_stage}"] for found in two_ranks)
    assert first == second
    assert set(METHODS) - set(first) == (set(NOT_UNDER_ZERO_3) if zero_stage == 3 else set())
    for name in first:
        assert first[name]["losses"] == pytest.approx(expected[name]["losses"], rel=1e-4)
        assert first[name]["memory"] == pytest.approx(expected[name]["memory"], rel=1e-2, abs=1e-6)


def recipe_of(file: str, folder: str, zero_stage: int | None) -> tuple[list[float], list[float]]:
    """Losses of the second stage, and the sizes of the weights of the first adapter that it learned."""
    run, where = (in_this_process, []) if zero_stage is None else (on_this_rank, [f"deepspeed.zero_stage={zero_stage}"])
    config = load_config(file, ["dtype=bf16", "training.epochs=1", "training.batch_size=12", *where])
    second = stages(config, Path(folder), run, score=False)[1].result
    return second.training["losses"], [float(recipe.abs().sum()) for recipe in second.adapter.recipe.values()]


@pytest.mark.integration
def test_recipes_are_learned_in_bf16_under_zero_3(
    alone: tuple[str, dict[str, Any]], two_ranks: list[dict[str, Any]], tmp_path: Path
) -> None:
    losses, sizes = recipe_of(alone[0], str(tmp_path / "alone"), None)
    first, second = (found["recipe"] for found in two_ranks)
    assert first == second
    assert first[0] == pytest.approx(losses, rel=2e-2)
    assert min(first[1]) > 0, "every layer's weight has left its start"
    assert sum(first[1]) == pytest.approx(sum(sizes), rel=0.05), "bf16 moves single ones by more"
