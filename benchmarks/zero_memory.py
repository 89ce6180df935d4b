"""Bytes per rank under ZeRO 0 to 3, measured in the processes, against what ``amlora plan`` says.

Two (or more) processes with gloo load a random Llama as a stage loads it, inject one frozen and one new adapter, make one
training step, and count the bytes they hold: parameters, gradients, optimizer state. Under ZeRO-3 the largest resident
memory while loading is compared with partition + largest layer + 256 MiB above what the process had after its imports.

    python benchmarks/zero_memory.py --json memory.json               # 0.7 B parameters, fp32 and bf16, 2 ranks
    python benchmarks/zero_memory.py --quick                          # 5 M parameters, all stages in the same two processes
    python benchmarks/zero_memory.py --like llama-3-70b --layers 2 --vocabulary 1024 --dtype bf16 --zero 3 --stage

``--stage`` lets the checkpoint go through ``amlora run`` as well: one whole stage under ZeRO-3 on two workers of Ray, with
training, scoring and publication.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
MIB = 1 << 20
SLACK = 256 * MIB
RANK, TASKS = 8, 2
SIZES = {
    "full": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 14, "num_attention_heads": 16,
             "num_key_value_heads": 4, "vocab_size": 16000},
    "quick": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 4,
              "num_key_value_heads": 2, "vocab_size": 2000},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a model of 5 M parameters")
    parser.add_argument("--like", help="a model whose shape comes with amlora, such as llama-3-70b")
    parser.add_argument("--layers", type=int, help="with --like: so many of its layers")
    parser.add_argument("--vocabulary", type=int, help="with --like: so many tokens")
    parser.add_argument("--dtype", action="append", choices=["fp32", "bf16"], help="default: both")
    parser.add_argument("--zero", action="append", type=int, choices=[0, 1, 2, 3], help="default: all")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where the random checkpoint is written; default: a temporary folder")
    parser.add_argument("--stage", action="store_true", help="also run one stage on it, through Ray and under ZeRO-3")
    parser.add_argument("--json", type=Path, help="write what is printed there, too")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        measure(json.loads(arguments.work))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        lines = []
        for line in run(arguments, Path(folder)):
            lines.append(line)
            if arguments.json:  # after every line: the large ones take minutes
                arguments.json.write_text(json.dumps(lines, indent=2) + "\n")
    if any(not line["holds"] for line in lines):
        sys.exit("measured and planned differ by more than 5%, or loading took more than its bound")


def run(arguments: argparse.Namespace, folder: Path) -> Iterable[dict[str, Any]]:
    from amlora_dist.base_model import ModelSettings
    from amlora_dist.planning.shapes import configuration_of

    values: dict[str, Any] = dict(SIZES["quick" if arguments.quick else "full"])
    if arguments.like:
        named = configuration_of(ModelSettings(source=arguments.like))
        values = {key: named[key] for key in SIZES["full"]}
        values["num_hidden_layers"] = arguments.layers or values["num_hidden_layers"]
        values["vocab_size"] = arguments.vocabulary or values["vocab_size"]
    for dtype in arguments.dtype or ["fp32", "bf16"]:
        model = folder / dtype / "model-llama"
        model.mkdir(parents=True)
        write_model(model, values, dtype)
        wanted = arguments.zero or [0, 1, 2, 3]
        # Fresh processes for each stage, as a run has them, for what one leaves behind would serve the next; the imports
        # are all that --quick would wait for.
        for zeros in [wanted] if arguments.quick else [[zero] for zero in wanted]:
            for line in compare(model, dtype, zeros, arguments.ranks):
                show(line)
                yield line
        if arguments.stage:
            line = run_one_stage(model, dtype)
            print(" ".join(f"{key.replace('_', ' ')} {value}" for key, value in line.items()), flush=True)
            yield line
        shutil.rmtree(model)


def write_model(folder: Path, values: dict[str, Any], dtype: str) -> None:
    """A random checkpoint in shards, written tensor by tensor: this process never holds the model."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**values, max_position_embeddings=512, tie_word_embeddings=False)
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    number = torch.bfloat16 if dtype == "bf16" else torch.float32
    index: dict[str, str] = {}
    for count, (name, shape) in enumerate(shapes.items(), start=1):
        file = f"model-{count:05d}-of-{len(shapes):05d}.safetensors"
        drawn = torch.ones(shape) if len(shape) == 1 else torch.empty(shape, dtype=number).normal_(0, 0.02)
        save_file({name: drawn.to(number)}, folder / file, metadata={"format": "pt"})
        index[name] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def compare(model: Path, dtype: str, zeros: list[int], ranks: int) -> Iterable[dict[str, Any]]:
    """Measured, next to planned."""
    from amlora_dist.adapters.settings import AdapterSettings, RouterSettings
    from amlora_dist.base_model import ModelSettings
    from amlora_dist.planning.memory import MemoryLayout, TrainedShare, memory_of
    from amlora_dist.planning.shapes import shape_of

    shape = shape_of(ModelSettings(source=str(model)), AdapterSettings(rank=RANK), RouterSettings())
    old = RANK * shape.adapter_width
    trained = TrainedShare(new=old + len(shape.targets), old=old)
    size = 2 if dtype == "bf16" else 4
    began = time.monotonic()
    found_by_rank = processes(model, dtype, zeros, ranks)
    seconds = round((time.monotonic() - began) / len(zeros), 1)
    for place, zero in enumerate(zeros):
        planned = memory_of(
            shape, trained, MemoryLayout(zero=zero, ranks=ranks), size=size, length=16, targets=1, eager=False
        )  # fmt: skip
        worst = {key: max(rank[place][key] for rank in found_by_rank) for key in found_by_rank[0][place]}
        line: dict[str, Any] = {"dtype": dtype, "zero": zero, "ranks": ranks, "parameters": shape.parameters}
        holds = True
        for key in ("weights", "gradients", "optimizer"):
            expected = getattr(planned, key)
            line[key] = {"measured": worst[key], "planned": expected}
            holds = holds and abs(worst[key] - expected) <= 0.05 * expected
        line["loading"] = {"measured": worst["loading"]}
        if zero == 3:
            line["loading"] |= {"bound": planned.loading + SLACK, "partition": planned.weights}
            line["loading"]["largest_layer"] = size * shape.largest_layer
            holds = holds and worst["loading"] <= planned.loading + SLACK
        yield line | {"holds": holds, "seconds": seconds}


