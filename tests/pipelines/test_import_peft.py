"""``import-peft``: what cannot become a bank is refused before a weight is read, and leaves nothing behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from amlora_dist.inference import import_peft as importing
from amlora_dist.registry.bank_folder import read_bank
from amlora_dist.registry.exports import write_row
from pipelines.cli.main import app
from tests.bank_with_base import texts_of, write_working_bank
from tests.pipelines.bad_models import changed, with_code


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank, its base model, a row of it as a PEFT adapter, and texts of another task."""
    folder = tmp_path_factory.mktemp("import")
    write_working_bank(folder / "bank", folder / "base")
    write_row(folder / "theirs", read_bank(folder / "bank"), "colours")
    (folder / "fruit.txt").write_text("\n".join(texts_of("fruit", 30)), encoding="utf-8")
    return folder


def import_peft(place: Path, dest: Path, *options: object, adapter: Path | None = None) -> Result:
    given = ["import-peft", adapter or place / "theirs", dest, "--sample", place / "fruit.txt", *options]
    task = [] if "--task" in given else ["--task", "fruit"]
    return CliRunner().invoke(app, [str(part) for part in [*given, *task]])


def own(place: Path, folder: Path, part: str, spoil: Callable[[Path], object]) -> Path:
    shutil.copytree(place / part, folder / part)
    spoil(folder / part)
    return folder / part


def wider(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    first = next(name for name in tensors if ".lora_A." in name)
    save_file(tensors | {first: torch.ones(tensors[first].shape[0], 40)}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--label", "red"), "--label: found 'red', expected two texts at least"),
        (("--label", "red", "--label", "red"), "--label: found 'red' twice"),
        (("--label", "red", "--label", " "), "expected two texts at least"),
        (("--label", "gryn", "--label", "red", "--label", "bloo"), "'bloo' of task 'fruit', which has the same tokens"),
        (("--task", "Fruit!"), "--task: found 'Fruit!'"),
        (("--base", "./nowhere"), "model.source: no folder './nowhere'"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_are_reported_before_a_weight_is_read(
    options: tuple[str, ...], message: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importing, "load_model", None)
    done = import_peft(place, tmp_path / "made", *options)
    assert done.exit_code == 2 and message in done.stderr, done.stderr
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: changed(folder / "adapter_config.json", use_nova=1), "use_nova: found 1, a key that this"),
        (lambda folder: changed(folder / "adapter_config.json", base_model_name_or_path=None), "say which one with --base"),
        (lambda folder: changed(folder / "adapter_config.json", r=None), "r: found null, expected a whole number"),
        (wider, "is of a layer with 40 inputs and"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "adapter_model.safetensors: missing"),
        (lambda folder: shutil.rmtree(folder), "give the folder of a PEFT adapter"),
    ],
)
def test_import_kinds_that_cannot_be_had_leave_nothing(
    spoil: Callable[[Path], object], message: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importing, "load_model", None)
    done = import_peft(place, tmp_path / "made", adapter=own(place, tmp_path, "theirs", spoil))
    assert done.exit_code == 2 and message in done.stderr, done.stderr
    assert not (tmp_path / "made").exists()


def test_remote_code_of_a_base_model_never_runs_for_an_import(place: Path, tmp_path: Path) -> None:
    base = own(place, tmp_path, "base", lambda folder: with_code(folder, model_type="own", architectures=["Own"]))
    done = import_peft(place, tmp_path / "made", "--base", base)
    assert done.exit_code == 2 and "code that comes with a model is never run" in done.stderr
    assert not (base / "RAN").exists() and not (tmp_path / "made").exists()


def test_what_is_there_is_not_replaced(place: Path, tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "notes").touch()
    done = import_peft(place, tmp_path / "made")
    assert done.exit_code == 2 and "is there already" in done.stderr
    assert [file.name for file in (tmp_path / "made").iterdir()] == ["notes"]


def test_import_alpha_ranks_by_pattern_become_one_bank(place: Path, tmp_path: Path) -> None:
    """Half of the modules at another rank and alpha: the bank holds the same function at one."""

    def halve(folder: Path) -> None:
        weights = folder / "adapter_model.safetensors"
        tensors = load_file(weights)
        cut: dict[str, Any] = {n: t[:1] if "lora_A" in n else t[:, :1] for n, t in tensors.items() if "q_proj" in n}
        save_file({name: tensor.contiguous() for name, tensor in (tensors | cut).items()}, weights)
        changed(folder / "adapter_config.json", rank_pattern={"q_proj": 1}, alpha_pattern={"q_proj": 5})

    theirs = own(place, tmp_path, "theirs", halve)
    done = import_peft(place, tmp_path / "made", "--label", "apple", "--label", "plum", adapter=theirs)
    assert done.exit_code == 0, done.stderr
    made = read_bank(tmp_path / "made").adapters[0]
    tensors = load_file(theirs / "adapter_model.safetensors")
    config = json.loads((theirs / "adapter_config.json").read_text(encoding="utf-8"))
    for module, a in made.a.items():
        scale = 5.0 if "q_proj" in module else config["lora_alpha"] / config["r"]
        theirs_a, theirs_b = (tensors[f"base_model.model.{module}.lora_{letter}.weight"] for letter in "AB")
        torch.testing.assert_close(made.scale * made.b[module] @ a, scale * theirs_b @ theirs_a)
