"""What the product costs around a stage: tokens per second against a plain loop, and where the seconds between steps go.

A sequence of two tasks is run by ``amlora run`` on two workers; the same model, adapter, rows and batches are then
trained by a loop in plain PyTorch + DeepSpeed, two processes with gloo, without Ray, MLflow, checkpoints and progress.
Compared is the first stage, from its second step on, without the trunk's cache, which the loop does not have.

The sequence is run twice, with workers that stay (``worker_lifetime: run``) and with workers of one stage, in homes of
their own; what both have learned must be equal.

Next to seconds are CPU seconds, of the command and of all processes below it, Ray's own among them: they mean something
also where others use the machine.

    python benchmarks/overhead.py --json overhead.json     # the demo's model and rows
    python benchmarks/overhead.py --quick                  # a tiny random model
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from bisect import bisect_left
from itertools import pairwise
from pathlib import Path
from typing import Any

from search_cost import CpuSeconds, Sample

REPOSITORY = Path(__file__).resolve().parents[1]
RANKS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny random model: shows that it runs, no figure")
    parser.add_argument("--json", type=Path, help="write what is printed there, too")
    parser.add_argument("--rounds", type=int, help="of the plain loop; default 3, with --quick 1")
    parser.add_argument("--loop", help=argparse.SUPPRESS)
    parser.add_argument("--timed", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.loop:
        plain_loop(json.loads(arguments.loop))
        return
    if arguments.timed:
        timed_run(Path(arguments.timed[0]), arguments.timed[1:])
        return
    rounds = arguments.rounds or (1 if arguments.quick else 3)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        config, overrides = quick_run(folder) if arguments.quick else (REPOSITORY / "configs" / "demo.yaml", TWO_TASKS)
        overrides = [*overrides, "training.cache_trunk=false"]
        model = prepared_home(folder, config, overrides)
        lifetimes = {name: measure_run(folder, config, overrides, model, name) for name in ("run", "stage")}
        stays = lifetimes["run"]
        plain = [measure_loop(folder, stays["work"])["rate"] for _ in range(rounds)]
    if stays["learned"] != lifetimes["stage"]["learned"]:
        sys.exit("workers that stay have learned something else than workers of one stage")
    out = {
        "tokens_per_second": {
            "amlora": stays["rate"], "plain_fastest": max(plain), "plain_median": statistics.median(plain),
            "ratio_to_fastest": stays["rate"] / max(plain), "ratio_to_median": stays["rate"] / statistics.median(plain),
        },
        "equal": True,
    } | {
        f"{what}_{unit}": {name: found[unit][what] for name, found in lifetimes.items()}
        for unit in UNITS for what in ("whole_run", "first_step", "between_stages")
    } | {
        f"{what}_{unit}": stays[unit][what] for unit in UNITS for what in ("first_step_split", "between_stages_split")
    } | {
        f"between_stages_split_of_fresh_workers_{unit}": lifetimes["stage"][unit]["between_stages_split"] for unit in UNITS
    }  # fmt: skip
    print(shown(out))
    if arguments.json:
        arguments.json.write_text(json.dumps(out, indent=2) + "\n")


UNITS = ("seconds", "cpu_seconds")
STEPS = {
    "trainable": "model and engine", "statistics": "features of the rows", "probe": "probe of the old adapters",
    "race": "race of the starts", "step": "first step",
}  # fmt: skip
"""What has just been done when a worker says so."""
TWO_TASKS = ["tasks=[helpdesk/email_route,helpdesk/chat_mood]", "evaluation.untrained=false", "evaluation.oracle=false"]


def quick_run(folder: Path) -> tuple[Path, list[str]]:
    """The tests' tiny model and tasks."""
    sys.path.insert(0, str(REPOSITORY))
    from tests.tiny_config import write_config

    return write_config(folder, tasks=("colours", "shapes"), workers=RANKS, deepspeed={"zero_stage": 2}), []


def timed_run(spans: Path, arguments: list[str]) -> None:
    """``amlora`` itself, with the times of what its driver does written to ``spans``, a line each."""
    import functools

    from pipelines.cli.main import main as cli
    from pipelines.cluster import executor
    from pipelines.runs import journal

    def timed(owner: Any, name: str) -> None:
        inner = getattr(owner, name)

        @functools.wraps(inner)
        def outer(*given: Any, **more: Any) -> Any:
            began = time.time()
            try:
                return inner(*given, **more)
            finally:
                with spans.open("a") as file:
                    file.write(json.dumps({"what": name, "began": began, "ended": time.time()}) + "\n")

        setattr(owner, name, outer)

    timed(executor.ClusterExecutor, "ready")
    timed(executor.ClusterExecutor, "run")
    timed(journal.RunJournal, "publish")  # what of it the next stage waits for
    sys.argv = ["amlora", *arguments]
    cli()


