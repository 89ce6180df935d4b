"""A bank's rows as LoRAs that a vLLM server loads: their names, their folders, what compression costs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from amlora_dist.adapters.adapter import Adapter
from amlora_dist.errors import UserError
from amlora_dist.files import new_folder
from amlora_dist.registry.bank_folder import Bank
from amlora_dist.registry.exports import row_adapter, served_names, write_lora
from amlora_dist.registry.manifest import Manifest, slug
from amlora_dist.registry.row_compression import compressed

log = logging.getLogger(__name__)

FOLDER = "vllm/rows"
"""Below ``AMLORA_HOME``; the vLLM server must see it at the same path."""


@dataclass(frozen=True, slots=True)
class RowSet:
    """The rows of one version of a bank."""

    names: Mapping[str, str]
    """What vLLM calls each task's row: ``NAME-vVERSION-TASK``."""
    folders: Mapping[str, Path]
    """Where each lies, by that name."""
    gaps: Mapping[str, float] = field(default_factory=dict)
    """By task, how far a row that had to be compressed is from the bank's, relative; see ``row_compression``."""


def write_rows(bank: Bank, name: str, version: str, home: Path, limit: int) -> RowSet:
    """Write every task's row as a PEFT LoRA, unless it is there.

    Args:
        bank: whose.
        name: what clients call it.
        version: ``models:/NAME/NUMBER``, or anything else for a bank that came as a folder.
        home: ``AMLORA_HOME``.
        limit: the server's ``--max-lora-rank``: rows of more ranks are compressed to it.

    Raises:
        UserError: a bank whose mixture is no fixed row for each task, or whose base model vLLM does not serve so.
    """
    manifest = bank.manifest
    if manifest.base.encoder_decoder:
        raise UserError("--engine vllm: this bank's base model is an encoder-decoder, which vLLM has no LoRA for")
    if manifest.router.by_layers:
        raise UserError(
            f"--engine vllm: the layers of this bank weigh the adapters themselves (router kind {manifest.router.kind}), "
            "token by token, which vLLM cannot; serve it with the own engine"
        )
    digest = manifest.digest()
    number = version.rpartition("/")[2] if version.startswith("models:") else digest[:12]
    slugs = served_names(manifest.tasks)
    names = {task: f"{slug(name)}-v{number}-{slugs[task]}" for task in manifest.tasks}
    place = home / FOLDER / f"{digest[:16]}-r{limit}"
    folders, gaps = {}, {}
    for task, called in names.items():
        folders[called] = place / called
        adapter = row_adapter(bank, task)
        if adapter.rank > limit:
            whole = adapter.rank
            adapter, gaps[task] = compressed(adapter, limit)
            log.warning(
                "task %r: its row has rank %d and was compressed to %d, which vLLM takes (--engine-rank): relative "
                "difference %.4f in Frobenius norm", task, whole, limit, gaps[task],
            )  # fmt: skip
        if not folders[called].is_dir():
            _write(folders[called], manifest, adapter)
    return RowSet(names, folders, gaps)


def _write(folder: Path, manifest: Manifest, adapter: Adapter) -> None:
    """Fill the folder under another name, then rename: it is whole, or not there."""
    try:
        with new_folder(folder) as part:
            write_lora(part, manifest, adapter)
    except OSError as error:
        if not folder.is_dir():  # another replica was quicker
            raise UserError(f"{folder}: cannot be written ({error}); give AMLORA_HOME a place that can") from error
