"""Rows that need not be scored again, because nothing that their answer depends on has changed.

Base model and old adapters are frozen, and so are the features that the router reads. What a new stage, the oracle or a
disabled adapter can change for a row is its gate: where that is, number for number, what it was when the row was last
scored, and 0 for every task that came since, the answer is the same. Sparse gates make this the rule and not the exception;
scoring after stage n then costs the rows of one or two tasks instead of n.

A row that no task has a weight for is always scored again: the base model answers it behind the bank's own prompt and within
the bank's own limit, and a new task may change both.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from amlora_dist.digests import tensors_digest
from amlora_dist.errors import UserError
from amlora_dist.evaluation.scoring import Prediction, read_predictions, summarise
from amlora_dist.files import write_bytes

if TYPE_CHECKING:
    from amlora_dist.adapters.router import Router

DIGEST = "digest"
"""Under this key a file of features says what its tensors' digest is."""


def write_features(path: Path, features: dict[int, Tensor]) -> None:
    """Keep what the router read of each row, (d,) fp32 by row number; the file appears whole or not at all."""
    from safetensors.torch import save

    rows = sorted(features)
    tensors = {"rows": torch.tensor(rows), "features": torch.stack([features[row] for row in rows])}
    # Not save_file, whose error for a full disk is not an OSError.
    write_bytes(path, save(tensors, {DIGEST: tensors_digest(tensors)}))


def read_features(path: Path, rows: Sequence[int]) -> Tensor | None:
    """Features (B, d) of ``rows`` in their order; None where the file is missing, damaged, or of other rows."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
            whole = (file.metadata() or {}).get(DIGEST) == tensors_digest(found)
        same = whole and found["rows"].tolist() == sorted(rows)
    except (OSError, SafetensorError, KeyError):
        return None
    place = {row: i for i, row in enumerate(sorted(rows))}
    return found["features"][[place[row] for row in rows]] if same else None


def gates_from(router: Router, path: Path | None, rows: Sequence[int]) -> Tensor | None:
    """The gates (B, T) of ``rows`` by their kept features; None where the router needs these and they are not there."""
    if not router.needs_features:
        return router.gates(None, len(rows)).cpu()
    features = None if path is None else read_features(path, rows)
    return None if features is None else router.to("cpu").gates(features, len(rows))


def unchanged(
    before: Sequence[Path], rows: Sequence[int], gates_BT: Tensor, *, noted: bool, changed: Collection[int] = ()
) -> list[Prediction]:
    """Predictions of earlier scores that still hold.

    Args:
        before: folders of those scores, under banks whose tasks are this one's or the first of them. Folders that were
            deleted, are damaged or are of other rows are passed over.
        rows: numbers of the rows to score now.
        gates_BT: their gates now.
        noted: whether these come from the router, so that predictions tell them.
        changed: tasks (0-based) whose row of the bank is not what it was.
    """
    wanted = dict(zip(rows, gates_BT.tolist(), strict=True))
    found: dict[int, Prediction] = {}
    for folder in before:
        for old in _predictions(folder, wanted.keys()):
            gates = wanted[old.row]
            if old.gates is None or len(old.gates) > len(gates) or any(gates[task] for task in changed):
                continue
            if not any(gates):
                continue
            if [*old.gates, *[0.0] * (len(gates) - len(old.gates))] == gates:
                found.setdefault(old.row, replace(old, gates=gates if noted else None))
    return [found[row] for row in rows if row in found]


def _predictions(folder: Path, rows: Collection[int]) -> list[Prediction]:
    """Those of a finished score of these very rows, which add up to its summary; none of any other."""
    try:
        found = read_predictions(folder / "predictions.jsonl")
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        whole = summarise(found).items() <= summary.items()
    except (OSError, UserError, ValueError, AttributeError, TypeError):
        return []
    return found if whole and {prediction.row for prediction in found} == set(rows) else []
