"""A bank that really works: random adapters on a tiny random base model, with a router that knows their tasks."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from amlora_dist.adapters.adapter import Adapter
from amlora_dist.adapters.inject import inject
from amlora_dist.adapters.router import Router, posterior_router
from amlora_dist.adapters.settings import AdapterSettings, GateSettings, LiteralSettings, RouterSettings
from amlora_dist.adapters.statistics import TaskStatistics
from amlora_dist.adapters.targets import Target, default_router_layer, find_targets
from amlora_dist.base_model import ModelSettings, load_model, load_tokenizer, resolve_base
from amlora_dist.inference.model import AMLoRAModel
from amlora_dist.registry.bank_folder import adapter_entry, statistics_entry, write_bank
from amlora_dist.registry.manifest import AccuracyMatrix, BaseEntry, Manifest, RouterEntry
from amlora_dist.tasks.prompts import BANK_TEMPLATE
from amlora_dist.tasks.task_entry import TaskEntry
from tests.registry.tiny_banks import fingerprint
from tests.tiny_config import TARGETS, TOPICS, write_model

TASKS = ("colours", "shapes", "sizes")


def texts_of(task: str, count: int, seed: str = "") -> list[str]:
    """Texts that belong to a task of ``tiny_config``."""
    labels, words = TOPICS[task]
    draw = random.Random(f"{task}{seed}")
    own = [word for word in words if sum(word in others for _, others in TOPICS.values()) == 1]
    return [" ".join([*draw.choices(own, k=draw.randint(4, 7)), draw.choice(labels)]) for _ in range(count)]


def random_adapter(task: str, index: int, targets: Sequence[Target], *, rank: int, recipe: bool, literal: bool) -> Adapter:
    """An adapter whose effect on the logits is large, with a recipe over the earlier ones."""
    draw = torch.Generator().manual_seed(index)
    a = {t.path: torch.randn(rank, t.in_features, generator=draw) for t in targets}
    b = {t.path: 0.03 * torch.randn(t.out_features, rank, generator=draw) for t in targets}
    made = Adapter(task, rank, 8.0, a, b)
    if recipe and index > 1:
        made.recipe = {t.path: 0.5 * torch.randn(index - 1, generator=draw) for t in targets}
    if literal:
        for t in targets:
            made.selector[f"{t.path}.weight"] = torch.randn(index, t.out_features, generator=draw)
            made.selector[f"{t.path}.bias"] = torch.randn(index + 1, generator=draw)
    return made


def write_working_bank(
    folder: Path,
    base_folder: Path,
    kind: str = "llama",
    *,
    tasks: Sequence[str] = TASKS,
    router: Router | None = None,
    literal: LiteralSettings | None = None,
    described: bool = True,
    gate: GateSettings | None = None,
    entries: Mapping[str, TaskEntry] | None = None,
    **changes: Any,
) -> Manifest:
    """Write a bank to ``folder`` and, unless it is there, its base model to ``base_folder``; ``entries`` in place of those
    of some tasks."""
    if not base_folder.is_dir():
        write_model(base_folder, kind)
    base = resolve_base(ModelSettings(source=str(base_folder)), folder.parent / "home")
    model, tokenizer = load_model(base, dtype=torch.float32), load_tokenizer(base.path)
    layer = default_router_layer(model)
    settings = AdapterSettings(targets=[name for name in TARGETS[kind] if name != "wo"])
    targets = find_targets(model, settings, layer)
    adapters = [
        random_adapter(task, k, targets, rank=1 + k, recipe=literal is None, literal=literal is not None)
        for k, task in enumerate(tasks, start=1)
    ]
    mixture = inject(model, targets, adapters)
    statistics = []
    for task in tasks:
        rows = tokenizer([f"{text}\nAnswer:" for text in texts_of(task, 40)], padding=True, return_tensors="pt")
        features = mixture.routing_features(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"])
        statistics.append(TaskStatistics.from_features(task, features))
    mixture.remove()
    chosen = router or posterior_router(statistics, shrinkage=0.1, gate=gate or GateSettings())
    described_as = {
        task: TaskEntry(kind="words", question="what ?", labels=TOPICS[task][0], template=BANK_TEMPLATE, max_length=24)
        for task in tasks
    } | dict(entries or {})
    fields: dict[str, Any] = {
        "base": BaseEntry(
            source=str(base_folder), digest=base.digest, architecture=base.model_type,
            encoder_decoder=base.encoder_decoder,
        ),
        "bank_template": BANK_TEMPLATE,
        "method": "am_lora",
        "adapters": [
            adapter_entry(
                adapter, k, training_fingerprint=fingerprint(adapter.task), parent=None,
                task_spec=described_as[adapter.task] if described else None,
            )
            for k, adapter in enumerate(adapters, start=1)
        ],
        "router": RouterEntry(
            kind="literal" if literal else chosen.kind,
            settings=asdict(literal) if literal else chosen.settings(),
            digest=fingerprint("draft"),
        ),
        "statistics": [statistics_entry(k, s.task, s.tensors()) for k, s in enumerate(statistics, start=1)],
        "training_configuration": {"router": asdict(RouterSettings()), "model": {"attention": "sdpa"}},
        "accuracy_matrix": AccuracyMatrix(tasks=list(tasks), accuracy=[[0.5] * len(tasks)]),
        "run_id": "run-1",
        "stage": len(tasks),
    }  # fmt: skip
    return write_bank(
        folder,
        Manifest(**{**fields, **changes}),
        adapters,
        {} if literal else chosen.tensors(),
        {s.task: s.tensors() for s in statistics},
    )


def write_keyed_bank(
    folder: Path, base_folder: Path, *, tasks: Sequence[str] = TASKS, entries: Mapping[str, TaskEntry] | None = None
) -> Manifest:
    """A working bank that is routed and answered by plain text, as runs make them since 0.2."""
    from amlora_dist.inference.rekeying import TaskRows, rekey

    write_working_bank(folder.with_name(f"{folder.name}-before"), base_folder, tasks=tasks, entries=entries)
    texts = {task: texts_of(task, 40) for task in tasks}
    rows = {task: TaskRows(own, [text.rpartition(" ")[2] for text in own]) for task, own in texts.items()}
    return rekey(folder.with_name(f"{folder.name}-before"), folder, rows)


def described(model: AMLoRAModel, task: str, entry: TaskEntry) -> None:
    """Another entry of a task in a bank that is loaded."""
    model.prompter.entries[task] = model.prompter.learned[task] = entry
