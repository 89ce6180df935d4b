"""The benchmark compares like with like: what must compute the same does, and every phase of everyone runs."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch


@pytest.fixture
def contenders(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    monkeypatch.delitem(sys.modules, "mixture_contenders", raising=False)
    return importlib.import_module("mixture_contenders")


@pytest.fixture
def field(contenders: ModuleType, tmp_path: Path) -> Any:
    case = contenders.llama_8b(2, 6, width=256)
    return contenders.Field(case, torch.float32, contenders.Weights(case, torch.float32), 3, tmp_path)


def test_the_mixture_and_the_loop_compute_the_same(contenders: ModuleType, field: Any) -> None:
    ids = contenders.batch_of(field.case)
    logits = {}
    for name, extra in (("amlora", {"task_gate": field.gate}), ("loop", {})):
        model = field.serving(name)
        with torch.no_grad():
            logits[name] = model(input_ids=ids, **extra).logits
    torch.testing.assert_close(logits["amlora"], logits["loop"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["peft_lora", "amlora", "amlora_routed", "loop", "peft_xlora", "peft_arrow"])
def test_every_phase_of_every_contender_runs(field: Any, name: str) -> None:
    contender = field.contender(name)
    assert {"forward", "decode"} <= set(contender.steps)
    assert all(step() > 0 for step in contender.steps.values())


def test_contenders_share_the_weights_of_the_base_model(field: Any) -> None:
    first, second = field.weights.model(), field.weights.model()
    assert first is not second
    assert all(a is b for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_bytes_per_adapter_are_those_of_its_matrices(contenders: ModuleType, field: Any) -> None:
    expected = sum(t.numel() * 4 for adapter in field.adapters[:1] for t in adapter.tensors().values())
    assert contenders.bytes_per_adapter(field.case, torch.float32) == expected
