"""Rows that need not be scored again, because nothing that their answer depends on has changed.

Base model and old adapters are frozen, and so are the features that the router reads. What a new stage, the oracle or a
silenced adapter can change for a row is its gate: where that is, number for number, what it was when the row was last
scored, and 0 for every task that came since, the answer stands. Sparse gates make this the rule and not the exception;
scoring after stage n then costs the rows of one or two tasks instead of n.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from amlora_dist.errors import UserError
from amlora_dist.evaluation.scoring import Prediction, read_predictions

if TYPE_CHECKING:
    from amlora_dist.adapters.router import Router


def write_features(path: Path, features: dict[int, Tensor]) -> None:
    """Keep what the router read of each row, (d,) fp32 by row number; the file appears whole or not at all."""
    from safetensors.torch import save

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    rows = sorted(features)
    # Not save_file, whose error for a full disk is not an OSError.
    partial.write_bytes(save({"rows": torch.tensor(rows), "features": torch.stack([features[row] for row in rows])}))
    partial.replace(path)


def read_features(path: Path, rows: Sequence[int]) -> Tensor | None:
    """Features (B, d) of ``rows`` in their order; None where the file is missing, damaged, or of other rows."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(path)
        same = found["rows"].tolist() == sorted(rows)
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
            if [*old.gates, *[0.0] * (len(gates) - len(old.gates))] == gates:
                found.setdefault(old.row, replace(old, gates=gates if noted else None))
    return [found[row] for row in rows if row in found]


def _predictions(folder: Path, rows: Collection[int]) -> list[Prediction]:
    try:
        found = read_predictions(folder / "predictions.jsonl")
    except (OSError, UserError, UnicodeDecodeError):
        return []
    return found if {prediction.row for prediction in found} == set(rows) else []
