"""The banks and servers that ``serving.py`` compares: one bank, and PEFT's LoRA behind the same engine and app."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amlora_dist.adapters.adapter import Adapter
from amlora_dist.adapters.inject import inject
from amlora_dist.adapters.router import posterior_router
from amlora_dist.adapters.settings import AdapterSettings, GateSettings, RouterSettings
from amlora_dist.adapters.statistics import TaskStatistics
from amlora_dist.adapters.targets import default_router_layer, find_targets
from amlora_dist.base_model import ModelSettings, load_model, load_tokenizer, resolve_base
from amlora_dist.config.loading import home
from amlora_dist.evaluation.decoding import Prefilled
from amlora_dist.evaluation.requests import Request, Route, tensors
from amlora_dist.inference.model import AMLoRAModel
from amlora_dist.registry.bank_folder import adapter_entry, statistics_entry, write_bank
from amlora_dist.registry.manifest import BaseEntry, Manifest, RouterEntry
from amlora_dist.serving.bank import ServedBank, Started
from amlora_dist.serving.settings import ServeSettings
from amlora_dist.tasks.prompts import BANK_TEMPLATE
from amlora_dist.tasks.sources import load_task
from amlora_dist.tasks.task import TaskDefaults, resolve_task
from amlora_dist.tasks.task_entry import task_entry

TASKS = [f"helpdesk/{name}" for name in ("email_route", "chat_mood", "call_urgency", "review_topic")]
RANK = 8


def make_bank(folder: Path, source: str, copies: int, ending: str) -> list[str]:
    """Write a bank with small random adapters on the base model ``source`` and a router that knows the support-desk
    tasks, ``copies`` times each. Returns test texts of all tasks, mixed, each with ``ending`` behind it."""
    base = resolve_base(ModelSettings(source=source), home())
    model, tokenizer = load_model(base, dtype=torch.float32), load_tokenizer(base.path)
    targets = find_targets(model, AdapterSettings(rank=RANK), default_router_layer(model))
    specs = [resolve_task(name, base_dir=Path(), defaults=TaskDefaults(max_length=96)) for name in TASKS]
    data = [load_task(spec, splits=("train", "test")) for spec in specs]
    names = [f"{spec.name}-{copy}" for copy in range(copies) for spec in specs]
    draw = torch.Generator().manual_seed(0)
    adapters = [
        Adapter(
            name, RANK, 2.0 * RANK,
            {t.path: torch.randn(RANK, t.in_features, generator=draw) / t.in_features**0.5 for t in targets},
            {t.path: 0.01 * torch.randn(t.out_features, RANK, generator=draw) for t in targets},
        )
        for name in names
    ]  # fmt: skip
    mixture = inject(model, targets, adapters)
    statistics = []
    for place, name in enumerate(names):
        rows = data[place % len(data)].rows["train"][place // len(data) :: copies][:32]
        prompts = [f"{row.text}\nAnswer:" for row in rows]
        inputs = tokenizer(prompts, padding=True, padding_side="right", return_tensors="pt")
        features = mixture.routing_features(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        statistics.append(TaskStatistics.from_features(name, features))
    mixture.remove()
    router = posterior_router(statistics, shrinkage=0.1, gate=GateSettings())
    blank = "0" * 64
    manifest = Manifest(
        base=BaseEntry(
            source=source, digest=base.digest, architecture=base.model_type, encoder_decoder=base.encoder_decoder
        ),
        bank_template=BANK_TEMPLATE,
        method="am_lora",
        adapters=[
            adapter_entry(adapter, k, training_fingerprint=blank, parent=None, task_spec=task_entry(specs[(k - 1) % 4]))
            for k, adapter in enumerate(adapters, start=1)
        ],
        router=RouterEntry(kind=router.kind, settings=router.settings(), digest=blank),
        statistics=[statistics_entry(k, s.task, s.tensors()) for k, s in enumerate(statistics, start=1)],
        training_configuration={"router": {"layer": RouterSettings().layer}},
        run_id="benchmark",
        stage=len(names),
    )
    write_bank(folder, manifest, adapters, router.tensors(), {s.task: s.tensors() for s in statistics})
    return [f"{row.text}{ending}" for rows in zip(*(one.rows["test"][:40] for one in data), strict=True) for row in rows]


class OneLora(ServedBank):
    """The base model with PEFT's LoRA of the first task for everybody, and no router: the same engine, less work."""

    def __init__(self, model: AMLoRAModel, name: str, folder: Path, tasks: Sequence[str]) -> None:
        from peft import PeftModel

        super().__init__(model, name)
        paths = {line.task: folder / line.folder for line in model.bank.manifest.adapters}
        self._adapters = {task: f"a{place}" for place, task in enumerate(tasks)}
        self._peft: Any = PeftModel.from_pretrained(load_model(model.base, dtype=torch.float32), paths[tasks[0]], "a0")
        for task in tasks[1:]:
            self._peft.load_adapter(paths[task], self._adapters[task])
        self._peft.eval()
        self._route = Route(dict.fromkeys(model.tasks, 0.0), dict.fromkeys(model.tasks, 0.0), 1.0)
        self._decoder = type(model.decoder)(
            self._peft.get_base_model(), pad_id=model.decoder.pad_id, eos_id=model.decoder.eos_id, encoder_decoder=False
        )

    def begin(self, requests: Sequence[Request]) -> Started:
        """Without a gate; every answer is written."""
        inputs = tensors(requests, pad_id=self._decoder.pad_id, encoder_decoder=False, device=torch.device("cpu"))
        state = self._decoder.prefill(inputs["input_ids"], inputs["attention_mask"])
        return Started(state, [self._route] * len(requests), [None] * len(requests), [[] for _ in requests])

    def advance(self, state: Prefilled, tokens_B1: Tensor) -> None:
        """Without a gate."""
        state.logits = self._decoder.advance(state, tokens_B1)[:, -1]


