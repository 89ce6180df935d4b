"""Everything that decides a served answer is in the fingerprint of its score, and of no adapter that it did not train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from amlora_dist.config.loading import load_config
from amlora_dist.tasks import background
from amlora_dist.training.stage_spec import Parent
from pipelines.runs.inputs import gather_inputs
from pipelines.runs.plan import BankState, plan_stage
from tests.tiny_config import write_config

TASKS = ("colours", "shapes")
Prints = tuple[list[str], str]
"""Training fingerprints of the stages, and the scoring fingerprint of the first task's rows under the bank of both."""


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("fingerprints"), tasks=TASKS)


def fingerprints(config_file: Path, *overrides: str) -> Prints:
    """Without a step of training: the first stage's adapter is taken to be the same whatever is changed."""
    inputs = gather_inputs(load_config(config_file, overrides), config_file.parent / "home")
    first = plan_stage(inputs, BankState(), TASKS[0], [])
    below = BankState((Parent(TASKS[0], "a" * 64, "nowhere"),), (first.fingerprint,), ("s" * 64,))
    second = plan_stage(inputs, below, TASKS[1], [first])
    (cell,) = [one for one in second.cells if (one.task, one.mode) == (TASKS[0], "router")]
    return [first.fingerprint, second.fingerprint], cell.fingerprint


@pytest.fixture(scope="module")
def before(config_file: Path) -> Prints:
    return fingerprints(config_file)


@pytest.fixture(scope="module")
def abstaining(config_file: Path) -> Prints:
    return fingerprints(config_file, *ABSTAINS)


ABSTAINS = ("router.background=true", "router.gate.abstention=true")
SERVED = {
    "evidence": "answer.evidence=model",
    "beta": "answer.beta=0.5",
    "temperature": "router.gate.temperature=2.0",
    "threshold": "router.gate.threshold=0.3",
    "form": "router.gate.form=absolute",
    "whose keys tell labels apart": "router.label_keys=bank",
    "keys": "router.keys=task",
    "shrinkage": "router.shrinkage=0.2",
    "lost": "router.gate.lost=0.01",
    "prompts": "evaluation.prompts=own",
}


@pytest.mark.parametrize("change", SERVED.values(), ids=SERVED)
def test_a_setting_of_serving_is_scored_again_and_trained_never(change: str, config_file: Path, before: Prints) -> None:
    trained, scored = fingerprints(config_file, change)
    assert trained == before[0]
    assert scored != before[1]


def test_abstention_and_how_much_it_may_lose_are_scored_again_and_trained_never(
    config_file: Path, before: Prints, abstaining: Prints
) -> None:
    less = fingerprints(config_file, *ABSTAINS, "router.gate.lost=0.01")
    assert before[0] == abstaining[0] == less[0]
    assert len({before[1], abstaining[1], less[1]}) == 3


def test_other_texts_of_the_background_are_scored_again_where_they_decide(
    config_file: Path, before: Prints, abstaining: Prints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "digest", lambda names=None: "b" * 64)
    trained, scored = fingerprints(config_file, *ABSTAINS)
    assert trained == abstaining[0] and scored != abstaining[1]
    assert fingerprints(config_file) == before, "a bank that takes every text for its own has no use for them"


OF_A_TASK: dict[str, dict[str, Any]] = {
    "question": {"prompt": {"question": "what now ?"}},
    "template": {"prompt": {"template": "{{ text }} ?\nAnswer:"}},
    "style": {"prompt_style": "options"},
    "labels": {"labels": ["round", "square", "flat", "long"]},
    "room": {"max_length": 20},
}


@pytest.mark.parametrize("change", OF_A_TASK.values(), ids=OF_A_TASK)
@pytest.mark.parametrize("place", [0, 1], ids=["its own", "another task of the bank"])
def test_prompt_and_labels_of_every_task_of_the_bank_are_in_the_score_of_each(
    place: int, change: dict[str, Any], config_file: Path, before: Prints, tmp_path: Path
) -> None:
    """A text may be routed to any of them. What a task's prompt is, its own adapter has learned: that stage alone is
    trained anew."""
    file = config_file.parent / "tasks" / f"{TASKS[place]}.yaml"
    spec = yaml.safe_load(file.read_text(encoding="utf-8"))
    if "labels" in change and place == 0:
        change = {"labels": [*spec["labels"], "long"]}
    other = file.with_name(f"{TASKS[place]}-changed-{tmp_path.name}.yaml")
    other.write_text(yaml.safe_dump(spec | change), encoding="utf-8")
    config = yaml.safe_load(config_file.read_text(encoding="utf-8"))
    config["tasks"][place] = str(other)
    changed = config_file.with_name(f"{tmp_path.name}.yaml")
    changed.write_text(yaml.safe_dump(config), encoding="utf-8")
    trained, scored = fingerprints(changed)
    assert scored != before[1]
    assert trained[place] != before[0][place] and trained[1 - place] == before[0][1 - place]


def test_a_bank_without_keys_is_scored_again_where_another_tasks_prompts_may_be_longer(
    config_file: Path, tmp_path: Path
) -> None:
    """It has one prompt for all of its tasks, with room for the longest; nothing is new where they are alike."""
    plain = "method=seq_lora"
    whole = gather_inputs(load_config(config_file, [plain]), config_file.parent / "home")
    assert whole._cut_with_others(whole.method, ["1", "2"], "router", TASKS[0]) == {}
    spec = yaml.safe_load((config_file.parent / "tasks" / f"{TASKS[1]}.yaml").read_text(encoding="utf-8"))
    other = config_file.parent / "tasks" / f"longer-{tmp_path.name}.yaml"
    other.write_text(yaml.safe_dump(spec | {"max_length": 40}), encoding="utf-8")
    config = yaml.safe_load(config_file.read_text(encoding="utf-8"))
    config["tasks"][1] = str(other)
    longer = config_file.with_name(f"longer-{tmp_path.name}.yaml")
    longer.write_text(yaml.safe_dump(config), encoding="utf-8")
    inputs = gather_inputs(load_config(longer, [plain]), config_file.parent / "home")
    method = inputs.method
    assert inputs._cut_with_others(method, ["1"], "router", TASKS[0]) == {}
    assert inputs._cut_with_others(method, ["1", "2"], "router", TASKS[0]) == {"max_length": 40}
    assert inputs._cut_with_others(method, ["1", "2"], "router", TASKS[1]) == {}
    assert inputs._cut_with_others(method, ["1", "2"], "oracle", TASKS[0]) == {}
    keyed = gather_inputs(load_config(longer), config_file.parent / "home")
    assert keyed._cut_with_others(keyed.method, ["1", "2"], "router", TASKS[0]) == {}, "it has each task's own"
