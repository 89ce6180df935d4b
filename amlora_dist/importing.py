"""A LoRA that was trained elsewhere becomes an adapter of a bank, with statistics from a sample of its task's texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import TypeAdapter, ValidationError

from amlora_dist.adapters.inject import inject
from amlora_dist.adapters.router import posterior_router
from amlora_dist.adapters.settings import RouterSettings
from amlora_dist.adapters.statistics import TaskStatistics
from amlora_dist.bank_loading import bank_targets, remember_base
from amlora_dist.base_model import load_model, load_tokenizer
from amlora_dist.digests import value_digest
from amlora_dist.errors import UserError
from amlora_dist.inference import Prompter, Request, batches, tensors
from amlora_dist.privacy import public_name
from amlora_dist.registry.bank_folder import adapter_entry, statistics_entry, write_bank
from amlora_dist.registry.manifest import BaseEntry, Manifest, RouterEntry, TaskName, replace
from amlora_dist.tasks.prompts import BANK_TEMPLATE
from amlora_dist.training.batching import prompt_positions

if TYPE_CHECKING:
    from amlora_dist.adapters.bank import Adapter
    from amlora_dist.base_model import BaseModel
    from amlora_dist.registry.bank_folder import Bank
    from amlora_dist.registry.task_entry import TaskEntry

METHOD = "imported"
CONV1D = ("gpt2", "openai-gpt", "imagegpt")
"""Architectures whose linear layers keep their weight as (d_in, d_out)."""
BATCH = 16


def empty_manifest(base: BaseModel) -> Manifest:
    """The manifest of a bank that has no adapter yet."""
    entry = BaseEntry(
        source=public_name(base.source),
        revision=base.revision,
        digest=base.digest,
        architecture=base.model_type,
        encoder_decoder=base.encoder_decoder,
    )
    return Manifest(
        base=entry,
        bank_template=BANK_TEMPLATE,
        method=METHOD,
        adapters=[],
        router=RouterEntry(kind="posterior", settings={}, digest="0" * 64),
        fan_in_fan_out=base.model_type in CONV1D,
    )


def add_adapter(
    dest: Path,
    base: BaseModel,
    draft: Manifest,
    before: Bank | None,
    made: Adapter,
    texts: Sequence[str],
    entry: TaskEntry,
) -> Manifest:
    """Write a bank with one more adapter, and a router that knows its task.

    Args:
        dest: folder to write.
        base: the base model.
        draft: manifest of the bank so far, or ``empty_manifest``.
        before: the bank so far, with its statistics.
        made: the adapter, without a recipe.
        texts: a sample of its task's texts; a few hundred are good.
        entry: labels and prompt of its task.

    Raises:
        UserError: the adapter or the bank cannot be joined; says why.
        BankError: the adapter adapts what the base model does not have.
    """
    try:
        TypeAdapter(TaskName).validate_python(made.task)
    except ValidationError as error:
        raise UserError(f"--task: found {made.task!r}: {error.errors()[0]['msg']}") from error
    adapters = [] if before is None else before.adapters
    if made.task in draft.tasks:
        raise UserError(f"--task: the bank has a task {made.task!r} already; choose another name")
    if before is not None:
        _check_joinable(before, made)
    settings = RouterSettings(**draft.training_configuration.get("router", {}))
    model, tokenizer = load_model(base, dtype=torch.float32), load_tokenizer(base.path)
    mixture = inject(
        model,
        bank_targets(model, sorted(made.a)),
        [*adapters, made],
        router_layer=settings.layer,
        skip_tokens=settings.skip_tokens,
    )
    index = len(adapters) + 1
    line = adapter_entry(
        made,
        index,
        training_fingerprint=value_digest(["imported", made.digest()]),
        parent=None if before is None else draft.parent_digest(),
        task_spec=entry,
    )
    remember_base(base)
    named = dataclasses.replace(draft.base, source=public_name(draft.base.source))
    draft = replace(draft, adapters=[*draft.adapters, line], base=named)
    prompter = Prompter(draft, tokenizer, getattr(model.config, "max_position_embeddings", None))
    requests = [Request(place, text, entry.question, made.task) for place, text in enumerate(texts)]
    prompter.fill(requests, new_tokens=1)
    features = []
    for batch in batches(requests, BATCH):
        inputs: dict[str, Any] = tensors(
            batch, pad_id=int(tokenizer.pad_token_id), encoder_decoder=base.encoder_decoder, device=mixture.device
        )
        inputs |= prompt_positions(model, inputs["attention_mask"], encoder_decoder=base.encoder_decoder)
        with torch.no_grad():
            features.append(mixture.routing_features(**inputs).cpu())
    own = TaskStatistics.from_features(made.task, torch.cat(features))
    known = {} if before is None else before.statistics
    statistics = [TaskStatistics.from_tensors(task, known[task]) for task in draft.tasks[:-1]] + [own]
    router = posterior_router(statistics, shrinkage=settings.shrinkage, gate=settings.gate)
    draft = replace(
        draft,
        router=RouterEntry(kind=router.kind, settings=router.settings(), digest="0" * 64),
        statistics=[*draft.statistics, statistics_entry(index, made.task, own.tensors())],
        stage=index,
    )
    values = {s.task: s.tensors() for s in statistics}
    return write_bank(dest, draft, [*adapters, made], router.tensors(), values)


def _check_joinable(before: Bank, made: Adapter) -> None:
    kind = before.manifest.router.kind
    if kind != "posterior":
        raise UserError(f"a bank with router kind {kind!r} takes no adapter from elsewhere, one with posterior does")
    if missing := [task for task in before.manifest.tasks if task not in before.statistics]:
        raise UserError(f"the bank lacks the statistics of {missing[0]!r}; pull it with: amlora pull --statistics")
    if odd := sorted(set(before.manifest.targets) ^ set(made.a)):
        raise UserError(
            f"the adapter and the bank adapt different layers: {len(odd)} differ, the first is {odd[0]}; "
            "they cannot be one bank"
        )