class Switched(OneLora):
    """One process for all tasks, whose one LoRA at a time is switched by ``set_adapter``; clients name the task, and
    only requests of the same task share a pass."""

    def __init__(self, model: AMLoRAModel, name: str, folder: Path, tasks: Sequence[str]) -> None:
        super().__init__(model, name, folder, tasks)
        self._task_of: dict[int, str] = {}

    def group(self, request: Request) -> Hashable:
        """The task."""
        return request.task

    def begin(self, requests: Sequence[Request]) -> Started:
        """With the task's LoRA."""
        task = requests[0].task
        assert task is not None
        self._switch(task)
        begun = super().begin(requests)
        begun.state.cache.amlora_task = task
        return begun

    def advance(self, state: Prefilled, tokens_B1: Tensor) -> None:
        """With the task's LoRA."""
        self._switch(state.cache.amlora_task)
        super().advance(state, tokens_B1)

    def _switch(self, task: str) -> None:
        if self._peft.active_adapter != self._adapters[task]:
            self._peft.set_adapter(self._adapters[task], inference_mode=True)


def builder(kind: str, folder: Path, limits: dict[str, Any], vllm: tuple[str, int] | None = None) -> Callable[[], Any]:
    """Makes the app of a contender in a replica; ``vllm``: address and largest rank of the server behind ``kind`` vllm."""

    def build() -> Any:
        from amlora_dist.serving.app import build_app
        from amlora_dist.serving.service import Service

        model = AMLoRAModel.from_bank(folder, device="cpu")
        bank: ServedBank
        maker = None
        if kind == "vllm":
            from amlora_dist.serving.vllm_engine import VllmEngine

            assert vllm is not None
            maker = functools.partial(VllmEngine, url=vllm[0], home=home(), rank=vllm[1])
        if kind in ("amlora", "vllm"):
            bank = ServedBank(model, "bank")
        elif kind == "one_lora":
            bank = OneLora(model, "bank", folder, model.tasks[:1])
        else:
            bank = Switched(model, "bank", folder, model.tasks)
        return build_app(Service(bank, ServeSettings(**limits), maker))

    return build
