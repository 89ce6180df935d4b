"""The same id goes on with other workers, ZeRO stage and paths; whatever changes a result is refused and named."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from amlora_dist.config import load_config, to_mapping
from amlora_dist.errors import UserError
from pipelines.jobs import Job
from pipelines.same_configuration import IRRELEVANT, refuse_other_configuration
from pipelines.submit import _attached
from tests.tiny_folder import write_config

FREE = {
    "workers": "workers=3", "min_workers": "min_workers=1", "placement": "placement=SPREAD", "storage": "storage=/shared",
    "data_dir": "data_dir=/data", "mlflow": "mlflow.tracking_uri=http://mlflow:5000", "name": "name=other",
    "deepspeed": "deepspeed.zero_stage=3", "evaluation.batch_size": "evaluation.batch_size=2",
    "training.micro_batch_size": "training.micro_batch_size=1", "training.checkpoint_every": "training.checkpoint_every=9",
    "training.gradient_checkpointing": "training.gradient_checkpointing=true",
    "training.cache_trunk": "training.cache_trunk=true", "training.cache_trunk_gb": "training.cache_trunk_gb=1.0",
}  # fmt: skip
"""A change of each key that may differ."""


class Journal:
    """The part of a store that is asked: the configuration of the start before."""

    def __init__(self, stored: dict[str, Any]) -> None:
        self._stored = stored

    def find_runs(self, wanted: dict[str, str]) -> list[SimpleNamespace]:
        return [SimpleNamespace(run="run")]

    def load_json(self, run: str, file: str) -> dict[str, Any]:
        return self._stored


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("config"), workers=2, deepspeed={"zero_stage": 2})


def start_again(config: Path, *overrides: str) -> None:
    journal: Any = Journal(to_mapping(load_config(config)))
    refuse_other_configuration(journal, {}, to_mapping(load_config(config, list(overrides))), "run id 'r'")


@pytest.mark.parametrize("key", IRRELEVANT)
def test_what_changes_no_result_may_differ(key: str, config: Path) -> None:
    start_again(config)
    start_again(config, FREE[key])


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("training.batch_size=12", "training.batch_size: 6 then, 12 now"),
        ("seed=1", "seed: 0 then, 1 now"),
        ("adapters.rank=2", "adapters.rank: 4 then, 2 now"),
        ("method=replay", "method: 'am_lora' then, 'replay' now"),
    ],
)
def test_what_changes_results_is_refused_with_both_values_and_the_mend(override: str, told: str, config: Path) -> None:
    with pytest.raises(UserError) as error:
        start_again(config, override)
    assert str(error.value) == f"run id 'r' exists with another configuration: {told}. Use another id, or undo that"


@pytest.mark.parametrize(
    ("search", "override", "told"),
    [
        (False, "search.space={training.l1: {grid: [0.5]}}", None),
        (False, "mlflow.tracking_uri=http://user:secret@mlflow:5000", None),
        (False, "training.l1=0.5", "job r-1 runs with another configuration: training.l1: "),
        (True, "search.max_concurrent=1", None),
        (True, "search.space={training.l1: {grid: [0.5]}}", "search.space"),
    ],
)
def test_a_job_that_runs_is_attached_to_if_it_runs_what_is_asked_for(
    search: bool, override: str, told: str | None, tmp_path: Path
) -> None:
    file = write_config(tmp_path, search={"space": {"training.l1": {"grid": [0.0, 0.1]}}})
    compared = {key: value for key, value in to_mapping(load_config(file)).items() if key not in IRRELEVANT}
    job = Job("r-1", "RUNNING", "r", 1, None, None, None, "", compared)
    if told is None:
        assert _attached(job, load_config(file, [override]), search).attached
        return
    with pytest.raises(UserError, match=re.escape(told)) as error:
        _attached(job, load_config(file, [override]), search)
    assert "amlora stop r-1" in str(error.value)
