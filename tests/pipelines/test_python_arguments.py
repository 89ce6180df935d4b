"""Runs from Python: what cannot be meant is refused in one line, before anything is read or started."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from amlora_dist.config.loading import load_config, validate_config
from amlora_dist.errors import FaultsError, UserError
from amlora_dist.evaluation.requests import check_counts
from amlora_dist.inference.loading import chosen_device
from pipelines import Sequence
from pipelines.runs.api import RunResult
from pipelines.runs.validation import place_faults
from tests.tiny_config import write_config

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{{ text }}{% endfor %}{% endfor %}"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AMLORA_HOME", str(tmp_path / "home"))
    return write_config(tmp_path, tasks=("colours",))


@pytest.mark.parametrize(
    ("config_given", "overrides", "run_id", "message"),
    [
        (None, [], "a", "config: found nothing, expected the path of a run's YAML, or a RunConfig"),
        ({"name": "demo"}, [], "a", "config: found a dictionary, expected the path"),
        ("FILE", "workers=0", "a", "overrides: found 'workers=0', expected a list of texts"),
        ("FILE", 5, "a", "overrides: found 5, expected a list of texts"),
        ("FILE", [5], "a", "overrides: found a value of type int, expected texts"),
        ("FILE", [], 5, "--run-id: found 5, expected at most 100 letters"),
    ],
)
def test_arguments_that_cannot_be_meant_are_named(
    config: Path, config_given: Any, overrides: Any, run_id: Any, message: str
) -> None:
    given = config if config_given == "FILE" else config_given
    with pytest.raises(UserError, match=re.escape(message)):
        Sequence(given, overrides, run_id=run_id)


def test_overrides_next_to_a_configuration_are_never_passed_over(config: Path) -> None:
    with pytest.raises(UserError, match="overrides: found some next to a RunConfig, expected none"):
        Sequence(load_config(config), ["seed=7"])
    assert Sequence(load_config(config)).config.seed == 0
    assert Sequence(config, (text for text in ["seed=7"])).config.seed == 7  # type: ignore[arg-type]


def test_what_is_to_be_called_is_a_function(config: Path) -> None:
    with pytest.raises(UserError, match="on_stage: found a value of type int, expected a function of one argument"):
        Sequence(config).run(on_stage=5)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="--run-id: found 5"):
        RunResult.of(5)  # type: ignore[arg-type]


@pytest.mark.parametrize("device", ["quantum", "cuda:99", "meta"])
def test_a_device_that_is_not_here_is_refused_before_a_model_is_read(device: str) -> None:
    with pytest.raises(UserError, match=f"device: found '{device}'"):
        chosen_device(device)


@pytest.mark.parametrize(
    ("batch_size", "new_tokens", "message"),
    [
        (0, None, "batch_size: found 0"), (-1, None, "batch_size: found -1"), (True, None, "batch_size: found True"),
        (8, -5, "max_new_tokens: found -5"), (8, "5", "max_new_tokens: found '5'"),
    ],
)  # fmt: skip
def test_counts_that_are_none_are_named(batch_size: Any, new_tokens: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_counts(batch_size, new_tokens)
    check_counts(1)
    check_counts(8, 0)


def test_validate_finds_places_and_endless_templates_next_to_a_models_faults(config: Path) -> None:
    (config.parent / "empty").mkdir()
    task = {"task": str(config.parent / "tasks" / "colours.yaml"), "prompt": {"template": ENDLESS}}
    given = [f"model.source={config.parent / 'empty'}", f"storage={config}/below", "mlflow.tracking_uri=nonsense"]
    with pytest.raises(FaultsError) as caught:
        validate_config(config, [*given, f"tasks=[{json.dumps(task)}]"], place_faults)
    found = str(caught.value)
    assert all(key in found for key in ("model.source: ", "storage: ", "mlflow.tracking_uri: ", "prompt.template: "))
    assert found.count("model.source: ") == 1 and "it takes too many steps" in found
