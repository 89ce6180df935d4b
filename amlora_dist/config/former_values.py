"""What keys meant before they existed, and values that are gone: what replaces them in what earlier versions stored.

A run, a search or a bank of an earlier version keeps its own resolved configuration. Keys that are new since then are
not in it, and today's defaults are not what it was trained with: there such a key has the value that does what the code
of that time did. The same table says when a new key enters a fingerprint: only where it is *not* at that value, so that
no fingerprint of the past changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FORMER: dict[str, Any] = {
    "prompt_format": 1,
    "router.keys": "task",
    "router.label_keys": "bank",
    "router.depths": [],
    "router.max_text_tokens": None,
    "router.background": False,
    "router.gate.lost": 0.03,
    "answer.evidence": "model",
    "answer.beta": "calibrated",
    "evaluation.prompts": "own",
    "adapters.use_rslora": False,
    "adapters.dropout": 0.0,
    "training.lora_plus": 1.0,
    "training.keep": "last",
    "recipe.start": "probe",
    "recipe.refit": 0.0,
    "training.label_smoothing": 0.0,
    "training.packing": False,
    "model.quantisation": "none",
}
"""Key path -> what version 0.1 did, which did not know the key."""

GONE: dict[str, dict[str, str]] = {
    "search.scheduler": {"asha": "write halving, where all trials wait at a rung; under search.algorithm: optuna none"},
}
"""Key path -> value that is no longer taken -> what to write in its place."""


def completed(stored: Mapping[str, Any]) -> dict[str, Any]:
    """A stored configuration with the keys that its version did not know, at what that version did, and with what `GONE`
    says in place of values that are gone.

    Of a configuration that this version stored nothing is missing, and nothing changes.
    """
    whole = dict(stored)
    for path, value in FORMER.items():
        *sections, key = path.split(".")
        inner = whole
        for section in sections:
            held = inner.get(section)
            inner[section] = dict(held) if isinstance(held, Mapping) else {}
            inner = inner[section]
        inner.setdefault(key, value)
    search = whole.get("search")
    if isinstance(search, Mapping) and search.get("scheduler") == "asha":
        whole["search"] = {**search, "scheduler": "none" if search.get("algorithm") == "optuna" else "halving"}
    return whole


def as_stored(stored: Mapping[str, Any], path: str, value: Any) -> Any:
    """``value``, what a key of a stored configuration means today; or what is written there, where that is `GONE`."""
    inner: Any = stored
    for key in path.split("."):
        inner = inner.get(key) if isinstance(inner, Mapping) else None
    return inner if isinstance(inner, str) and inner in GONE.get(path, {}) else value


def unlike_former(section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` (of the keys of one section) without new keys that are at their former value."""
    return {
        key: value
        for key, value in values.items()
        if f"{section}.{key}" not in FORMER or value != FORMER[f"{section}.{key}"]
    }
