"""Trackers besides MLflow, through their own libraries: what they keep is what the run has."""

from __future__ import annotations

import json
import logging
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event

from amlora_dist.config.loading import load_config
from amlora_dist.errors import FaultsError
from amlora_dist.registry import tags
from amlora_dist.registry.store import Store
from pipelines.runs.progress import Silent
from pipelines.runs.sequence import run_sequence
from pipelines.runs.trackers import StageFigures, write_stage
from tests.tiny_config import write_config

FIGURES = StageFigures(1, "colours", [2.0, 1.0], {"accuracy/colours": 0.5})


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar of a TensorBoard folder: its records are a length, its checksum, an event and its checksum."""
    found: dict[str, list[tuple[int, float]]] = {}
    for file in sorted(folder.glob("events.out.tfevents.*")):
        content = file.read_bytes()
        while content:
            (size,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + size])
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
            content = content[16 + size :]
    return found


class Tags:
    """A run's tags, as a store keeps them."""

    def __init__(self, run_id: str = "r") -> None:
        self.values: dict[str, str] = {tags.RUN_ID: run_id}

    def run_tags(self, run: str) -> dict[str, str]:
        return self.values

    def set_tags(self, run: str, values: dict[str, str]) -> None:
        self.values |= values


@pytest.mark.integration
def test_tensorboard_has_each_stage_s_loss_and_the_scores_once_whatever_the_starts(
    tmp_path: Path, amlora_home: Path, empty_home: Path
) -> None:
    shutil.copytree(empty_home, amlora_home)
    config = load_config(write_config(tmp_path, tasks=("colours",), tracking=["tensorboard"]))
    result, again = (run_sequence(config, run_id="tracked", progress=Silent()) for _ in range(2))
    found = scalars(amlora_home / "tensorboard" / "tracked")
    store = Store.open(amlora_home)
    stages = store.find_runs({tags.RUN_ID: "tracked", tags.KIND: "stage"})
    (stage,) = stages
    losses = store.metric_history(stage.run, "loss")
    assert [step for step, _ in found["loss/1-colours"]] == [step for step, *_ in losses]
    assert [value for _, value in found["loss/1-colours"]] == pytest.approx([value for _, value, _ in losses], rel=1e-6)
    (scored,) = found["accuracy/colours"]
    assert scored == (1, pytest.approx(result["accuracy_matrix"][0][0]))
    assert again["accuracy_matrix"] == result["accuracy_matrix"]


def test_a_stage_that_an_earlier_start_did_not_come_to_is_written_by_the_next_one(tmp_path: Path) -> None:
    store: Any = Tags()
    given = (store, "run", tmp_path, {}, FIGURES)
    write_stage([], *given)
    assert not list(tmp_path.iterdir())
    for _ in range(2):
        write_stage(["tensorboard"], *given)
    assert scalars(tmp_path / "tensorboard" / "r") == {
        "loss/1-colours": [(1, 2.0), (2, 1.0)], "accuracy/colours": [(1, 0.5)]
    }  # fmt: skip
    assert store.values == {tags.RUN_ID: "r", tags.TRACKED: "tensorboard"}


def test_a_tracker_that_fails_is_warned_about_and_tried_again_the_next_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store: Any = Tags()
    (tmp_path / "tensorboard").write_text("a file where a folder should be")
    with caplog.at_level(logging.WARNING):
        write_stage(["tensorboard"], store, "run", tmp_path, {}, FIGURES)
    assert "tracking: tensorboard: stage 1 was not written" in caplog.text and tags.TRACKED not in store.values


def test_a_tracker_that_is_not_installed_is_a_fault_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_config(tmp_path, tasks=("colours",), tracking=["tensorboard", "wandb"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None if name == "wandb" else object())
    with pytest.raises(FaultsError, match=r"tracking\[1\]: found wandb, .* that is installed \(.*pip install wandb\)"):
        load_config(file)
    with pytest.raises(FaultsError, match=r"tracking"):
        load_config(file, ["tracking=[mlflow]"])


@pytest.fixture
def offline(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a process that has wandb and no account."""
    pytest.importorskip("wandb", reason="wandb is not installed: pip install 'amlora-dist[wandb]'")
    yield os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CONFIG_DIR": str(tmp_path / "settings")}


@pytest.mark.integration
def test_wandb_keeps_a_run_of_the_same_name(offline: dict[str, str], tmp_path: Path) -> None:
    code = (
        "import sys, json, pathlib; from tests.pipelines.test_trackers import Tags, FIGURES; "
        "from pipelines.runs.trackers import write_stage; store = Tags('r/1'); "
        "write_stage(['wandb'], store, 'run', pathlib.Path(sys.argv[1]), {'seed': 1}, FIGURES); "
        "print(json.dumps(store.values))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=offline, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0 and json.loads(done.stdout.splitlines()[-1])[tags.TRACKED] == "wandb", done.stderr
    (file,) = (tmp_path / "wandb").rglob("run-r-1.wandb")
    content = file.read_bytes()
    assert b"accuracy/colours" in content and b"loss/1-colours" in content
