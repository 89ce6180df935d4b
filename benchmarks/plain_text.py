"""What it costs to answer plain text, against text whose task is named.

Texts of ``--tokens`` tokens are classified by a bank three ways, which take turns batch by batch, so that a busy machine
slows all alike, in every order in turn, so that none always comes after the same other and finds the memory as that left it:

- ``plain``: the text alone; it is read, routed, its task's own prompt is read behind it and the labels are ranked;
- ``named``: the same with the task named by the caller, which is still read for the keys' evidence on its labels;
- ``whole``: the task named, its whole prompt read in one pass under its gate, no keys: the least that an answer costs.

Each text is named the task that it is routed to, so that the prompts and the labels are the same; a text between two tasks
is answered by both rows if nobody names one. Printed are medians over
rounds of the seconds a batch and of the ratios of each round, with the quartiles; the goal is ``plain`` at most 1.05 of
``named`` and of ``whole``.

    python benchmarks/plain_text.py --bank models:/demo@champion --json plain.json
    python benchmarks/plain_text.py --quick                # a tiny random bank: shows that it runs, no figure
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from amlora_dist.evaluation.ranking import finished
from amlora_dist.inference.model import AMLoRAModel
from amlora_dist.tasks import background
from pipelines.cluster.library_output import set_up

BATCHES = (8, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bank", help="models:/NAME@ALIAS, models:/NAME/VERSION or a folder, of labelled tasks")
    parser.add_argument("--dtype", default="fp32", help="of the model")
    parser.add_argument("--tokens", type=int, default=64, help="of a text")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--quick", action="store_true", help="a tiny random bank: ends within a minute, shows nothing")
    args = parser.parse_args()
    if args.bank is None and not args.quick:
        parser.error("--bank: which bank? `make demo` leaves models:/demo@champion")
    set_up(verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        if args.quick:
            from tests.bank_with_base import write_keyed_bank

            args.bank, args.rounds, args.tokens = str(Path(folder) / "bank"), 3, 12
            write_keyed_bank(Path(folder) / "bank", Path(folder) / "base")
        rows = measure(args)
    for row in rows:
        print(
            f"{row['batch']:>3} rows of {args.tokens} tokens: plain {row['plain']:.3f} s a batch, of named"
            f" {row['of_named'][1]:.3f} [{row['of_named'][0]:.3f}, {row['of_named'][2]:.3f}], of whole"
            f" {row['of_whole'][1]:.3f} [{row['of_whole'][0]:.3f}, {row['of_whole'][2]:.3f}]"
        )
    if args.json is not None:
        machine = {"machine": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
        args.json.write_text(json.dumps(machine | {"bank": str(args.bank), "dtype": args.dtype, "rows": rows}, indent=1))


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A line for each size of batch."""
    model = AMLoRAModel.from_bank(args.bank, dtype=args.dtype, abstain=0.0)
    texts = texts_of(model, args.tokens, max(BATCHES))
    tasks = [route.task for route in model.route(texts)]
    found = []
    for size in BATCHES:
        own, named = texts[:size], tasks[:size]

        def whole(own: list[str] = own, named: list[str | None] = named, size: int = size) -> Any:
            requests = model.requests(own, task=named)
            return finished(model.former.classifying(requests, size, None))

        ways: dict[str, Callable[[], Any]] = {
            "plain": lambda own=own, size=size: model.classify(own, batch_size=size),  # type: ignore[misc]
            "named": lambda own=own, named=named, size=size: model.classify(own, task=named, batch_size=size),  # type: ignore[misc]
            "whole": whole,
        }
        for way in ways.values():
            way()  # warms up
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        orders = list(permutations(ways))
        for turn in range(args.rounds):
            for name in orders[turn % len(orders)]:
                begun = time.perf_counter()
                ways[name]()
                seconds[name].append(time.perf_counter() - begun)
        ratios = {
            f"of_{name}": quartiles([a / b for a, b in zip(seconds["plain"], seconds[name], strict=True)])
            for name in ("named", "whole")
        }
        found.append({"batch": size} | {name: statistics.median(times) for name, times in seconds.items()} | ratios)
    return found


def texts_of(model: AMLoRAModel, tokens: int, count: int) -> list[str]:
    """Texts of the project's background, joined and cut to so many tokens, which are no task's in particular."""
    own = [text for part in ("news", "reviews", "posts", "letters") for text in background.texts(part)]
    made = []
    for place in range(count):
        joined = " ".join(own[(place * 7 + step) % len(own)] for step in range(12))
        ids = model.tokenizer(joined, add_special_tokens=False)["input_ids"][:tokens]
        made.append(str(model.tokenizer.decode(ids)))
    return made


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


if __name__ == "__main__":
    main()
