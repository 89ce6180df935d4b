"""Races and looks at held-out rows: what diverges has lost and leaves nothing behind; passes are no larger than asked."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from amlora_dist.config.loading import load_config
from amlora_dist.evaluation import scoring
from amlora_dist.training import held_loss, recipe_start
from amlora_dist.training.best_checkpoint import best_of, exhausted
from amlora_dist.training.checkpoint import StageProgress, save_checkpoint
from amlora_dist.training.engine import PlainEngine
from amlora_dist.training.failures import DeviceMemoryError, NonFiniteLossError
from amlora_dist.training.held_loss import beats, first_lowest, pass_rows
from amlora_dist.training.loop import Learner
from amlora_dist.training.race import Candidate
from amlora_dist.training.rate_race import Raced, at_rate, run_rate_race
from amlora_dist.training.recipe_start import RecipeStart
from amlora_dist.training.result import Result, read_result
from amlora_dist.training.settings import TrainingSettings
from amlora_dist.training.stage import run_stage
from amlora_dist.training.stage_spec import RateRace, StageWork
from amlora_dist.training.worker_cache import WorkerCache
from tests.methods.stages import stages
from tests.tiny_config import write_config
from tests.training.ranks import on_ranks

TRAINING = {
    "epochs": 8, "batch_size": 6, "learning_rate": 1e-2, "warmup_steps": 0, "schedule": "constant", "checkpoint_every": 5,
    "probe_rows": 8, "keep": "last",
}  # fmt: skip
"""24 rows, 6 of them held out: 24 steps, of which a race of two starts may take 12."""
NAN = math.nan


# -- what decides -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "margin", "expected"),
    [
        ((1.000, 0.992, 0.9895), 0.01, 1),  # a near-tie of the lowest that is no near-tie of the first
        ((1.000, 0.992, 0.9895), 0.0, 2),
        ((0.995, 0.992, 0.9895), 0.01, 0),
        ((NAN, 0.9, None), 0.01, 1),
        ((None, math.inf, NAN), 0.01, None),
        ((), 0.01, None),
    ],
)
def test_the_first_of_those_wins_that_are_near_ties_with_the_lowest(
    losses: tuple[float | None, ...], margin: float, expected: int | None
) -> None:
    assert first_lowest(losses, margin) == expected


def test_a_loss_that_is_not_finite_loses_wherever_it_stands() -> None:
    for odd in (NAN, math.inf, None):
        assert beats(1.0, odd, 0.01) and not beats(odd, 1.0, 0.01) and not beats(odd, odd, 0.01)
        looks: list[list[Any]] = [[3, odd], [6, 1.0], [9, odd]]
        assert best_of(looks, 0.01) == 1 and best_of(looks[:1], 0.01) is None
        assert not exhausted(looks[:1], TrainingSettings(patience=1)) and exhausted(looks, TrainingSettings(patience=1))


# -- passes over held-out rows ----------------------------------------------------------------------------------------


def second_stage(config: Path, folder: Path, *overrides: str, distributed: bool = False, events: Any = None) -> Result:
    report = (lambda event: None) if events is None else events.append

    def run(work: StageWork) -> None:
        run_stage(work, distributed=distributed, report=report, device=torch.device("cpu"))

    done = stages(load_config(config, list(overrides)), folder, run, score=False)
    return read_result(done[-1].work.trained)


def test_a_look_at_held_out_rows_takes_no_more_rows_at_once_than_configured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    dealt = scoring.deal

    def noted(rows: Any, batch: int, rank: int, world: int) -> Any:
        found = dealt(rows, batch, rank, world)
        sizes.extend(len(one) for one, _ in found)
        return found

    monkeypatch.setattr(held_loss, "deal", noted)
    config = write_config(tmp_path, rows=24, tasks=("colours",), training=TRAINING | {"keep": "best", "epochs": 2})
    whole = second_stage(config, tmp_path / "whole")
    assert set(sizes) == {6}, "as ever: all of them in one pass, whatever the global batch is"
    sizes.clear()
    small = second_stage(config, tmp_path / "small", "training.micro_batch_size=2")
    assert set(sizes) == {2}
    for (step, loss), (other_step, other) in zip(
        whole.training["held_losses"], small.training["held_losses"], strict=True
    ):  # fmt: skip
        assert step == other_step and loss == pytest.approx(other, rel=1e-5)
    assert whole.training["held_seconds"] > 0
    assert (pass_rows(None), pass_rows(64), pass_rows(3)) == (16, 16, 3), "whatever the world size"


@pytest.mark.parametrize("start", ["never", "probe"])
def test_running_out_of_memory_at_a_look_or_a_probe_says_what_to_set(
    start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*args: Any) -> Any:
        raise torch.OutOfMemoryError("tried to allocate 9 GiB")

    monkeypatch.setattr(recipe_start if start == "probe" else held_loss, "deal", too_large)
    config = write_config(tmp_path, rows=24, tasks=("colours", "shapes"), training=TRAINING | {"epochs": 2})
    keep = "best" if start == "never" else "last"
    with pytest.raises(DeviceMemoryError, match=r"out of GPU memory .*; lower training\.micro_batch_size"):
        second_stage(config, tmp_path, f"recipe.start={start}", f"training.keep={keep}")


# -- starts that diverge ----------------------------------------------------------------------------------------------


def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Old rows to start at become infinite."""
    candidate = RecipeStart._candidate

    def infinite(self: RecipeStart, place: int) -> Candidate:
        found = candidate(self, place)
        return Candidate(found.name, {name: torch.full_like(one, math.inf) for name, one in found.state.items()})

    monkeypatch.setattr(RecipeStart, "_candidate", infinite)


