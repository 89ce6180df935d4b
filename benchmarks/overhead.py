"""What the product costs around a stage: tokens per second against a plain loop, and where the seconds between steps go.

A sequence of two tasks is run by ``amlora run`` on two workers; the same model, adapter, rows and batches are then
trained by a loop in plain PyTorch + DeepSpeed, two processes with gloo, without Ray, MLflow, checkpoints and progress.

    python benchmarks/overhead.py            # the demo's model and rows
    python benchmarks/overhead.py --quick    # a tiny random model
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
RANKS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny random model: shows that it runs, no figure")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=3, help="of the plain loop; the fastest counts")
    parser.add_argument("--loop", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.loop:
        plain_loop(json.loads(arguments.loop))
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        config, overrides = quick_run(folder) if arguments.quick else (REPOSITORY / "configs" / "demo.yaml", TWO_TASKS)
        told = measure_run(folder, config, overrides)
        plain = max((measure_loop(folder, told["work"]) for _ in range(arguments.rounds)), key=lambda r: r["rate"])
    stages = told["stages"]
    rate = max(stage["tokens_per_second"] for stage in stages)
    out = {
        "tokens_per_second": {"amlora": rate, "plain": plain["rate"], "ratio": rate / plain["rate"]},
        "first_step_after_seconds": told["first_step"],
        "first_step_split": told["start"],
        "between_stages_seconds": told["between"],
        "between_stages_split": told["between_split"],
    }
    print(json.dumps(out, indent=2) if arguments.json else shown(out))


TWO_TASKS = ["tasks=[helpdesk/email_route,helpdesk/chat_mood]", "evaluation.untrained=false", "evaluation.oracle=false"]


def quick_run(folder: Path) -> tuple[Path, list[str]]:
    """The tests' tiny model and tasks."""
    sys.path.insert(0, str(REPOSITORY))
    from tests.tiny_folder import write_config

    return write_config(folder, tasks=("colours", "shapes"), workers=RANKS, deepspeed={"zero_stage": 2}), []


def shown(out: dict[str, Any]) -> str:
    lines = []
    for key, value in out.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {number:,.2f}" for name, number in value.items())
        else:
            value = f"{value:,.1f}"
        lines.append(f"{key.replace('_', ' ')}: {value}")
    return "\n".join(lines)


def measure_run(folder: Path, config: Path, overrides: list[str]) -> dict[str, Any]:
    """Run it, and read the times from the workers' own progress files."""
    home = folder / "home"
    command = [sys.executable, "-m", "pipelines.cli", "run", str(config), *overrides, "--run-id", "overhead", "--json"]
    environment = os.environ | {"AMLORA_HOME": str(home), "PYTHONPATH": str(REPOSITORY)}
    began = time.time()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    result = json.loads(done.stdout)
    events = []
    for stage in result["stages"]:
        file = home / "storage" / "stages" / stage["fingerprint"] / "progress.jsonl"
        events.append([json.loads(line) for line in file.read_text().splitlines()])

    def at(stage: int, kind: str, last: bool = False) -> float:
        found = [event["time"] for event in events[stage] if event["kind"] == kind]
        return float(found[-1] if last else found[0])

    def split(stage: int, start: float) -> dict[str, float]:
        worker = next(event for event in events[stage] if event["kind"] == "worker")
        first = next(event for event in events[stage] if event["kind"] == "step")
        return {
            "driver": worker["process"] - start,
            "Ray starts the worker": worker["entered"] - worker["process"],
            "imports in the worker": worker["time"] - worker["entered"],
            "model and engine": at(stage, "trainable") - worker["time"],
            "features of the rows": at(stage, "statistics") - at(stage, "trainable"),
            "first step": first["time"] - at(stage, "statistics"),
        }

    left = max(event["time"] for event in events[0])
    return {
        "stages": result["stages"],
        "work": {"config": str(config), "overrides": overrides, "home": str(home)},
        "first_step": at(0, "step") - began,
        "start": split(0, began),
        "between": at(1, "step") - left,
        "between_split": split(1, left),
    }


