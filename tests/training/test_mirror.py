"""Copies of checkpoints: another machine goes on from them, torn ones count for nothing, and a store that is away costs
no training."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from amlora_dist.config import load_config
from amlora_dist.errors import FaultsError, UserError
from amlora_dist.training.checkpoint import Progress, newest_checkpoint, save_checkpoint
from amlora_dist.training.mirror import Mirror
from pipelines.progress import Silent
from pipelines.sequence import run_sequence
from tests.tiny_folder import write_config

FINGERPRINT = "f" * 64


def save(folder: Path, step: int) -> Path:
    progress = Progress(fingerprint=FINGERPRINT, step=step, losses=[1.0] * step)
    return save_checkpoint(folder, {"master.a": torch.full((2, 3), float(step))}, progress)


def found(folder: Path) -> int | None:
    newest = newest_checkpoint(folder, FINGERPRINT, {"master.a": (2, 3)})
    return None if newest is None else newest[1].step


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_another_machine_goes_on_from_the_newest_copy(scheme: str, tmp_path: Path) -> None:
    mirror = Mirror(f"{scheme}://{tmp_path}/copies")
    mirror.check()
    for step in (1, 2, 3):
        mirror.keep(save(tmp_path / "here", step))
    assert mirror._names() == ["step-00000002", "step-00000003"], "as many as are kept here"
    there = tmp_path / "there"
    mirror.fetch(there)
    assert found(there) == 3 and [one.name for one in there.iterdir()] == ["step-00000003"]
    save(there, 4)
    mirror.fetch(there)
    assert found(there) == 4, "what is newer stays"
    mirror.forget()
    mirror.forget()
    mirror.fetch(tmp_path / "third")
    assert found(tmp_path / "third") is None


def test_a_torn_copy_is_passed_over_and_a_damaged_one_counts_for_nothing(tmp_path: Path) -> None:
    mirror = Mirror(f"file://{tmp_path}/copies")
    for step in (1, 2):
        mirror.keep(save(tmp_path / "here", step))
    (tmp_path / "copies" / "step-00000002" / "COMMIT").unlink()
    mirror.fetch(tmp_path / "there")
    assert found(tmp_path / "there") == 1
    (tmp_path / "copies" / "step-00000001" / "state.safetensors").write_bytes(b"not a tensor")
    mirror.fetch(tmp_path / "third")
    assert found(tmp_path / "third") is None


def test_a_store_that_is_away_costs_no_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    mirror = Mirror(f"file://{tmp_path}/file/copies")
    mirror.keep(save(tmp_path / "here", 1))
    mirror.fetch(tmp_path / "here")
    mirror.forget()
    assert found(tmp_path / "here") == 1 and "going on without" in caplog.text
    with pytest.raises(UserError, match="storage: cannot write to file://"):
        mirror.check()


@pytest.mark.parametrize(
    ("url", "workers", "told"),
    [
        ("s3://bucket/x", 2, "a folder that all nodes mount"),
        ("s4://bucket/x", 0, "a URL that fsspec knows"),
        ("memory://x", 0, None),
    ],
)
def test_a_url_is_taken_where_it_can_work(url: str, workers: int, told: str | None, tmp_path: Path) -> None:
    config = write_config(tmp_path, workers=workers, storage=url)
    if told is None:
        assert load_config(config).storage == url
        return
    with pytest.raises(FaultsError, match=told):
        load_config(config)


class Cut(Silent):
    """Ends the run after so many steps, and keeps what is said."""

    def __init__(self, after: int) -> None:
        self.left, self.lines = after, list[str]()

    def note(self, text: str) -> None:
        self.lines.append(text)

    def step(self, done: int, total: int, loss: float | None, tokens_per_second: float | None) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


@pytest.mark.integration
def test_a_stage_goes_on_where_a_machine_that_is_gone_left_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = f"sqlite:///{tmp_path}/shared.db"
    config = write_config(
        tmp_path, tasks=("colours",), storage=f"file://{tmp_path}/copies", mlflow={"tracking_uri": store},
        evaluation={"batch_size": 5, "cells": "last", "untrained": False, "oracle": False},
    )  # fmt: skip
    monkeypatch.setenv("AMLORA_HOME", str(tmp_path / "gone"))
    with pytest.raises(KeyboardInterrupt):
        run_sequence(load_config(config), run_id="moved", progress=Cut(7))
    (tmp_path / "gone").rename(tmp_path / "out-of-sight")
    monkeypatch.setenv("AMLORA_HOME", str(tmp_path / "other"))
    second, began = Cut(-1), time.monotonic()
    result = run_sequence(load_config(config), run_id="moved", progress=second)
    assert "  resumed after step 6" in second.lines and result["stages"][0]["version"] == 1
    assert not list((tmp_path / "copies" / "stages").glob("*/*")), "published: nobody needs the copies"
    assert time.monotonic() - began < 120
