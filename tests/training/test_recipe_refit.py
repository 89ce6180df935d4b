"""A small memory refits the rows of earlier tasks: what came later may help them, and nothing else changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from amlora_dist.adapters.adapter import Adapter, rows, tasks_using
from amlora_dist.config.loading import RunConfig, load_config
from amlora_dist.errors import BankError, FaultsError
from amlora_dist.methods import method_for
from amlora_dist.registry.adapter_folder import read_adapter, write_adapter
from amlora_dist.registry.bank_folder import read_bank, write_bank
from amlora_dist.training.result import read_result
from amlora_dist.training.stage_rows import StageRows
from amlora_dist.training.worker_cache import WorkerCache
from tests import tiny_config
from tests.bank_with_base import write_working_bank
from tests.methods.stages import Stage, stages
from tests.tiny_config import COLOURS, write_config

MEMORY = "method_settings.memory_rows=8"
OVERRIDES = ["training.epochs=1", "training.l1=0", "training.recipe_learning_rate=0.3", "training.near_tie=0"]


@pytest.fixture
def config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A task, a relative of it, and a stranger."""
    monkeypatch.setitem(tiny_config.TOPICS, "paints", (COLOURS, ["house", "wall", "tree", "the", "a", "seems"]))
    return write_config(tmp_path, tasks=("colours", "paints", "sizes"))


def run(file: Path, folder: Path, *overrides: str) -> list[Stage]:
    return stages(load_config(file, [*OVERRIDES, *overrides]), folder)


def adapter(task: str, earlier: int, refitted: torch.Tensor | None = None) -> Adapter:
    made = Adapter(task, 1, 1.0, {"m": torch.ones(1, 2)}, {"m": torch.ones(2, 1)})
    made.recipe = {"m": 0.1 * torch.arange(1.0, earlier + 1)}
    made.refitted = {} if refitted is None else {"m": refitted}
    return made


def test_the_last_refit_gives_the_earlier_rows_and_later_adapters_bring_their_own() -> None:
    refitted = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, -0.5]])
    bank = [adapter("a", 0), adapter("b", 1), adapter("c", 2, refitted), adapter("d", 3)]
    expected = [[1.0, 0.5, 0.0, 0.0], [0.0, 1.0, -0.5, 0.0], [0.1, 0.2, 1.0, 0.0], [0.1, 0.2, 0.3, 1.0]]
    torch.testing.assert_close(rows(bank, "m"), torch.tensor(expected))
    torch.testing.assert_close(rows(bank[:2], "m"), torch.tensor([[1.0, 0.0], [0.1, 1.0]]), msg="the bank before has its own")
    assert tasks_using(bank, 2) == [2, 1, 3] and tasks_using(bank, 0) == [0, 2, 3]
    without = adapter("c", 2)
    assert bank[2].digest() != without.digest(), "the rows are part of what a version is"


def test_an_old_task_gains_from_a_later_relative_and_no_adapter_changes(config_file: Path, tmp_path: Path) -> None:
    plain, refit = run(config_file, tmp_path / "plain"), run(config_file, tmp_path / "refit", MEMORY)
    old, new = plain[1], refit[1]
    assert plain[0].result.adapter.digest() == refit[0].result.adapter.digest()
    for name, tensor in old.result.adapter.tensors().items():
        assert torch.equal(tensor, new.result.adapter.tensors()[name]), name
    found = new.result.training["memory"]
    assert found["rows"] == 8 and found["tasks"]["colours"]["refitted"]
    assert found["tasks"]["colours"]["after"] < found["tasks"]["colours"]["before"]
    assert new.loss("colours") < old.loss("colours"), "on rows that no refit has seen"
    assert new.loss("paints") == pytest.approx(old.loss("paints"), abs=1e-5)
    assert "memory" not in old.result.training and not old.result.adapter.refitted


