"""Whole stages with ``training.packing``: the losses of stages without, on every kind of row, after a stop, on two ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoConfig

from amlora_dist.adapters.packed_rows import PackedRows
from amlora_dist.config.loading import load_config, validate_config
from amlora_dist.errors import FaultsError, UserError
from amlora_dist.methods import METHODS, excluded, method_class, method_for
from amlora_dist.model_folder import unpackable
from amlora_dist.training.settings import StageSettings
from pipelines.runs.inputs import gather_inputs
from tests.methods.stages import Stage, stages
from tests.tiny_chat import write_chat_config
from tests.tiny_config import write_config
from tests.training.ranks import on_ranks
from tests.training.test_elasticity import half, rest, runner

ON = "training.packing=true"
TRAINING = {
    "epochs": 2, "batch_size": 6, "learning_rate": 1e-2, "warmup_steps": 2, "checkpoint_every": 3, "probe_rows": 8,
}  # fmt: skip


def losses(found: list[Stage]) -> list[float]:
    """Of all steps of all stages."""
    return [loss for stage in found for loss in stage.result.training["losses"]]


def apart(one: list[float], other: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(one, other, strict=True))


def noted(made: list[int], inner: Any) -> Any:
    """``inner``, which notes how many rows share the one sequence it is called for."""

    def mask(packed: PackedRows, dtype: Any) -> Any:
        assert packed.row_PS.shape[0] == 1
        made.append(packed.count)
        return inner(packed, dtype)

    return mask


@pytest.mark.parametrize("method", ["am_lora", "seq_lora", "lwf", "gainlora"])
def test_a_stage_of_classic_rows_has_the_losses_of_one_without(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more: dict[str, Any] = {}
    if method == "am_lora":
        more = {"adapters": {"rank": 4, "alpha": 8, "targets": "all-linear", "dropout": 0.1}}
    config = write_config(tmp_path, tasks=("colours", "shapes"), training=TRAINING, method=method, **more)
    made: list[int] = []
    monkeypatch.setattr(PackedRows, "attention_mask", noted(made, PackedRows.attention_mask))
    plain = stages(load_config(config), tmp_path / "plain", score=False)
    assert not made
    packed = stages(load_config(config, [ON]), tmp_path / "packed", score=False)
    assert made.count(6) >= len(losses(packed)), "six rows share a sequence"
    assert apart(losses(packed), losses(plain)) <= 1e-5
    assert [stage.work.task for stage in packed] == [stage.work.task for stage in plain]
    for one, other in zip(packed, plain, strict=True):
        assert one.work.fingerprint != other.work.fingerprint
        for name, tensor in one.result.adapter.tensors().items():
            assert float((tensor - other.result.adapter.tensors()[name]).abs().max()) < 1e-3, name


@pytest.mark.parametrize("method", ["am_lora", "seq_lora"])
def test_a_stage_of_conversations_has_the_losses_of_one_without(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``train_on: all`` in the first task, labels in the chat template in the second; kept at its best, and with the
    frozen layers' states from files."""
    monkeypatch.chdir(tmp_path)  # where a stage without a driver has its caches
    config = write_chat_config(tmp_path, method=method)
    more = ["training.keep=best", "training.cache_trunk=true"] if method == "seq_lora" else []
    plain = stages(load_config(config, more), tmp_path / "plain", score=False)
    packed = stages(load_config(config, [ON, *more]), tmp_path / "packed", score=False)
    assert apart(losses(packed), losses(plain)) <= 1e-5
    assert len(losses(packed)) > 6


def test_a_packed_stage_that_was_stopped_and_resumed_equals_one_that_was_not(tmp_path: Path) -> None:
    config = write_config(tmp_path, tasks=("colours", "shapes"), training=TRAINING | {"epochs": 3, "packing": True})
    undisturbed = rest(config, tmp_path / "whole", None)
    half(config, tmp_path / "stopped", None)
    assert rest(config, tmp_path / "stopped", None) == undisturbed, "equal, bit for bit"


def _packed_on_ranks(config: Path, folder: Path) -> list[float]:
    """A whole run under ZeRO-2, then what one process began."""
    run = runner(distributed=True, stop=False)
    found = losses(stages(load_config(config, [ON, "deepspeed.zero_stage=2"]), folder / "two", run, score=False))
    partitioned = stages(load_config(config, [ON, "deepspeed.zero_stage=3"]), folder / "three", run, score=False)
    return [*found, *losses(partitioned), *rest(config, folder / "one-then-two", 2)]


@pytest.mark.slow
@pytest.mark.integration
def test_two_ranks_have_the_losses_of_one_process_without_packing(tmp_path: Path) -> None:
    config = write_config(tmp_path, tasks=("colours", "shapes"), training=TRAINING | {"epochs": 3})
    plain = losses(stages(load_config(config), tmp_path / "plain", score=False))
    packed = yaml.safe_load(config.read_text(encoding="utf-8"))
    packed["training"]["packing"] = True
    config.write_text(yaml.safe_dump(packed), encoding="utf-8")
    half(config, tmp_path / "one-then-two", None)
    shutil.copytree(tmp_path / "one-then-two", tmp_path / "one-then-one")
    first, second = on_ranks(2, _packed_on_ranks, config, tmp_path)
    assert first == second
    steps = len(plain)
    assert apart(first[:steps], plain) <= 1e-5, "ZeRO-2"
    assert apart(first[steps : 2 * steps], plain) <= 1e-5, "ZeRO-3"
    assert apart(first[2 * steps :], rest(config, tmp_path / "one-then-one", None)) <= 1e-5, "begun in one process"


