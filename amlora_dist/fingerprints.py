"""The fingerprints: what decides a stage, its adapter alone, and a score. Equal fingerprint, equal result.

World size, ZeRO stage, logging and paths are in neither; they are recorded next to the results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from amlora_dist.digests import value_digest

SCHEMA = 1
"""Raised when the same configuration would train another adapter than before."""


def prompt_values(template_digest: str, max_length: int, encoder_decoder: bool) -> dict[str, Any]:
    """What turns rows into token ids, besides the tokenizer (which is in the base model's digest)."""
    return {"template": template_digest, "max_length": max_length, "encoder_decoder": encoder_decoder}


def training_fingerprint(
    *,
    base_digest: str,
    parent_adapters: Sequence[str],
    parent_statistics: Sequence[str],
    task: str,
    rows_digest: str,
    prompt: Mapping[str, Any],
    method: str,
    seed: int,
    reads: Mapping[str, Any],
) -> str:
    """Digest of all that decides the adapter and the router statistics of one stage; of its adapter alone, where ``reads``
    is without what only the statistics read (``methods.base.adapter_reads``).

    Args:
        base_digest: of the base model's files, and of how it is quantised where it is (``BaseModel.identity``).
        parent_adapters: digests of the adapters below, in order; empty for a method that does not inherit.
        parent_statistics: digests of their router statistics, against which held-out rows are weighed.
        task: its name, which names the stage's random streams.
        rows_digest: of the training rows used.
        prompt: `prompt_values`.
        method: its name.
        seed: of the run.
        reads: the configuration values the method declares for this stage (``Method.reads``).
    """
    return value_digest(
        {
            "schema": SCHEMA,
            "base": base_digest,
            "parents": list(parent_adapters),
            "statistics": list(parent_statistics),
            "task": task,
            "rows": rows_digest,
            "prompt": dict(prompt),
            "method": method,
            "seed": seed,
            "reads": dict(reads),
        }
    )


def scoring_fingerprint(
    *,
    bank: Sequence[str],
    mode: str,
    router: Mapping[str, Any],
    task: str,
    split: str,
    rows_digest: str,
    prompt: Mapping[str, Any],
    metric: str,
    labels: Sequence[str],
    dtype: str,
) -> str:
    """Digest of all that decides one cell of the accuracy matrix.

    Args:
        bank: training fingerprints of the stages in order; the base model's identity for ``untrained``.
        mode: ``router``, ``oracle``, ``untrained``, or ``without.N``.
        router: kind and gate settings; empty unless the router weighs.
        task: its name (the oracle gives its row).
        split: ``test`` or ``dev``.
        rows_digest: of the rows scored.
        prompt: `prompt_values`; of a free-text task also the most tokens of an answer.
        metric: of the task.
        labels: verbalisers, which ranked accuracy needs.
        dtype: of the model.
    """
    return value_digest(
        {
            "schema": SCHEMA,
            "bank": list(bank),
            "mode": mode,
            "router": dict(router),
            "task": task,
            "split": split,
            "rows": rows_digest,
            "prompt": dict(prompt),
            "metric": metric,
            "labels": list(labels),
            "dtype": dtype,
        }
    )