def test_a_start_that_diverges_has_lost_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_config(tmp_path, rows=24, tasks=("colours", "shapes"), training=TRAINING)
    calm = second_stage(config, tmp_path / "calm", "recipe.start=never")
    broken(monkeypatch)
    events: list[dict[str, Any]] = []
    raced = second_stage(config, tmp_path / "raced", "recipe.start=race", events=events)
    race = raced.training["race"]
    assert race["losses"]["colours"] is None and race["losses"]["none"] > 0 and race["losers_seconds"] > 0
    assert raced.training["recipe_from"] is None
    assert raced.training["losses"] == calm.training["losses"] and raced.adapter.digest() == calm.adapter.digest()
    steps = [event["step"] for event in events if event["kind"] == "racing"]
    assert steps == list(range(1, 13)), "of the start that did not diverge; a progress bar moves"


def test_a_race_in_which_all_starts_diverge_ends_as_the_stage_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_config(tmp_path, rows=24, tasks=("colours", "shapes"), training=TRAINING)
    warm = Learner.warm

    def diverges(self: Learner, progress: StageProgress, steps: int) -> StageProgress:
        warm(self, progress, 1)
        raise NonFiniteLossError("step 2: the loss is not finite", 2)

    monkeypatch.setattr(Learner, "warm", diverges)
    with pytest.raises(NonFiniteLossError, match="step 2"):
        second_stage(config, tmp_path, "recipe.start=race")


def on_two_ranks(config: Path, folder: Path, zero: int) -> tuple[str, str, Any]:
    given = [f"deepspeed.zero_stage={zero}", "training.micro_batch_size=2"]

    def digest(name: str, start: str) -> Result:
        return second_stage(config, folder / name, f"recipe.start={start}", *given, distributed=True)

    calm = digest("calm", "never")
    with pytest.MonkeyPatch.context() as patch:
        broken(patch)
        raced = digest("raced", "race")
    dist.barrier()
    return calm.adapter.digest(), raced.adapter.digest(), raced.training["race"]["losses"]["colours"]


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.parametrize("zero", [0, 2, 3])
def test_a_start_that_diverges_leaves_nothing_behind_in_zero(zero: int, tmp_path: Path) -> None:
    config = write_config(tmp_path, rows=24, tasks=("colours", "shapes"), training=TRAINING)
    for calm, raced, lost in on_ranks(2, on_two_ranks, config, tmp_path, zero):
        assert raced == calm and lost is None


# -- rates ------------------------------------------------------------------------------------------------------------


def racing(tmp_path: Path, **changes: Any) -> StageWork:
    works: list[StageWork] = []
    config = load_config(write_config(tmp_path, rows=24, tasks=("colours",), training=TRAINING))

    def keep(work: StageWork) -> None:
        works.append(work)
        run_stage(work, distributed=False, report=lambda event: None, device=torch.device("cpu"))

    stages(config, tmp_path / "any", keep, score=False)
    race = RateRace({"0.001": "a" * 64, "0.01": "b" * 64, "1e+30": "c" * 64}, steps=8)
    folder = tmp_path / "root" / "races" / "f"
    folder.mkdir(parents=True)
    return replace(works[0], folder=str(folder), root=str(tmp_path / "root"), race=race, **changes)