def run_one_stage(model: Path, dtype: str) -> dict[str, Any]:
    """One task of four rows learned, scored and published by ``amlora run`` on two workers under ZeRO-3."""
    sys.path.insert(0, str(REPOSITORY))
    from tests.tiny_config import write_config, write_tokenizer

    write_tokenizer(model, closes_prompts=False)
    config = write_config(
        model.parent, tasks=("colours",), workers=2, dtype=dtype, adapters={"rank": RANK}, deepspeed={"zero_stage": 3},
        task_defaults={"max_length": 24, "max_train": 4, "max_test": 2}, evaluation={"untrained": False, "oracle": False},
        training={"epochs": 1, "batch_size": 2, "learning_rate": 1e-3, "checkpoint_every": 1},
    )  # fmt: skip
    command = [sys.executable, "-m", "pipelines.cli", "run", str(config), "--run-id", "stage", "--json"]
    home = model.parent / "home"
    environment = os.environ | {"AMLORA_HOME": str(home), "PYTHONPATH": str(REPOSITORY)}
    began = time.monotonic()
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"the stage failed with exit code {done.returncode}, see above")
    (stage,) = json.loads(done.stdout)["stages"]
    trained = json.loads((home / "storage" / "stages" / stage["fingerprint"] / "trained" / "training.json").read_text())
    return {
        "stage": stage["task"], "dtype": dtype, "zero": 3, "ranks": 2, "steps": trained["step"],
        "losses": [round(loss, 4) for loss in trained["losses"]], "train_seconds": round(stage["train_seconds"], 1),
        "score_seconds": round(stage["score_seconds"], 1), "version": stage["version"],
        "seconds": round(time.monotonic() - began, 1), "holds": True,
    }  # fmt: skip


def show(line: dict[str, Any]) -> None:
    parts = [f"{line['dtype']} ZeRO {line['zero']}, {line['ranks']} ranks, {line['parameters'] / 1e6:.0f} M parameters:"]
    for key in ("weights", "gradients", "optimizer"):
        pair = line[key]
        share = pair["measured"] / pair["planned"] - 1
        parts.append(f"{key} {pair['measured'] / MIB:.2f} MiB, planned {pair['planned'] / MIB:.2f} ({share:+.1%});")
    loading = line["loading"]
    bound = f", bound {loading['bound'] / MIB:.0f}" if "bound" in loading else ""
    parts.append(f"loading {loading['measured'] / MIB:.0f} MiB{bound}; {line['seconds']} s")
    print(" ".join(parts), "holds" if line["holds"] else "DOES NOT HOLD", flush=True)


def processes(model: Path, dtype: str, zeros: list[int], ranks: int) -> list[list[dict[str, int]]]:
    """One fresh process for each rank; what each says of each ZeRO stage."""
    with tempfile.TemporaryDirectory() as meeting:
        started = []
        for rank in range(ranks):
            work = {"model": str(model), "dtype": dtype, "zeros": zeros, "rank": rank, "ranks": ranks, "meet": meeting}
            environment = os.environ | {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "DS_ACCELERATOR": "cpu",
                "OMP_NUM_THREADS": "1", "DEEPSPEED_LOG_LEVEL": "error", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",
            }  # fmt: skip
            command = [sys.executable, __file__, "--work", json.dumps(work)]
            started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
        out = [process.communicate(timeout=3600)[0] for process in started]
    if any(process.returncode for process in started):
        sys.exit("a rank failed, see above")
    return [json.loads(text.strip().splitlines()[-1]) for text in out]


