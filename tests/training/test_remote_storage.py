"""Copies of checkpoints: another machine goes on from them, torn ones count for nothing, and a store that is away costs no
training."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from amlora_dist.config.loading import load_config
from amlora_dist.errors import FaultsError, UserError
from amlora_dist.training.checkpoint import StageProgress, newest_checkpoint, save_checkpoint
from amlora_dist.training.remote_storage import RemoteCheckpoints, RemoteStorage
from pipelines.runs.sequence import run_sequence
from tests.recording_progress import Watching
from tests.tiny_config import write_config

FINGERPRINT = "f" * 64


def save(folder: Path, step: int) -> Path:
    progress = StageProgress(fingerprint=FINGERPRINT, step=step, losses=[1.0] * step)
    return save_checkpoint(folder, {"master.a": torch.full((2, 3), float(step))}, progress)


def found(folder: Path) -> int | None:
    newest = newest_checkpoint(folder, FINGERPRINT, {"master.a": (2, 3)})
    return None if newest is None else newest[1].step


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_another_machine_goes_on_from_the_newest_copy(scheme: str, tmp_path: Path) -> None:
    mirror = RemoteCheckpoints(f"{scheme}://{tmp_path}/copies")
    RemoteStorage(f"{scheme}://{tmp_path}/copies", tmp_path).check()
    for step in (1, 2, 3):
        mirror.upload(save(tmp_path / "here", step))
    assert mirror._names() == ["step-00000002", "step-00000003"], "as many as are kept here"
    there = tmp_path / "there"
    mirror.fetch_newest(there)
    assert found(there) == 3 and [one.name for one in there.glob("step-*")] == ["step-00000003"]
    save(there, 4)
    mirror.fetch_newest(there)
    assert found(there) == 4, "what is newer stays"
    mirror.forget()
    mirror.forget()
    mirror.fetch_newest(tmp_path / "third")
    assert found(tmp_path / "third") is None


def test_a_torn_copy_is_passed_over_and_a_damaged_one_counts_for_nothing(tmp_path: Path) -> None:
    mirror = RemoteCheckpoints(f"file://{tmp_path}/copies")
    for step in (1, 2):
        mirror.upload(save(tmp_path / "here", step))
    (tmp_path / "copies" / "step-00000002" / "COMMIT").unlink()
    mirror.fetch_newest(tmp_path / "there")
    assert found(tmp_path / "there") == 1
    (tmp_path / "copies" / "step-00000001" / "state.safetensors").write_bytes(b"not a tensor")
    mirror.fetch_newest(tmp_path / "third")
    assert found(tmp_path / "third") is None


def test_a_store_that_is_away_costs_no_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    mirror = RemoteCheckpoints(f"file://{tmp_path}/file/copies")
    mirror.upload(save(tmp_path / "here", 1))
    mirror.fetch_newest(tmp_path / "here")
    mirror.forget()
    assert found(tmp_path / "here") == 1 and "going on without" in caplog.text
    with pytest.raises(UserError, match="storage: cannot write to file://"):
        RemoteStorage(mirror.url, tmp_path).check()


@pytest.mark.parametrize(
    ("url", "workers", "message"),
    [
        ("memory://x", 2, "a URL that all workers reach"),
        ("file:///mnt/x", 2, None),
        ("s4://bucket/x", 0, "a URL that fsspec knows"),
        ("memory://x", 0, None),
    ],
)
def test_a_url_is_taken_where_it_can_work(url: str, workers: int, message: str | None, tmp_path: Path) -> None:
    config = write_config(tmp_path, workers=workers, storage=url)
    if message is None:
        assert load_config(config).storage == url
        return
    with pytest.raises(FaultsError, match=message):
        load_config(config)


def test_a_search_that_shares_nothing_needs_a_folder_for_each_trial(tmp_path: Path) -> None:
    search = {"space": {"adapters.rank": {"choice": [2, 4]}}, "share_stages": False}
    config = write_config(tmp_path, workers=2, storage="file:///mnt/x", search=search)
    with pytest.raises(FaultsError, match=r"search.share_stages: found false, expected true where storage is a URL"):
        load_config(config)
    assert load_config(config, ["workers=0"]).search is not None


def test_what_is_finished_is_sent_once_and_brought_whole(tmp_path: Path) -> None:
    here, there = (RemoteStorage(f"file://{tmp_path}/copies", tmp_path / home) for home in ("here", "there"))
    trained = tmp_path / "here" / "stages" / "f" / "trained"
    trained.mkdir(parents=True)
    (trained / "COMMIT").write_text("1")
    (trained / "adapter").write_text("a")
    (tmp_path / "here" / "features").write_text("one file")
    here.upload(trained)
    (trained / "adapter").write_text("b")
    here.upload(trained)  # the same mark: the same content
    here.upload(tmp_path / "here" / "features")
    mine = tmp_path / "there" / "stages" / "f" / "trained"
    there.fetch(mine, (mine / "COMMIT").is_file)
    assert (mine / "adapter").read_text() == "a"
    there.fetch(tmp_path / "there" / "features", lambda: False)
    assert (tmp_path / "there" / "features").read_text() == "one file"
    (mine / "adapter").write_text("damaged")
    there.fetch(mine, (mine / "COMMIT").is_file)
    assert (mine / "adapter").read_text() == "damaged", "whoever asks says what is whole"
    there.fetch(mine, lambda: False)
    assert (mine / "adapter").read_text() == "a"

    (tmp_path / "copies" / "stages" / "f" / "trained" / "COMMIT").unlink()
    other = tmp_path / "there" / "stages" / "f" / "other"
    third = RemoteStorage(f"file://{tmp_path}/copies", tmp_path / "third")
    third.fetch(tmp_path / "third" / "stages" / "f" / "trained", lambda: False)
    there.fetch(other, lambda: False)
    assert not other.exists() and not (tmp_path / "third" / "stages" / "f" / "trained").exists(), "torn, or never there"


@pytest.mark.integration
def test_a_stage_goes_on_where_a_machine_that_is_gone_left_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = f"sqlite:///{tmp_path}/shared.db"
    config = write_config(
        tmp_path, tasks=("colours",), storage=f"file://{tmp_path}/copies", mlflow={"tracking_uri": store},
        evaluation={"batch_size": 5, "cells": "last", "untrained": False, "oracle": False},
    )  # fmt: skip
    monkeypatch.setenv("AMLORA_HOME", str(tmp_path / "gone"))
    with pytest.raises(KeyboardInterrupt):
        run_sequence(load_config(config), run_id="moved", progress=Watching(after=7))
    (tmp_path / "gone").rename(tmp_path / "out-of-sight")
    monkeypatch.setenv("AMLORA_HOME", str(tmp_path / "other"))
    second, began = Watching(), time.monotonic()
    result = run_sequence(load_config(config), run_id="moved", progress=second)
    assert "  resumed after step 6" in second.lines and result["stages"][0]["version"] == 1
    assert not list((tmp_path / "copies" / "stages").glob("*/*")), "published: nobody needs the copies"
    assert time.monotonic() - began < 120