def test_a_rate_that_diverges_has_lost_and_its_engine_is_let_go_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[PlainEngine] = []
    destroyed: list[PlainEngine] = []
    init = PlainEngine.__init__

    def noted(self: PlainEngine, *args: Any, **more: Any) -> None:
        made.append(self)
        init(self, *args, **more)

    monkeypatch.setattr(PlainEngine, "__init__", noted)
    monkeypatch.setattr(PlainEngine, "destroy", lambda self: destroyed.append(self))
    work = racing(tmp_path)
    made.clear()
    destroyed.clear()
    run_stage(work, distributed=False, report=lambda event: None, device=torch.device("cpu"))
    found = work.race_file.read_text()
    assert '"1e+30": null' in found and "NaN" not in found and '"seconds"' in found
    assert len(made) == 3 and destroyed == made
    assert work.progress()[0] >= 16, "how far the race has come, so that workers may be lost at several places in it"


def race_on_two_ranks(work: StageWork) -> tuple[dict[str, Any], int, str]:
    from deepspeed.runtime.zero import parameter_offload

    cache = WorkerCache()
    device = torch.device("cpu")
    run_stage(work, distributed=True, report=lambda event: None, device=device, cache=cache)
    dist.barrier()
    found = json.loads(work.race_file.read_text())
    left = len(parameter_offload.FWD_MODULE_STACK)
    assert work.race is not None
    one = at_rate(work, work.race, 1e-3)  # as the driver hands the winner's steps on
    stage = replace(one, stop_in=None)
    resumed: list[int] = []

    def report(event: dict[str, Any]) -> None:
        if event["kind"] == "resumed":
            resumed.append(event["step"])

    run_stage(stage, distributed=True, report=report, device=device, cache=cache)
    assert resumed == ([8] if dist.get_rank() == 0 else [])
    return found, left, read_result(stage.trained).adapter.digest()


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.parametrize("zero", [2, 3])
def test_a_race_of_rates_on_two_ranks_is_that_of_one_process_and_nothing_of_what_diverged_is_left(
    zero: int, tmp_path: Path
) -> None:
    (tmp_path / "one").mkdir()
    alone = racing(tmp_path / "one")
    run_stage(alone, distributed=False, report=lambda event: None, device=torch.device("cpu"))
    expected = json.loads(alone.race_file.read_text())
    (tmp_path / "two").mkdir()
    work = racing(tmp_path / "two", deepspeed={"zero_stage": zero})
    (found, left, digest), (other, also_left, same) = on_ranks(2, race_on_two_ranks, work)
    assert found == other and digest == same and left == also_left == 0
    assert found["losses"]["1e+30"] is None and found["steps"] == 8 and all(one > 0 for one in found["seconds"].values())
    for rate in ("0.001", "0.01"):
        assert found["losses"][rate] == pytest.approx(expected["losses"][rate], rel=1e-4)


@pytest.mark.parametrize("published", [(), ("0.001",)])
def test_where_nodes_share_no_folder_the_winners_checkpoint_travels_and_no_candidate_stays(
    published: tuple[str, ...], tmp_path: Path
) -> None:
    work = racing(tmp_path, url=f"file://{tmp_path}/bucket", apart=True)
    assert work.race is not None
    race = replace(work.race, published=published)

    def begin(one: StageWork, steps: int) -> Raced:
        progress = StageProgress(fingerprint=one.fingerprint, step=steps, losses=[1.0] * steps)
        save_checkpoint(one.path / "checkpoints", {"master.x": torch.ones(2)}, progress)
        return Raced({"a": 0.5, "b": 0.499, "c": None}[one.fingerprint[0]], 2.0)

    run_rate_race(work, race, begin, writes=True)
    kept = [] if published else ["step-00000008"]
    begun = Path("stages") / ("a" * 64) / "checkpoints"
    for root in (tmp_path / "root", tmp_path / "bucket"):
        assert sorted(one.name for one in (root / begun).glob("*")) == kept, root
    assert [one.name for one in work.path.iterdir()] == ["race.json"]
    assert (tmp_path / "bucket" / "races" / "f" / "race.json").is_file()
