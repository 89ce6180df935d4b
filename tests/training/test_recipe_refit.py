"""A small memory refits the rows of earlier tasks: what came later may help them, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import amlora_dist.training.stage as stage_module
from amlora_dist.adapters.adapted_layers import NO_PREFIX
from amlora_dist.adapters.adapter import Adapter, rows, tasks_using
from amlora_dist.adapters.inject import inject
from amlora_dist.adapters.settings import AdapterSettings
from amlora_dist.adapters.targets import default_router_layer, find_targets
from amlora_dist.base_model import ModelSettings, load_model, resolve_base
from amlora_dist.config.loading import load_config
from amlora_dist.errors import BankError, FaultsError
from amlora_dist.registry.bank_folder import adapter_entry, read_bank, write_bank
from amlora_dist.registry.exports import row_adapter
from amlora_dist.registry.manifest import replace as changed
from amlora_dist.registry.tensor_files import read_tensors, write_tensors
from amlora_dist.training.stage_rows import StageRows
from amlora_dist.training.stage_spec import StageWork
from amlora_dist.training.worker_cache import WorkerCache
from pipelines.runs.inputs import gather_inputs
from pipelines.runs.outlook import stage_sizes
from pipelines.runs.plan import BankState
from tests import tiny_config
from tests.bank_with_base import write_working_bank
from tests.methods.stages import Stage, in_this_process, stages
from tests.tiny_config import COLOURS, TARGETS, write_config

MEMORY = "method_settings.memory_rows=6"
OVERRIDES = ["training.epochs=1", "training.l1=0", "training.recipe_learning_rate=0.3", "training.near_tie=0"]


@pytest.fixture
def config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A task, a relative of it, and a stranger."""
    monkeypatch.setitem(tiny_config.TOPICS, "paints", (COLOURS, ["house", "wall", "tree", "the", "a", "seems"]))
    return write_config(tmp_path, tasks=("colours", "paints", "sizes"))


def run(file: Path, folder: Path, *overrides: str, score: bool = False) -> list[Stage]:
    return stages(load_config(file, [*OVERRIDES, *overrides]), folder, score=score)


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
    torch.testing.assert_close(rows(bank[:2], "m"), torch.tensor([[1.0, 0.0], [0.1, 1.0]]))  # the version before
    assert tasks_using(bank, 2) == [2, 1, 3] and tasks_using(bank, 0) == [0, 2, 3]
    assert bank[2].digest() != adapter("c", 2).digest(), "the rows are part of what a version is"


def test_a_row_that_is_tried_answers_as_the_bank_that_has_it_and_takes_gradients(tmp_path: Path) -> None:
    write_working_bank(tmp_path / "bank", tmp_path / "base")
    bank = read_bank(tmp_path / "bank")
    model = load_model(resolve_base(ModelSettings(source=str(tmp_path / "base")), tmp_path), dtype=torch.float32)
    settings = AdapterSettings(targets=[name for name in TARGETS["llama"] if name != "wo"])
    mixture = inject(model, find_targets(model, settings, default_router_layer(model)), bank.adapters)
    ids = torch.randint(3, 20, (2, 5), generator=torch.Generator().manual_seed(0))
    nothing = torch.zeros(2, 3)
    tried = {path: torch.tensor([1.0, -0.5, 0.25], requires_grad=True) for path in mixture.modules}
    mixture.try_row(tried)
    logits = model(ids, task_gate=nothing).logits
    gradients = torch.autograd.grad(logits.square().sum(), list(tried.values()))
    assert all(bool((gradient != 0).all()) for gradient in gradients)
    mixture.try_row(None)
    whole = {path: rows(bank.adapters, path) for path in mixture.modules}
    for matrix in whole.values():
        matrix[0] = torch.tensor([1.0, -0.5, 0.25])
    mixture.set_rows(whole)
    torch.testing.assert_close(model(ids, task_gate=mixture.one_hot(0, 2)).logits, logits)
    cached = model.generate(ids, task_gate=mixture.one_hot(0, 2), max_new_tokens=3, do_sample=False)  # reads some columns
    longer = torch.cat([ids, cached[:, 5:7]], dim=1)
    assert torch.equal(model(longer, task_gate=mixture.one_hot(0, 2)).logits[:, -1].argmax(dim=-1), cached[:, 7])


def test_an_old_task_gains_from_a_later_relative_and_no_adapter_changes(config_file: Path, tmp_path: Path) -> None:
    plain, refit = (run(config_file, tmp_path / name, *more, score=True) for name, more in (("p", ()), ("m", (MEMORY,))))
    old, new = plain[1], refit[1]
    assert plain[0].work.fingerprint == refit[0].work.fingerprint, "a memory changes nothing before there are old tasks"
    assert plain[0].result.adapter.digest() == refit[0].result.adapter.digest()
    assert old.work.fingerprint != new.work.fingerprint
    for name, tensor in old.result.adapter.tensors().items():
        assert torch.equal(tensor, new.result.adapter.tensors()[name]), name
    found = new.result.training["memory"]
    assert found["rows"] == 6 and found["tasks"]["colours"]["refitted"]
    assert found["tasks"]["colours"]["after"] < found["tasks"]["colours"]["before"]
    assert new.loss("colours") < old.loss("colours"), "on rows that no refit has seen"
    assert "memory" not in old.result.training and not old.result.adapter.refitted
    for one, matrix in refit[2].result.adapter.refitted.items():
        assert matrix.shape == (2, 3) and matrix.diagonal().tolist() == [1.0, 1.0], one


