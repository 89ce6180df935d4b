"""The benchmark compares like with like: what must compute the same does, and every phase of everyone runs."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch


@pytest.fixture
def contenders(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    for name in ("mixture_contenders", "mixture"):
        monkeypatch.delitem(sys.modules, name, raising=False)
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


@pytest.mark.parametrize(
    "name",
    [
        "peft_lora", "peft_lora_fp32", "amlora", "amlora_routed", "amlora_above_router", "loop", "peft_xlora", "peft_arrow"
    ],
)  # fmt: skip
def test_every_phase_of_every_contender_runs(field: Any, name: str) -> None:
    contender = field.contender(name)
    assert {"forward", "decode"} <= set(contender.steps)
    assert all(step() > 0 for _ in range(2) for step in contender.steps.values())


def test_peft_adapts_the_layers_that_the_mixture_adapts(
    contenders: ModuleType, field: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.lora import LoraLayer

    built: list[torch.nn.Module] = []
    monkeypatch.setattr(contenders, "steps_of", lambda model, *_, **__: built.append(model) or {})
    for name in ("peft_lora", "peft_xlora", "peft_arrow"):
        field.contender(name)
    for model in built:
        adapted = {path for path, module in model.named_modules() if isinstance(module, LoraLayer)}
        paths = {path[path.index("model.layers.") :] for path in adapted}
        assert paths == {target.path for target in field.targets}


def test_a_contender_that_fails_leaves_the_others_their_rows(
    contenders: ModuleType, field: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mixture = importlib.import_module("mixture")

    def broken(*_: Any) -> None:
        raise ValueError("no such adapter")

    monkeypatch.setattr(contenders.Field, "peft_arrow", broken)
    measured = mixture.Measured(field.case, torch.float32, 2)
    args = SimpleNamespace(rounds=3, seconds=1.0)
    measured.run(field.weights, field.case, torch.float32, ["peft_lora", "amlora", "peft_arrow"], args)
    assert [one["contender"] for one in measured.failures] == ["peft_arrow"]
    assert {(r["phase"], r["contender"]) for r in measured.rows} == {
        (phase, name) for phase in mixture.PHASES for name in ("peft_lora", "amlora")
    }
    assert "FAILED" in capsys.readouterr().out


def test_contenders_share_the_weights_of_the_base_model(field: Any) -> None:
    first, second = field.weights.model(), field.weights.model()
    assert first is not second
    assert all(a is b for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_bytes_per_adapter_are_those_of_its_matrices(contenders: ModuleType, field: Any) -> None:
    expected = sum(t.numel() * 4 for adapter in field.adapters[:1] for t in adapter.tensors().values())
    assert contenders.bytes_per_adapter(field.case, torch.float32) == expected
