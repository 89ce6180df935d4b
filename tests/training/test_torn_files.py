"""Checkpoints and results of stages that were cut off, changed or swapped: passed over with the reason, never loaded."""

from __future__ import annotations

import json
import logging
import os
import pickle
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from amlora_dist.adapters.statistics import TaskStatistics
from amlora_dist.digests import file_digest
from amlora_dist.errors import BankError, UserError
from amlora_dist.training import result as result_module
from amlora_dist.training.checkpoint import StageProgress, newest_checkpoint, save_checkpoint
from amlora_dist.training.result import FILES, Result, is_whole, read_result, write_result
from amlora_dist.training.stage_spec import Cell
from tests.registry.tiny_banks import tiny_adapter

FINGERPRINT = "f" * 64
NEWEST = "step-00000006"
SHAPES = {"master.a.m": (3, 4), "exp_avg.a.m": (3, 4)}


def state(step: int) -> dict[str, torch.Tensor]:
    return {"master.a.m": torch.full((3, 4), float(step)), "exp_avg.a.m": torch.full((3, 4), step / 10)}


def save(folder: Path, step: int) -> None:
    progress = StageProgress(fingerprint=FINGERPRINT, step=step, losses=[1.0 / (i + 1) for i in range(step)])
    save_checkpoint(folder, state(step), progress)


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """Checkpoints after steps 4 and 6."""
    for step in (2, 4, 6):
        save(tmp_path / "checkpoints", step)
    return tmp_path / "checkpoints"


def commit(folder: Path) -> None:
    """What somebody would do who wants damage to count."""
    names = ("progress.json", "state.safetensors")
    marks = {"format": 1, "files": {name: file_digest(folder / name) for name in names}}
    (folder / "COMMIT").write_text(json.dumps(marks))


def tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    found = load_file(folder / "state.safetensors")
    change(found)
    save_file(found, folder / "state.safetensors")
    commit(folder)


def progress(folder: Path, **changes: Any) -> None:
    file = folder / "progress.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    commit(folder)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (lambda f: os.truncate(f / "state.safetensors", 50), "differ from the digests"),
    "empty": (lambda f: (f / "state.safetensors").write_bytes(b""), "differ from the digests"),
    "no marker": (lambda f: (f / "COMMIT").unlink(), "no commit marker"),
    "empty marker": (lambda f: (f / "COMMIT").write_bytes(b""), "marker is not JSON"),
    "marker of another format": (lambda f: (f / "COMMIT").write_text('{"format": 2}'), "format is not 1"),
    "marker is a list": (lambda f: (f / "COMMIT").write_text("[]"), "format is not 1"),
    "missing file": (lambda f: (f / "progress.json").unlink(), "is missing"),
    "a folder for a file": (lambda f: ((f / "progress.json").unlink(), (f / "progress.json").mkdir()), "is missing"),
    "other step": (lambda f: progress(f, step=7), "says step 7"),
    "unknown key": (lambda f: progress(f, surprise=1), "surprise"),
    "other fingerprint": (lambda f: progress(f, fingerprint="e" * 64), "belongs to fingerprint eeeeeeeeeeee"),
    "pickle, committed": (
        lambda f: ((f / "state.safetensors").write_bytes(pickle.dumps({"a": 1})), commit(f)), "deserializing header"
    ),
    "cut, committed": (lambda f: (os.truncate(f / "state.safetensors", 50), commit(f)), "deserializing header"),
    "NaN, committed": (lambda f: tensors(f, lambda t: t["master.a.m"].fill_(float("nan"))), "holds NaN"),
    "dtype, committed": (lambda f: tensors(f, lambda t: t.update({"master.a.m": torch.zeros(2).half()})), "float16"),
    "shape, committed": (
        lambda f: tensors(f, lambda t: t.update({"exp_avg.a.m": torch.zeros(1, 4)})), "shape (1, 4), expected (3, 4)"
    ),
    "a tensor too few, committed": (lambda f: tensors(f, lambda t: t.pop("exp_avg.a.m")), "exp_avg.a.m is not there"),
    "a tensor too many, committed": (
        lambda f: tensors(f, lambda t: t.update({"master.a.x": torch.zeros(1)})), "master.a.x is of no trained parameter"
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    damage: str, checkpoints: Path, caplog: pytest.LogCaptureFixture
) -> None:
    act, reason = DAMAGE[damage]
    act(checkpoints / NEWEST)
    with caplog.at_level(logging.WARNING):
        found = newest_checkpoint(checkpoints, FINGERPRINT, SHAPES)
    assert found is not None and found[1].step == 4
    assert torch.equal(found[0]["master.a.m"], state(4)["master.a.m"])
    assert reason in caplog.text and NEWEST in caplog.text


def test_without_a_good_checkpoint_the_stage_starts_at_its_beginning(checkpoints: Path) -> None:
    for folder in checkpoints.glob("step-*"):
        (folder / "COMMIT").unlink()
    assert newest_checkpoint(checkpoints, FINGERPRINT, SHAPES) is None
    assert newest_checkpoint(checkpoints / "not-there", FINGERPRINT, SHAPES) is None