def shown(out: dict[str, Any]) -> str:
    lines = []
    for key, value in out.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {number:,.2f}" for name, number in value.items())
        lines.append(f"{key.replace('_', ' ')}: {value}")
    return "\n".join(lines)


def prepared_home(folder: Path, config: Path, overrides: list[str]) -> Path:
    """A home with the base model in it: converting a packaged one is no part of what is measured."""
    home = folder / "prepared"
    home.mkdir()
    code = (
        "import json, sys; from pathlib import Path; from amlora_dist.base_model import resolve_base\n"
        "from amlora_dist.config.loading import load_config\n"
        "resolve_base(load_config(sys.argv[1], json.loads(sys.argv[2])).model, Path(sys.argv[3]))"
    )
    command = [sys.executable, "-c", code, str(config), json.dumps(overrides), str(home)]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, check=True)
    return home


def measure_run(folder: Path, config: Path, overrides: list[str], prepared: Path, lifetime: str) -> dict[str, Any]:
    """Run it, and read the times from the driver's spans and the workers' own progress files."""
    home, spans = folder / lifetime, folder / f"{lifetime}.jsonl"
    shutil.copytree(prepared, home)
    command = [
        sys.executable, __file__, "--timed", str(spans), "run", str(config), *overrides, f"worker_lifetime={lifetime}",
        "--run-id", "overhead", "--json",
    ]  # fmt: skip
    environment = os.environ | {"AMLORA_HOME": str(home), "PYTHONPATH": str(REPOSITORY)}
    began = time.time()
    output, errors = folder / f"{lifetime}.out", folder / f"{lifetime}.err"
    with output.open("w") as out, errors.open("w") as err:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=err)
        cpu = CpuSeconds(process.pid, lambda _: None)
        process.wait()
    ended = time.time()
    whole = cpu.stop()
    if process.returncode:
        sys.exit(errors.read_text())
    driver = [json.loads(line) for line in spans.read_text().splitlines()]
    events, result = [], json.loads(output.read_text())
    learned: list[Any] = [result["accuracy_matrix"]]
    for stage in result["stages"]:
        place = home / "storage" / "stages" / stage["fingerprint"]
        events.append([json.loads(line) for line in (place / "progress.jsonl").read_text().splitlines()])
        learned.append(hashlib.sha256((place / "trained" / "adapter_model.safetensors").read_bytes()).hexdigest())

    steps = [event for event in events[0] if event["kind"] == "step"]
    found: dict[str, Any] = {
        "rate": (steps[-1]["tokens"] - steps[0]["tokens"]) / (steps[-1]["seconds"] - steps[0]["seconds"]),
        "work": {"config": str(config), "overrides": overrides, "home": str(home)},
        "learned": learned,
    }
    ends = moments(began, driver, events)
    for unit in UNITS:
        found[unit] = splits(unit, ends, cpu.samples) | {"whole_run": ended - began if unit == "seconds" else whole}
    return found


Moment = tuple[str, float]
"""What ended then, seconds since 1970."""


def moments(
    began: float, driver: list[dict[str, Any]], events: list[list[dict[str, Any]]]
) -> dict[str, list[Moment]]:
    """From the command to the end of the first step, and from the end of the first stage to that of the next one's.

    Args:
        began: when the command did.
        driver: spans of what the driver did.
        events: of each stage.
    """
    ready, runs = ([span for span in driver if span["what"] == what] for what in ("ready", "run"))

    def worker(stage: int) -> list[Moment]:
        """From when the driver asks for workers."""
        first, asked = next(event for event in events[stage] if event["kind"] == "worker"), ready[stage]["began"]
        ends = [("plan", first["time"])]
        if first["ready"] > asked:
            ends = [("Ray: controller and workers", first["entered"]), ("imports in the worker", first["ready"]), *ends]
        for event in events[stage]:
            if event["kind"] in STEPS:
                ends.append((STEPS[event["kind"]], event["time"]))
            if event["kind"] == "step":
                break
        return ends

    left = max(event["time"] for event in events[0])
    done = runs[0]["ended"]
    published = [span["ended"] for span in driver if span["what"] == "publish" and done <= span["began"] < ready[1]["began"]]
    return {
        "first_step": [("", began), ("driver, while Ray starts", ready[0]["began"]), *worker(0)],
        "between_stages": [
            ("", left), ("end of the stage", done), ("publishing", max(published, default=done)),
            ("driver", ready[1]["began"]), *worker(1),
        ],
    }  # fmt: skip


