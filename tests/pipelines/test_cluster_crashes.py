"""A head and two worker nodes with addresses of their own: a node dies in mid-stage, then the head; the run goes on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from amlora_dist.training.remote_storage import file_system
from tests.ray_nodes import REPOSITORY, Nodes
from tests.tiny_config import write_config

pytestmark = [pytest.mark.crash, pytest.mark.timeout(3600)]

SAME = ("accuracy_matrix", "ranked_accuracy_matrix", "untrained", "oracle")


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    started = Nodes()
    try:
        yield started
    finally:
        started.close()


def bring_up(nodes: Nodes) -> None:
    nodes.head(cpus=0)
    nodes.worker("first", 1, "127.0.0.2")
    nodes.joined(2)  # one after the other: on one machine they would claim the same sockets
    nodes.worker("second", 1, "127.0.0.3")
    nodes.joined(3)


def submit(nodes: Nodes, folder: Path, run_id: str, *more: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, "-m", "pipelines.cli", "submit", "run.yaml", f"storage={folder / run_id}", "--run-id", run_id,
        "--address", nodes.address, *more,
    ]  # fmt: skip
    return subprocess.run(command, cwd=folder, env=nodes.environment, capture_output=True, text=True, timeout=1500)


def wait_for(there: Callable[[], bool], what: str, deadline_s: float = 600.0) -> None:
    deadline = time.monotonic() + deadline_s
    while not there():
        assert time.monotonic() < deadline, f"waited {deadline_s:.0f} s for {what}"
        time.sleep(0.2)


def checkpoints(folder: Path) -> dict[str, int]:
    """Newest committed step of each stage."""
    out: dict[str, int] = {}
    for commit in folder.glob("stages/*/checkpoints/step-*/COMMIT"):
        stage, step = commit.parents[2].name, int(commit.parent.name.removeprefix("step-"))
        out[stage] = max(step, out.get(stage, 0))
    return out


def outcome(folder: Path) -> dict[str, Any]:
    """Matrix and adapters of a run, from its store on the shared folder."""
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", "show", folder.name, "--json"],
        env=Nodes.plain_environment() | {"AMLORA_HOME": str(folder / "home")}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    adapters = []
    for stage in result["stages"]:
        record = folder / "stages" / stage["fingerprint"] / "trained" / "training.json"
        adapters.append(json.loads(record.read_text())["adapter"]["digest"])
    return {key: result[key] for key in SAME} | {"adapters": adapters}


def write_tiny(folder: Path) -> None:
    write_config(
        folder, tasks=("colours", "shapes"), workers=2, placement="SPREAD", deepspeed={"zero_stage": 2},
        training={"epochs": 60, "batch_size": 6, "learning_rate": 1e-2, "warmup_steps": 2, "checkpoint_every": 5},
    )  # fmt: skip


def write_demo(folder: Path) -> None:
    """The demo as it is shipped, with checkpoints often enough to die between two of a stage."""
    config = yaml.safe_load((REPOSITORY / "configs" / "demo.yaml").read_text(encoding="utf-8"))
    config["training"]["checkpoint_every"] = 4
    config["placement"] = "SPREAD"
    (folder / "run.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


@pytest.mark.parametrize(("write", "first_task"), [(write_tiny, "colours"), (write_demo, "helpdesk/email_route")])
def test_a_lost_node_and_a_lost_head_change_nothing(
    write: Callable[[Path], None], first_task: str, nodes: Nodes, tmp_path: Path
) -> None:
    write(tmp_path)
    (tmp_path / ".gitignore").write_text("calm/\ndisturbed/\nmodel-llama/\nhome/\n")
    bring_up(nodes)
    calm = submit(nodes, tmp_path, "calm")
    assert calm.returncode == 0, calm.stdout + calm.stderr

    folder = tmp_path / "disturbed"
    assert submit(nodes, tmp_path, "disturbed", "--no-wait").returncode == 0
    wait_for(lambda: bool(checkpoints(folder)), "a checkpoint of stage 1")
    nodes.kill("second")
    nodes.worker("third", 1, "127.0.0.4")
    wait_for(lambda: len(checkpoints(folder)) == 2, "a checkpoint of stage 2")
    for name in ("head", "first", "third"):
        nodes.kill(name)
    before = checkpoints(folder)

    bring_up(nodes)
    resumed = submit(nodes, tmp_path, "disturbed")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "resumed after step" in resumed.stdout and f"stage 1 {first_task}: " in resumed.stdout
    after = checkpoints(folder)
    assert all(after[stage] >= step for stage, step in before.items())
    assert outcome(folder) == outcome(tmp_path / "calm"), "equal bit for bit"


def test_an_elastic_stage_goes_on_with_the_workers_that_are_left(nodes: Nodes, tmp_path: Path) -> None:
    write_config(
        tmp_path, tasks=("colours",), workers=2, min_workers=1, deepspeed={"zero_stage": 3},
        training={"epochs": 60, "batch_size": 6, "learning_rate": 1e-2, "warmup_steps": 2, "checkpoint_every": 5},
    )  # fmt: skip
    (tmp_path / ".gitignore").write_text("elastic/\nmodel-llama/\nhome/\n")
    bring_up(nodes)
    folder = tmp_path / "elastic"
    assert submit(nodes, tmp_path, "elastic", "--no-wait").returncode == 0
    wait_for(lambda: bool(checkpoints(folder)), "a checkpoint")
    nodes.kill("second")
    done = submit(nodes, tmp_path, "elastic")  # attaches
    assert done.returncode == 0, done.stdout + done.stderr
    assert "trying again from the last checkpoint" in done.stdout and "resumed after step" in done.stdout
    (record,) = folder.glob("stages/*/trained/training.json")
    assert json.loads(record.read_text())["trained_with"]["workers"] == 1


@pytest.mark.parametrize("scheme", ["file", "s3"])
def test_nodes_that_share_nothing_but_a_url_survive_the_loss_of_one(scheme: str, nodes: Nodes, tmp_path: Path) -> None:
    if scheme == "s3":
        pytest.importorskip("s3fs", reason="s3:// needs the package s3fs")
        if not os.environ.get("AWS_ENDPOINT_URL"):
            pytest.skip("s3:// needs a server: AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY")
    url = f"file://{tmp_path}/bucket" if scheme == "file" else f"s3://amlora-{uuid.uuid4().hex[:8]}/runs"
    write_tiny(tmp_path)
    nodes.head(cpus=0)
    # Rank 0 dies with a checkpoint that nobody has copied: on its node it is, on the other one it is not.
    dies = {"AMLORA_CRASH": "checkpoint_committed:kill:2", "AMLORA_CRASH_ONCE": str(tmp_path / "crashed")}
    for place, name in enumerate(("first", "second"), start=2):
        nodes.worker(name, 1, f"127.0.0.{place}", AMLORA_HOME=str(tmp_path / name), **dies)
        nodes.joined(place)
    command = [
        sys.executable, "-m", "pipelines.cli", "run", str(tmp_path / "run.yaml"), f"storage={url}",
        "--run-id", "apart",
    ]  # fmt: skip
    environment = nodes.environment | {"RAY_ADDRESS": f"127.0.0.1:{nodes.gcs_port}", "AMLORA_HOME": str(tmp_path / "driver")}
    log = (tmp_path / "log").open("wb")
    running = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=subprocess.STDOUT)
    system, root = file_system(url)

    def copied() -> bool:
        assert running.poll() is None, (tmp_path / "log").read_text()
        marks = system.glob(f"{root}/stages/*/checkpoints/step-*/COMMIT")
        return any(int(mark.split("/")[-2].removeprefix("step-")) >= 30 for mark in marks)

    wait_for(copied, "copies of checkpoints after the first death")
    nodes.kill("first")  # the node of rank 0, most likely: whoever wrote checkpoints, they are at the URL
    shutil.rmtree(tmp_path / "first")
    nodes.worker("third", 1, "127.0.0.4", AMLORA_HOME=str(tmp_path / "third"))
    assert running.wait(timeout=900) == 0, (tmp_path / "log").read_text()
    log = (tmp_path / "log").read_text()
    assert log.count("trying again from the last checkpoint") >= 2 and log.count("resumed after step") >= 2
    for home in ("second", "third"):
        assert list((tmp_path / home / "storage").glob("stages/*/trained/COMMIT")), "parents were brought to the node"

    other_store = f"mlflow.tracking_uri=sqlite:///{tmp_path}/calm.db"
    calm = subprocess.run(
        [*command[:5], f"storage={tmp_path}/calm", other_store, *command[6:]],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert calm.returncode == 0, calm.stdout + calm.stderr
    results = []
    for uri in ([], ["--tracking-uri", f"sqlite:///{tmp_path}/calm.db"]):
        shown = subprocess.run(
            [*command[:3], "show", "apart", "--json", *uri], env=environment, capture_output=True, text=True, timeout=120
        )
        assert shown.returncode == 0, shown.stderr
        results.append({key: json.loads(shown.stdout)[key] for key in SAME})
    assert results[0] == results[1], "equal to a run that nothing happened to, over a shared folder"
