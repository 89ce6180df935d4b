"""Four crash points through Ray and DeepSpeed in one run; ``make test-crash`` has all of them, one by one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.pipelines.crash_cases import calm, matrix_config, outcome_of, spawned

DEATHS = ("step_done:kill:3", "training_ended:raise", "artifacts_uploaded:kill", "version_registered:raise:2")
"""In stage 1 a worker at its third step, a worker when it has trained, the driver when it has uploaded; in stage 2 the
driver when it has registered the version."""


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_that_died_four_times_through_ray_ends_with_the_undisturbed_result(empty_home: Path, tmp_path: Path) -> None:
    config = matrix_config(tmp_path / "config", workers=2, deepspeed={"zero_stage": 2})
    undisturbed = calm(spawned, tmp_path / "calm", config, empty_home)
    home, once = tmp_path / "home", tmp_path / "died"
    shutil.copytree(empty_home, home)
    environment = {"AMLORA_HOME": str(home), "AMLORA_CRASH": ",".join(DEATHS), "AMLORA_CRASH_ONCE": str(once)}
    starts = []
    for number in (1, 2, 3):
        starts.append(spawned(tmp_path / f"start-{number}", "run", str(config), "--run-id", "r", "--json", **environment))
        starts[-1].wait(800)
    outputs = [start.stderr for start in starts]
    assert [start.poll() for start in starts] == [-9, 1, 0], outputs
    assert outputs[0].count("trying again from the last checkpoint") == 2, outputs[0]
    assert sorted(file.name for file in tmp_path.glob("died.*")) == sorted(
        "died." + death.partition(":")[0] for death in DEATHS
    )
    assert outcome_of(home, starts[-1].stdout) == undisturbed
