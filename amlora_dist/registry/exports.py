"""A bank in the forms other tools take: plain PEFT adapters, one merged model. For servers: ``server_exports``.

A task's whole row of the mixture, ``sum_i row_i scale_i B_i A_i``, is one LoRA: the A of the adapters it uses under
each other, their B side by side with weight and scale multiplied in, at alpha / r = 1. It is exact, and its rank is
the sum of theirs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from amlora_dist.adapters.adapter import Adapter, rows
from amlora_dist.errors import UserError
from amlora_dist.files import make_folders, sync_tree
from amlora_dist.methods import LORA
from amlora_dist.registry.adapter_folder import CONFIG_FILE, MODEL_FILE, peft_config
from amlora_dist.registry.bank_files import README_FILE
from amlora_dist.registry.bank_folder import Bank, adapter_entry
from amlora_dist.registry.card import adapter_readme
from amlora_dist.registry.manifest import slug
from amlora_dist.registry.tensor_files import write_tensors, write_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from amlora_dist.registry.manifest import Manifest

INDEX = "export.json"


def row_adapter(bank: Bank, task: str) -> Adapter:
    """A task's row as one adapter without a recipe, in fp32.

    Raises:
        UserError: no such task, or a bank whose adapters are no LoRA.
    """
    if bank.manifest.form != LORA:
        held = f"{bank.manifest.form} (method {bank.manifest.method})"
        raise UserError(f"this bank holds {held}, which other tools cannot choose by input: no form for them")
    if task not in bank.manifest.tasks:
        raise UserError(f"task: found {task!r}, the bank's tasks are {', '.join(bank.manifest.tasks)}")
    place = bank.manifest.tasks.index(task)
    weights = {module: rows(bank.adapters, module)[place] for module in bank.adapters[place].a}
    used = [i for i in range(len(bank.adapters)) if any(bool(row[i] != 0) for row in weights.values())]
    a: dict[str, Tensor] = {}
    b: dict[str, Tensor] = {}
    for module, row in weights.items():
        parts = [bank.adapters[i] for i in used]
        a[module] = torch.cat([part.a[module].float() for part in parts], dim=0)
        scaled = [part.b[module].float() * (row[i] * part.scale) for i, part in zip(used, parts, strict=True)]
        b[module] = torch.cat(scaled, dim=1)
    rank = sum(bank.adapters[i].rank for i in used)
    return Adapter(task, rank, float(rank), a, b)


def write_row(folder: Path, bank: Bank, task: str, base: str | None = None) -> Path:
    """Write a task's row as a PEFT adapter: ``peft.PeftModel.from_pretrained(base, folder)`` loads it.

    ``base`` is what its configuration says of the base model; None: what the bank says.
    """
    return write_lora(folder, bank.manifest, row_adapter(bank, task), base)


def write_lora(folder: Path, manifest: Manifest, adapter: Adapter, base: str | None = None) -> Path:
    """Write an adapter of one's own making, without a recipe, as ``write_row`` does a task's row."""
    line = adapter_entry(adapter, 1, training_fingerprint="0" * 64, parent=None)
    config = peft_config(manifest, line)
    if base is not None:
        config |= {"base_model_name_or_path": base, "revision": None}
    named = {f"base_model.model.{module}.lora_A.weight": tensor for module, tensor in adapter.a.items()}
    named |= {f"base_model.model.{module}.lora_B.weight": tensor for module, tensor in adapter.b.items()}
    write_tensors(folder / MODEL_FILE, named)
    write_text(folder / CONFIG_FILE, json.dumps(config, indent=1, sort_keys=True) + "\n")
    write_text(folder / README_FILE, adapter_readme(manifest, adapter.task, adapter.rank))
    return folder


def export_peft(folder: Path, bank: Bank, *, kind: str = "peft", base: str | None = None, **more: Any) -> Path:
    """Write every task's row as a PEFT adapter below ``folder``, and ``export.json`` that lists them.

    Args:
        folder: must not exist, or be empty.
        bank: to export.
        kind: the format's name.
        base: what each adapter's configuration says of the base model; None: what the bank says.
        more: further entries of ``export.json``.
    """
    new_folder(folder)
    listed = []
    for line in bank.manifest.adapters:
        name = f"{line.index}-{slug(line.task)}"
        write_row(folder / name, bank, line.task, base)
        rank = row_adapter(bank, line.task).rank
        labels = None if line.task_spec is None else line.task_spec.labels
        listed.append({"task": line.task, "folder": name, "rank": rank, "labels": labels})
    write_index(folder, bank.manifest, kind, adapters=listed, **more)
    return folder


def export_merged(
    folder: Path, bank: Bank, model: PreTrainedModel, tokenizer: Any, weights: Mapping[str, float], **more: Any
) -> Path:
    """Write the base model with a fixed mixture of the tasks' rows in its weights: a plain transformers folder.

    Args:
        folder: must not exist, or be empty.
        bank: to merge.
        model: the plain base model; its weights are changed.
        tokenizer: saved next to it.
        weights: of the tasks; those left out are 0.
        more: further entries of ``export.json``.

    Raises:
        UserError: a task that the bank does not have.
    """
    new_folder(folder)
    with torch.no_grad():
        for task, share in weights.items():
            adapter = row_adapter(bank, task)
            for module, a in adapter.a.items():
                weight = model.get_submodule(module).weight
                assert isinstance(weight, Tensor)
                delta = share * (adapter.b[module] @ a)
                weight += (delta.T if bank.manifest.fan_in_fan_out else delta).to(weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    sync_tree(folder)
    write_index(folder, bank.manifest, "merged", weights=dict(weights), **more)
    return folder


def gap_between(mixture: Tensor, fixed: Tensor) -> dict[str, float]:
    """How far an export is from the bank, from the first-token logits (B, vocabulary) of both."""
    log_p, log_q = mixture.log_softmax(dim=-1), fixed.log_softmax(dim=-1)
    return {
        "texts": len(mixture),
        "other_first_token": float((mixture.argmax(-1) != fixed.argmax(-1)).float().mean()),
        "mean_kl_nats": float((log_p.exp() * (log_p - log_q)).sum(-1).mean()),
        "largest_logit_difference": float((mixture - fixed).abs().max()),
    }


def vacant(folder: Path) -> None:
    """Refuse to write into what is there."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: is there already; give a new folder, or remove it first")


