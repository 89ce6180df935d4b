"""Checkpoints of one stage: small, by parameter name, independent of world size and ZeRO stage.

A checkpoint is a folder ``step-00000050`` of ``state.safetensors`` (fp32 master weights and Adam's moments of what
trains) and ``progress.json``; it counts when ``COMMIT``, written last, agrees with their digests. Only rank 0 writes.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from amlora_dist.crash_points import reach
from amlora_dist.digests import file_digest
from amlora_dist.errors import UserError
from amlora_dist.files import new_folder, write_bytes

log = logging.getLogger(__name__)

FORMAT = 1
BEST = "best."
"""Begins the names of the best adapter's tensors (``best_checkpoint``)."""
KEEP = 2
"""Committed checkpoints kept: the newest, and one to fall back on when the newest turns out damaged."""


@dataclass(slots=True)
class StageProgress:
    """How far a stage is after ``step`` optimizer steps."""

    fingerprint: str
    step: int
    losses: list[float] = field(default_factory=list)
    """Loss of every step so far, in nats per target token."""
    tokens: int = 0
    """Tokens seen so far over all ranks, prompt and target, without padding."""
    seconds: float = 0.0
    """Training time so far, over all attempts that counted."""
    recipe_from: str | None = None
    """Task whose row the recipe started from; None if it started at zero."""
    trained_with: dict[str, Any] = field(default_factory=dict)
    """World size, ZeRO stage and versions: recorded, not part of the fingerprint."""
    held_losses: list[list[Any]] = field(default_factory=list)
    """(step, loss on the held-out rows in nats per target token) of every look at them; None for one that is not finite."""
    held_seconds: float = 0.0
    """Of ``seconds``, those that the looks took."""
    kept_step: int | None = None
    """The step whose adapter is the stage's result, where the best one is kept; None: the last."""
    race: dict[str, Any] | None = None
    """How the starts of the recipe raced: steps of each, held-out losses by name (None of those that diverged), and
    seconds of the losers; None: there was no race."""

    def copied(self) -> StageProgress:
        """One that can go on by itself."""
        return replace(
            self, losses=list(self.losses), trained_with=dict(self.trained_with), held_losses=list(self.held_losses)
        )


def checkpoint_name(step: int) -> str:
    """Of the checkpoint's folder."""
    return f"step-{step:08d}"


def write_text(path: Path, text: str) -> None:
    """Write under a temporary name, flush to disk, rename into place."""
    try:
        write_bytes(path, text.encode())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}; make room or fix the permissions, then run again") from error


def save_checkpoint(folder: Path, state: Mapping[str, Tensor], progress: StageProgress) -> Path:
    """Write one checkpoint under ``folder``, commit it, and drop all but the newest ``KEEP``.

    Raises:
        UserError: the disk is full or not writable; earlier checkpoints are untouched.
    """
    target = folder / checkpoint_name(progress.step)
    for left in folder.glob(".step-*"):  # by a writer that was killed; there is one at a time
        shutil.rmtree(left, ignore_errors=True)
    try:
        with new_folder(target, replace=True) as tmp:
            save_file(dict(state), tmp / "state.safetensors")
            write_text(tmp / "progress.json", json.dumps(asdict(progress)))
            reach("checkpoint_written")
        write_text(target / "COMMIT", json.dumps({"format": FORMAT, "files": _digests(target)}))
    except (OSError, SafetensorError, UserError) as error:
        raise UserError(
            f"cannot write a checkpoint under {folder}: {error}; the last good one is kept: make room, then start the same"
            " command again"
        ) from error
    reach("checkpoint_committed")
    for old in sorted(folder.glob("step-*"))[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def newest_checkpoint(
    folder: Path, fingerprint: str, shapes: Mapping[str, tuple[int, ...]], *, at: int | None = None
) -> tuple[dict[str, Tensor], StageProgress] | None:
    """The newest committed checkpoint of this fingerprint with tensors of these names and shapes (the one ``at`` a step), or
    None. Says why it passes over the others."""
    for candidate in sorted(folder.glob("step-*" if at is None else checkpoint_name(at)), reverse=True):
        reason = _fault(candidate)
        if reason is None:
            try:
                return _read(candidate, fingerprint, shapes)
            except (SafetensorError, OSError, TypeError, ValueError) as error:  # committed, but not by this code
                reason = str(error)
        log.warning("passing over checkpoint %s: %s", candidate, reason)
    return None


def _read(
    folder: Path, fingerprint: str, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Tensor], StageProgress]:
    progress = StageProgress(**json.loads((folder / "progress.json").read_text(encoding="utf-8")))
    if progress.fingerprint != fingerprint:
        raise ValueError(f"it belongs to fingerprint {str(progress.fingerprint)[:12]}")
    if folder.name != checkpoint_name(progress.step) or len(progress.losses) != progress.step:
        raise ValueError(f"its progress says step {progress.step} and has {len(progress.losses)} losses")
    state = load_file(folder / "state.safetensors")
    shapes = dict(shapes)
    if any(name.startswith(BEST) for name in state):  # the best adapter so far travels along
        shapes |= {f"{BEST}{name}": shape for name, shape in shapes.items() if name.startswith("master.")}
    if strange := sorted(state.keys() ^ shapes.keys()):
        raise ValueError(f"{strange[0]} is {'not there' if strange[0] in shapes else 'of no trained parameter'}")
    for name, tensor in state.items():
        if tensor.dtype != torch.float32 or not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} is {tensor.dtype} or holds NaN or infinity, expected finite torch.float32")
        if tuple(tensor.shape) != shapes[name]:  # copying would spread a smaller one over the parameter
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shapes[name]}")
    return state, progress


def _digests(folder: Path) -> dict[str, str]:
    return {name: file_digest(folder / name) for name in ("progress.json", "state.safetensors")}


def _fault(folder: Path) -> str | None:
    """Why the folder does not count as a checkpoint; None when it does."""
    mark = folder / "COMMIT"
    if not mark.is_file():
        return "it has no commit marker"
    try:
        commit = json.loads(mark.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        return "its commit marker is not JSON"
    if not isinstance(commit, dict) or commit.get("format") != FORMAT:
        return f"its format is not {FORMAT}"
    try:
        if commit.get("files") != _digests(folder):
            return "its files differ from the digests in the commit marker"
    except OSError as error:
        return f"{error.filename} is missing or no file"
    return None
