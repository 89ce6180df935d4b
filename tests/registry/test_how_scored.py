"""Cards, MLflow's pages and reports say how scores came about, and never that nothing was told where something was."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from amlora_dist.registry.card import readme
from amlora_dist.registry.how_scored import how_scored
from amlora_dist.registry.manifest import AccuracyMatrix, Manifest, replace
from amlora_dist.registry.records import version_description
from pipelines.runs.stage_pages import run_description
from tests.registry.tiny_banks import TASKS, rewrite, tiny_bank

SERVED = {"prompt_format": 2, "evaluation": {"prompts": "served", "split": "test"}}
OWN = {"prompt_format": 2, "evaluation": {"prompts": "own", "split": "test"}}
OLD: dict[str, Any] = {"evaluation": {"split": "test"}}
"""Of version 0.1, which knew neither key."""
NOTHING_TOLD = "nothing told its task"


@pytest.mark.parametrize(
    ("configuration", "method", "plain", "what", "says"),
    [
        (SERVED, "am_lora", True, "served answer", NOTHING_TOLD),
        (SERVED, "seq_lora", True, "served answer", NOTHING_TOLD),
        (SERVED, "joint", True, "served answer", NOTHING_TOLD),
        (SERVED, "per_task", False, "likeliest label behind the task's own prompt", "was told its task"),
        (OWN, "per_task", False, "greedy output behind the task's own prompt", "was told its task"),
        (SERVED, "base", False, "greedy output behind the task's own prompt", "behind its own task's prompt"),
        (OWN, "am_lora", False, "greedy output behind the task's own prompt", "behind its own task's prompt"),
        (OLD, "am_lora", False, "greedy output behind the task's own prompt", "behind its own task's prompt"),
        ({"prompt_format": 1} | OLD, "seq_lora", False, "greedy output behind the task's own prompt", "can tell the task"),
    ],
)
def test_only_plain_texts_are_said_to_be_told_nothing(
    tmp_path: Path, configuration: Mapping[str, Any], method: str, plain: bool, what: str, says: str
) -> None:
    how = how_scored(configuration, method)
    assert how.plain == plain and how.what == what and says in how.sentence
    tiny_bank(tmp_path / "bank")
    manifest: Manifest = replace(
        rewrite(tmp_path / "bank"), method=method, training_configuration=dict(configuration),
        accuracy_matrix=AccuracyMatrix(tasks=list(TASKS), accuracy=[[0.5] * len(TASKS)]),
    )  # fmt: skip
    version: Any = SimpleNamespace(uri="models:/x/1")
    result = {"tasks": ["a"], "accuracy_matrix": [[0.5]], "registered_model": "x", "method": method, "seed": 0,
              "stages": [{"task": "a", "version": 1}], "metrics": {}, "task_metrics": {"a": "accuracy"}}  # fmt: skip
    texts = {
        "card": readme(manifest), "version": version_description(version, manifest),
        "run": run_description(result, "base", configuration),
    }  # fmt: skip
    for page, text in texts.items():
        assert how.sentence in text, page
        assert plain or NOTHING_TOLD not in text, page
    assert f"{what} is right" in texts["card"] and f"{what} is right" in texts["version"]
    assert f"{what}, test rows" in texts["card"], "in the Hub's model-index"


def test_what_the_router_read_is_said_by_prompt_format() -> None:
    assert how_scored(SERVED, "am_lora").router == "The router read the text alone."
    assert "what stands before the text there can tell it the task" in how_scored(OWN, "am_lora").router
    assert "read the whole prompt" in how_scored(OLD, "am_lora").router
