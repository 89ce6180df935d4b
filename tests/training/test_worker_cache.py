"""Stages in a process that stays: equal to stages in fresh ones, the base is read once, and nothing is left behind."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from amlora_dist.config.loading import RunConfig, load_config
from amlora_dist.digests import tensors_digest
from amlora_dist.errors import TrainingError
from amlora_dist.methods import METHODS, excluded
from amlora_dist.training.module_state import ModuleState
from amlora_dist.training.stage import run_stage
from amlora_dist.training.stage_spec import StageWork, _parsed
from amlora_dist.training.worker_cache import WorkerCache
from tests.methods.stages import Stage, stages
from tests.tiny_config import write_config
from tests.training.ranks import on_ranks

TASKS = ("colours", "shapes", "sizes")
QUICK = ["training.epochs=1", "training.batch_size=12"]


def runner(cache: WorkerCache | None, *, distributed: bool, then: Callable[[], None]) -> Callable[[StageWork], None]:
    def run(work: StageWork) -> None:
        device = torch.device("cpu")
        run_stage(work, distributed=distributed, report=lambda event: None, device=device, cache=cache)
        then()

    return run


def learned(done: list[Stage]) -> list[Any]:
    """All that must be equal: adapters, what continuation needs, losses, and every row's answer."""
    return [
        (
            stage.result.adapter.digest(),
            tensors_digest(stage.result.continuation()),
            stage.result.training["losses"],
            {task: [(p.answer, p.loglikelihoods) for p in found] for task, found in stage.predictions.items()},
        )
        for stage in done
    ]


def census() -> dict[str, int]:
    """What is alive in this process."""
    gc.collect()
    alive = gc.get_objects()
    kinds = Counter(map(type, alive))  # asking each object takes a second
    modules = {kind for kind in kinds if issubclass(kind, nn.Module)}
    found = [one for one in alive if type(one) in modules]
    return {
        "engines": sum(count for kind, count in kinds.items() if kind.__name__ in ("DeepSpeedEngine", "PlainEngine")),
        "optimizers": sum(count for kind, count in kinds.items() if issubclass(kind, torch.optim.Optimizer)),
        "parameters": kinds[nn.Parameter],
        "modules": len(found),
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in found),
    }


def both_ways(file: str, folder: str, overrides: list[str], distributed: bool) -> dict[str, Any]:
    """The stages of a sequence in a process that forgets, and in one that keeps."""
    config, cache = load_config(file, overrides), WorkerCache()
    counts: list[dict[str, int]] = []
    fresh = stages(config, Path(folder) / "fresh", runner(None, distributed=distributed, then=lambda: None))
    stay = runner(cache, distributed=distributed, then=lambda: counts.append(census()))
    stayed = stages(config, Path(folder) / "stayed", stay)
    again = WorkerCache()
    scored = [_scored_again(stayed, config, folder, distributed, keep) for keep in (None, again)]
    return {
        "fresh": learned(fresh), "stayed": learned(stayed), "scored": scored, "counts": counts,
        "loads": [cache.loads, again.loads],
    }  # fmt: skip


def _scored_again(
    done: list[Stage], config: RunConfig, folder: str, distributed: bool, cache: WorkerCache | None
) -> list[Any]:
    """Of stages that are trained already: then the model is only scored."""
    for cell in (cell for stage in done for cell in stage.work.cells):
        (Path(cell.folder) / "summary.json").unlink(missing_ok=True)
    if distributed:
        torch.distributed.barrier()
    return learned(stages(config, Path(folder) / "stayed", runner(cache, distributed=distributed, then=lambda: None)))


def assert_equal_and_nothing_stays(found: dict[str, Any]) -> None:
    assert found["stayed"] == found["fresh"], "bit for bit"
    assert found["scored"][0] == found["scored"][1]
    assert found["loads"] == [1, 1]
    assert found["counts"][0]["engines"] == 0
    assert found["counts"][1:] == found["counts"][:-1], "no engine, parameter or hook stays"


OTHER_METHODS = sorted(set(METHODS) - {"am_lora", "seq_lora", "per_task", "l2p", "base"})
"""Tested when there is time; the base model alone is trained on nothing."""


def of_method(name: str) -> list[str]:
    """Overrides."""
    knobs = {"l2p": ["method_settings.prompt_pool=6", "method_settings.prompt_tokens=3"]}
    return [f"method={name}", *knobs.get(name, [])]


@pytest.mark.parametrize(
    "method",
    ["am_lora", "seq_lora", "per_task", "l2p", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHER_METHODS)],
)
def test_stages_in_one_process_equal_stages_that_load_the_base_each_time(method: str, tmp_path: Path) -> None:
    file = write_config(tmp_path, tasks=TASKS)
    found = both_ways(str(file), str(tmp_path), [*QUICK, *of_method(method)], distributed=False)
    assert_equal_and_nothing_stays(found)


def on_two_ranks(file: str, folder: str, settings: list[list[str]]) -> list[dict[str, Any]]:
    return [both_ways(file, f"{folder}/{number}", [*QUICK, *more], True) for number, more in enumerate(settings)]


def zero(stage: int, *more: str) -> list[str]:
    """Overrides: ``more`` are keys of DeepSpeed's own section."""
    section = "deepspeed.zero_optimization"
    return [f"{section}.stage={stage}", *(f"{section}.{key}" for key in more)]


OTHERS = [
    zero(0), zero(1), zero(3), zero(3, "stage3_param_persistence_threshold=0"), [*zero(2), "dtype=bf16"],
    [*zero(3), "dtype=bf16"],
]  # fmt: skip
"""With the threshold no parameter stays whole between passes, as in a large model."""


