"""What the rivals' own mathematics promise: merges, energies, closed gates, and keys without adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from amlora_dist.adapters.router import router_from
from amlora_dist.adapters.statistics import TaskStatistics
from amlora_dist.adapters.subspace_router import SubspaceRouter, basis, second_moment
from amlora_dist.config.loading import load_config
from amlora_dist.errors import FaultsError
from amlora_dist.methods import method_for
from amlora_dist.methods.base import Trained
from amlora_dist.methods.slao import orthonormal_rows
from amlora_dist.training.settings import StageSettings
from tests.methods.stages import stages
from tests.methods.test_methods import settings_for
from tests.tiny_config import write_config

SHORT = ["training.epochs=2"]


def test_slao_starts_at_an_orthonormal_basis_of_the_last_and_serves_the_merge(tmp_path: Path) -> None:
    file = write_config(tmp_path, tasks=("colours", "shapes", "sizes"))
    first, second, third = (
        one.result.adapter for one in stages(load_config(file, ["method=slao", *SHORT]), tmp_path / "run", score=False)
    )
    method = method_for(load_and_settle(file))
    start = method.start_from([first, second])
    assert start is not None
    path = next(iter(first.a))
    a = start.a[path]
    torch.testing.assert_close(a @ a.T, torch.eye(len(a)), atol=1e-5, rtol=0)
    span = second.a[path].T @ torch.linalg.pinv(second.a[path].T)
    torch.testing.assert_close(span @ a.T, a.T, atol=1e-4, rtol=0)
    tuned = first.b[path] + (second.b[path] - first.b[path]) * 2**0.5
    torch.testing.assert_close(start.b[path], tuned)
    with_them = Trained(start, [first, second], *[None] * 4)  # type: ignore[arg-type]
    merged = method.finished(with_them)[0].b[path]
    torch.testing.assert_close(merged, second.b[path] + (tuned - second.b[path]) / 3**0.5)
    assert all(not torch.equal(second.b[p], third.b[p]) for p in first.b)


def load_and_settle(file: Path) -> StageSettings:
    from pipelines.runs.inputs import gather_inputs

    return gather_inputs(load_config(file, ["method=slao"]), file.parent / "home").stage_settings()


def test_an_orthonormal_basis_depends_on_the_rows_alone() -> None:
    rows = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    basis_rows = orthonormal_rows(rows)
    torch.testing.assert_close(basis_rows @ basis_rows.T, torch.eye(3))
    assert float((basis_rows @ rows.T).diagonal().min()) > 0
    torch.testing.assert_close(orthonormal_rows(basis_rows), basis_rows)


def test_the_penalty_of_ella_keeps_new_updates_out_of_where_the_past_has_its_energy(tmp_path: Path) -> None:
    file = write_config(tmp_path, tasks=("colours", "shapes"))
    shares = {}
    for weight in (0.0, 30.0):
        config = load_config(file, ["method=ella", f"method_settings.ella_weight={weight}"])
        first, second = (one.result.adapter for one in stages(config, tmp_path / str(weight), score=False))
        inside = [_inside(first.b[p] @ first.a[p], second.b[p] @ second.a[p]) for p in first.a]
        shares[weight] = sum(inside) / len(inside)
    assert shares[30.0] < 0.7 * shares[0.0], shares


def _inside(past: torch.Tensor, new: torch.Tensor) -> float:
    """Energy of an update where the past has its own, relative to an update that does not look at it."""
    energy = past.square() / past.square().mean()
    return float((energy * new.square()).sum())


def _statistics(task: str, centre: torch.Tensor, seed: int) -> tuple[TaskStatistics, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = centre + 0.1 * torch.randn(64, len(centre), generator=generator)
    return TaskStatistics.from_features(task, rows), rows


def test_gates_of_gainlora_are_open_on_their_own_task_and_closed_on_earlier_ones() -> None:
    centres = torch.eye(12)[:3] * 3
    made = [_statistics(f"t{n}", centre, n) for n, centre in enumerate(centres)]
    router = SubspaceRouter.of([one for one, _ in made], energy=0.97)
    for task, (_, rows) in enumerate(made):
        gates = router.gates(rows, len(rows)).mean(dim=0)
        assert float(gates[task]) > 0.9
        assert all(float(gate) < 0.2 for gate in gates[task + 1 :]), "what comes later stays silent on what was before"
    again = router_from(router.tensors(), router.settings())
    assert torch.equal(again.gates(made[1][1], 64), router.gates(made[1][1], 64))
    assert bool((router.learning("new").gates(made[0][1], 64)[:, -1] == 1).all())


def test_a_subspace_holds_the_energy_that_is_asked_for() -> None:
    one, _ = _statistics("t", torch.arange(12.0), 0)
    factor = second_moment(one)
    for energy in (0.5, 0.97, 0.9999):
        rows = basis(factor, energy)
        torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows), dtype=torch.float64))
        assert float((factor @ rows.T).square().sum()) >= energy * float(factor.square().sum()) * (1 - 1e-12)
    assert len(basis(factor[:0], 0.97)) == 0


def test_keys_train_nothing_and_answer_by_the_keys_alone(tmp_path: Path) -> None:
    file = write_config(tmp_path, tasks=("colours", "shapes"), method="keys")
    for stage in stages(load_config(file), tmp_path / "run", score=False):
        adapter = stage.result.adapter
        assert adapter.rank == 1 and not any(bool(b.any()) for b in adapter.b.values())
        assert stage.result.training["losses"] == [] and stage.result.statistics.held is not None
        assert stage.work.settings.answer.evidence == "keys"
    other = write_config(tmp_path, tasks=("colours", "shapes"), method="keys")
    longer = stages(load_config(other, ["training.epochs=9", "adapters.rank=8"]), tmp_path / "again", score=False)
    assert longer[0].work.fingerprint == stages(load_config(other), tmp_path / "run", score=False)[0].work.fingerprint


@pytest.mark.parametrize("override", ["router.kind=uniform", "router.keys=task", "prompt_format=1"])
def test_keys_without_keys_are_refused(tmp_path: Path, override: str) -> None:
    file = write_config(tmp_path, tasks=("colours",), method="keys")
    with pytest.raises(FaultsError, match="with method: keys"):
        load_config(file, [override])


def test_the_new_gate_is_wide_open_while_gainlora_learns() -> None:
    method = method_for(settings_for("gainlora"))
    gate = method.training_gate(1)
    assert gate is not None and gate.tolist() == [1.0]
    assert method.training_gate(2) is None
