"""A run with a small memory: every version keeps the rows it was published with, and what is scored is what is served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from amlora_dist.adapters.adapter import rows
from amlora_dist.config.loading import load_config
from amlora_dist.errors import UserError
from amlora_dist.inference.model import AMLoRAModel
from amlora_dist.registry.store import Store
from amlora_dist.reporting.facts import read_run
from amlora_dist.reporting.run_report import run_page
from pipelines.runs.progress import Silent
from pipelines.runs.sequence import run_sequence
from tests import tiny_config
from tests.pipelines.test_served import texts_of
from tests.tiny_config import COLOURS, write_config

pytestmark = [pytest.mark.integration, pytest.mark.slow]
TASKS = ("colours", "paints", "sizes")
OVERRIDES = [
    "method_settings.memory_rows=6", "evaluate=all", "training.epochs=1", "training.l1=0", "training.near_tie=0",
    "training.recipe_learning_rate=0.3",
]  # fmt: skip


def test_versions_keep_their_rows_and_the_last_one_serves_what_was_scored(
    tmp_path: Path, amlora_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tiny_config.TOPICS, "paints", (COLOURS, ["house", "wall", "tree", "the", "a", "seems"]))
    file = write_config(tmp_path, tasks=TASKS)
    result = run(file, OVERRIDES)
    first, second, third = (AMLoRAModel.from_bank(f"models:/memory/{n}", device="cpu") for n in (1, 2, 3))
    path = next(iter(first.bank.adapters[0].a))
    assert rows(first.bank.adapters, path).tolist() == [[1.0]]
    assert float(rows(second.bank.adapters, path)[0, 1]) != 0.0, "colours leans on paints, which came later"
    assert second.bank.manifest.adapters == third.bank.manifest.adapters[:2], "what was published stays what it was"
    for place, task in enumerate(TASKS):
        texts = texts_of(tmp_path, task)
        right = [answer == text.split()[-3] for text, answer in zip(texts, third.predict(texts), strict=True)]
        assert sum(right) / len(right) == pytest.approx(result["accuracy_matrix"][-1][place]), task
    again = run(file, OVERRIDES)
    assert all(stage["reused"] for stage in again["stages"]) and again["accuracy_matrix"] == result["accuracy_matrix"]
    page = run_page(read_run(Store.open(amlora_home), "memory"))
    assert "memory of 6 rows a task" in page.summary and page.facts["memory"] == "6 rows of each earlier task"
    with pytest.raises(UserError, match="memory_rows"):
        run(file, [*OVERRIDES, "method_settings.memory_rows=5"])


def run(file: Path, overrides: list[str]) -> dict[str, Any]:
    return run_sequence(load_config(file, overrides), run_id="memory", progress=Silent())