@pytest.mark.integration
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "settings", [pytest.param([zero(2)], id="zero2"), pytest.param(OTHERS, marks=pytest.mark.crash, id="others")]
)
def test_stages_on_ranks_that_stay_equal_stages_that_load_the_base_each_time(
    settings: list[list[str]], tmp_path: Path
) -> None:
    file = write_config(tmp_path, tasks=TASKS)
    for rank in on_ranks(2, on_two_ranks, str(file), str(tmp_path), settings):
        for found in rank:
            assert_equal_and_nothing_stays(found)


@pytest.mark.crash
@pytest.mark.integration
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("method", sorted(set(METHODS) - {"base"}))
def test_every_method_on_ranks_that_stay_equals_itself_in_fresh_ones_under_every_zero_stage(
    method: str, tmp_path: Path
) -> None:
    file = write_config(tmp_path, tasks=TASKS[:2])
    possible = [stage for stage in range(4) if stage < 3 or "zero_3" not in excluded(method)]
    settings = [[*zero(stage), *of_method(method)] for stage in possible]
    for rank in on_ranks(2, on_two_ranks, str(file), str(tmp_path), settings):
        for found in rank:
            assert_equal_and_nothing_stays(found)


def counted(monkeypatch: pytest.MonkeyPatch, calls: Counter[str], target: str) -> None:
    """Count the calls of a function where it is used."""
    module, _, name = target.rpartition(".")
    inner = getattr(sys.modules[module], name)

    def outer(*given: Any, **named: Any) -> Any:
        calls[name] += 1
        return inner(*given, **named)

    monkeypatch.setattr(target, outer)


def test_a_second_trial_reads_parses_and_tokenises_nothing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another rank and another L1 have the same rows, texts and base: what a search's process runs one after another."""
    calls: Counter[str] = Counter()
    for used in (
        "stage_statistics.read_texts", "stage_rows.encode", "stage_spec.load_task", "stage_spec.read_mapping",
        "worker_cache.load_model", "worker_cache.load_tokenizer",
    ):  # fmt: skip
        counted(monkeypatch, calls, f"amlora_dist.training.{used}")
    _parsed.cache_clear()
    file, cache = write_config(tmp_path, tasks=TASKS), WorkerCache()

    def trial(name: str, rank: int, kept: WorkerCache | None) -> tuple[list[Any], dict[str, int]]:
        calls.clear()
        config = load_config(file, [*QUICK, f"adapters.rank={rank}", f"training.l1={rank / 10}"])
        done = stages(config, tmp_path / name, runner(kept, distributed=False, then=lambda: None))
        return learned(done), dict(calls)

    first, of_first = trial("first", 2, cache)
    again, of_second = trial("second", 3, cache)
    assert of_first["load_model"] == of_first["load_tokenizer"] == 1
    assert of_first["load_task"] == 2 * len(TASKS), "rows of each task: those of training and of scoring"
    assert of_first["encode"] <= 2 * len(TASKS)
    assert of_first["read_mapping"] == len(TASKS)
    assert of_first["read_texts"] >= 2 * len(TASKS), "rows that count, and rows that are held out"
    assert of_second == {}
    assert again == trial("fresh", 3, None)[0], "bit for bit"
    assert again != first


def test_features_are_computed_once_and_the_oldest_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("amlora_dist.training.worker_cache.MOST_FEATURES", 20)
    cache, made = WorkerCache(), []

    def features(key: str) -> torch.Tensor:
        def make() -> torch.Tensor:
            made.append(key)
            return torch.full((1, 2), float(ord(key)))

        return cache.features(key, 4, make)  # of which this rank reads one

    for key in ("a", "b", "a", "c", "a", "b"):
        assert float(features(key)[0, 0]) == ord(key)
    assert made == ["a", "b", "c", "b"], "b had to go for c, a was used since"


def test_a_stage_that_fails_leaves_no_model_and_the_next_one_loads_it(tmp_path: Path) -> None:
    file, cache = write_config(tmp_path, tasks=("colours",)), WorkerCache()

    def fail(event: dict[str, Any]) -> None:
        if event["kind"] == "step":
            raise KeyboardInterrupt

    def run(work: StageWork) -> None:
        device = torch.device("cpu")
        with pytest.raises(KeyboardInterrupt):
            run_stage(work, distributed=False, report=fail, device=device, cache=cache)
        run_stage(work, distributed=False, report=lambda event: None, device=device, cache=cache)

    done = stages(load_config(file, QUICK), tmp_path / "failed", run)
    plain = stages(load_config(file, QUICK), tmp_path / "plain")
    assert learned(done) == learned(plain)
    assert cache.loads == 2


def test_a_model_is_put_back_as_it_was_and_a_changed_base_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).requires_grad_(False).eval()
    state = ModuleState(model)
    model.train()
    model[0].register_forward_hook(lambda *args: None)
    model[1].running_mean.fill_(7)
    model[0].left_behind = object()
    inner, model[0] = model[0], nn.Identity()
    state.restore()
    assert model[0] is inner and not model.training and not inner._forward_hooks
    assert float(model[1].running_mean.sum()) == 0 and not hasattr(inner, "left_behind")
    inner.weight.requires_grad_(True)
    with pytest.raises(TrainingError, match="would train"):
        state.restore()


def test_rows_are_made_once_and_the_oldest_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("amlora_dist.training.worker_cache.MOST_TOKENS", 5)
    cache, made = WorkerCache(), []

    def rows(key: str | None) -> list[str]:
        def make() -> list[str]:
            made.append(key)
            return [str(key)] * 2

        return cache.rows(key, make, len)

    for key in ("a", "b", "a", "c", "a", "b", None, None):
        rows(key)
    assert made == ["a", "b", "c", "b", None, None], "b had to go for c, a was used since"
