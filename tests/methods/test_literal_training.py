"""The paper's selector in whole stages: each switch of ``router.literal`` does what its name says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from amlora_dist.adapters.settings import LiteralSettings
from amlora_dist.config.loading import load_config, validate_config
from amlora_dist.errors import FaultsError
from tests.methods.stages import Stage, stages
from tests.tiny_config import write_config

LITERAL = ("router.kind=literal", "training.epochs=2")


def run(folder: Path, name: str, *overrides: str, tasks: tuple[str, ...] = ("colours",), score: bool = False) -> list[Stage]:
    file = write_config(folder, tasks=tasks)
    return stages(load_config(file, [*LITERAL, *overrides]), folder / name, score=score)


def bias(stage: Stage) -> float:
    """Mean bias of the new adapter's dense layers: what opens its gate for every input."""
    found = [t[-1] for name, t in stage.result.adapter.selector.items() if name.endswith(".bias")]
    return float(torch.stack(found).mean())


def test_the_l1_term_as_written_trains_the_same_adapter_at_any_coefficient(tmp_path: Path) -> None:
    (without,) = run(tmp_path, "without", "training.l1=0", "training.epochs=1")
    (strong,) = run(tmp_path, "strong", "training.l1=100", "training.epochs=1")
    for name, tensor in without.result.adapter.tensors().items():
        torch.testing.assert_close(tensor, strong.result.adapter.tensors()[name], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("penalty", "gate"), [("unnormalised", "relu"), ("unnormalised", "abs_sigmoid"), ("non_zero_slot", "softmax")]
)
def test_readings_of_the_l1_term_that_do_something_close_the_gate(penalty: str, gate: str, tmp_path: Path) -> None:
    reading = (f"router.literal.penalty={penalty}", f"router.literal.map={gate}")
    (without,) = run(tmp_path, "without", *reading, "training.l1=0")
    (strong,) = run(tmp_path, "strong", *reading, "training.l1=3")
    assert bias(strong) < bias(without) - 0.05


def test_in_two_stages_the_adapter_learns_as_if_alone_and_the_selector_afterwards(tmp_path: Path) -> None:
    two = ("router.literal.training=two_stage", "training.epochs=4")
    (stage,) = run(tmp_path, "two", *two)
    (alone,) = run(tmp_path, "alone", "router.kind=posterior", "router.recipes=false", "training.epochs=2")
    (joint,) = run(tmp_path, "joint", "training.epochs=4")
    for module, a in alone.result.adapter.a.items():
        torch.testing.assert_close(stage.result.adapter.a[module], a)
        torch.testing.assert_close(stage.result.adapter.b[module], alone.result.adapter.b[module])
    assert not torch.allclose(joint.result.adapter.b[module], alone.result.adapter.b[module])
    assert bias(stage) != 0.0


def test_two_stages_with_workers_are_refused_before_anything_starts(tmp_path: Path) -> None:
    file = write_config(tmp_path, tasks=("colours",))
    with pytest.raises(FaultsError, match="two_stage with workers: 2"):
        validate_config(file, [*LITERAL, "workers=2", "router.literal.training=two_stage"])


def test_bf16_under_zero_3_is_refused_before_anything_starts(tmp_path: Path) -> None:
    file = write_config(tmp_path)
    with pytest.raises(FaultsError, match="literal and dtype: bf16"):
        validate_config(file, [*LITERAL, "workers=2", "dtype=bf16", "deepspeed.zero_stage=3"])
    validate_config(file, [*LITERAL, "workers=2", "dtype=bf16", "deepspeed.zero_stage=2"])


def test_with_the_posterior_as_prior_the_layers_gate_by_task(tmp_path: Path) -> None:
    both = ("colours", "shapes")
    *_, last = run(tmp_path, "prior", "router.literal.prior=true", tasks=both, score=True)
    for column, task in enumerate(both):
        gates = torch.tensor([p.gates for p in last.predictions[task]])
        assert (gates.argmax(dim=1) == column).float().mean() > 0.8, "the prior finds the task"


@pytest.mark.integration
def test_a_bank_of_literal_with_prior_is_published_and_loads_with_its_prior(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from amlora_dist.inference.model import AMLoRAModel
    from amlora_dist.registry.store import Store
    from amlora_dist.reporting.facts import read_run
    from amlora_dist.reporting.routing_facts import routing_by_stage
    from pipelines.runs.progress import Silent
    from pipelines.runs.sequence import run_sequence

    monkeypatch.setenv("AMLORA_HOME", str(tmp_path / "home"))
    file = write_config(tmp_path, tasks=("colours", "shapes"))
    config = load_config(file, [*LITERAL, "router.literal.prior=true", "training.epochs=1", "evaluate=last"])
    result = run_sequence(config, run_id="prior", progress=Silent())
    facts = read_run(Store.open(tmp_path / "home"), "prior")
    (routing,) = routing_by_stage(facts)
    assert routing.stage == 2 and routing.learned_accuracy is not None, "the last stage alone is scored, and it routes"
    assert all(p.zeros is not None for p in facts.cell("router", "shapes") or [])
    model = AMLoRAModel.from_bank("models:/prior@current", tracking_uri=result["tracking_uri"], device="cpu")
    assert model.mixture.router is not None and model.mixture.routing.select
    assert set(LiteralSettings.__dataclass_fields__) <= set(model.bank.manifest.router.settings)
