"""What a training step costs with rows packed into shared sequences and with each in its own: forward, backward and the
optimizer's step, on the rows of the demos as their stages see them and on made-up rows whose lengths differ more.

Both sides take turns, batch by batch and each first in every other round, in one process and on one model, so that a busy
machine slows them alike. ``speed_up`` is the median over batches and rounds of plain over packed seconds of the same batch,
``spread`` its quartiles. Tokens are those of rows; ``padding`` is the share of what is computed that is none of them.
``same_loss`` is the largest difference between the two losses of a batch (nats per target token), as training begins.

    python benchmarks/packing.py --json out.json
    python benchmarks/packing.py --quick
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from sweeps import write_json

from amlora_dist.adapters.inject import NewAdapter, inject
from amlora_dist.adapters.packed_rows import WIDTH, PackedRows
from amlora_dist.adapters.targets import default_router_layer, find_targets
from amlora_dist.base_model import load_model, load_tokenizer, resolve_base
from amlora_dist.config.loading import RunConfig, home, load_config
from amlora_dist.tasks.batches import Example, encode
from amlora_dist.tasks.chat import settled
from amlora_dist.tasks.prompt_format import PromptFormat
from amlora_dist.tasks.prompts import template_for
from amlora_dist.tasks.sources import load_task
from amlora_dist.tasks.task import resolve_task
from amlora_dist.training.batching import LossComputer, Schedule, all_tokens, target_tokens
from amlora_dist.training.engine import PlainEngine
from amlora_dist.training.optimizer import parameter_groups

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
DRAWN = "drawn"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def tasks_of(config: RunConfig, base: Any, tokenizer: Any) -> Iterator[tuple[str, list[Example]]]:
    """Training rows of each task of a run, as its stage reads them."""
    for ref in config.tasks:
        spec = resolve_task(ref, data_dir=None, base_dir=Path.cwd(), defaults=config.task_defaults)
        spec = settled(spec, tokenizer, encoder_decoder=base.encoder_decoder)
        rows = load_task(spec, seed=config.seed, data_dir=None, splits=("train",)).rows["train"]
        examples = encode(
            rows, spec, template_for(spec, spec.prompt_style), tokenizer, max_length=int(spec.max_length or 512),
            encoder_decoder=base.encoder_decoder, prompt_format=PromptFormat(2, int(spec.max_length or 512)),
        )  # fmt: skip
        yield spec.name, examples


def drawn(batch: int, count: int, vocabulary: int) -> list[Example]:
    """Made-up rows for so many batches: a question of 8 to 192 tokens, short ones the most frequent, and an answer of a
    quarter of that."""
    draw = torch.Generator().manual_seed(0)
    out = []
    for row in range(batch * count):
        length = round(8 * 24 ** float(torch.rand((), generator=draw)))
        ids = torch.randint(10, vocabulary, (length + length // 4,), generator=draw).tolist()
        out.append(Example(row, tuple(ids[:length]), tuple(ids[length:]), None, ""))
    return out


def padding(batches: list[list[Example]], width: int) -> float:
    """Share of the tokens computed that are of no row; ``width`` 0: each row in a sequence of its own."""
    computed = 0
    for batch in batches:
        lengths = [len(row.prompt) + len(row.target) for row in batch]
        computed += PackedRows.of(lengths, width).tokens if width else len(lengths) * max(lengths)
    return 1 - sum(all_tokens(batch) for batch in batches) / computed


def measure(
    model: Any, config: RunConfig, task: str, rows: list[Example], batch: int, args: argparse.Namespace
) -> dict[str, Any]:
    """One task's batches, on a model without a mixture; gives the model back as it was."""
    layer = default_router_layer(model)
    targets = find_targets(model, config.adapters, layer)
    mixture = inject(model, targets, [], new=NewAdapter(task="new", rank=8, alpha=32.0), router_layer=layer)
    trainable = mixture.trainable()
    groups = parameter_groups(trainable, config.training)
    engine = PlainEngine(model, trainable, groups, betas=config.training.betas, clip=1.0, device=torch.device("cpu"))
    schedule = Schedule(len(rows), batch_size=batch, epochs=1, seed=0, stage=task)
    batches = [[rows[place] for place in schedule.rows(step)] for step in range(min(args.batches, len(rows) // batch))]
    mixture.packing_width()
    widths = {"plain": 0, "packed": args.width}
    sides = {
        name: LossComputer(model, pad_id=0, encoder_decoder=False, device=engine.device, packing_width=width)
        for name, width in widths.items()
    }
    gate, clock = torch.ones(1), time.process_time if args.cpu_clock else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    apart = 0.0
    for round_ in range(args.rounds + 1):
        for number, rows_of in enumerate(batches):
            if not round_:
                with torch.no_grad():
                    one, other = (float(side(model, rows_of, gate)) / target_tokens(rows_of) for side in sides.values())
                apart = max(apart, abs(one - other))
            order = list(sides.items())
            for name, side in order if (round_ + number) % 2 else order[::-1]:
                began = clock()
                engine.backward(side(engine.forward, rows_of, gate) / target_tokens(rows_of))
                engine.step(1e-3)
                if round_:  # the first round warms up
                    seconds[name].append(clock() - began)
    mixture.remove()
    tokens = [all_tokens(rows_of) for rows_of in batches] * args.rounds
    ratios = [plain / packed for plain, packed in zip(seconds["plain"], seconds["packed"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    lengths = [len(row.prompt) + len(row.target) for rows_of in batches for row in rows_of]
    return {
        "task": task,
        "batch": batch,
        "row_tokens": [min(lengths), statistics.median(lengths), max(lengths)],
        "padding": {name: padding(batches, width) for name, width in widths.items()},
        "tokens_per_s": {
            name: statistics.median(n / s for n, s in zip(tokens, found, strict=True)) for name, found in seconds.items()
        },
        "speed_up": middle,
        "spread": [low, high],
        "same_loss": apart,
    }


def main() -> None:
    """Measure all tasks and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", type=Path, default=[CONFIGS / "demo.yaml", CONFIGS / "demo_chat.yaml"])
    parser.add_argument("--tasks", nargs="*", help=f"names, {DRAWN} the made-up rows; default: all")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--batch", type=int, nargs="*", help="rows of a step; default: the configuration's")
    parser.add_argument("--width", type=int, default=WIDTH, help="tokens that shared sequences are filled up to")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cpu-clock", action="store_true", help="CPU seconds of all threads: for one, where others run too")
    parser.add_argument("--quick", action="store_true", help="one task of each, two batches, one round")
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()
    if args.quick:
        args.batches, args.rounds = 2, 1
    about = {
        "torch": torch.__version__, "transformers": transformers.__version__, "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(), "dtype": args.dtype, "width": args.width,
        "rounds": args.rounds, "batches": args.batches, "clock": "CPU" if args.cpu_clock else "wall",
    }  # fmt: skip
    found = []
    print(f"{'task':28}{'batch':>6}{'row tokens':>15}{'padding':>14}{'plain t/s':>11}{'packed t/s':>12}{'faster':>8}"
          f"{'quartiles':>14}{'same loss':>11}")  # fmt: skip
    for file in args.configs:
        config = load_config(file)
        base = resolve_base(config.model, home())
        tokenizer = load_tokenizer(base.path)
        model = load_model(base, dtype=DTYPES[args.dtype], attention=config.model.attention)
        tasks = list(tasks_of(config, base, tokenizer))[: 1 if args.quick else None]
        if file == args.configs[-1]:
            tasks.append((DRAWN, drawn(config.training.batch_size, args.batches, model.config.vocab_size)))
        for task, rows in tasks:
            if args.tasks and task not in args.tasks:
                continue
            for batch in args.batch or [config.training.batch_size]:
                one = measure(model, config, task, rows, batch, args)
                found.append(one)
                write_json(args.json, {"about": about, "rows": found})
                both, rate = one["padding"], one["tokens_per_s"]
                lengths = "/".join(f"{n:.0f}" for n in one["row_tokens"])
                print(
                    f"{task:28}{batch:6}{lengths:>15}{both['plain']:7.2f}{both['packed']:7.2f}{rate['plain']:11.1f}"
                    f"{rate['packed']:12.1f}{one['speed_up']:8.2f}{one['spread'][0]:7.2f}{one['spread'][1]:7.2f}"
                    f"{one['same_loss']:11.1e}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
