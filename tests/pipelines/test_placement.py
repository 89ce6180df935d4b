"""How many workers a stage takes of those that are there, and which variables they get."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from amlora_dist.config.loading import load_config, validate_config
from amlora_dist.errors import FaultsError, UserError
from amlora_dist.training.stage_spec import StageWork
from pipelines.cluster import resources
from pipelines.cluster.resources import Demand
from pipelines.cluster.session import RayCluster, WorkerPlacement, _passed_on
from tests.tiny_config import write_config


def placement_of(config: Path, fewest: int) -> WorkerPlacement:
    demand = Demand(workers=fewest, parameters=1, trainable=1, stages=1, dtype="fp32", zero_stage=2)
    settings = load_config(config)
    return WorkerPlacement(
        settings.workers, config.parent, demand, batch_size=settings.training.batch_size, strategy=settings.placement
    )


def test_a_stage_takes_what_is_there_between_its_limits(tmp_path: Path) -> None:
    config = write_config(tmp_path, tasks=("colours",), workers=6, min_workers=2, placement="SPREAD")
    placement = placement_of(config, fewest=2)
    assert placement.strategy == "SPREAD"
    # The batch is 6: shares must be equal.
    assert {n: placement.fitting(n) for n in range(9)} == {0: 0, 1: 0, 2: 2, 3: 3, 4: 3, 5: 3, 6: 6, 7: 6, 8: 6}


def test_without_a_minimum_a_stage_takes_all_or_nothing(tmp_path: Path) -> None:
    placement = placement_of(write_config(tmp_path, tasks=("colours",), workers=3), fewest=3)
    assert [placement.fitting(n) for n in (2, 3, 4)] == [0, 3, 3]
    assert placement.strategy == "PACK"


def test_limits_and_storage_that_cannot_be_are_refused(tmp_path: Path) -> None:
    config = write_config(tmp_path, tasks=("colours",), workers=2)
    with pytest.raises(FaultsError, match=r"min_workers: found 3, expected at most workers, which is 2"):
        validate_config(config, ["min_workers=3"])
    with pytest.raises(FaultsError, match=r"storage: found .memory.*a URL that all workers reach"):
        validate_config(config, ["storage=memory://x"])


def test_a_cluster_that_grows_is_asked_for_what_is_waited_for_and_then_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    placement = placement_of(write_config(tmp_path, tasks=("colours",), workers=2), fewest=2)
    memory = {"memory": 64 << 30, "largest_node": 64 << 30}
    none, one = resources.Supply(cpus=0, gpus=0, **memory), resources.Supply(cpus=16, gpus=1, **memory)
    grows = iter([none, none, one, resources.Supply(cpus=32, gpus=2, **memory)])
    asked: list[Any] = []
    monkeypatch.setattr(resources, "in_cluster", lambda: next(grows))
    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", lambda bundles: asked.append(bundles))
    cluster = RayCluster(placement.workers, verbose=False)
    monkeypatch.setattr(cluster, "_start", lambda: None)
    cluster.ready(placement, again=True)
    assert asked == [[{"CPU": 1.0}] * 2, [{"GPU": 1.0}] * 2, []]

    monkeypatch.setattr(resources, "in_cluster", lambda: none)
    monkeypatch.setenv("AMLORA_RESOURCES_DEADLINE_S", "0.1")
    with pytest.raises(UserError, match="can never fit"):
        cluster.ready(placement, again=False)
    assert asked[3:] == [[{"CPU": 1.0}] * 2, []], "what was asked for is taken back"


def test_a_node_that_does_not_have_the_base_model_says_so(tmp_path: Path) -> None:
    where = {"source": "org/model", "revision": None, "path": str(tmp_path / "hub"), "digest": "", "encoder_decoder": False}
    work = SimpleNamespace(base=where | {"model_type": "llama"}, apart=False)
    with pytest.raises(UserError, match=r"'org/model' lies in .*hub where the driver runs.* nothing there.*HF_HOME"):
        StageWork.base_model(work)  # type: ignore[arg-type]
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "config.json").write_text("{}")
    assert StageWork.base_model(work).path == tmp_path / "hub"  # type: ignore[arg-type]


def test_settings_of_the_network_reach_workers_on_other_nodes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth0")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth1")
    for name in ("SOMETHING_ELSE", "HF_TOKEN"):
        monkeypatch.setenv(name, "x")
    passed = _passed_on()
    assert passed["NCCL_SOCKET_IFNAME"] == "eth0" and passed["GLOO_SOCKET_IFNAME"] == "eth1"
    assert "SOMETHING_ELSE" not in passed and "HF_TOKEN" not in passed, "a secret is not put where a dashboard shows it"
    # A job's own variables reach its workers already; naming them twice is a conflict to Ray.
    job = {"runtime_env": {"env_vars": {"NCCL_SOCKET_IFNAME": "eth0"}}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    assert set(passed) - set(_passed_on()) == {"NCCL_SOCKET_IFNAME"}
