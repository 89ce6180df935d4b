"""What a stage's first step does not need is done after its last one, and what it needs is computed once: the same comes
out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from amlora_dist.adapters.trunk import Trunk
from amlora_dist.config.loading import RunConfig, load_config
from amlora_dist.digests import tensors_digest
from amlora_dist.tasks import background
from amlora_dist.training import recipe_start, stage_statistics
from amlora_dist.training.result import read_result
from amlora_dist.training.stage import run_stage
from amlora_dist.training.stage_spec import StageWork
from tests.methods.stages import Stage, stages
from tests.tiny_config import write_config

TASKS = ("colours", "shapes")
WITH_BACKGROUND = ["training.epochs=1", "router.background=true"]
READ = "read"


class Interrupted(BaseException):
    """As if the process died."""


def run_saying(
    cache: Path, monkeypatch: pytest.MonkeyPatch, kinds: list[str], dies_at_text: int | None = None
) -> Callable[[StageWork], None]:
    """What runs a stage and notes its events, and every batch of texts that is read for statistics; the process dies at
    the one of this number, once."""
    inner, fatal = stage_statistics.read_texts, [dies_at_text]

    def reading(*given: Any, **named: Any) -> Any:
        kinds.append(READ)
        if kinds.count(READ) == fatal[0]:
            fatal[0] = None
            raise Interrupted
        return inner(*given, **named)

    monkeypatch.setattr(stage_statistics, "read_texts", reading)

    def run(work: StageWork) -> None:
        work = replace(work, cache=str(cache))
        run_stage(work, distributed=False, report=lambda event: kinds.append(event["kind"]), device=torch.device("cpu"))

    return run


def learned(done: list[Stage]) -> list[Any]:
    return [(one.result.adapter.digest(), tensors_digest(one.result.continuation())) for one in done]


def test_no_step_waits_for_the_reading_of_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: list[str] = []
    run = run_saying(tmp_path / "cache", monkeypatch, kinds)
    stages(load_config(write_config(tmp_path, tasks=TASKS), WITH_BACKGROUND), tmp_path, run)
    assert kinds.count("statistics") == kinds.count("trainable") == 2
    assert kinds.count(READ) > len(background.parts()), "the texts of the background among them"
    first_of_second = kinds.index("trainable", kinds.index("statistics"))
    for events in (kinds[:first_of_second], kinds[first_of_second:]):
        last = len(events) - 1 - events[::-1].index("step")
        assert READ not in events[:last]
        assert "statistics" not in events[:last]


def test_a_stage_that_dies_while_texts_are_read_takes_no_step_again_and_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(write_config(tmp_path, tasks=TASKS), WITH_BACKGROUND)
    undisturbed = stages(config, tmp_path / "undisturbed", run_saying(tmp_path / "other", monkeypatch, []))
    kinds: list[str] = []
    run = run_saying(tmp_path / "cache", monkeypatch, kinds, dies_at_text=3)

    def run_again(work: StageWork) -> None:
        try:
            run(work)
        except Interrupted:
            before = kinds.count("step")
            run(work)
            assert kinds.count("resumed") == 1 and kinds.count("step") == before

    assert learned(stages(config, tmp_path / "killed", run_again)) == learned(undisturbed)
    assert kinds.count("resumed") == 1, "it died"


def probes(folder: Path, config: RunConfig) -> list[Any]:
    """What each stage found of the rows of earlier tasks."""
    kinds: list[dict[str, Any]] = []

    def run(work: StageWork) -> None:
        run_stage(work, distributed=False, report=kinds.append, device=torch.device("cpu"))

    stages(config, folder, run, score=False)
    return [(event["losses"], event["base"]) for event in kinds if event["kind"] == "probe"]


def test_the_probe_of_many_adapters_runs_the_layers_below_them_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(write_config(tmp_path, tasks=("colours", "shapes", "sizes")), ["training.epochs=1"])
    batches: list[int] = []
    inner = Trunk.batch_states

    def counting(trunk: Trunk, ids_BL: Tensor, *more: Any) -> Tensor:
        batches.append(len(ids_BL))
        return inner(trunk, ids_BL, *more)

    monkeypatch.setattr(Trunk, "batch_states", counting)
    shared = probes(tmp_path / "shared", config)
    assert batches == [8, 8], "of each of two stages the rows of its probe"
    monkeypatch.setattr(recipe_start, "reusable_trunk", lambda mixture: None)
    assert probes(tmp_path / "plain", config) == shared, "bit for bit"
    assert len(batches) == len(shared) == 2 and [len(losses) for losses, _ in shared] == [1, 2]


def test_a_race_with_the_only_old_row_needs_no_probe_to_choose_it(tmp_path: Path) -> None:
    training = {"epochs": 8, "batch_size": 6, "learning_rate": 2e-2, "warmup_steps": 0, "probe_rows": 8, "keep": "best"}
    config = load_config(
        write_config(tmp_path, rows=24, tasks=("colours", "shapes", "sizes"), training=training), ["recipe.start=race"]
    )
    ((losses, base),) = probes(tmp_path, config)
    assert set(losses) == {"colours", "shapes"} and base is not None, "of the third stage, which has two to choose from"
    races = [read_result(tmp_path / "stages" / task / "trained").training["race"] for task in ("shapes", "sizes")]
    assert races[0]["losses"].keys() == {"none", "colours"}
    assert races[1]["losses"].keys() <= {"none", "colours", "shapes"} and len(races[1]["losses"]) > 1


def test_a_start_that_is_always_an_old_row_is_looked_for_among_these_alone(tmp_path: Path) -> None:
    tasks = ("colours", "shapes", "sizes")
    config = load_config(write_config(tmp_path, tasks=tasks), ["training.epochs=1", "recipe.start=always"])
    found = probes(tmp_path, config)
    assert len(found) == 1, "of two stages one has nothing to choose from"
    (losses, base), results = found[0], [read_result(tmp_path / "stages" / task / "trained") for task in tasks]
    assert base is None and set(losses) == set(tasks[:2])
    begun = [result.training["recipe_from"] for result in results]
    assert begun == [None, "colours", min(losses, key=losses.__getitem__)]
