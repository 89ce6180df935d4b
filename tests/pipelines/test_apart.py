"""Workers that share no folder with the driver: all that they have in common is a URL."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from amlora_dist.config.loading import load_config
from amlora_dist.errors import UserError
from amlora_dist.training.failures import StoppedError
from pipelines.runs.progress import Progress, Silent
from pipelines.runs.sequence import run_sequence
from tests.pipelines.crash_cases import within_one_row
from tests.recording_progress import Watching
from tests.tiny_config import write_config

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(900)]

SAME = ("accuracy_matrix", "ranked_accuracy_matrix", "untrained", "oracle")


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """``AMLORA_HOME`` of the workers, the first of which dies when it has written its third checkpoint."""
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    variables = {
        "AMLORA_HOME": str(tmp_path / "theirs"), "AMLORA_CRASH": "checkpoint_committed:kill:3",
        "AMLORA_CRASH_ONCE": str(tmp_path / "crashed"),
    }  # fmt: skip
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR", runtime_env={"env_vars": variables}
    )
    yield tmp_path / "theirs"
    ray.shutdown()


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def run(config: Path, run_id: str, progress: Progress, *overrides: str) -> dict[str, Any]:
    return run_sequence(load_config(config, list(overrides)), run_id=run_id, progress=progress)


def test_a_url_is_all_that_workers_and_driver_need_to_share(theirs: Path, tmp_path: Path, amlora_home: Path) -> None:
    config = write_config(tmp_path, tasks=("colours", "shapes"), workers=2, deepspeed={"zero_stage": 2})
    watching = Watching()
    apart = run(config, "apart", watching, f"storage=file://{tmp_path}/bucket")
    assert "  resumed after step 6" in watching.lines, "after the death of a worker"

    stage = apart["stages"][0]["fingerprint"]
    assert (theirs / "storage" / "stages" / stage / "checkpoints").is_dir(), "workers have folders of their own"
    assert not (amlora_home / "storage" / "stages" / stage / "checkpoints").exists(), "and the driver has its own"
    copied = {path.name for path in (tmp_path / "bucket").rglob("*") if path.is_file()}
    assert {"COMMIT", "adapter_model.safetensors", "summary.json", "predictions.jsonl"} <= copied
    assert not list((tmp_path / "bucket").glob("stages/*/checkpoints")), "published: nobody needs checkpoints"

    os.environ["AMLORA_HOME"] = str(tmp_path / "alone")
    alone = run(config, "alone", Silent(), "workers=0")
    assert alone["stages"][0]["fingerprint"] == stage
    assert all(within_one_row(alone[key], apart[key]) for key in ("accuracy_matrix", "ranked_accuracy_matrix"))
    (tmp_path / "in-the-way").write_text("no folder")
    with pytest.raises(UserError, match="storage: cannot write to file://"):
        run(config, "nowhere", Silent(), f"storage=file://{tmp_path}/in-the-way/bucket")


@pytest.mark.crash
def test_what_was_stopped_and_killed_ends_as_with_a_shared_folder(theirs: Path, tmp_path: Path, amlora_home: Path) -> None:
    config = write_config(
        tmp_path, tasks=("colours", "shapes"), workers=2, deepspeed={"zero_stage": 2},
        training={"epochs": 40, "batch_size": 6, "learning_rate": 1e-2, "warmup_steps": 2, "checkpoint_every": 10},
    )  # fmt: skip
    first, second = Watching(after=45, then=terminate), Watching()
    with pytest.raises(StoppedError) as stopped:
        run(config, "apart", first, f"storage=file://{tmp_path}/bucket")
    assert stopped.value.exit_code == 143 and "  resumed after step 30" in first.lines, "after a death"
    apart = run(config, "apart", second, f"storage=file://{tmp_path}/bucket")
    assert any(line.startswith("  resumed after step ") for line in second.lines), "where the signal stopped it"

    (amlora_home / "mlflow.db").rename(tmp_path / "mlflow.db")  # so that nothing is taken over from the run above
    shared = run(config, "shared", Silent(), f"storage={tmp_path}/folder")
    assert {key: apart[key] for key in SAME} == {key: shared[key] for key in SAME}, "equal number for number"
    below = f"stages/{apart['stages'][0]['fingerprint']}/trained/adapter_model.safetensors"
    assert (amlora_home / "storage" / below).read_bytes() == (tmp_path / "folder" / below).read_bytes(), "bit for bit"
