"""Jobs on a really started head node, with a dashboard and a token: submit, attach, stop, resume."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from amlora_dist.errors import UserError
from pipelines.cluster.jobs import Jobs
from tests.ray_nodes import Nodes
from tests.tiny_config import write_config

pytestmark = [
    pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(400),
    pytest.mark.skipif(shutil.which("git") is None, reason="jobs with an ignore file need git, which is not installed"),
]  # fmt: skip


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    started = Nodes()
    try:
        started.head(cpus=2)
        yield started
    finally:
        started.close()


def amlora(nodes: Nodes, folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipelines.cli", *arguments, "--address", nodes.address]
    return subprocess.run(
        command, cwd=folder, env=nodes.environment | environment, capture_output=True, text=True, timeout=240
    )


def test_a_run_is_submitted_stopped_attached_to_and_resumed(nodes: Nodes, tmp_path: Path) -> None:
    config = write_config(tmp_path, tasks=("colours",))
    shared = tmp_path / "shared"
    options = ["run.yaml", f"storage={shared}", "training.epochs=400", "training.checkpoint_every=10", "--run-id", "job"]
    (tmp_path / ".gitignore").write_text("shared/\nmodel-llama/\n")
    assert config.name == "run.yaml"

    first = amlora(nodes, tmp_path, "submit", *options, "--no-wait")
    assert first.returncode == 0, first.stderr
    assert first.stdout.strip() == "job-1"
    deadline = time.monotonic() + 120
    while not list(shared.glob("stages/*/checkpoints/step-*/COMMIT")):
        assert time.monotonic() < deadline, amlora(nodes, tmp_path, "logs", "job").stdout
        time.sleep(0.3)

    other = amlora(nodes, tmp_path, "submit", *options, "training.l1=0.5", "--no-wait")
    assert other.returncode == 2 and "job-1 runs with another configuration: training.l1: " in other.stderr, other.stderr
    entry = json.loads(amlora(nodes, tmp_path, "jobs", "--json").stdout)[0]
    assert not {"mlflow", "storage", "data_dir"} & entry["configuration"].keys(), "whoever sees the cluster sees this"
    again = subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", "submit", *options, "--address", nodes.address],
        cwd=tmp_path, env=nodes.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert again.stderr is not None
    assert "job-1: runs already" in again.stderr.readline(), "no twin"
    stopped = amlora(nodes, tmp_path, "stop", "job")
    assert stopped.returncode == 0 and "job-1: " in stopped.stdout, stopped.stderr
    out, err = again.communicate(timeout=60)
    assert again.returncode == 143, (out, err)
    assert "checkpoint" in out

    done = amlora(nodes, tmp_path, "submit", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "job job-2: submitted" in done.stderr
    resumed = re.search(r"resumed after step (\d+)", done.stdout)
    assert resumed and int(resumed[1]) > 0, done.stdout
    listed = json.loads(amlora(nodes, tmp_path, "jobs", "--json").stdout)
    assert [(job["id"], job["run_id"], job["attempt"]) for job in listed] == [("job-1", "job", 1), ("job-2", "job", 2)]
    assert listed[1]["status"] == "SUCCEEDED" and listed[0]["status"] in ("STOPPED", "FAILED")
    assert amlora(nodes, tmp_path, "logs", "job-2").stdout.endswith(done.stdout[-200:])


def test_of_two_who_submit_at_the_same_moment_one_starts_the_job(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", nodes.environment["RAY_AUTH_TOKEN_PATH"])
    cluster, both = Jobs(nodes.address), threading.Barrier(2)

    def submit(_: int) -> bool:
        both.wait(timeout=30)
        return cluster.submit("twin-1", "echo once", {}, {"amlora_run_id": "twin"})

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(submit, range(2))) == [False, True]
    assert [(job.id, job.attempt) for job in cluster.of_run("twin")] == [("twin-1", 1)]
    lines: list[str] = []
    assert cluster.follow("twin-1", lines.append).status == "SUCCEEDED"
    assert "".join(lines).splitlines().count("once") == 1
    with pytest.raises(UserError, match=r"--runtime-env: .*pip"):
        cluster.submit("twin-2", "true", {"pip": 3}, {})


def test_the_jobs_exit_code_is_the_commands(nodes: Nodes, tmp_path: Path) -> None:
    write_config(tmp_path, tasks=("colours",))
    (tmp_path / ".gitignore").write_text("model-llama/\n")
    bad = amlora(
        nodes, tmp_path, "submit", "run.yaml", f"storage={tmp_path}/s", "adapters.targets=[nothing]", "--run-id", "bad"
    )
    assert bad.returncode == 2, bad.stdout + bad.stderr
    assert "matches no linear layer" in bad.stdout


def test_a_run_that_the_cluster_cannot_hold_is_not_submitted(nodes: Nodes, tmp_path: Path) -> None:
    write_config(tmp_path, tasks=("colours",))
    asked = ["submit", "run.yaml", f"storage={tmp_path}/s", "workers=3", "--run-id", "wide", "--no-wait"]
    refused = amlora(nodes, tmp_path, *asked)
    assert refused.returncode == 2 and "can never hold this run, nothing was submitted" in refused.stderr, refused.stderr
    assert "  - workers: 3 workers need 3 CPUs, the cluster has 2: lower `workers`, or add nodes" in refused.stderr
    assert "--env AMLORA_RESOURCES_DEADLINE_S=600" in refused.stderr
    known = json.loads(amlora(nodes, tmp_path, "jobs", "--json").stdout)
    assert "wide" not in [job["run_id"] for job in known]
    coming = amlora(nodes, tmp_path, *asked, "--env", "AMLORA_RESOURCES_DEADLINE_S=600")
    assert coming.returncode == 0 and coming.stdout.strip() == "wide-1", coming.stderr
    assert amlora(nodes, tmp_path, "stop", "wide").returncode == 0


@pytest.mark.crash  # for its time: a Tune search in a Ray job
def test_a_search_is_submitted_as_a_run_is(nodes: Nodes, tmp_path: Path) -> None:
    write_config(
        tmp_path, tasks=("colours",), search={"space": {"training.learning_rate": {"grid": [0.03, 0.01]}}},
        evaluation={"batch_size": 5, "cells": "last", "untrained": False, "oracle": False},
    )  # fmt: skip
    (tmp_path / ".gitignore").write_text("shared/\nmodel-llama/\n")
    done = amlora(nodes, tmp_path, "submit", "run.yaml", f"storage={tmp_path}/shared", "--search-id", "found")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "models:/found@champion" in done.stdout
    listed = json.loads(amlora(nodes, tmp_path, "jobs", "--json").stdout)
    assert [(job["id"], job["run_id"]) for job in listed if job["run_id"] == "found"] == [("found-1", "found")]


def test_what_cannot_work_is_refused_before_anything_is_sent(nodes: Nodes, tmp_path: Path) -> None:
    write_config(tmp_path, tasks=("colours",))
    refused = amlora(nodes, tmp_path, "submit", "run.yaml", RAY_AUTH_TOKEN="wrong" * 8)
    assert refused.returncode == 2 and "refuses the token of RAY_AUTH_TOKEN" in refused.stderr
    missing = amlora(nodes, tmp_path, "jobs", RAY_AUTH_TOKEN_PATH="", HOME=str(tmp_path))
    assert missing.returncode == 2 and "wants a token and there is none" in missing.stderr
    nowhere = amlora(nodes, tmp_path, "submit", "run.yaml", "--run-id", "x")
    assert nowhere.returncode == 2 and "storage: found nothing, expected a folder that all nodes share" in nowhere.stderr
    both = amlora(nodes, tmp_path, "submit", "run.yaml", "--run-id", "x", "--search-id", "y")
    assert both.returncode == 2 and "--run-id and --search-id: found both" in both.stderr
    nothing = amlora(nodes, tmp_path, "submit", "run.yaml", "--search-id", "y")
    assert nothing.returncode == 2 and "no `search` section" in nothing.stderr
    url = amlora(nodes, tmp_path, "submit", "run.yaml", "storage=memory://x", "--run-id", "x")
    assert url.returncode == 2 and "--env AMLORA_HOME=FOLDER" in url.stderr
    unknown = amlora(nodes, tmp_path, "stop", "nobody")
    assert unknown.returncode == 2 and "no job or run 'nobody'" in unknown.stderr


def test_the_doctor_looks_at_every_node(nodes: Nodes, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = amlora(
        nodes, tmp_path, "doctor", "--storage", str(tmp_path / "shared"), "--working-dir", "empty", "--tracking-uri",
        "http://127.0.0.1:9",
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    assert re.search(r"ok +nodes +1: ", done.stdout) and "WebSocket" not in done.stderr
    assert re.search(r"ok .* storage +.*shared: writable and shared", done.stdout)
    assert re.search(r"bad .* MLflow .*-> open the port", done.stdout)
    assert not list((tmp_path / "shared").iterdir()), "it takes its files away again"