def test_an_interrupted_checkpoint_is_replaced_by_the_next_try(checkpoints: Path) -> None:
    (checkpoints / NEWEST / "COMMIT").unlink()
    save(checkpoints, 6)
    found = newest_checkpoint(checkpoints, FINGERPRINT, SHAPES)
    assert found is not None and found[1].step == 6


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """A full disk, as far as one process can have one: writing past ``size`` bytes of a file fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 60, 300], ids=["no byte", "half the tensors", "half the progress"])
def test_a_full_disk_leaves_the_last_good_checkpoint_and_no_rubbish(size: int, checkpoints: Path) -> None:
    with no_file_above(size), pytest.raises(UserError, match=r"cannot write a checkpoint under .*: make room"):
        save(checkpoints, 30)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000004", NEWEST]
    found = newest_checkpoint(checkpoints, FINGERPRINT, SHAPES)
    assert found is not None and found[1].step == 6


# -- results ----------------------------------------------------------------------------------------------------------


def a_result(seed: int = 0) -> Result:
    features = torch.randn(6, 8, generator=torch.Generator().manual_seed(seed))
    statistics = TaskStatistics.from_features("agnews", features)
    return Result(tiny_adapter("agnews", 2, seed=seed), statistics, {"fingerprint": FINGERPRINT, "losses": [1.0]}, 2)


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    write_result(tmp_path / "trained", a_result())
    return tmp_path / "trained"


def test_a_whole_result_is_left_as_it_is_by_who_comes_late(trained: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in trained.iterdir()}
    write_result(trained, a_result(seed=5))
    assert {path.name: path.stat().st_mtime_ns for path in trained.iterdir()} == before
    assert read_result(trained).adapter.digest() == a_result().adapter.digest()


def test_of_two_that_write_one_result_the_slower_takes_the_other_s(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, folder = read_result(trained), tmp_path / "stage" / "trained"
    inner = result_module.write_adapter

    def writing(*given: Any) -> None:
        monkeypatch.setattr(result_module, "write_adapter", inner)
        write_result(folder, result)  # who is quicker
        inner(*given)

    monkeypatch.setattr(result_module, "write_adapter", writing)
    write_result(folder, result)
    assert is_whole(folder) and [path.name for path in folder.parent.iterdir()] == ["trained"]


def test_a_full_disk_leaves_no_half_result(tmp_path: Path) -> None:
    with no_file_above(200), pytest.raises(UserError, match="make room"):
        write_result(tmp_path / "trained", a_result())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [*FILES, "COMMIT"])
@pytest.mark.parametrize("damage", ["cut", "empty", "missing", "pickle"])
def test_a_damaged_result_does_not_count_and_is_written_again(name: str, damage: str, trained: Path) -> None:
    file = trained / name
    content = {"cut": file.read_bytes()[:-3], "empty": b"", "pickle": pickle.dumps({"a": 1})}
    file.unlink()
    if damage in content:
        file.write_bytes(content[damage])
    assert not is_whole(trained)
    with pytest.raises(BankError, match="not a whole training result"):
        read_result(trained)
    write_result(trained, a_result())
    assert read_result(trained).adapter.digest() == a_result().adapter.digest()


@pytest.mark.parametrize("name", FILES)
def test_what_is_committed_but_no_result_is_refused(name: str, trained: Path) -> None:
    (trained / name).write_bytes(pickle.dumps({"a": 1}))
    marks = {file: file_digest(trained / file) for file in json.loads((trained / "COMMIT").read_text())}
    (trained / "COMMIT").write_text(json.dumps(marks))
    with pytest.raises(BankError, match=r"not a training result of this project .*remove it"):
        read_result(trained)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_changed_byte_gives_the_right_state_or_none(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / "bytes"
    if not folder.exists():
        save(folder / "checkpoints", 6)
        write_result(folder / "trained", a_result())
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    file = data.draw(st.sampled_from(files))
    content = file.read_bytes()
    place = data.draw(st.integers(0, len(content) - 1))
    byte = bytes([data.draw(st.integers(0, 255))])
    kind = data.draw(st.sampled_from(["change", "insert", "delete", "cut"]))
    changed = {
        "change": content[:place] + byte + content[place + 1 :],
        "insert": content[:place] + byte + content[place:],
        "delete": content[:place] + content[place + 1 :],
        "cut": content[:place],
    }[kind]
    try:
        file.write_bytes(changed)
        found = newest_checkpoint(folder / "checkpoints", FINGERPRINT, SHAPES)
        assert found is None or all(torch.equal(found[0][name], tensor) for name, tensor in state(6).items())
        try:
            assert read_result(folder / "trained").adapter.digest() == a_result().adapter.digest()
        except BankError as error:
            assert str(folder) in str(error)
    finally:
        file.write_bytes(content)


def test_a_damaged_score_is_computed_again(tmp_path: Path) -> None:
    cell = Cell("agnews", "test", "router", FINGERPRINT, str(tmp_path))
    assert not cell.done
    good = {"fingerprint": FINGERPRINT, "accuracy": 0.5, "seconds": 1.0}
    for text in ("", "{", "[]", json.dumps(good | {"fingerprint": "e" * 64}), json.dumps({"fingerprint": FINGERPRINT})):
        (tmp_path / "summary.json").write_text(text)
        assert not cell.done, text
    (tmp_path / "summary.json").write_text(json.dumps(good))
    assert cell.done and cell.summary() == good
    shutil.rmtree(tmp_path)
    assert not cell.done