def measure_loop(folder: Path, work: dict[str, Any]) -> dict[str, float]:
    """The plain loop in fresh processes."""
    with tempfile.TemporaryDirectory(dir=folder) as meeting:
        started = []
        for rank in range(RANKS):
            environment = os.environ | {
                "AMLORA_HOME": work["home"], "PYTHONPATH": str(REPOSITORY), "DS_ACCELERATOR": "cpu",
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "DEEPSPEED_LOG_LEVEL": "error",
            }  # fmt: skip
            told = json.dumps(work | {"rank": rank, "meet": meeting})
            command = [sys.executable, __file__, "--loop", told]
            started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
        out = [process.communicate(timeout=3600)[0] for process in started]
    if any(process.returncode for process in started):
        sys.exit("the plain loop failed, see above")
    return dict(json.loads(out[0].strip().splitlines()[-1]))


def plain_loop(work: dict[str, Any]) -> None:
    """One rank: load, adapt, and step through the first task's rows; prints tokens per second over all ranks."""
    import deepspeed
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F

    from amlora_dist.adapters.inject import NewAdapter, inject
    from amlora_dist.adapters.targets import default_router_layer, find_targets
    from amlora_dist.base_model import load_model, load_tokenizer
    from amlora_dist.config import load_config
    from amlora_dist.tasks.batches import collate, encode, epoch_order
    from amlora_dist.tasks.prompts import template_for
    from pipelines.materials import gather_materials

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // RANKS))
    dist.init_process_group("gloo", init_method=f"file://{work['meet']}/meet", rank=work["rank"], world_size=RANKS)
    config = load_config(work["config"], work["overrides"])
    materials = gather_materials(config, Path(work["home"]))
    name, spec = next(iter(materials.specs.items()))
    tokenizer = load_tokenizer(materials.base.path)
    rows = encode(
        materials.data[name].rows["train"], spec, template_for(spec, spec.prompt_style), tokenizer,
        max_length=int(spec.max_length or 512), encoder_decoder=False,
    )  # fmt: skip
    dtype = torch.bfloat16 if materials.dtype == "bf16" else torch.float32
    model = load_model(materials.base, dtype=dtype, attention=config.model.attention)
    targets = find_targets(model, config.adapters, default_router_layer(model))
    new = NewAdapter(task=name, rank=config.adapters.rank, alpha=config.adapters.alpha, seed=0)
    trainable = list(inject(model, targets, [], new=new).trainable().values())
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    size = config.training.batch_size // RANKS
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(trainable, lr=config.training.learning_rate), dist_init_required=False,
        config={
            "train_micro_batch_size_per_gpu": size, "gradient_clipping": config.training.clip,
            "zero_optimization": {"stage": config.zero_stage}, "bf16": {"enabled": dtype == torch.bfloat16},
            "zero_allow_untested_optimizer": True, "steps_per_print": 10**9,
        },
    )  # fmt: skip
    gate = torch.ones(size, 1)
    began, tokens, warm = 0.0, 0, 2
    for epoch in range(config.training.epochs):
        order = epoch_order(len(rows), seed=0, stage=name, epoch=epoch)
        for start in range(0, len(order) - config.training.batch_size + 1, config.training.batch_size):
            if warm:
                warm -= 1
                began, tokens = time.monotonic(), 0
            batch = sorted((rows[i] for i in order[start : start + config.training.batch_size]), key=lambda r: len(r.prompt))
            mine = batch[work["rank"] :: RANKS]
            tensors = collate(mine, pad_id=tokenizer.pad_token_id, side="left")
            labels = tensors.pop("labels")
            keep = max(len(row.target) for row in mine) + 1
            logits = engine(**tensors, task_gate=gate, use_cache=False, logits_to_keep=keep).logits[:, -keep:-1]
            loss = F.cross_entropy(logits.flatten(0, 1).float(), labels[:, -(keep - 1) :].flatten(), ignore_index=-100)
            engine.backward(loss)
            engine.step()
            tokens += sum(len(row.prompt) + len(row.target) for row in batch)
    print(json.dumps({"rate": tokens / (time.monotonic() - began)}))


if __name__ == "__main__":
    main()
