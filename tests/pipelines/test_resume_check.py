"""The same id goes on with other workers, ZeRO stage and paths; whatever changes a result is refused and named."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from amlora_dist.base_model import Attention, settled_attention
from amlora_dist.config.former_values import FORMER, completed
from amlora_dist.config.loading import flat, from_mapping, load_config, named_keys, to_mapping
from amlora_dist.errors import UserError
from pipelines.cluster.jobs import ClusterJob
from pipelines.cluster.submit import _attached
from pipelines.runs.resume_check import IRRELEVANT, check_rule_of_bank, differences, refuse_other_configuration, taken_up
from tests.tiny_config import write_config

FREE = {
    "tracking": "tracking=[tensorboard]",
    "workers": "workers=3", "min_workers": "min_workers=1", "worker_lifetime": "worker_lifetime=stage",
    "placement": "placement=SPREAD", "storage": "storage=/shared",
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


@pytest.mark.parametrize("key", [key for key in IRRELEVANT if not key.startswith("search.")])
def test_what_changes_no_result_may_differ(key: str, config: Path) -> None:
    start_again(config)
    start_again(config, FREE[key])
    then, now = (to_mapping(load_config(config, overrides)) for overrides in ([], [FREE[key]]))
    assert then != now and differences(then, now) == ""


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.batch_size=12", "training.batch_size: 6 then, 12 now"),
        ("seed=1", "seed: 0 then, 1 now"),
        ("adapters.rank=2", "adapters.rank: 4 then, 2 now"),
        ("method=replay", "method: 'am_lora' then, 'replay' now"),
    ],
)
def test_what_changes_results_is_refused_with_both_values_and_the_fix(override: str, message: str, config: Path) -> None:
    with pytest.raises(UserError) as error:
        start_again(config, override)
    assert str(error.value) == f"run id 'r' exists with another configuration: {message}. Use another id, or undo that"


def of_version_01(config: Path, **values: Any) -> dict[str, Any]:
    """What 0.1 would have stored of this file, but for ``values``: without keys that it did not know."""
    stored = to_mapping(load_config(config)) | values
    stored["model"] |= {"attention": "sdpa"}
    for path in FORMER:
        *sections, key = path.split(".")
        inner = stored
        for section in sections:
            inner = inner[section]
        inner.pop(key)
    return stored


def test_a_run_that_exists_has_what_its_file_does_not_name_from_its_start_before(config: Path) -> None:
    stored = of_version_01(config, seed=3)
    stored["training"] |= {"clip": 0.5, "epochs": 9}
    overrides = ["workers=3", "model.attention=auto"]
    made = taken_up(load_config(config, overrides), stored, named_keys(config, overrides))
    assert (made.seed, made.training.clip) == (3, 0.5), "nobody named them"
    assert made.training.epochs == 4, "the file names it, and what differs is refused"
    assert made.workers == 3, "what changes no result is the file's business"
    assert made.model.attention == "sdpa", "auto was settled at the first start"
    with pytest.raises(UserError, match=re.escape("training.epochs: 9 then, 4 now")):
        refuse_other_configuration(cast(Any, Journal(stored)), {}, to_mapping(made), "run id 'r'")
    stored["adapters"] |= {"targets": "auto"}
    unnamed = load_config(config, ["adapters.targets=mlp"])
    assert taken_up(unnamed, stored, named_keys(config) - {"adapters.targets"}).adapters.targets == "auto", "q and v stay"
    eager = ["model.attention=eager"]
    named = taken_up(load_config(config, eager), stored, named_keys(config, eager))
    assert named.model.attention == "eager", "an implementation that is named is another configuration"


def test_a_bank_of_before_is_a_parent_whosever_keys_tell_its_labels_apart(config: Path) -> None:
    """How texts are read is a bank's for life; its keys are made again from their statistics at every version."""
    stored = of_version_01(config)
    as_then = ["prompt_format=1", "router.keys=task", "router.depths=[]"]
    check_rule_of_bank(load_config(config, as_then), stored, "models:/old/1")
    with pytest.raises(UserError, match=r"router\.keys 'label', expected those of models:/old/1"):
        check_rule_of_bank(load_config(config, ["prompt_format=1", "router.depths=[]"]), stored, "models:/old/1")