def test_packing_is_in_the_training_fingerprint_only_where_it_is_on(tmp_path: Path) -> None:
    config = write_config(tmp_path, tasks=("colours",))
    for name in (one for one in METHODS if "packing" not in excluded(one) and one not in ("keys", "base")):
        def reads(*overrides: str, name: str = name) -> dict[str, Any]:
            c = load_config(config, [f"method={name}", *overrides])
            settings = StageSettings(
                method=name, seed=0, dtype="fp32", attention="eager", adapters=c.adapters, router=c.router,
                training=c.training, method_settings=c.method_settings,
            )  # fmt: skip
            return method_for(settings).reads(2)

        assert reads() == reads("training.packing=false") and "packing" not in reads()["training"]
        assert reads(ON)["training"]["packing"] is True


def test_what_puts_something_in_front_of_rows_is_listed_without_importing_the_methods(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path, tasks=("colours",)))
    for name in METHODS:
        settings = StageSettings(
            method=name, seed=0, dtype="fp32", attention="eager", adapters=config.adapters, router=config.router,
            training=config.training,
        )  # fmt: skip
        assert (method_class(name)(settings).layers.prefix.tokens > 0) == ("packing" in excluded(name))


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["method=l2p"], "method: l2p, which puts prompts in front of every row"),
        (["router.kind=literal"], "router.kind: literal, whose selectors read a sequence as one row"),
        (["model.attention=flash_attention_2"], "model.attention: flash_attention_2, which takes no mask of rows"),
    ],
)
def test_what_packing_cannot_be_right_for_is_refused_with_all_other_faults(
    overrides: list[str], reason: str, tmp_path: Path
) -> None:
    config = write_config(tmp_path, tasks=("colours",))
    with pytest.raises(FaultsError) as error:
        validate_config(config, [ON, "training.epochs=0", *overrides])
    assert f"training.packing: found true with {reason}" in str(error.value) and "2 faults" in str(error.value)
    load_config(config, [*overrides, "training.packing=false"])


def test_models_whose_rows_run_into_each_other_are_refused_by_their_configuration(tmp_path: Path) -> None:
    config = write_config(tmp_path, tasks=("colours",))
    file = tmp_path / "model-llama" / "config.json"
    whole = json.loads(file.read_text(encoding="utf-8"))
    cases: dict[str, dict[str, Any]] = {
        "a mistral model with sliding_window 16": {"model_type": "mistral", "sliding_window": 16},
        "a llama model with linear_attention, sliding_attention": {
            "layer_types": ["full_attention", "sliding_attention", "linear_attention"]
        },
        "an encoder-decoder": {"is_encoder_decoder": True},
    }
    for reason, values in cases.items():
        file.write_text(json.dumps(whole | values), encoding="utf-8")
        with pytest.raises(FaultsError, match=f"training.packing: found true with {reason}.*, expected false"):
            validate_config(config, [ON])
        validate_config(config)
    mistral = {**whole, "model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    file.write_text(json.dumps(mistral), encoding="utf-8")
    gather_inputs(load_config(config, [ON]), tmp_path / "home")  # no row is longer than the window
    mistral["max_position_embeddings"] = 8192
    file.write_text(json.dumps(mistral), encoding="utf-8")  # its window is the kind's default, not in the file
    with pytest.raises(UserError, match=r"training\.packing: found true with a mistral model with sliding_window 4096"):
        gather_inputs(load_config(config, [ON]), tmp_path / "home")


@pytest.mark.parametrize(
    ("kind", "values", "refused"),
    [
        ("llama", {}, False), ("qwen2", {"sliding_window": 64}, False), ("qwen3", {}, False), ("gpt2", {}, False),
        ("mixtral", {}, False), ("smollm3", {}, False), ("mistral", {"sliding_window": None}, False),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, True), ("gemma2", {}, True),
        ("mistral", {}, True), ("gemma3_text", {}, True), ("gpt_oss", {}, True), ("mamba", {}, True),
        ("mamba2", {}, True), ("jamba", {}, True), ("qwen3_next", {}, True),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, True), ("recurrent_gemma", {}, True),
        ("bloom", {}, True), ("falcon", {"alibi": True}, True), ("falcon", {}, False), ("t5", {}, True),
        ("llama4_text", {}, True),
    ],
)  # fmt: skip
def test_which_kinds_of_models_are_refused(kind: str, values: dict[str, Any], refused: bool) -> None:
    made = AutoConfig.for_model(kind, num_hidden_layers=2, **values)
    assert (unpackable(made.to_dict()) is not None) == refused