def splits(unit: str, ends: dict[str, list[Moment]], samples: list[Sample]) -> dict[str, Any]:
    """Seconds, or CPU seconds, between moments and in all."""
    found: dict[str, Any] = {}
    for what, those in ends.items():
        split = {name: used(unit, samples, start, end) for (_, start), (name, end) in pairwise(those)}
        found |= {what: sum(split.values()), f"{what}_split": split}
    return found


def used(unit: str, samples: list[Sample], began: float, ended: float) -> float:
    """Seconds between two moments, or CPU seconds by the looks before and after each."""
    return ended - began if unit == "seconds" else cpu_at(samples, ended) - cpu_at(samples, began)


def cpu_at(samples: list[Sample], moment: float) -> float:
    """CPU seconds used until then."""
    place = bisect_left(samples, (moment, 0.0))
    if place in (0, len(samples)):
        return samples[min(place, len(samples) - 1)][1] if samples and place else 0.0
    (before, low), (after, high) = samples[place - 1], samples[place]
    return low + (high - low) * (moment - before) / (after - before)


def measure_loop(folder: Path, work: dict[str, Any]) -> dict[str, float]:
    """The plain loop in fresh processes."""
    with tempfile.TemporaryDirectory(dir=folder) as meeting:
        started = []
        for rank in range(RANKS):
            environment = os.environ | {
                "AMLORA_HOME": work["home"], "PYTHONPATH": str(REPOSITORY), "DS_ACCELERATOR": "cpu",
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "DEEPSPEED_LOG_LEVEL": "error",
            }  # fmt: skip
            given = json.dumps(work | {"rank": rank, "meet": meeting})
            command = [sys.executable, __file__, "--loop", given]
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
    from amlora_dist.config.loading import load_config
    from amlora_dist.tasks.batches import collate, encode, epoch_order
    from amlora_dist.tasks.prompts import template_for
    from pipelines.runs.inputs import gather_inputs

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // RANKS))
    dist.init_process_group("gloo", init_method=f"file://{work['meet']}/meet", rank=work["rank"], world_size=RANKS)
    config = load_config(work["config"], work["overrides"])
    inputs = gather_inputs(config, Path(work["home"]))
    name, spec = next(iter(inputs.specs.items()))
    tokenizer = load_tokenizer(inputs.base.path)
    rows = encode(
        inputs.data[name].rows["train"], spec, template_for(spec, spec.prompt_style), tokenizer,
        max_length=int(spec.max_length or 512), encoder_decoder=False,
    )  # fmt: skip
    dtype = torch.bfloat16 if inputs.dtype == "bf16" else torch.float32
    model = load_model(inputs.base, dtype=dtype, attention=inputs.config.model.attention)
    targets = find_targets(model, config.adapters, default_router_layer(model))
    new = NewAdapter(task=name, rank=config.adapters.rank, alpha=config.adapters.alpha, seed=0)
    trainable = list(inject(model, targets, [], new=new).trainable().values())
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    size = config.training.batch_size // RANKS
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(trainable, lr=config.training.rate), dist_init_required=False,
        config={
            "train_micro_batch_size_per_gpu": size, "gradient_clipping": config.training.clip,
            "zero_optimization": {"stage": config.zero_stage}, "bf16": {"enabled": dtype == torch.bfloat16},
            "zero_allow_untested_optimizer": True, "steps_per_print": 10**9,
        },
    )  # fmt: skip
    gate = torch.ones(size, 1)
    began, tokens = 0.0, 0
    for epoch in range(config.training.epochs):
        order = epoch_order(len(rows), seed=0, stage=name, epoch=epoch)
        for start in range(0, len(order) - config.training.batch_size + 1, config.training.batch_size):
            batch = sorted((rows[i] for i in order[start : start + config.training.batch_size]), key=lambda r: len(r.prompt))
            mine = batch[work["rank"] :: RANKS]
            tensors = collate(mine, pad_id=tokenizer.pad_token_id, side="left")
            labels = tensors.pop("labels")
            keep = max(len(row.target) for row in mine) + 1
            logits = engine(**tensors, task_gate=gate, use_cache=False, logits_to_keep=keep).logits[:, -keep:-1]
            loss = F.cross_entropy(logits.flatten(0, 1).float(), labels[:, -(keep - 1) :].flatten(), ignore_index=-100)
            engine.backward(loss)
            engine.step()
            if not began:  # the first step warms up
                began = time.monotonic()
                continue
            tokens += sum(len(row.prompt) + len(row.target) for row in batch)
    print(json.dumps({"rate": tokens / (time.monotonic() - began)}))


if __name__ == "__main__":
    main()
