"""What a mixture of N LoRAs costs, against one LoRA and against other ways to mix.

Forward, forward + backward, and decoding with a KV cache, for banks of several sizes, in one run: all contenders of a
setting take turns round by round, so that a busy machine slows them alike. Adapters have rank 8 on the query and value
projections of all layers, as PEFT has them by default.

Contenders:

- ``amlora``: the mixture layer with a gate per sequence. Forward + backward is a training step of stage N: N - 1
  frozen adapters with a learned recipe and a new adapter.
- ``amlora_routed``: the same with the gate found by the router, from features of a partial pass through the plain model
  (the price of adapting layers below the routing layer; by default only those above it are adapted, and routing is free).
- ``peft_lora``: one LoRA by PEFT, whatever N: what all ratios refer to.
- ``loop``: the plain loop over adapters, each with its own A and B.
- ``peft_xlora``: PEFT's X-LoRA (a classifier on a first pass weighs all adapters; trains the classifier alone;
  generates without a KV cache).
- ``peft_arrow``: PEFT's Arrow (per-token top-k routing by the adapters' singular vectors; nothing to train).

    python benchmarks/mixture.py --model FOLDER --json out.json --plot out.png
    python benchmarks/mixture.py --quick
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import platform
import statistics
import tempfile
import threading
from pathlib import Path
from typing import Any

import peft
import psutil
import torch
import transformers
from mixture_contenders import CONTENDERS, Case, Field, Weights, bytes_per_adapter, llama_8b
from transformers import AutoConfig

PHASES = ("forward", "forward_backward", "decode")


class PeakMemory:
    """Largest resident memory of the process beyond where it stood, bytes; sampled, so short peaks can escape."""

    def __enter__(self) -> PeakMemory:
        self._process = psutil.Process()
        self._start = self._top = self._process.memory_info().rss
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self._top = max(self._top, self._process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.bytes = self._top - self._start


def spread_of(seconds: list[float]) -> float:
    """Half the range of the middle half, seconds."""
    if len(seconds) < 4:
        return (max(seconds) - min(seconds)) / 2
    quarters = statistics.quantiles(seconds, n=4)
    return (quarters[2] - quarters[0]) / 2


def measure(
    case: Case, dtype: torch.dtype, count: int, weights: Weights, names: list[str], args: Any
) -> list[dict[str, Any]]:
    """Rows of one case, dtype and number of adapters."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        built = Field(case, dtype, weights, count, Path(folder))
        contenders = [built.contender(name) for name in names]
    for phase in PHASES:
        field = [c for c in contenders if phase in c.steps]
        seconds: dict[str, list[float]] = {c.name: [] for c in field}
        memory: dict[str, int] = {}
        for contender in field:  # the first time pays for memory and kernels
            with PeakMemory() as peak:
                contender.steps[phase]()
            memory[contender.name] = peak.bytes
        for turn in range(args.rounds):
            for contender in field[turn % len(field) :] + field[: turn % len(field)]:
                taken = seconds[contender.name]
                if len(taken) < 3 or sum(taken) < args.seconds:
                    taken.append(contender.steps[phase]())
        reference = statistics.median(seconds["peft_lora"])
        for contender in field:
            taken = seconds[contender.name]
            row = {
                "case": case.name,
                "dtype": str(dtype).removeprefix("torch."),
                "phase": phase,
                "adapters": count,
                "contender": contender.name,
                "median_seconds": statistics.median(taken),
                "spread": spread_of(taken),
                "ratio": statistics.median(taken) / reference,
                "rounds": len(taken),
                "peak_bytes": memory[contender.name],
            }
            rows.append(row)
            print(
                "{case:28} {dtype:9} {phase:17} N={adapters:<3} {contender:14} {median_seconds:9.4f} s "
                "± {spread:.4f}  {ratio:6.3f}x".format(**row),
                flush=True,
            )
    return rows


def plot(rows: list[dict[str, Any]], file: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    settings = sorted({(row["case"], row["dtype"]) for row in rows})
    figure, axes = plt.subplots(len(settings), len(PHASES), figsize=(13, 3.2 * len(settings)), squeeze=False)
    for line, (case, dtype) in zip(axes, settings, strict=True):
        for axis, phase in zip(line, PHASES, strict=True):
            chosen = [r for r in rows if (r["case"], r["dtype"], r["phase"]) == (case, dtype, phase)]
            for name in dict.fromkeys(row["contender"] for row in chosen):
                points = [(r["adapters"], r["ratio"]) for r in chosen if r["contender"] == name]
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
            axis.set(xscale="log", yscale="log", title=f"{case}, {dtype}\n{phase}", xlabel="adapters")
            axis.set_xticks(counts := sorted({row["adapters"] for row in rows}), [str(n) for n in counts])
            axis.grid(alpha=0.3)
        line[0].set_ylabel("time / one PEFT LoRA")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def write_json(file: str, content: dict[str, Any]) -> None:
    temporary = f"{file}.part"
    Path(temporary).write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of SmolLM2-135M (or another causal model); left out, so is its case")
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 2, 5, 15, 50])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, help="default: all")
    parser.add_argument("--cases", nargs="+", choices=["model", "shapes"], default=["model", "shapes"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=60.0, help="a contender sits out once it took as long, per phase")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", help="write the rows here")
    parser.add_argument("--plot", help="write a figure here")
    parser.add_argument("--quick", action="store_true", help="small shapes, few adapters: ends within a minute")
    args = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(args.threads)

    cases: list[Case] = []
    if args.quick:
        args.adapters, args.rounds, args.dtypes = [1, 5], 3, ["float32"]
        cases.append(llama_8b(2, 32, width=256))
    else:
        if args.model and "model" in args.cases:
            cases.append(Case(Path(args.model).name, AutoConfig.from_pretrained(args.model), 8, 128, args.model))
        if "shapes" in args.cases:
            cases.append(llama_8b(2, 512))
    names = [CONTENDERS[0], *(name for name in CONTENDERS[1:] if name in (args.contenders or CONTENDERS))]

    rows: list[dict[str, Any]] = []
    sizes = []
    for case in cases:
        for dtype in (getattr(torch, name) for name in args.dtypes):
            weights = Weights(case, dtype)
            size = bytes_per_adapter(case, dtype)
            sizes.append({"case": case.name, "dtype": str(dtype).removeprefix("torch."), "bytes_per_adapter": size})
            for count in args.adapters:
                rows += measure(case, dtype, count, weights, names, args)
                gc.collect()
                if args.json:
                    write_json(args.json, {"rows": rows, "sizes": sizes, "machine": machine(args)})
    if args.plot:
        plot(rows, args.plot)


def machine(args: Any) -> dict[str, Any]:
    """Where the figures come from."""
    return {
        "processor": platform.processor() or platform.machine(),
        "threads": args.threads,
        "load_average": os.getloadavg()[1],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }


if __name__ == "__main__":
    main()
