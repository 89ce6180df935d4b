"""The contenders of ``mixture.py``: one model each, built over the same weights, and its phases."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from amlora_dist.adapters.adapter import Adapter
from amlora_dist.adapters.inject import NewAdapter, inject
from amlora_dist.adapters.settings import AdapterSettings
from amlora_dist.adapters.targets import Target, default_router_layer, find_targets

RANK, ALPHA = 8, 32.0
DECODED = 8
"""Tokens per decoding measurement, each time from the same prompt, whose pass is not timed."""
UNCACHED = 2
"""Tokens per decoding measurement of a contender that has no KV cache: every token repeats the prompt's pass."""

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
            model = AutoModelForCausalLM.from_config(case.config, dtype=dtype, trust_remote_code=False)
        else:
            model = AutoModelForCausalLM.from_pretrained(case.folder, dtype=dtype, trust_remote_code=False)
        self._model = model.eval().requires_grad_(False)

    def model(self) -> PreTrainedModel:
        """A fresh model over the same tensors."""
        shared = {id(tensor): tensor for tensor in (*self._model.parameters(), *self._model.buffers())}
        model = copy.deepcopy(self._model, memo=shared)
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
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, case.config.vocab_size, (case.batch, case.tokens), generator=generator)


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def steps_of(
    model: Any, case: Case, *, gate: dict[str, Tensor], train: dict[str, Tensor] | None, cached: bool = True
) -> dict[str, Step]:
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

    prefilled: list[Any] = []  # the cache of the prompt, and the first token

    def decode() -> float:
        model.eval()
        with torch.no_grad():
            if not prefilled:
                out = model(input_ids=ids, use_cache=True, **gate)
                prefilled.extend([out.past_key_values, out.logits[:, -1:].argmax(-1)])
            cache, first = prefilled

            def tokens() -> None:
                token = first
                for _ in range(DECODED):
                    out = model(input_ids=token, past_key_values=cache, use_cache=True)
                    token = out.logits[:, -1:].argmax(-1)

            seconds = timed(tokens) / DECODED
            cache.crop(-DECODED)
            return seconds

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

    def contender(self, name: str) -> Contender:
        """One of ``CONTENDERS``."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            built: Contender = getattr(self, name)()
        return built

    def serving(self, name: str) -> PreTrainedModel:
        """The bank in a fresh model, by ``amlora`` or ``loop``."""
        model = self.weights.model()
        if name == "loop":
            return self._looped(model, self.gate, train=False)
        inject(model, self.targets, self.adapters)
        return model

    def amlora(self) -> Contender:
        steps = steps_of(self.serving("amlora"), self.case, gate={"task_gate": self.gate}, train=None)
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

    def amlora_above_router(self) -> Contender:
        model, trained = self.weights.model(), self.weights.model()
        width = self.case.config.hidden_size
        targets = find_targets(model, AdapterSettings(), default_router_layer(model))
        adapters = [random_adapter(targets, i) for i in range(self.count)]
        router = FlatRouter(torch.randn(self.count, width) / width, [adapter.task for adapter in adapters])
        inject(model, targets, adapters, router=router)
        new = NewAdapter(task="new", rank=RANK, alpha=ALPHA)
        last = inject(trained, targets, adapters[:-1], new=new).one_hot(self.count - 1, self.case.batch)
        steps = steps_of(model, self.case, gate={}, train=None)
        steps["forward_backward"] = steps_of(trained, self.case, gate={}, train={"task_gate": last})["forward_backward"]
        return Contender("amlora_above_router", steps)

    def loop(self) -> Contender:
        steps = steps_of(self.serving("loop"), self.case, gate={}, train=None)
        last = torch.zeros(self.case.batch, self.count)
        last[:, -1] = 1.0
        trained = self._looped(self.weights.model(), last, train=True)
        steps["forward_backward"] = steps_of(trained, self.case, gate={}, train={})["forward_backward"]
        return Contender("loop", steps)

    def _looped(self, model: PreTrainedModel, gate_BN: Tensor, train: bool) -> PreTrainedModel:
        for target in self.targets:
            base = model.get_submodule(target.path)
            assert isinstance(base, nn.Linear)
            model.set_submodule(target.path, LoopLinear(base, target, self.adapters, gate_BN, train))
        return model

    def peft_lora(self) -> Contender:
        return self._peft_lora("peft_lora", autocast=False)

    def peft_lora_fp32(self) -> Contender:
        return self._peft_lora("peft_lora_fp32", autocast=True)

    def _peft_lora(self, name: str, *, autocast: bool) -> Contender:
        """``autocast``: PEFT keeps LoRAs of a bf16 model in fp32, its default; otherwise in the model's dtype, as ours."""
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules=self._names())
        model = get_peft_model(self.weights.model(), config, autocast_adapter_dtype=autocast)
        return Contender(name, steps_of(model, self.case, gate={}, train={}))

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
        return Contender("peft_arrow", steps_of(model.to(self.dtype), self.case, gate={}, train=None))

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


REFERENCE = "peft_lora"
CONTENDERS = (
    REFERENCE,
    "amlora",
    "amlora_routed",
    "amlora_above_router",
    "loop",
    "peft_lora_fp32",
    "peft_xlora",
    "peft_arrow",
)
"""Methods of ``Field``. The first is what the others are compared with."""


def bytes_per_adapter(case: Case, dtype: torch.dtype) -> int:
    """What one more adapter adds to the model's parameters."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(case.config, trust_remote_code=False)
    targets = find_targets(model, AdapterSettings(layers="all"), default_router_layer(model))
    return sum(RANK * (t.in_features + t.out_features) for t in targets) * dtype.itemsize