def test_a_refit_that_is_no_better_on_unseen_rows_is_not_taken(config_file: Path, tmp_path: Path) -> None:
    _, second, _ = run(config_file, tmp_path / "m", MEMORY, "training.near_tie=0.999")
    assert not second.result.training["memory"]["tasks"]["colours"]["refitted"]
    assert all(matrix.tolist() == [[1.0, 0.0]] for matrix in second.result.adapter.refitted.values())


def test_a_stage_that_died_after_its_refit_ends_equal(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm = run(config_file, tmp_path / "calm", MEMORY)
    died = []

    def reach(point: str) -> None:
        if point == "adapter_gathered" and not died:
            died.append(point)
            raise RuntimeError("here it dies")

    def crashing(work: StageWork) -> None:
        if work.index == 2:
            with monkeypatch.context() as patch:
                patch.setattr(stage_module, "reach", reach)
                with pytest.raises(RuntimeError, match="here it dies"):
                    in_this_process(work)
        in_this_process(work)

    again = stages(load_config(config_file, [*OVERRIDES, MEMORY]), tmp_path / "again", crashing, score=False)
    assert died and again[1].result.training["memory"]["tasks"]["colours"]["refitted"]
    assert [one.result.adapter.digest() for one in again] == [one.result.adapter.digest() for one in calm]


def test_a_memory_holds_rows_that_nobody_trains_on(config_file: Path, tmp_path: Path) -> None:
    _, second, _ = run(config_file, tmp_path / "m", MEMORY)
    base = second.work.base_model()
    reader = StageRows(second.work, WorkerCache(), base, WorkerCache().tokenizer(base), NO_PREFIX, memory_rows=6)
    own, replayed = reader.training()
    assert replayed == [] and len(own) == 32 and reader.alone
    (memory,) = reader.memory().values()
    assert reader.memory() == {"colours": memory} and len(memory) == 6
    larger = replace(second.work, rows={"paints": None, "colours": 100})
    everything = StageRows(larger, WorkerCache(), base, WorkerCache().tokenizer(base), NO_PREFIX, memory_rows=100)
    assert len(everything.memory()["colours"]) == 8, "all that were held out, and no row that an adapter has seen"


def test_refitted_rows_are_kept_with_the_adapter_whose_stage_made_them(tmp_path: Path) -> None:
    manifest = write_working_bank(tmp_path / "bank", tmp_path / "base")
    bank = read_bank(tmp_path / "bank")
    last, draw = bank.adapters[-1], torch.Generator().manual_seed(0)
    last.refitted = {path: torch.randn(2, 3, generator=draw) for path in last.a}
    line = manifest.adapters[-1]
    entry = adapter_entry(last, 3, training_fingerprint=line.training_fingerprint, parent=None, task_spec=line.task_spec)
    written = changed(manifest, adapters=[*manifest.adapters[:-1], entry])
    write_bank(tmp_path / "refit", written, bank.adapters, bank.router, bank.statistics)
    again = read_bank(tmp_path / "refit")
    assert all(torch.equal(last.refitted[path], again.adapters[-1].refitted[path]) for path in last.a)
    assert row_adapter(again, again.manifest.tasks[0]).rank == sum(one.rank for one in again.adapters), "as one LoRA"
    file = tmp_path / "refit" / entry.folder / "recipe.safetensors"
    damaged = read_tensors(file)
    damaged |= {name: tensor[:1] for name, tensor in damaged.items() if name.startswith("refitted.")}
    write_tensors(file, damaged)
    with pytest.raises(BankError, match="a row for each earlier task"):
        read_bank(tmp_path / "refit")


def test_a_memory_is_refused_where_stages_train_on_rows_of_the_next_task(config_file: Path) -> None:
    with pytest.raises(FaultsError, match=r"boundary_mix.*memory_rows"):
        load_config(config_file, [MEMORY, "boundary_mix=0.3"])
    load_config(config_file, [MEMORY, "boundary_mix=0.3", "router.recipes=false"])  # nothing is refitted


def test_memory_rows_are_not_counted_as_rows_that_are_trained(config_file: Path, tmp_path: Path) -> None:
    plain, refit = (
        stage_sizes(gather_inputs(load_config(config_file, more), tmp_path), BankState()) for more in ([], [MEMORY])
    )
    assert [size.trained for size in refit] == [size.trained for size in plain]


def test_a_memory_is_refused_under_zero_3_before_anything_starts(config_file: Path) -> None:
    with pytest.raises(FaultsError, match=r"zero_stage.*memory_rows"):
        load_config(config_file, [MEMORY, "workers=2", "deepspeed.zero_stage=3"])
