"""Every fault in one round: what is wrong with one value hides nothing of what is wrong between the others."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from amlora_dist.config.checks import model_faults
from amlora_dist.config.loading import load_config, validate_config
from amlora_dist.errors import FaultsError

BASE = {
    "name": "name: demo",
    "model": "model: {source: some/model}",
    "tasks": "tasks: [helpdesk/email_route, helpdesk/chat_mood]",
}
FAULTS: dict[str, tuple[str, ...]] = {
    "sed": ("sed: 1",),
    "seed": ("seed: one",),
    "training.l1": ("training: {l1: many}",),
    "training.batch_size": ("training: {batch_size: 7}",),
    "training.cache_trunk": ("training: {cache_trunk: true}", "adapters: {layers: all}"),
    "name": ("name: '!!'",),
    "tasks[0]": ("tasks: [dbpedai]",),
    "tasks[1]": ("tasks: [helpdesk/email_route, 3]",),
    "tasks": ("tasks: []",),
    "evaluation.also[0]": ("evaluation: {also: [nowhere]}",),
    "method": ("method: am_lore",),
    "deepspeed.zero_stage": ("deepspeed: {zero_stage: 3}", "method: o_lora"),
    "deepspeed.train_batch_size": ("deepspeed: {train_batch_size: 9}",),
    "deepspeed.optimiser": ("deepspeed: {optimiser: {}}",),
    "deepspeed": ("deepspeed: 3",),
    "min_workers": ("min_workers: 9",),
    "router.kind": ("router: {kind: posteriour}",),
    "model.source": ("model: {source: ./nowhere}",),
    "storage": ("storage: 's4://bucket'",),
    "search.space.training.l3": ("search: {space: {training.l3: [1, 2]}}",),
    "search.space": ("search: {}",),
    "task_defaults.max_length": ("task_defaults: {max_length: 2}",),
}
"""Where a fault is reported, and the lines that make it."""
PAIRS = [
    (one, other)
    for one, other in itertools.combinations(FAULTS, 2)
    if not {line.partition(":")[0] for line in FAULTS[one]} & {line.partition(":")[0] for line in FAULTS[other]}
]
UNCOMPARED = ("training.batch_size", "deepspeed.train_batch_size")
"""A size that is wrong itself is not compared with what follows from it."""


def found(folder: Path, *lines: str) -> set[str]:
    text = BASE | {line.partition(":")[0]: line for line in lines}
    (folder / "run.yaml").write_text("\n".join(text.values()) + "\n", encoding="utf-8")
    with pytest.raises(FaultsError) as caught:
        validate_config(folder / "run.yaml")
    return {fault.where for fault in caught.value.faults}


@pytest.mark.parametrize("where", FAULTS)
def test_each_fault_is_found_alone(where: str, tmp_path: Path) -> None:
    assert found(tmp_path, *FAULTS[where]) == {where}


def test_every_two_faults_are_found_in_one_round(tmp_path: Path) -> None:
    for one, other in PAIRS:
        if (one, other) != UNCOMPARED:
            assert found(tmp_path, *FAULTS[one], *FAULTS[other]) == {one, other}


def test_validate_finds_every_fault_at_once(tmp_path: Path) -> None:
    chosen = (
        "sed", "seed", "training.l1", "name", "evaluation.also[0]", "deepspeed.zero_stage", "min_workers", "router.kind",
        "model.source", "storage", "search.space.training.l3", "task_defaults.max_length",
    )  # fmt: skip
    lines = [line for where in chosen for line in FAULTS[where]]
    tasks = "tasks: [dbpedai, 3, helpdesk/chat_mood, nowhere/task.yaml]"
    lines = [line.replace("zero_stage: 3", "zero_stage: 3, train_batch_size: 9") for line in lines]
    expected = {*chosen, "tasks[0]", "tasks[1]", "tasks[3]", "deepspeed.train_batch_size"}
    assert found(tmp_path, *lines, tasks) == expected


def test_everything_wrong_with_a_model_is_reported_by_validate_without_reading_weights(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").touch()
    (model / "adapter_config.json").write_text("{}")
    (model / "tokenizer.json").write_text('{"model": {"type": "Next"}}')
    config = {"auto_map": {"AutoConfig": "own.Own"}, "quantization_config": {"quant_method": "gptq"}, "vocab_size": 9}
    (model / "config.json").write_text(json.dumps(config))
    text = BASE | {"model": f"model: {{source: '{model}'}}", "seed": "seed: one"}
    (tmp_path / "run.yaml").write_text("\n".join(text.values()), encoding="utf-8")
    with pytest.raises(FaultsError, match="6 faults") as caught:
        validate_config(tmp_path / "run.yaml")
    for part in ("seed", "auto_map", "gptq", "no safetensors file", "an adapter inside", "tokenizer.json"):
        assert part in str(caught.value)


def test_tokenizer_larger_than_the_model_is_reported_by_validate(tmp_path: Path) -> None:
    from tests.tiny_config import write_config

    file = write_config(tmp_path, tasks=("colours",))
    validate_config(file)
    config = tmp_path / "model-llama" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 12}))
    with pytest.raises(FaultsError, match="is number 12, expected numbers below 12, the rows of the model's embedding"):
        validate_config(file)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: b"", "0 bytes that are no safetensors file"),
        (lambda data: b"\x80\x04" * 100, "200 bytes that are no safetensors file"),
        (lambda data: data[:-100], "bytes, expected the .* bytes that its header names"),
        (lambda data: data + b"\0", "bytes, expected the .* bytes that its header names"),
    ],
)
def test_weights_that_a_download_cut_short_are_reported_by_validate(
    tmp_path: Path, spoil: Callable[[bytes], bytes], message: str
) -> None:
    from tests.tiny_config import write_config

    config = load_config(write_config(tmp_path))
    assert not model_faults(config.model)
    file = Path(config.model.source) / "model.safetensors"
    file.write_bytes(spoil(file.read_bytes()))
    (fault,) = model_faults(config.model).values()
    assert re.search(rf"model\.safetensors: .*{message}.*fetch the model again", str(fault)), fault
