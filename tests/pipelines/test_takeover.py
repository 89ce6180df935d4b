"""A published stage is taken over with everything that was published: what the store lost is put back, or made again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from amlora_dist.config.loading import load_config
from amlora_dist.registry.bank_folder import read_bank
from amlora_dist.registry.store import Store
from pipelines.runs.progress import Silent
from pipelines.runs.sequence import run_sequence
from tests.tiny_config import write_config

pytestmark = pytest.mark.integration

QUICK = ("training.epochs=1", "evaluation.untrained=false", "evaluation.oracle=false")


@pytest.fixture
def home(amlora_home: Path, empty_home: Path) -> Path:
    shutil.copytree(empty_home, amlora_home)
    return amlora_home


class Steps(Silent):
    """Counts the optimizer steps of a start."""

    done = 0

    def step(self, done: int, total: int, loss: float | None, tokens_per_second: float | None) -> None:
        self.done += 1


def run(config: Path, run_id: str, *overrides: str) -> tuple[dict[str, Any], int]:
    progress = Steps()
    result = run_sequence(load_config(config, [*QUICK, *overrides]), run_id=run_id, progress=progress)
    return result, progress.done


def artifacts(home: Path, run_id: str, name: str) -> list[Path]:
    return sorted((home / "artifacts" / run_id).rglob(name))


def pulled(home: Path, run_id: str, dest: Path) -> list[str]:
    bank = read_bank(Store.open(home).pull(f"models:/{run_id}@current", dest))
    return [entry.digest for entry in bank.manifest.adapters]


def test_artifacts_gone(tmp_path: Path, home: Path) -> None:
    """Looked at before anything is trained, and put back from what the storage has of the stage."""
    config = write_config(tmp_path, tasks=("colours", "shapes"))
    run(config, "two")
    before = pulled(home, "two", tmp_path / "before")
    kept = {path: path.read_bytes() for path in artifacts(home, "two", "*") if path.is_file() and "bank-e1" in str(path)}
    gone = [
        *artifacts(home, "two", "adapter_model.safetensors"), *artifacts(home, "two", "1-colours.safetensors"),
        *artifacts(home, "two", "MLmodel"), *artifacts(home, "two", "adapter_config.json"),
    ]  # fmt: skip
    for path in gone:
        path.unlink()
    result, steps = run(config, "two")
    assert [stage["version"] for stage in result["stages"]] == [1, 2] and steps == 0
    for path in gone:
        assert path.read_bytes() == kept[path], f"{path} is back, byte for byte"
    assert pulled(home, "two", tmp_path / "after") == before


def test_what_the_storage_has_not_either_is_published_again(tmp_path: Path, home: Path) -> None:
    config = write_config(tmp_path, tasks=("colours", "shapes"))
    run(config, "two")
    before = pulled(home, "two", tmp_path / "before")
    artifacts(home, "two", "1-colours")[0].joinpath("adapter_model.safetensors").unlink()
    shutil.rmtree(home / "storage")
    longer = write_config(tmp_path, tasks=("colours", "shapes", "sizes"))
    result, steps = run(longer, "two")
    assert steps == 8, "the first and the third: trained again, the first is what the bank of the second lacked"
    assert [stage["version"] for stage in result["stages"]] == [3, 2, 4]
    assert pulled(home, "two", tmp_path / "after")[:2] == before, "and comes out as it was"


@pytest.mark.parametrize("stored", [True, False], ids=["in the storage", "nowhere"])
def test_another_runs_stage_that_lost_its_files_is_no_stage_to_refer_to(
    stored: bool, tmp_path: Path, home: Path
) -> None:
    config = write_config(tmp_path, tasks=("colours",))
    run(config, "first")
    artifacts(home, "first", "router.safetensors")[0].unlink()
    if not stored:
        shutil.rmtree(home / "storage")
    result, steps = run(config, "second")
    assert steps == (0 if stored else 4)
    assert result["stages"][0]["reused_from"] is None, "published with its own files"
    assert len(pulled(home, "second", tmp_path / "bank")) == 1
    assert json.loads((tmp_path / "bank" / "manifest.json").read_text(encoding="utf-8"))["run_id"] == "second"
