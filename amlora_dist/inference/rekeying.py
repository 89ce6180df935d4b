"""A finished bank whose statistics are made again from rows: one of before 0.2 then routes and answers plain text.

Adapters stay bit for bit. The router's keys, and what calibrates them, are made of the texts of rows that the caller has;
the bank then has prompt format 2, and a background by which texts of no task are recognised. The adapters of a bank of
before were trained behind prompts of format 1, whose ids differ at the seams.

The weight of the keys' evidence (``beta``) is fitted on rows of these that are held out of the keys. If the adapter has
trained on them, it is surer of their labels than of new ones, and the keys get less weight than they should have.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from amlora_dist.adapters.inject import inject
from amlora_dist.adapters.keyed_router import keyed_router
from amlora_dist.adapters.settings import RouterSettings
from amlora_dist.adapters.statistics import HeldOut, Sample, TaskStatistics
from amlora_dist.adapters.targets import bank_targets, default_depths
from amlora_dist.base_model import load_model, load_tokenizer
from amlora_dist.config.former_values import completed
from amlora_dist.config.loading import home
from amlora_dist.errors import UserError
from amlora_dist.evaluation.decoding import Decoder
from amlora_dist.evaluation.field_texts import MissingFieldsError, fields_for
from amlora_dist.evaluation.ranking import Room, label_scores
from amlora_dist.evaluation.requests import Prompter, Request
from amlora_dist.inference.import_peft import sample_features
from amlora_dist.inference.loading import resolve_bank_base
from amlora_dist.registry.bank_folder import read_bank, statistics_entry, write_bank
from amlora_dist.registry.manifest import RouterEntry
from amlora_dist.registry.manifest import replace as with_changes
from amlora_dist.tasks.prompt_format import PromptFormat
from amlora_dist.training.engine import Alone
from amlora_dist.training.stage_statistics import StageStatistics, held_out_places, sampled_places
from amlora_dist.training.worker_cache import WorkerCache

if TYPE_CHECKING:
    from amlora_dist.adapters.inject import Mixture
    from amlora_dist.base_model import BaseModel
    from amlora_dist.registry.manifest import Manifest
    from amlora_dist.tasks.task_entry import TaskEntry

BATCH = 16


@dataclass(frozen=True, slots=True)
class TaskRows:
    """Texts of one task with their right answers, in one order."""

    texts: Sequence[str]
    answers: Sequence[str]
    fields: Sequence[Mapping[str, str]] | None = None
    """By name, those that each text was joined of, for a prompt that reads them; empty for a text without; None: of none."""


def rekey(source: Path, dest: Path, rows: Mapping[str, TaskRows], *, base: str | None = None) -> Manifest:
    """Write a bank with the adapters of another and a router for plain text.

    Args:
        source: folder of the bank.
        dest: folder to write.
        rows: of every task of the bank; for tasks with labels every answer is one of them.
        base: folder or Hub id of the base model, where it is not at the place that the bank names.

    Raises:
        UserError: a task without rows or description, a bank that no router of tasks weighs, another base model; a bank
            that abstains, of which no rows can be held out.
        BankError: the bank is damaged.
    """
    bank = read_bank(source, statistics=False)
    manifest = bank.manifest
    if manifest.router.kind != "posterior":
        raise UserError(f"rekey: found router kind {manifest.router.kind!r}, expected posterior: others read no texts")
    if missing := [task for task in manifest.tasks if not rows.get(task) or not rows[task].texts]:
        raise UserError(f"rekey: found no rows of {', '.join(missing)}, expected some of every task; give --rows TASK=FILE")
    found = resolve_bank_base(manifest.base, base)
    model, tokenizer = load_model(found, dtype=torch.float32).eval(), load_tokenizer(found.path)
    stored = completed(manifest.training_configuration)
    settings = RouterSettings(**stored.get("router", {}))
    targets = bank_targets(model, manifest.targets)
    probe = inject(model, targets, bank.adapters, router_layer=settings.layer)
    layer = probe.router_layer
    probe.remove()
    depths = default_depths(layer)
    mixture = inject(
        model, targets, bank.adapters, router_layer=layer, depths=depths, skip_tokens=settings.skip_tokens
    )
    entries = {line.task: line.task_spec for line in manifest.adapters}
    longest = max((entry.max_length for entry in entries.values() if entry is not None), default=512)
    prompter = Prompter(
        entries, manifest.bank_template, tokenizer, encoder_decoder=found.encoder_decoder,
        positions=getattr(model.config, "max_position_embeddings", None), prompt_format=PromptFormat(2, longest),
    )  # fmt: skip
    statistics = [
        _statistics(model, mixture, prompter, found, task, prompter.entry(task), rows[task]) for task in manifest.tasks
    ]
    background = _background(mixture, tokenizer, found, settings)
    if statistics[-1].held is not None:
        statistics[-1] = replace(statistics[-1], background=background)
    label_keys = RouterSettings().label_keys
    router = keyed_router(
        statistics, rule="label", shrinkage=None, gate=settings.gate, depths=len(depths) + 1, background=background,
        label_keys=label_keys,
    )  # fmt: skip
    if settings.gate.abstention and not router.foreign_above:
        raise UserError(
            "rekey: router.gate.abstention: found true in the bank, but too few rows to tell texts of no task from them (a"
            " quarter of a task's is held out, 24 are enough); give more rows of each task: --rows TASK=FILE"
        )
    section = {
        **stored.get("router", {}), "keys": "label", "label_keys": label_keys, "shrinkage": "held_out", "depths": depths,
        "layer": layer, "max_text_tokens": longest, "background": True,
    }  # fmt: skip
    configuration = {
        **stored, "prompt_format": 2, "router": section, "answer": {"evidence": "both", "beta": "calibrated"},
    }  # fmt: skip
    changed = with_changes(
        manifest,
        router=RouterEntry(kind=router.kind, settings=router.settings(), digest="0" * 64),
        statistics=[statistics_entry(k, s.task, s.tensors()) for k, s in enumerate(statistics, start=1)],
        training_configuration=configuration,
        adapters=[dataclasses.replace(line, stored=None) for line in manifest.adapters],
    )
    return write_bank(dest, changed, bank.adapters, router.tensors(), {s.task: s.tensors() for s in statistics})


def _statistics(
    model: Any, mixture: Mixture, prompter: Prompter, base: Any, task: str, entry: TaskEntry, rows: TaskRows
) -> TaskStatistics:
    """Of one task: most rows for the keys, a sample of them stored as a stage does, and a share held out."""
    labels = list(entry.labels or [])
    if odd := sorted(set(rows.answers) - set(labels)) if labels else []:
        raise UserError(f"rekey: task {task!r}: found answer {odd[0]!r}, its labels are {', '.join(labels)}")
    held = held_out_places(len(rows.texts), 0.1, seed=0, task=task)
    fields = [rows.fields[k] if rows.fields else {} for k in held]
    for k, given in zip(held, fields, strict=True) if labels else ():
        try:
            fields_for(task, prompter.entries, rows.texts[k], given)
        except MissingFieldsError as error:
            raise UserError(f"rekey: row {k + 1} of {len(rows.texts)}: {error}") from None
    features = sample_features(model, mixture, prompter, base, task, entry, rows.texts)
    places = [labels.index(answer) if labels else -1 for answer in rows.answers]
    learned = [place for place in range(len(places)) if place not in set(held)]
    own = TaskStatistics.from_features(task, features[learned], [max(places[k], 0) for k in learned], len(labels))
    if not held:
        return own
    unseen = HeldOut(features[held].float(), torch.tensor([places[k] for k in held]))
    if labels:
        likelihoods = _likelihoods(mixture, prompter, task, [rows.texts[k] for k in held], fields, tuple(labels))
        unseen = replace(unseen, loglikelihoods=likelihoods)
    counted = [learned[place] for place in sampled_places(len(learned), seed=0, task=task)]
    return replace(own, held=unseen, sample=Sample(features[counted].float(), torch.tensor([places[k] for k in counted])))


def _background(mixture: Mixture, tokenizer: Any, base: BaseModel, settings: RouterSettings) -> dict[str, torch.Tensor]:
    """Mean features of each part of the background, as a stage reads them; once for a base model."""
    makes = StageStatistics(
        "background", 0, settings, tokenizer, base.encoder_decoder, Alone(), mixture.device, whole=False, text_alone=True,
        cache=WorkerCache(),
    )  # fmt: skip
    read = {"layer": mixture.router_layer, "depths": list(mixture.routing.depths)}
    return makes.background(mixture, home() / "cache", {"base": base.identity, "dtype": "fp32"} | read)


@torch.no_grad()
def _likelihoods(
    mixture: Mixture, prompter: Prompter, task: str, texts: Sequence[str], fields: Sequence[Mapping[str, str]],
    labels: tuple[str, ...],
) -> torch.Tensor:  # fmt: skip
    """What the model says of each label of each text under the task's own row, (rows, labels), nats."""
    tokenizer = prompter.tokenizer
    decoder = Decoder(
        mixture.model, pad_id=int(tokenizer.pad_token_id), eos_id=int(tokenizer.eos_token_id),
        encoder_decoder=prompter.encoder_decoder,
    )  # fmt: skip
    plan = prompter.plan(labels, task)
    found = []
    for start in range(0, len(texts), BATCH):
        places = range(start, min(start + BATCH, len(texts)))
        requests = [Request(place, texts[place], task=task, fields=fields[place]) for place in places]
        prompter.read(requests)
        for request in requests:
            prompter.ask(request, new_tokens=plan.longest + 1)
        width = max(len(request.tokens) for request in requests)
        left = not prompter.encoder_decoder
        ids, mask = [], []
        for request in requests:
            fill, ones = [decoder.pad_id] * (width - len(request.tokens)), [1] * len(request.tokens)
            ids.append([*fill, *request.tokens] if left else [*request.tokens, *fill])
            mask.append([0] * len(fill) + ones if left else ones + [0] * len(fill))
        gate = mixture.one_hot(mixture.task_names.index(task), len(requests))
        state = decoder.prefill(torch.tensor(ids), torch.tensor(mask), task_gate=gate)
        found.append(label_scores(decoder, state, plan, Room(width, BATCH)))
    return torch.cat(found)