def measure(work: dict[str, Any]) -> None:
    """One rank: prints what it holds under each ZeRO stage."""
    import torch.distributed as dist

    from amlora_dist.training.engine import join_process_group

    dist.init_process_group("gloo", init_method=f"file://{work['meet']}/meet", rank=work["rank"], world_size=work["ranks"])
    join_process_group()
    print(json.dumps([measured(work, zero) for zero in work["zeros"]]))


def measured(work: dict[str, Any], zero: int) -> dict[str, int]:
    """Bytes by kind, at the worst moment of loading and of one training step."""
    import torch

    from amlora_dist.adapters.adapter import Adapter
    from amlora_dist.adapters.inject import NewAdapter, inject
    from amlora_dist.adapters.settings import AdapterSettings
    from amlora_dist.adapters.targets import default_router_layer, find_targets
    from amlora_dist.base_model import BaseModel, load_model
    from amlora_dist.training.engine import DeepSpeedEngine, deepspeed_config
    from amlora_dist.training.optimizer import parameter_groups
    from amlora_dist.training.settings import TrainingSettings
    from amlora_dist.training.zero3_loading import load_partitioned

    dtype = torch.bfloat16 if work["dtype"] == "bf16" else torch.float32
    section = {"zero_optimization": {"stage": zero}}
    config = deepspeed_config(section, dtype=dtype, micro=1, accumulation=1, world=work["ranks"], clip=1.0)
    base = BaseModel("random", None, Path(work["model"]), "", False, "llama")
    import transformers.models.llama.modeling_llama  # noqa: F401  what loading imports is not what it loads

    before = memory("VmRSS")
    forget_peak()
    if zero == 3:
        model: Any = load_partitioned(base, config, dtype=dtype, attention="sdpa")
    else:
        model = load_model(base, dtype=dtype, attention="sdpa")
    loading = memory("VmHWM") - before
    targets = find_targets(model, AdapterSettings(rank=RANK), default_router_layer(model))
    old = Adapter("first", RANK, 8.0, {}, {})
    for target in targets:
        old.a[target.path] = torch.randn(RANK, target.in_features)
        old.b[target.path] = torch.randn(target.out_features, RANK)
        old.recipe[target.path] = torch.zeros(0)
    mixture = inject(model, targets, [old], new=NewAdapter(task="second", rank=RANK, alpha=8.0, seed=0))
    del old
    trainable = mixture.trainable()
    groups = parameter_groups(trainable, TrainingSettings(learning_rate=1e-4))
    engine = DeepSpeedEngine(mixture.model, trainable, groups, config=config, betas=(0.9, 0.999))
    ids = torch.randint(0, 100, (1, 16), generator=torch.Generator().manual_seed(work["rank"]))
    gate = torch.tensor([[0.0, 1.0]])
    held: dict[str, int] = {"gradients": 0}
    client, step = engine._client, engine._client.step

    def observed(*given: Any, **more: Any) -> Any:
        held["gradients"] = max(held["gradients"], gradient_bytes(engine))
        return step(*given, **more)

    client.step = observed  # type: ignore[method-assign]
    engine.backward(engine.forward(input_ids=ids, task_gate=gate, use_cache=False).logits.float().sum() * 1e-3)
    held["gradients"] = max(held["gradients"], gradient_bytes(engine))
    engine.step(1.0)
    gc.collect()
    held["weights"] = unique(getattr(p, "ds_tensor", p) for p in engine.model.parameters())
    masters = [p for group in client.param_groups for p in group["params"]]
    masters += getattr(engine._optimizer, "fp32_partitioned_groups_flat", [])  # ZeRO-3 lends them to the client for a step
    own = {getattr(p, "ds_tensor", p).untyped_storage().data_ptr() for p in engine.model.parameters()}
    states = [t for state in client.state.values() for t in state.values() if torch.is_tensor(t) and t.dim()]
    held["optimizer"] = unique([t for t in (*masters, *states) if t.untyped_storage().data_ptr() not in own])
    return held | {"loading": loading}


def gradient_bytes(engine: Any) -> int:
    """Bytes that hold gradients now, wherever DeepSpeed keeps them."""
    import torch

    optimizer = engine._optimizer
    found: list[Any] = []
    for parameter in engine.model.parameters():
        found += [parameter.grad, getattr(parameter, "grad_accum", None)]
    found += [p.grad for group in engine._client.param_groups for p in group["params"]]
    for value in (getattr(optimizer, "averaged_gradients", None) or {}).values():
        found += value if isinstance(value, list) else [value]
    found.append(getattr(optimizer, "grad_partitions_flat_buffer", None))
    return unique(t for t in found if torch.is_tensor(t))


def unique(tensors: Iterable[Any]) -> int:
    """Bytes of the tensors, elements that two of them share counted once."""
    seen: dict[tuple[int, int], int] = {}
    for tensor in tensors:
        key = (tensor.data_ptr(), tensor.numel())
        seen[key] = tensor.numel() * tensor.element_size()
    return sum(seen.values())


def memory(field: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: this measures on Linux only")


def forget_peak() -> None:
    """Let ``VmHWM`` start from now."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    main()