def test_keys_that_are_new_have_in_an_old_run_the_value_of_what_was_done_then(config: Path) -> None:
    stored = of_version_01(config)
    made = flat(to_mapping(taken_up(load_config(config), stored, named_keys(config))))
    assert {key: made[key] for key in FORMER} == FORMER
    refuse_other_configuration(cast(Any, Journal(stored)), {}, to_mapping(from_mapping(stored)), "run id 'r'")
    today = to_mapping(load_config(config))
    assert completed(today) == today, "in what this version stored nothing is missing"


@pytest.mark.parametrize(("algorithm", "now"), [("random", "halving"), ("optuna", "none")])
def test_what_was_begun_with_a_value_that_is_gone_goes_on_with_what_replaces_it(
    algorithm: str, now: str, tmp_path: Path
) -> None:
    search = {"space": {"training.l1": {"choice": [0.0, 0.5]}}, "algorithm": algorithm, "num_samples": 2, "scheduler": now}
    file = write_config(tmp_path, search=search)
    mapping = to_mapping(load_config(file))
    stored = mapping | {"seed": 3, "search": mapping["search"] | {"scheduler": "asha"}}
    made = taken_up(load_config(file), stored, named_keys(file))
    assert made.seed == 3 and made.search is not None and made.search.scheduler == now
    assert differences(stored, to_mapping(made), free=()) == ""


def test_a_refusal_names_what_was_stored_and_not_what_replaces_it(tmp_path: Path) -> None:
    search = {"space": {"training.l1": {"choice": [0.0, 0.5]}}, "algorithm": "random", "num_samples": 2}
    file = write_config(tmp_path, search=search | {"scheduler": "none"})
    mapping = to_mapping(load_config(file))
    stored = mapping | {"search": mapping["search"] | {"scheduler": "asha"}}
    assert differences(stored, mapping, free=()) == "search.scheduler: 'asha' then, 'none' now"
    others = write_config(tmp_path, search=search | {"algorithm": "optuna"})
    made = taken_up(load_config(others), stored, named_keys(others))
    found = differences(stored, to_mapping(made), free=())
    assert "search.algorithm: 'random' then, 'optuna' now" in found and "halving" not in found


@pytest.mark.parametrize(
    ("asked", "cpu", "gpu"), [("auto", "eager", "sdpa"), ("sdpa", "sdpa", "sdpa"), ("eager", "eager", "eager")]
)
def test_attention_is_what_is_quick_on_the_device_unless_it_is_named(asked: Attention, cpu: str, gpu: str) -> None:
    assert (settled_attention(asked, gpu=False), settled_attention(asked, gpu=True)) == (cpu, gpu)


@pytest.mark.parametrize(
    ("search", "override", "message"),
    [
        (False, "search.space={training.l1: {grid: [0.5]}}", None),
        (False, "mlflow.tracking_uri=http://user:secret@mlflow:5000", None),
        (False, "training.l1=0.5", "job r-1 runs with another configuration: training.l1: "),
        *((True, f"search.{one}", None) for one in ("max_concurrent=1", "retries=0", "gpus=0.5")),
        (True, "search.space={training.l1: {grid: [0.5]}}", "search.space"),
    ],
)
def test_a_job_that_runs_is_attached_to_if_it_runs_what_is_asked_for(
    search: bool, override: str, message: str | None, tmp_path: Path
) -> None:
    file = write_config(tmp_path, search={"space": {"training.l1": {"grid": [0.0, 0.1]}}})
    compared = {key: value for key, value in to_mapping(load_config(file)).items() if key not in IRRELEVANT}
    job = ClusterJob("r-1", "RUNNING", "r", 1, None, None, None, "", compared)
    if message is None:
        assert _attached(job, load_config(file, [override]), search).attached
        return
    with pytest.raises(UserError, match=re.escape(message)) as error:
        _attached(job, load_config(file, [override]), search)
    assert "amlora stop r-1" in str(error.value)
