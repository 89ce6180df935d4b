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
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from amlora_dist.adapters.bank import Adapter
from amlora_dist.adapters.inject import NewAdapter, inject
from amlora_dist.adapters.settings import AdapterSettings
from amlora_dist.adapters.targets import Target, default_router_layer, find_targets

RANK, ALPHA = 8, 32.0
PHASES = ("forward", "forward_backward", "decode")
DECODED = 8
"""Tokens per decoding measurement; the prompt's pass is not timed, but for X-LoRA every token repeats it."""
UNCACHED = 2
"""Tokens per decoding measurement of a contender that has no KV cache."""

Step = Callable[[], float]


@dataclass(frozen=True)
class Case:
    """A model and a batch."""

    name: str
    config: PretrainedConfig
    batch: int
    tokens: int
    folder: str | None = None
    """Weights of a real model; otherwise they are random."""


@dataclass
class Contender:
    """Phases that a contender can do; a step returns the seconds it counts."""

    name: str
    steps: dict[str, Step]


def llama_8b(layers: int, tokens: int, width: int = 4096) -> Case:
    """Layers with the shapes of Llama-3-8B. The vocabulary is cut to 1,024: the head would hide the layers."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=1024,
        hidden_size=width,
        intermediate_size=width * 7 // 2,
        num_hidden_layers=layers,
        num_attention_heads=width // 128,
        num_key_value_heads=max(1, width // 512),
        head_dim=128,
    )
    return Case(f"llama-3-8b-shapes-{layers}-layers" if width == 4096 else f"llama-{width}", config, 1, tokens)


class Weights:
    """One copy of a model's weights, on which every contender builds its own modules."""

    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        if case.folder is None:
            model = AutoModelForCausalLM.from_config(case.config, dtype=dtype)
        else:
            model = AutoModelForCausalLM.from_pretrained(case.folder, dtype=dtype)
        self._model = model.eval().requires_grad_(False)

    def model(self) -> PreTrainedModel:
        """A fresh model over the same tensors."""
        shared = {id(tensor): tensor for tensor in (*self._model.parameters(), *self._model.buffers())}
        import copy

        model = copy.deepcopy(self._model, memo=dict(shared))
        model.config.use_cache = False
        return model


def random_adapter(targets: list[Target], index: int) -> Adapter:
    generator = torch.Generator().manual_seed(index)
    return Adapter(
        task=f"task{index}",
        rank=RANK,
        alpha=ALPHA,
        a={t.path: torch.randn(RANK, t.in_features, generator=generator) / t.in_features**0.5 for t in targets},
        b={t.path: torch.randn(t.out_features, RANK, generator=generator) * 0.01 for t in targets},
    )


@dataclass(frozen=True)
class FlatRouter:
    """As cheap as the posterior router (one dense layer), without statistics."""

    weight_TD: Tensor
    tasks: list[str]
    needs_features: bool = True
    kind: str = "flat"

    def gates(self, features_BD: Tensor | None, batch: int) -> Tensor:
        assert features_BD is not None
        assert len(features_BD) == batch
        return torch.softmax(features_BD @ self.weight_TD.t(), dim=-1)

    def to(self, device: torch.device | str) -> FlatRouter:
        return self

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def settings(self) -> dict[str, Any]:
        return {}


class LoopLinear(nn.Module):
    """The plain loop: one LoRA after the other, each weighed by its gate."""

    def __init__(self, base: nn.Linear, target: Target, adapters: list[Adapter], gate_BN: Tensor, train: bool) -> None:
        super().__init__()
        self.base, self.gate_BN = base, gate_BN
        dtype = base.weight.dtype
        self.a = nn.ParameterList([nn.Parameter(x.a[target.path].to(dtype), requires_grad=False) for x in adapters])
        self.b = nn.ParameterList([nn.Parameter(x.b[target.path].to(dtype), requires_grad=False) for x in adapters])
        self.a[-1].requires_grad_(train)
        self.b[-1].requires_grad_(train)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        for i, (a, b) in enumerate(zip(self.a, self.b, strict=True)):
            gate = (self.gate_BN[:, i] * (ALPHA / RANK)).to(x.dtype)[:, None, None]
            y = y + gate * nn.functional.linear(nn.functional.linear(x, a), b)
        return y