def new_folder(folder: Path) -> None:
    """Make a folder where nothing is, or an empty one."""
    vacant(folder)
    make_folders(folder)


def discard(folder: Path) -> None:
    """Remove an export that could not be finished."""
    shutil.rmtree(folder, ignore_errors=True)


def write_index(folder: Path, manifest: Manifest, kind: str, **more: Any) -> None:
    """Write ``export.json``: which bank this is, in which form, and what belongs to the form."""
    base = manifest.base
    bits = {} if base.quantisation == "none" else {"quantisation": base.quantisation}
    value = {
        "format": kind,
        "bank": {"run_id": manifest.run_id, "stage": manifest.stage, "digest": manifest.digest()},
        "base": {"source": base.source, "revision": base.revision, "digest": base.digest, **bits},
        **more,
    }
    write_text(folder / INDEX, json.dumps(value, indent=1) + "\n")


def amend_index(folder: Path, **more: Any) -> None:
    """Add entries to ``export.json``."""
    value = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    write_text(folder / INDEX, json.dumps(value | more, indent=1) + "\n")


def served_names(tasks: Sequence[str]) -> dict[str, str]:
    """What other servers call each task's adapter: its slug, with its number where two tasks have the same one."""
    slugs = [slug(task) for task in tasks]
    return {
        task: one if slugs.count(one) == 1 else f"{one}-{number}"
        for number, (task, one) in enumerate(zip(tasks, slugs, strict=True), start=1)
    }


def client_source(name: str) -> str:
    """The client that goes into an export's folder, a program of its own."""
    return resources.files("amlora_dist.registry").joinpath(name).read_text(encoding="utf-8")


def quoted(text: str) -> str:
    """A word of a shell's command."""
    return "'" + text.replace("'", "'\\''") + "'"
