"""Small banks for tests: random adapters for made-up modules, with a router and statistics."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amlora_dist.adapters.adapter import Adapter
from amlora_dist.registry import tags
from amlora_dist.registry.bank_folder import adapter_entry, read_bank, statistics_entry, write_bank
from amlora_dist.registry.manifest import AccuracyMatrix, BaseEntry, Manifest, RouterEntry, replace
from amlora_dist.registry.store import Store, Version

MODULES = {"model.layers.1.self_attn.q_proj": (8, 8), "model.layers.1.self_attn.v_proj": (8, 4)}
"""Module path -> (d_in, d_out)."""
TASKS = ("helpdesk/email", "agnews", "yahoo")


def fingerprint(*parts: object) -> str:
    """A sha256-like text that differs where its parts do."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def tiny_adapter(
    task: str, index: int, *, seed: int = 0, rank: int = 2, modules: Mapping[str, tuple[int, int]] = MODULES
) -> Adapter:
    """A random adapter with a recipe over the earlier ones."""
    generator = torch.Generator().manual_seed(1000 * seed + index)
    a = {m: torch.randn(rank, d_in, generator=generator) for m, (d_in, _) in modules.items()}
    b = {m: torch.randn(d_out, rank, generator=generator) for m, (_, d_out) in modules.items()}
    recipe = {m: torch.randn(index - 1, generator=generator) for m in modules} if index > 1 else {}
    return Adapter(task, rank, 4.0, a, b, recipe)


def tiny_bank(
    folder: Path,
    tasks: Sequence[str] = TASKS,
    *,
    adapters: list[Adapter] | None = None,
    router: Mapping[str, Tensor] | None = None,
    **changes: Any,
) -> Manifest:
    """Write a bank; ``changes`` are fields of the manifest."""
    adapters = adapters or [tiny_adapter(task, index) for index, task in enumerate(tasks, start=1)]
    generator = torch.Generator().manual_seed(7)
    statistics = {task: {"mean": torch.randn(8, dtype=torch.float64, generator=generator)} for task in tasks}
    fields: dict[str, Any] = {
        "base": BaseEntry(source="base", digest=fingerprint("base"), architecture="llama"),
        "bank_template": "{{ text }}\nAnswer:",
        "method": "am_lora",
        "adapters": [
            adapter_entry(adapter, index, training_fingerprint=fingerprint(adapter.task), parent=None)
            for index, adapter in enumerate(adapters, start=1)
        ],
        "router": RouterEntry(kind="posterior", settings={"temperature": 1.5}, digest=fingerprint("draft")),
        "statistics": [statistics_entry(i, task, statistics[task]) for i, task in enumerate(tasks, start=1)],
        "training_configuration": {"adapters": {"rank": 2}},
        "accuracy_matrix": AccuracyMatrix(tasks=list(tasks), accuracy=[[None] * len(tasks), [0.5] * len(tasks)]),
        "run_id": "run-1",
        "stage": len(tasks),
    }
    keys = router or {"keys": torch.randn(len(tasks), 8, generator=generator)}
    return write_bank(folder, Manifest(**{**fields, **changes}), adapters, keys, statistics)


def rewrite(folder: Path, **changes: Any) -> Manifest:
    """Change the manifest of a bank that is written."""
    bank = read_bank(folder)
    return write_bank(folder, replace(bank.manifest, **changes), bank.adapters, bank.router, bank.statistics)


def publish_sequence(
    store: Store,
    name: str,
    work: Path,
    *,
    run_id: str | None = None,
    tasks: Sequence[str] = TASKS,
    epoch: int = 1,
    guard: Any = lambda: None,
    adapters: Sequence[Adapter] | None = None,
    start: int = 1,
    **changes: Any,
) -> list[Version]:
    """What a driver does: one stage after the other, each adapter stored once by its own stage's run.

    Stages before ``start`` are there already, from epoch 1. ``changes`` are fields of the manifests.
    """
    run_id = run_id or name
    parent = store.parent_run(name, run_id, {"name": name})
    adapters = adapters or [tiny_adapter(task, index) for index, task in enumerate(tasks, start=1)]
    places: list[Any] = []
    published = []
    for index, task in enumerate(tasks, start=1):
        print_of = fingerprint(name, *tasks[:index])
        run = store.stage_run(parent, f"{index} {task}", print_of)
        places.append(store.placement(name, run, epoch if index >= start else 1))
        folder = work / f"{name}-{index}-e{epoch}"
        draft = tiny_bank(folder, tasks[:index], adapters=list(adapters[:index]), **changes)
        lines = [
            dataclasses.replace(line, stored=place.of(line.folder), training_fingerprint=print_of)
            for line, place in zip(draft.adapters, places, strict=True)
        ]
        parts = [
            dataclasses.replace(part, stored=place.of(part.file))
            for part, place in zip(draft.statistics, places, strict=True)
        ]
        rewrite(folder, adapters=lines, statistics=parts, run_id=run_id, epoch=epoch)
        if index < start:
            continue
        values = {tags.TRAINING_FINGERPRINT: print_of, tags.RUN_ID: run_id, tags.TASK: task}
        published.append(store.publish(name, folder, stage_run=run, tags=values, epoch=epoch, guard=guard))
        store.end_run(run, "FINISHED")
    return published