def batch_of(case: Case) -> Tensor:
    return torch.randint(3, case.config.vocab_size, (case.batch, case.tokens), generator=torch.Generator().manual_seed(0))


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def steps_of(model: Any, case: Case, *, gate: dict[str, Tensor], train: dict[str, Tensor] | None, cached: bool = True) -> dict[str, Step]:
    """The phases of one model; ``gate`` and ``train`` are extra inputs of inference and of training (None: cannot)."""
    ids = batch_of(case)

    def forward() -> float:
        model.eval()
        with torch.no_grad():
            return timed(lambda: model(input_ids=ids, use_cache=False, **gate))

    def forward_backward() -> float:
        model.train()
        inputs = {"input_ids": ids, "labels": ids, "use_cache": False, **(train or {})}
        seconds = timed(lambda: model(**inputs).loss.backward())
        model.zero_grad(set_to_none=True)
        return seconds

    def decode() -> float:
        model.eval()
        with torch.no_grad():
            out = model(input_ids=ids, use_cache=True, **gate)
            token = out.logits[:, -1:].argmax(-1)

            def tokens() -> None:
                nonlocal out, token
                for _ in range(DECODED):
                    out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
                    token = out.logits[:, -1:].argmax(-1)

            return timed(tokens) / DECODED

    def decode_uncached() -> float:
        model.eval()
        options = {"max_new_tokens": UNCACHED, "min_new_tokens": UNCACHED, "do_sample": False}
        with torch.no_grad():
            return timed(lambda: model.generate(input_ids=ids, **options)) / UNCACHED

    steps: dict[str, Step] = {"forward": forward}
    if train is not None:
        steps["forward_backward"] = forward_backward
    steps["decode"] = decode if cached else decode_uncached
    return steps


