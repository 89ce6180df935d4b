"""The best step on held-out rows is kept, the start of a recipe is raced: decided by losses alone, safe through stops."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from amlora_dist.config.loading import load_config
from amlora_dist.methods import method_for
from amlora_dist.training.best_checkpoint import best_of, check_interval, exhausted
from amlora_dist.training.failures import StoppedError
from amlora_dist.training.loop import STOP_FILE
from amlora_dist.training.race import race_steps
from amlora_dist.training.result import Result, read_result
from amlora_dist.training.settings import TrainingSettings
from amlora_dist.training.stage import run_stage
from amlora_dist.training.stage_spec import StageWork
from pipelines.runs.inputs import gather_inputs
from tests.methods.stages import stages
from tests.tiny_config import write_config
from tests.training.ranks import on_ranks

TRAINING = {
    "epochs": 8, "batch_size": 6, "learning_rate": 2e-2, "warmup_steps": 0, "schedule": "constant", "checkpoint_every": 5,
    "probe_rows": 8, "keep": "best", "check_every": 3, "patience": 2,
}  # fmt: skip
"""24 rows, 6 of them held out: 24 steps, of which a race of two starts may take 12."""


# -- what decides -----------------------------------------------------------------------------------------------------


def test_a_later_step_has_to_be_better_by_more_than_a_near_tie() -> None:
    losses = [[3, 1.0], [6, 0.995], [9, 0.98], [12, 0.975], [15, 2.0]]
    assert best_of(losses, 0.01) == 2, "0.995 is no better than 1.0, 0.98 is; 0.975 is no better than 0.98"
    assert best_of(losses, 0.0) == 3
    assert best_of([], 0.01) is None


def test_a_stage_ends_after_so_many_looks_without_anything_better() -> None:
    losses = [[3, 1.0], [6, 0.5], [9, 0.6], [12, 0.7]]
    assert exhausted(losses, TrainingSettings(patience=2))
    assert not exhausted(losses[:3], TrainingSettings(patience=2))
    assert not exhausted(losses, TrainingSettings(patience=0)), "0 goes on to the end"
    assert not exhausted([], TrainingSettings(patience=1))


def test_looks_at_few_steps_are_few_and_never_more_than_eight() -> None:
    assert check_interval(TrainingSettings(batch_size=8), 18, 24) == 6, "the demo: three looks"
    assert check_interval(TrainingSettings(batch_size=8), 1000, 24) == 125
    assert check_interval(TrainingSettings(batch_size=8), 4, 100) == 4
    assert check_interval(TrainingSettings(check_every=7), 1000, 24) == 7


def test_losers_of_a_race_cost_no_more_than_their_share() -> None:
    for steps in (*range(1, 130), 1000):
        for candidates in (2, 3):
            each = race_steps(steps, candidates, 20)
            share = 0.15 if steps >= 100 else 0.5
            assert each == 0 or (8 <= each <= 20 and each * (candidates - 1) <= share * steps), (steps, candidates)
    assert race_steps(58, 3, 20) == 14
    assert race_steps(18, 3, 20) == 0, "fewer than eight steps each are no race"


# -- stages -----------------------------------------------------------------------------------------------------------


def runner(*, distributed: bool = False, stop_at: int | None = None) -> Callable[[StageWork], None]:
    """``stop_at``: a step of the second stage before which it is asked to stop; 0: before it begins."""

    def run(work: StageWork) -> None:
        def report(event: dict[str, Any]) -> None:
            if work.index == 2 and event["kind"] == "step" and event["step"] == stop_at:
                (work.path / STOP_FILE).touch()

        work.path.mkdir(parents=True, exist_ok=True)
        if work.index == 2 and stop_at == 0:
            (work.path / STOP_FILE).touch()
        run_stage(work, distributed=distributed, report=report, device=torch.device("cpu"))

    return run


def results(config: Path, folder: Path, *overrides: str, run: Callable[[StageWork], None] | None = None) -> list[Result]:
    done = stages(load_config(config, list(overrides)), folder, run or runner(), score=False)
    return [read_result(stage.work.trained) for stage in done]


def test_the_step_that_is_best_on_held_out_rows_is_the_result(tmp_path: Path) -> None:
    config = write_config(tmp_path, rows=24, tasks=("colours",), training=TRAINING | {"learning_rate": 0.3, "patience": 0})
    best = results(config, tmp_path / "best")[0]
    steps = [step for step, _ in best.training["held_losses"]]
    assert steps == [3, 6, 9, 12, 15, 18, 21, 24] and best.training["step"] == 24
    kept = best.training["kept_step"]
    losses = dict(best.training["held_losses"])
    assert kept < 24 and all(losses[kept] <= loss / 0.99 for loss in losses.values()), "at this rate the last is not best"
    short = results(config, tmp_path / "short", f"training.epochs={kept // 3}", "training.keep=last")[0]
    assert short.adapter.digest() == best.adapter.digest(), "what a run that ends there has, bit for bit"
    last = results(config, tmp_path / "last", "training.keep=last")[0]
    assert last.training["losses"] == best.training["losses"] and last.adapter.digest() != best.adapter.digest()
    early = results(config, tmp_path / "early", "training.patience=1")[0]
    assert early.training["step"] < 24 and early.training["losses"] == best.training["losses"][: early.training["step"]]


def test_what_is_kept_and_how_recipes_start_is_in_the_fingerprint_where_it_is_not_as_it_was(tmp_path: Path) -> None:
    def reads(stage: int, *overrides: str) -> dict[str, Any]:
        config = load_config(file, list(overrides))
        return method_for(gather_inputs(config, tmp_path).stage_settings()).reads(stage)

    file = write_config(tmp_path, rows=24, tasks=("colours", "shapes"))
    plain = ["training.keep=last", "recipe.start=probe"]
    assert "keep" not in reads(2, *plain)["training"] and "start" not in reads(2, *plain)["recipe"]
    assert reads(2, *plain, "training.patience=9", "training.near_tie=0.5", "recipe.race_steps=9") == reads(2, *plain)
    best = [*plain, "training.keep=best"]
    for key in ("training.keep=best", "training.patience=9", "training.near_tie=0.5", "training.check_every=2"):
        assert reads(1, *best, key) != reads(1, *plain), key
        assert key == "training.keep=best" or reads(1, *best, key) != reads(1, *best), key
    for start in ("race", "always", "never"):
        assert reads(2, *plain, f"recipe.start={start}") != reads(2, *plain)
        assert reads(1, *plain, f"recipe.start={start}") == reads(1, *plain), "a first stage has no recipe"


def test_a_recipe_starts_as_configured(tmp_path: Path) -> None:
    config = write_config(tmp_path, rows=24, tasks=("colours", "shapes"), training=TRAINING | {"keep": "last"})
    first = tmp_path / "first"
    results(config, first, f"tasks=[{tmp_path / 'tasks' / 'colours.yaml'}]")

    def second(start: str, *overrides: str) -> Result:
        folder = tmp_path / start
        shutil.copytree(first, folder, dirs_exist_ok=True)
        return results(config, folder, f"recipe.start={start}", *overrides)[-1]

    never, always, race = second("never"), second("always"), second("race")
    assert never.training["recipe_from"] is None and never.training["race"] is None
    assert always.training["recipe_from"] == "colours"
    race_record = race.training["race"]
    assert race_record["steps"] == 12 and race_record["losses"].keys() == {"none", "colours"}
    wins = race_record["losses"]["colours"] < race_record["losses"]["none"] * 0.99
    assert race.training["recipe_from"] == ("colours" if wins else None)
    alike = always if wins else never
    assert race.training["losses"] == alike.training["losses"], "the winner's steps are the stage's own"
    assert race.adapter.digest() == alike.adapter.digest()


def stopped(config: Path, folder: Path, at: int, zero: int | None) -> None:
    overrides = [] if zero is None else [f"deepspeed.zero_stage={zero}"]
    with pytest.raises(StoppedError):
        results(config, folder, *overrides, run=runner(distributed=zero is not None, stop_at=at))
    if zero is None or dist.get_rank() == 0:
        (folder / "stages" / "shapes" / STOP_FILE).unlink()


def ended(config: Path, folder: Path, zero: int | None = None) -> dict[str, Any]:
    overrides = [] if zero is None else [f"deepspeed.zero_stage={zero}"]
    found = results(config, folder, *overrides, run=runner(distributed=zero is not None))[-1]
    return found.training | {"digest": found.adapter.digest()}


def on_two_ranks(config: Path, folder: Path) -> list[dict[str, Any]]:
    if dist.get_rank() == 0:
        shutil.copytree(folder / "later", folder / "later-on-two")
    dist.barrier()
    return [ended(config, folder / "later-on-two", 3)]


@pytest.mark.slow
@pytest.mark.integration
def test_a_race_and_the_best_step_are_the_same_after_a_stop_and_on_other_workers(tmp_path: Path) -> None:
    config = write_config(
        tmp_path, tasks=("colours", "shapes"), training=TRAINING | {"patience": 0, "learning_rate": 1e-2, "epochs": 6},
        recipe={"start": "race"},
    )  # fmt: skip
    whole = ended(config, tmp_path / "whole")
    assert whole["race"] is not None and whole["kept_step"] is not None
    stopped(config, tmp_path / "racing", 0, None)
    stopped(config, tmp_path / "later", 13, None)
    two = on_ranks(2, on_two_ranks, config, tmp_path)[0]
    for name in ("racing", "later"):
        again = ended(config, tmp_path / name)
        for key in ("losses", "held_losses", "kept_step", "digest", "recipe_from"):
            assert again[key] == whole[key], (name, key)
    for found in two:
        assert (found["kept_step"], found["recipe_from"]) == (whole["kept_step"], whole["recipe_from"])
        assert max(abs(x - y) for x, y in zip(found["losses"], whole["losses"], strict=True)) <= 1e-4
