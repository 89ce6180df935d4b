"""A LoRA that was trained elsewhere becomes an adapter of a bank, with statistics from a sample of its task's texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from amlora_dist.adapters.inject import Mixture, inject
from amlora_dist.adapters.router import build_router
from amlora_dist.adapters.settings import RouterSettings
from amlora_dist.adapters.statistics import TaskStatistics, background_of
from amlora_dist.adapters.targets import bank_targets
from amlora_dist.base_model import check_tokenizer, check_weights, load_model, load_tokenizer, meta_model
from amlora_dist.config.former_values import completed
from amlora_dist.digests import value_digest
from amlora_dist.errors import UserError
from amlora_dist.evaluation.requests import Prompter, Request
from amlora_dist.inference.loading import bank_format, remember_base
from amlora_dist.privacy import public_name
from amlora_dist.registry.bank_folder import adapter_entry, statistics_entry, write_bank
from amlora_dist.registry.manifest import BaseEntry, Manifest, RouterEntry, TaskName, replace
from amlora_dist.tasks.batches import Example, Side, collate_prompts
from amlora_dist.tasks.label_checks import check_labels
from amlora_dist.tasks.prompts import BANK_TEMPLATE
from amlora_dist.training.batching import prompt_positions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from amlora_dist.adapters.adapter import Adapter
    from amlora_dist.base_model import BaseModel
    from amlora_dist.registry.bank_folder import Bank
    from amlora_dist.tasks.task_entry import TaskEntry

METHOD = "imported"
BATCH = 16


def empty_manifest(base: BaseModel) -> Manifest:
    """The manifest of a bank that has no adapter yet."""
    return Manifest(
        base=BaseEntry.of(base),
        bank_template=BANK_TEMPLATE,
        method=METHOD,
        adapters=[],
        router=RouterEntry(kind="posterior", settings={}, digest="0" * 64),
        fan_in_fan_out=base.fan_in_fan_out,
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
    check_options(made.task, entry.labels)
    adapters = [] if before is None else before.adapters
    if before is not None:
        check_joinable(before, made)
    settings = RouterSettings(**completed(draft.training_configuration).get("router", {}))
    prompt_format = bank_format(draft)
    tokenizer = _checked_tokenizer(base, made, entry)
    model = load_model(base, dtype=torch.float32)
    mixture = inject(
        model,
        bank_targets(model, sorted(made.a)),
        [*adapters, made],
        router_layer=settings.layer,
        depths=settings.depths or (),
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
    prompter = Prompter(
        {line.task: line.task_spec for line in draft.adapters},
        draft.bank_template,
        tokenizer,
        encoder_decoder=base.encoder_decoder,
        positions=getattr(model.config, "max_position_embeddings", None),
        prompt_format=prompt_format,
    )
    own = TaskStatistics.from_features(made.task, sample_features(model, mixture, prompter, base, made.task, entry, texts))
    known = {} if before is None else before.statistics
    statistics = [TaskStatistics.from_tensors(task, known[task]) for task in draft.tasks[:-1]] + [own]
    router = build_router(
        settings, statistics, seed=0, text_alone=prompt_format.text_alone, background=background_of(statistics)
    )
    assert router is not None, "banks that take adapters from elsewhere have a posterior router"
    draft = replace(
        draft,
        router=RouterEntry(kind=router.kind, settings=router.settings(), digest="0" * 64),
        statistics=[*draft.statistics, statistics_entry(index, made.task, own.tensors())],
        stage=index,
    )
    values = {s.task: s.tensors() for s in statistics}
    return write_bank(dest, draft, [*adapters, made], router.tensors(), values)


def check_options(task: str, labels: Sequence[str] | None) -> None:
    """See that a task can have this name and these labels, whatever the model.

    Raises:
        UserError: names the option.
    """
    try:
        TypeAdapter(TaskName).validate_python(task)
    except ValidationError as error:
        raise UserError(f"--task: found {task!r}: {error.errors()[0]['msg']}") from error
    if labels is None:
        return
    if twice := next((label for n, label in enumerate(labels) if label in labels[:n]), None):
        raise UserError(f"--label: found {twice!r} twice, expected different texts")
    if len(labels) < 2 or not all(label.strip() for label in labels):
        raise UserError(f"--label: found {', '.join(map(repr, labels))}, expected two texts at least, or none for free text")


def _checked_tokenizer(base: BaseModel, made: Adapter, entry: TaskEntry) -> PreTrainedTokenizerBase:
    """The base model's tokenizer, once adapter, weights, tokenizer and labels are known to fit; reads no weights."""
    model = meta_model(base)
    for target in bank_targets(model, sorted(made.a)):
        found = (made.a[target.path].shape[1], made.b[target.path].shape[0])
        if found != (target.in_features, target.out_features):
            raise UserError(
                f"the adapter's {target.path} is of a layer with {found[0]} inputs and {found[1]} outputs, the base model"
                f" {base.source!r} has {target.in_features} and {target.out_features}; give its own base model (--base)"
            )
    check_weights(base, model)
    tokenizer = load_tokenizer(base.path)
    check_tokenizer(base, tokenizer, int(model.get_input_embeddings().weight.shape[0]))
    labels = entry.labels or []
    check_labels(labels, tokenizer, encoder_decoder=base.encoder_decoder, where="--label", task=made.task)
    return tokenizer


def sample_features(
    model: Any, mixture: Mixture, prompter: Prompter, base: BaseModel, task: str, entry: TaskEntry, texts: Sequence[str]
) -> Tensor:
    """What the bank's router reads of texts, (rows, F): of the texts alone, or in format 1 of the task's prompts."""
    requests = [Request(place, text, entry.question, task) for place, text in enumerate(texts)]
    pad_id = int(prompter.tokenizer.pad_token_id)
    if prompter.format.text_alone:
        prompter.read(requests)
        ends = prompter.ends
        examples = [
            Example(r.place, r.text_ids, (), None, "", span=(len(ends.before), len(r.text_ids) - len(ends.after)))
            for r in requests
        ]
    else:
        prompter.fill(requests, new_tokens=1)
        examples = [Example(r.place, r.tokens, (), None, "") for r in requests]
    features = []
    for start in range(0, len(examples), BATCH):
        side: Side = "right" if base.encoder_decoder else "left"
        inputs: dict[str, Any] = dict(collate_prompts(examples[start : start + BATCH], pad_id=pad_id, side=side))
        inputs |= prompt_positions(model, inputs["attention_mask"], encoder_decoder=base.encoder_decoder)
        with torch.no_grad():
            features.append(
                mixture.routing_features(**{name: tensor.to(mixture.device) for name, tensor in inputs.items()}).cpu()
            )
    return torch.cat(features)


def check_joinable(before: Bank, made: Adapter) -> None:
    """See that a bank can take one more adapter, and this one.

    Raises:
        UserError: says what is in the way.
    """
    if made.task in before.manifest.tasks:
        raise UserError(f"--task: the bank has a task {made.task!r} already; choose another name")
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
