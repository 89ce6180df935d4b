"""What can never fit is refused before a worker starts, all of it at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from amlora_dist.config.loading import load_config
from amlora_dist.errors import UserError
from pipelines.cluster.resources import (
    GIB,
    Demand,
    Supply,
    deadline_s,
    least_demand,
    local_supply,
    require,
    shortfalls,
    supply_of,
)
from tests.tiny_config import write_config

SMALL = Demand(workers=2, parameters=135_000_000, trainable=1_000_000, stages=4, dtype="fp32", zero_stage=2)
LARGE = Demand(workers=16, parameters=70_000_000_000, trainable=100_000_000, stages=15, dtype="bf16", zero_stage=3)
ROOMY = Supply(cpus=64, gpus=0, memory=2000 * GIB, largest_node=200 * GIB, disk=1000 * GIB)


def test_what_fits_lacks_nothing() -> None:
    assert shortfalls(SMALL, ROOMY) == shortfalls(LARGE, ROOMY) == []
    assert shortfalls(SMALL, Supply()) == [], "what nobody knows is not held against a run"


@pytest.mark.parametrize(
    ("demand", "supply", "expected"),
    [
        (SMALL, Supply(cpus=1, gpus=0), ["workers: 2", "2 CPUs", "has 1", "add nodes"]),
        (LARGE, Supply(cpus=64, gpus=8), ["workers: 16", "16 GPUs", "has 8"]),
        (LARGE, Supply(cpus=64, gpus=0, memory=64 * GIB), ["workers: 16 need 13", "70,000,000,000", "64.0 GiB", "=3"]),
        (SMALL, Supply(cpus=2, gpus=0, memory=9 * GIB, largest_node=GIB // 2), ["on one node", "0.5 GiB", "larger nodes"]),
        (SMALL, Supply(disk=1 << 20, storage=Path("/data")), ["storage: /data", "1.0 MiB", "another disk"]),
    ],
    ids=["CPUs", "GPUs", "memory", "memory of one node", "disk"],
)
def test_what_is_missing_is_named_with_the_fix(demand: Demand, supply: Supply, expected: list[str]) -> None:
    (lines,) = shortfalls(demand, supply)
    assert all(part in lines for part in expected), lines


def test_all_shortfalls_are_reported_at_once() -> None:
    lines = shortfalls(SMALL, Supply(cpus=1, gpus=0, memory=GIB // 4, disk=0, storage=Path("/data")))
    assert [line.partition(":")[0] for line in lines] == ["workers", "workers", "storage"]
    with pytest.raises(UserError, match=r"never fit here:\n  - workers: .*CPUs.*\n  - workers: .*memory.*\n  - storage: "):
        require(lines)
    require([])


def test_with_gpus_the_weights_are_not_held_against_the_nodes_memory() -> None:
    assert shortfalls(LARGE, Supply(cpus=1, gpus=16, memory=GIB, largest_node=GIB)) == []


def test_zero_3_holds_the_weights_once(tmp_path: Path) -> None:
    whole = Demand(16, 70_000_000_000, 0, 1, "bf16", 2).memory
    parts = Demand(16, 70_000_000_000, 0, 1, "bf16", 3).memory
    assert whole - parts == 15 * 2 * 70_000_000_000


def test_this_machine_is_looked_at_where_its_storage_will_be(tmp_path: Path) -> None:
    supply = local_supply(tmp_path / "not" / "yet" / "there", alone=True)
    assert supply.disk and supply.memory and supply.cpus is None
    assert local_supply(tmp_path, alone=False).memory is None


def test_the_deadline_for_nodes_on_their_way_is_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert deadline_s(20) == 20
    monkeypatch.setenv("AMLORA_RESOURCES_DEADLINE_S", "600")
    assert deadline_s(20) == 600
    for value in ("soon", "-1", "inf", "nan"):
        monkeypatch.setenv("AMLORA_RESOURCES_DEADLINE_S", value)
        with pytest.raises(UserError, match="AMLORA_RESOURCES_DEADLINE_S"):
            deadline_s(20)


def test_what_a_configuration_needs_at_least_is_known_without_rows_or_weights(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path), ["workers=3", "min_workers=2", "adapters.rank=2"])
    demand = least_demand(config)
    assert (demand.workers, demand.stages, demand.dtype, demand.zero_stage) == (2, 3, "fp32", config.zero_stage)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model-llama")
    assert demand.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert 0 < demand.trainable < demand.parameters and demand.trainable % 2 == 0
    strange = load_config(tmp_path / "run.yaml", ["adapters.targets=[nothing]"])
    assert least_demand(strange).parameters == 0, "what is wrong with a model is for the run to say"
    elsewhere = load_config(tmp_path / "run.yaml", ["model.source=/mnt/of/the/cluster", "workers=3"])
    assert least_demand(elsewhere).parameters == 0, "what nobody knows is not held against a run"
    assert shortfalls(least_demand(elsewhere), supply_of([{"CPU": 1.0}])), "its workers are counted all the same"


def test_nodes_are_added_up() -> None:
    large = {"CPU": 4.0, "memory": 8.0 * GIB, "object_store_memory": 2.0 * GIB}
    small = {"CPU": 2.0, "GPU": 1.0, "memory": 1.0 * GIB}
    assert supply_of([large, small]) == Supply(cpus=6, gpus=1, memory=11 * GIB, largest_node=10 * GIB)
