"""rsLoRA, dropout, LoRA+, weight decay and label smoothing: each does what it says, and a run goes on with all of them."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from amlora_dist.adapters.adapter import Adapter
from amlora_dist.config.former_values import FORMER
from amlora_dist.config.loading import load_config
from amlora_dist.methods import METHODS, method_for
from amlora_dist.methods.base import Method
from amlora_dist.methods.kinds import Trains
from amlora_dist.registry.adapter_folder import peft_config
from amlora_dist.tasks.batches import IGNORED, Example
from amlora_dist.training.batching import LossComputer
from amlora_dist.training.failures import StoppedError
from amlora_dist.training.loop import STOP_FILE
from amlora_dist.training.optimizer import ProximalAdamW, parameter_groups, set_rates
from amlora_dist.training.result import Result, read_result
from amlora_dist.training.settings import StageSettings, TrainingSettings
from amlora_dist.training.stage import run_stage
from amlora_dist.training.stage_spec import StageWork
from tests.methods.stages import stages
from tests.registry.tiny_banks import tiny_bank
from tests.tiny_config import write_config
from tests.training.ranks import on_ranks
from tests.training.test_elasticity import half, on_two_ranks, rest

KNOBS = {
    "adapters.use_rslora": "true", "adapters.dropout": "0.3", "training.lora_plus": "8",
    "training.label_smoothing": "0.2", "training.weight_decay": "0.5",
}  # fmt: skip
"""A value of each that differs from the default."""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    training = {"epochs": 2, "batch_size": 6, "learning_rate": 1e-2, "warmup_steps": 2, "checkpoint_every": 3}
    return write_config(tmp_path_factory.mktemp("knobs"), tasks=("colours", "shapes"), training=training)


def only_stage(config: Path, folder: Path, *overrides: str) -> tuple[str, Adapter, list[float]]:
    """Fingerprint, adapter and losses of the first stage."""
    one = f"tasks=[{config.parent / 'tasks' / 'colours.yaml'}]"
    first = stages(load_config(config, [one, *overrides]), folder, score=False)[0]
    return first.work.fingerprint, first.result.adapter, first.result.training["losses"]


@pytest.mark.parametrize("name", METHODS)
def test_a_knob_is_in_the_fingerprint_only_where_it_is_not_at_its_former_value(name: str, config: Path) -> None:
    def made(*overrides: str) -> Method:
        c = load_config(config, [f"method={name}", *overrides])
        return method_for(
            StageSettings(
                method=name, seed=0, dtype="fp32", attention="eager", adapters=c.adapters, router=c.router,
                training=c.training, method_settings=c.method_settings,
            )
        )  # fmt: skip

    def reads(*overrides: str) -> dict[str, Any]:
        return made(*overrides).reads(2)

    plain, learns = reads(), made().trains is Trains.ADAPTER
    assert not {"use_rslora", "dropout", "lora_plus", "label_smoothing"} & (
        plain.get("adapters", {}).keys() | plain.get("training", {}).keys()
    )
    for key, value in KNOBS.items():
        adapts = not (name == "l2p" and key.startswith("adapters."))
        assert (reads(f"{key}={value}") != plain) == (learns and adapts), key
    assert KNOBS.keys() - FORMER.keys() == {"training.weight_decay"}, "which 0.1 had"


def test_every_knob_changes_the_adapter(config: Path, tmp_path: Path) -> None:
    fingerprint, plain, losses = only_stage(config, tmp_path / "plain")
    for key, value in KNOBS.items():
        other, adapter, _ = only_stage(config, tmp_path / key, f"{key}={value}")
        assert other != fingerprint and adapter.digest() != plain.digest(), key
    former = [f"{key}={json.dumps(FORMER[key])}" for key in KNOBS if key in FORMER]
    again, same, once_more = only_stage(config, tmp_path / "again", *former)
    assert (again, same.digest(), once_more) == (fingerprint, plain.digest(), losses), "the former values change nothing"


def test_rslora_scales_by_the_root_of_the_rank_and_peft_reads_the_same_scale(config: Path, tmp_path: Path) -> None:
    _, adapter, _ = only_stage(config, tmp_path, "adapters.use_rslora=true", "adapters.rank=9", "adapters.alpha=6")
    assert adapter.scale == pytest.approx(6 / math.sqrt(9))
    manifest = tiny_bank(tmp_path / "bank", [adapter.task], adapters=[adapter])
    written = peft_config(manifest, manifest.adapters[0])
    assert written["use_rslora"] is False and written["lora_alpha"] / written["r"] == pytest.approx(2.0)


def test_lora_plus_teaches_b_faster_and_leaves_the_groups_alone_at_one() -> None:
    trainable = {name: nn.Parameter(torch.ones(2)) for name in ("a.m", "b.m", "recipe.m")}
    plain = parameter_groups(trainable, TrainingSettings(learning_rate=1e-3))
    assert [(len(g["params"]), g["base_lr"]) for g in plain] == [(2, 1e-3), (1, 3e-2)]
    plus = parameter_groups(trainable, TrainingSettings(learning_rate=1e-3, lora_plus=16, weight_decay=0.1))
    assert [g["base_lr"] for g in plus] == [1e-3, 16e-3, 3e-2]
    assert plus[1]["params"] == [trainable["b.m"]]
    assert [g["weight_decay"] for g in plus] == [0.1, 0.1, 0.0], "a recipe does not decay, it has its L1"


def test_a_refit_moves_the_weights_that_the_penalty_left_and_keeps_its_zeros() -> None:
    """Least squares of three weights of which two matter: the penalty shrinks them, the refit does not."""
    wanted = torch.tensor([1.0, -0.5, 0.02])

    def learned(refit_from: int) -> torch.Tensor:
        weights = nn.Parameter(torch.zeros(3))
        settings = TrainingSettings(learning_rate=1e-3, l1=0.3, recipe_learning_rate=0.03)
        optimizer = ProximalAdamW(parameter_groups({"a.m": nn.Parameter(torch.ones(1)), "recipe.m": weights}, settings))
        for step in range(600):
            set_rates(optimizer, 1.0, refit=step >= refit_from)
            optimizer.zero_grad()
            (0.5 * (weights - wanted).square().sum()).backward()
            optimizer.step()
        return weights.detach()

    shrunk, refitted = learned(600), learned(300)
    assert float(shrunk[2]) == float(refitted[2]) == 0.0, "what was left out stays out"
    assert float(shrunk[0]) < 0.9, "the penalty pulls"
    torch.testing.assert_close(refitted[:2], wanted[:2], atol=0.02, rtol=0)


def test_in_its_last_steps_a_stage_refits_what_the_penalty_left_and_a_stop_changes_nothing(
    config: Path, tmp_path: Path
) -> None:
    training = {"epochs": 4, "checkpoint_every": 8, "l1": 2.0, "recipe_learning_rate": 0.05}
    given = ["recipe.start=always", *(f"training.{key}={value}" for key, value in training.items())]

    def second(folder: Path, *overrides: str, stop_at: int | None = None) -> Result:
        def run(work: StageWork) -> None:
            def report(event: dict[str, Any]) -> None:
                if work.index == 2 and event["kind"] == "step" and event["step"] == stop_at:
                    (work.path / STOP_FILE).touch()

            work.path.mkdir(parents=True, exist_ok=True)
            run_stage(work, distributed=False, report=report, device=torch.device("cpu"))

        done = stages(load_config(config, [*given, *overrides]), folder, run, score=False)
        return read_result(done[-1].work.trained)

    plain, refit = second(tmp_path / "plain"), second(tmp_path / "refit", "recipe.refit=0.5")
    assert len(plain.training["losses"]) == 16 and plain.adapter.digest() != refit.adapter.digest()
    assert plain.training["losses"][:9] == refit.training["losses"][:9], "of the first half, and the next step's"
    assert plain.training["losses"][9:] != refit.training["losses"][9:]
    half_way = load_file(tmp_path / "refit" / "stages" / "shapes" / "checkpoints" / "step-00000008" / "state.safetensors")
    zeros = {name: half_way[f"master.recipe.{name}"] == 0 for name in refit.adapter.recipe}
    assert any(bool(one.any()) for one in zeros.values()) and not all(bool(one.all()) for one in zeros.values())
    for name, weights in refit.adapter.recipe.items():
        assert bool((weights[zeros[name]] == 0).all()), "what the penalty has left out stays out"
        assert bool((weights[~zeros[name]] != 0).all()), "and the penalty takes nothing more"
    for at in (5, 11):
        folder = tmp_path / f"stopped-{at}"
        with pytest.raises(StoppedError):
            second(folder, "recipe.refit=0.5", stop_at=at)
        (folder / "stages" / "shapes" / STOP_FILE).unlink()
        again = second(folder, "recipe.refit=0.5")
        assert again.adapter.digest() == refit.adapter.digest() and again.training["losses"] == refit.training["losses"]


def test_labels_are_smoothed_and_free_text_is_not() -> None:
    logits = torch.randn(2, 3, 11)
    labels = torch.tensor([[IGNORED, 4, 1], [7, 2, 1]])
    rows = [Example(0, (3,), (4, 1), 0, "x"), Example(1, (3,), (7, 2, 1), None, "a text")]
    plain = [float(F.cross_entropy(logits[n], labels[n], ignore_index=IGNORED, reduction="sum")) for n in (0, 1)]
    smooth = float(F.cross_entropy(logits[0, 1:], labels[0, 1:], reduction="sum", label_smoothing=0.2))
    assert float(LossComputer.cross_entropy(logits, labels)) == pytest.approx(sum(plain), rel=1e-6)
    assert float(LossComputer.cross_entropy(logits, labels, rows, 0.2)) == pytest.approx(smooth + plain[1], rel=1e-6)


@pytest.mark.integration
def test_a_stage_with_all_of_them_is_equal_after_a_stop_and_equivalent_on_other_workers(tmp_path: Path) -> None:
    training = {
        "epochs": 3, "batch_size": 6, "learning_rate": 1e-2, "warmup_steps": 2, "checkpoint_every": 3, "probe_rows": 8,
        "lora_plus": 4, "weight_decay": 0.1, "label_smoothing": 0.1,
    }  # fmt: skip
    adapters = {"rank": 4, "alpha": 8, "targets": "all-linear", "use_rslora": True, "dropout": 0.2}
    config = write_config(tmp_path, tasks=("colours", "shapes"), training=training, adapters=adapters)
    undisturbed = rest(config, tmp_path / "whole", None)
    half(config, tmp_path / "one-then-two", None)
    shutil.copytree(tmp_path / "one-then-two", tmp_path / "one-then-one")
    one_then_two = on_ranks(2, on_two_ranks, config, tmp_path)
    assert rest(config, tmp_path / "one-then-one", None) == undisturbed, "equal, bit for bit"
    for found in (one_then_two[0], rest(config, tmp_path / "two-then-one", None)):
        assert max(abs(x - y) for x, y in zip(found, undisturbed, strict=True)) <= 1e-4