class Field:
    """Builds the contenders of one case, dtype and number of adapters."""

    def __init__(self, case: Case, dtype: torch.dtype, weights: Weights, count: int, folder: Path) -> None:
        self.case, self.dtype, self.weights, self.count, self.folder = case, dtype, weights, count, folder
        model = weights.model()
        self.targets = find_targets(model, AdapterSettings(layers="all"), default_router_layer(model))
        self.adapters = [random_adapter(self.targets, i) for i in range(count)]
        self.gate = torch.softmax(torch.randn(case.batch, count, generator=torch.Generator().manual_seed(1)), dim=-1)

    def contenders(self, names: list[str]) -> Iterator[Contender]:
        for name in names:
            with quiet():
                built: Contender = getattr(self, name)()
            yield built

    def amlora(self) -> Contender:
        served = self.weights.model()
        inject(served, self.targets, self.adapters)
        steps = steps_of(served, self.case, gate={"task_gate": self.gate}, train=None)
        trained = self.weights.model()
        new = NewAdapter(task="new", rank=RANK, alpha=ALPHA)
        last = inject(trained, self.targets, self.adapters[:-1], new=new).one_hot(self.count - 1, self.case.batch)
        steps["forward_backward"] = steps_of(trained, self.case, gate={}, train={"task_gate": last})["forward_backward"]
        return Contender("amlora", steps)

    def amlora_routed(self) -> Contender:
        model = self.weights.model()
        width = self.case.config.hidden_size
        router = FlatRouter(torch.randn(self.count, width) / width, [adapter.task for adapter in self.adapters])
        inject(model, self.targets, self.adapters, router=router)
        return Contender("amlora_routed", steps_of(model, self.case, gate={}, train=None))

    def loop(self) -> Contender:
        def looped(gate_BN: Tensor, train: bool) -> PreTrainedModel:
            model = self.weights.model()
            for target in self.targets:
                layer = LoopLinear(model.get_submodule(target.path), target, self.adapters, gate_BN, train)  # type: ignore[arg-type]
                model.set_submodule(target.path, layer)
            return model

        steps = steps_of(looped(self.gate, train=False), self.case, gate={}, train=None)
        last = torch.zeros(self.case.batch, self.count)
        last[:, -1] = 1.0
        steps["forward_backward"] = steps_of(looped(last, train=True), self.case, gate={}, train={})["forward_backward"]
        return Contender("loop", steps)

    def peft_lora(self) -> Contender:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules=self._names())
        return Contender("peft_lora", steps_of(get_peft_model(self.weights.model(), config), self.case, gate={}, train={}))

    def peft_xlora(self) -> Contender:
        from peft import XLoraConfig, get_peft_model

        config = XLoraConfig(
            task_type="CAUSAL_LM",
            hidden_size=self.case.config.hidden_size,
            adapters={str(i): path for i, path in enumerate(self._saved())},
        )
        model = get_peft_model(self.weights.model(), config).to(self.dtype)
        return Contender("peft_xlora", steps_of(model, self.case, gate={}, train={}, cached=False))

    def peft_arrow(self) -> Contender:
        from peft import ArrowConfig, create_arrow_model

        top = ArrowConfig(top_k=min(3, self.count))
        model = create_arrow_model(self.weights.model(), task_specific_adapter_paths=self._saved(), arrow_config=top)
        return Contender("peft_arrow", steps_of(model, self.case, gate={}, train=None))

    def _names(self) -> list[str]:
        return sorted({target.path.rsplit(".", 1)[-1] for target in self.targets})

    def _saved(self) -> list[str]:
        """The adapters as PEFT stores them, one folder each."""
        from peft import LoraConfig
        from safetensors.torch import save_file

        paths = []
        for i, adapter in enumerate(self.adapters):
            path = self.folder / f"{self.case.name}-{i}"
            paths.append(str(path))
            if path.exists():
                continue
            LoraConfig(
                r=RANK, lora_alpha=int(ALPHA), target_modules=self._names(), task_type="CAUSAL_LM"
            ).save_pretrained(path)
            tensors = {f"base_model.model.{m}.lora_A.weight": a for m, a in adapter.a.items()}
            tensors |= {f"base_model.model.{m}.lora_B.weight": b.contiguous() for m, b in adapter.b.items()}
            save_file(tensors, path / "adapter_model.safetensors")
        return paths


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


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


def measure(case: Case, dtype: torch.dtype, count: int, weights: Weights, names: list[str], args: Any) -> list[dict[str, Any]]:
    """Rows of one case, dtype and number of adapters."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        contenders = list(Field(case, dtype, weights, count, Path(folder)).contenders(names))
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
                seconds[contender.name].append(contender.steps[phase]())
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


def bytes_per_adapter(case: Case, dtype: torch.dtype) -> int:
    """What one more adapter adds to the model's parameters."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(case.config)
    targets = find_targets(model, AdapterSettings(layers="all"), default_router_layer(model))
    return sum(RANK * (t.in_features + t.out_features) for t in targets) * dtype.itemsize


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
    parser.add_argument("--contenders", nargs="+", help="default: all")
    parser.add_argument("--cases", nargs="+", choices=["model", "shapes"], default=["model", "shapes"])
    parser.add_argument("--rounds", type=int, default=9)
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
        cases.append(llama_8b(2, 64, width=512))
    else:
        if args.model and "model" in args.cases:
            cases.append(Case(Path(args.model).name, AutoConfig.from_pretrained(args.model), 8, 128, args.model))
        if "shapes" in args.cases:
            cases.append(llama_8b(2, 512))
    everyone = ["peft_lora", "amlora", "amlora_routed", "loop", "peft_xlora", "peft_arrow"]
    names = ["peft_lora", *(n for n in everyone if n in (args.contenders or everyone) and n != "peft_lora")]

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
    import platform

    import peft
    import transformers

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
