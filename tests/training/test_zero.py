"""Both engines compute the same steps, and their state moves between world sizes and ZeRO stages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from amlora_dist.training.engine import DeepSpeedEngine, PlainEngine, TrainingEngine, deepspeed_config, join_process_group
from amlora_dist.training.optimizer import parameter_groups
from amlora_dist.training.settings import TrainingSettings
from tests.training.ranks import on_ranks

SETTINGS = TrainingSettings(learning_rate=1e-2, recipe_learning_rate=1e-2, l1=0.1, clip=0.5)


class Toy(nn.Module):
    """Odd sizes, so that every partition needs padding; ``c`` plays the recipe."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.base = nn.Linear(7, 5, bias=False)
        self.base.weight.data = torch.randn(5, 7, generator=generator)
        self.base.weight.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(3, 7, generator=generator) * 0.3)
        self.b = nn.Parameter(torch.randn(5, 3, generator=generator) * 0.3)
        self.c = nn.Parameter(torch.tensor([0.3, -0.002, 0.2]))
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + ((x @ self.a.t()) * (1 + self.c)) @ self.b.t()


OFFLOADS = {2: ("offload_optimizer",), 3: ("offload_optimizer", "offload_param")}
"""What can leave the device, by ZeRO stage."""


def _engine(
    stage: int | None, dtype: torch.dtype, micro: int, accumulation: int, offload: tuple[str, ...] = ()
) -> tuple[Toy, TrainingEngine]:
    model = Toy(dtype)
    trainable = {"a.m": model.a, "b.m": model.b, "recipe.m": model.c}
    groups = parameter_groups(trainable, SETTINGS)
    if stage is None:
        plain = PlainEngine(
            model, trainable, groups, betas=SETTINGS.betas, clip=SETTINGS.clip, device=torch.device("cpu")
        )
        return model, plain
    join_process_group()
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0} | {name: {"device": "cpu"} for name in offload}
    config = deepspeed_config(
        {"zero_stage": stage, "zero_optimization": zero},
        dtype=dtype,
        micro=micro,
        accumulation=accumulation,
        world=dist.get_world_size(),
        clip=SETTINGS.clip,
    )
    return model, DeepSpeedEngine(model, trainable, groups, config=config, betas=SETTINGS.betas)


def _steps(engine: TrainingEngine, dtype: torch.dtype, first: int, last: int, accumulation: int) -> list[float]:
    losses = []
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 7, generator=generator).to(dtype)
        y = torch.randn(8, 5, generator=generator)
        total = torch.zeros(1)
        parts = range(engine.ranks.rank, engine.ranks.world * accumulation, engine.ranks.world)
        for part in parts:
            share = 8 // (engine.ranks.world * accumulation)
            rows = slice(part * share, (part + 1) * share)
            loss = (engine.forward(x=x[rows]).float() - y[rows]).pow(2).sum() / 8
            engine.backward(loss)
            total += loss.detach()
        engine.step(1.0 - step / 20)
        losses.append(float(engine.ranks.sum(total)))
    return losses


def _run(
    stage: int | None, dtype_name: str, accumulation: int, state: dict[str, Any] | None, first: int, last: int,
    offload: tuple[str, ...] = (),
) -> tuple[list[float], dict[str, Any]]:  # fmt: skip
    dtype = torch.float32 if dtype_name == "fp32" else torch.bfloat16
    world = 1 if stage is None else dist.get_world_size()
    _, engine = _engine(stage, dtype, 8 // world // accumulation, accumulation, offload)
    if state is not None:
        engine.import_state({name: torch.tensor(value) for name, value in state.items()}, first)
    losses = _steps(engine, dtype, first, last, accumulation)
    return losses, {name: value.tolist() for name, value in engine.export_state().items()}


CASES = [(stage, dtype) for stage in (0, 1, 2, 3) for dtype in ("fp32", "bf16")]


def _every_case() -> dict[str, Any]:
    out = {}
    for stage, dtype in CASES:
        accumulation = 2 if stage in {1, 3} else 1
        whole = _run(stage, dtype, accumulation, None, 0, 8)
        half = _run(stage, dtype, accumulation, None, 0, 4)
        rest = _run(stage, dtype, accumulation, half[1], 4, 8)
        out[f"{stage}-{dtype}"] = (whole, half, rest)
    for stage, offload in OFFLOADS.items():
        whole = _run(stage, "fp32", 1, None, 0, 8, offload)
        half = _run(stage, "fp32", 1, None, 0, 4, offload)
        out[f"{stage}-offloaded"] = (whole, half, _run(stage, "fp32", 1, half[1], 4, 8, offload))
    return out


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, Any]]:
    """Undisturbed, first half and resumed second half of every case; one process group, for starting it is slow."""
    return on_ranks(2, _every_case)


@pytest.mark.integration
@pytest.mark.parametrize(("stage", "dtype"), CASES)
def test_two_ranks_equal_one_process_and_resume_exactly(
    two_ranks: list[dict[str, Any]], stage: int, dtype: str
) -> None:
    losses, state = _run(None, dtype, 1, None, 0, 8)
    whole, half, rest = two_ranks[0][f"{stage}-{dtype}"]
    assert half[0] + rest[0] == whole[0], "a resumed run must equal an undisturbed one, bit for bit"
    assert rest[1] == whole[1]
    assert whole[1] == two_ranks[1][f"{stage}-{dtype}"][0][1], "every rank exports the same state"
    tolerance = 1e-5 if dtype == "fp32" else 0.1
    assert max(abs(x - y) / x for x, y in zip(losses, whole[0], strict=True)) < tolerance
    if dtype == "fp32":
        for name, value in state.items():
            torch.testing.assert_close(torch.tensor(whole[1][name]), torch.tensor(value), atol=1e-5, rtol=1e-4)
        zeros = torch.tensor(whole[1]["master.recipe.m"]) == 0
        assert bool(zeros.any()) and not bool(zeros.all()), "the proximal step makes exact zeros under ZeRO"
        assert torch.equal(zeros, torch.tensor(state["master.recipe.m"]) == 0)


@pytest.mark.integration
@pytest.mark.parametrize("stage", OFFLOADS)
def test_offloading_to_the_host_changes_no_step_and_resumes_exactly(two_ranks: list[dict[str, Any]], stage: int) -> None:
    losses, _ = _run(None, "fp32", 1, None, 0, 8)
    whole, half, rest = two_ranks[0][f"{stage}-offloaded"]
    assert half[0] + rest[0] == whole[0] and rest[1] == whole[1]
    assert max(abs(x - y) / x for x, y in zip(losses, whole[0], strict=True)) < 1e-5


@pytest.mark.integration
def test_state_moves_from_zero_3_with_two_ranks_to_one_plain_process(two_ranks: list[dict[str, Any]]) -> None:
    whole, _ = _run(None, "fp32", 1, None, 0, 8)
    _, state = two_ranks[0]["3-fp32"][1]
    rest, _ = _run(None, "fp32", 1, state, 4, 8)
    assert max(abs(x - y) / x for x, y in zip(whole[4:], rest, strict=True)) < 1e-5
