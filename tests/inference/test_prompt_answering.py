"""Banks without keys: what is told decides, and where nothing is, the labels of all tasks do."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest

from amlora_dist.adapters.router import FixedRouter
from amlora_dist.evaluation.served_scoring import PlainRow
from amlora_dist.inference.model import AMLoRAModel
from amlora_dist.registry.bank_folder import read_bank, write_bank
from amlora_dist.registry.manifest import LearnedTask, read_manifest, replace
from amlora_dist.serving.bank import ServedBank
from tests.bank_with_base import TASKS, texts_of, write_working_bank
from tests.tiny_config import TOPICS

ALL = tuple(dict.fromkeys(label for task in TASKS for label in TOPICS[task][0]))
TEXTS = [text for task in TASKS for text in texts_of(task, 4, "asked")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Banks of prompt format 1 and 2 whose newest row answers everything."""
    folder = tmp_path_factory.mktemp("banks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AMLORA_HOME", str(folder / "home"))
        for number in (1, 2):
            stored: dict[str, Any] = {"prompt_format": number, "router": {"max_text_tokens": 24}}
            write_working_bank(
                folder / f"format{number}", folder / "base", router=FixedRouter.newest(TASKS), method="seq_lora",
                training_configuration=stored,
            )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> AMLoRAModel:
    return AMLoRAModel.from_bank(folder / "format2", device="cpu")


def best_of(model: AMLoRAModel, texts: list[str], labels: tuple[str, ...]) -> list[str]:
    """By a way of its own: the labels that a caller gives, behind the bank's prompt."""
    return [str(found.label) for found in model.classify(texts, labels)]


def test_a_text_of_which_nothing_is_told_gets_the_best_of_all_labels(model: AMLoRAModel) -> None:
    wanted = best_of(model, TEXTS, ALL)
    assert len({TASKS[place] for place in range(3) for label in wanted if label in TOPICS[TASKS[place]][0]}) > 1
    assert model.predict(TEXTS) == wanted
    assert model.predict(TEXTS, batch_size=3, max_new_tokens=40) == wanted, "room to write cuts no text that is ranked"
    found = model.classify(TEXTS)
    assert [one.label for one in found] == wanted
    assert all(tuple(one.scores) == ALL and one.task is None for one in found)
    bank = ServedBank(model, "bank")
    begun = bank.begin([bank.to_generate(text, new_tokens=9, top=2) for text in TEXTS])
    assert [answer.text for answer in begun.answers if answer is not None] == wanted
    assert all(answer is not None and answer.scores for answer in begun.answers)
    rows = [PlainRow(n, text, ALL[0]) for n, text in enumerate(TEXTS)]
    counted = model.former.scored(rows, model.prompter.entry(TASKS[0]), 5)
    assert [one.served for one in counted] == wanted
    assert [one.output for one in counted] == model.predict(TEXTS, free=True), "and what it writes is next to it"


def test_a_named_task_or_question_is_answered_as_it_always_was(model: AMLoRAModel) -> None:
    own = tuple(TOPICS["shapes"][0])
    assert {one.label for one in model.classify(TEXTS, task="shapes")} <= set(own)
    assert model.predict(TEXTS, task="shapes") == model.predict(TEXTS, task="shapes", free=True), "it is written"
    assert model.predict(TEXTS, question="what ?") == model.predict(TEXTS, question="what ?", free=True)
    newest = {one.task for one in model.classify(TEXTS, question="what ?")}
    assert newest == {TASKS[-1]}
    tasks: list[str | None] = ["shapes", None] * (len(TEXTS) // 2)
    both = model.predict(TEXTS, task=tasks)
    assert both[1::2] == model.predict(TEXTS[1::2]) and both[::2] == model.predict(TEXTS[::2], task="shapes")


def test_a_bank_of_before_answers_as_it_did(folder: Path) -> None:
    old = AMLoRAModel.from_bank(folder / "format1", device="cpu")
    assert not old.former.plain.labels
    assert old.predict(TEXTS) == old.predict(TEXTS, free=True)
    assert {one.task for one in old.classify(TEXTS)} == {TASKS[-1]}


def test_of_some_tasks_only_their_labels_are_ranked(model: AMLoRAModel) -> None:
    few = tuple(dict.fromkeys([*TOPICS["colours"][0], *TOPICS["sizes"][0]]))
    over = model.use_tasks(["sizes", "colours"])
    assert over.predict(TEXTS) == best_of(over, TEXTS, few)
    assert model.predict(TEXTS) == best_of(model, TEXTS, ALL), "the whole bank is as it was"


def changed(folder: Path, name: str, **lines: Any) -> AMLoRAModel:
    """The bank with another line for its last adapter."""
    bank = read_bank(folder / "format2", statistics=True)
    adapters = [*bank.manifest.adapters[:-1], dataclasses.replace(bank.manifest.adapters[-1], **lines)]
    dest = folder / name
    shutil.rmtree(dest, ignore_errors=True)
    write_bank(dest, replace(bank.manifest, adapters=adapters), bank.adapters, bank.router, bank.statistics)
    return AMLoRAModel.from_bank(dest, device="cpu")


def test_with_a_task_of_free_text_a_plain_text_is_answered_freely_and_a_label_is_of_all(folder: Path) -> None:
    entry = read_manifest(folder / "format2").adapters[-1].task_spec
    assert entry is not None
    mixed = changed(folder, "mixed", task_spec=dataclasses.replace(entry, labels=None))
    labels = tuple(dict.fromkeys([*TOPICS["colours"][0], *TOPICS["shapes"][0]]))
    assert mixed.predict(TEXTS) == mixed.predict(TEXTS, free=True)
    wanted = best_of(mixed, TEXTS, labels)
    assert [one.label for one in mixed.classify(TEXTS)] == wanted
    rows = [PlainRow(n, text, "red") for n, text in enumerate(TEXTS)]
    assert [one.served for one in mixed.former.scored(rows, mixed.prompter.entry("shapes"), 5)] == wanted
    free = mixed.former.scored(rows, mixed.prompter.entry("sizes"), 5)
    assert [one.served for one in free] == mixed.predict(TEXTS, max_new_tokens=32)


def test_an_adapter_of_several_tasks_brings_the_labels_of_each(folder: Path) -> None:
    first, _, last = read_manifest(folder / "format2").adapters
    assert first.task_spec is not None and last.task_spec is not None
    chat = dataclasses.replace(last.task_spec, max_length=20)
    learned = [LearnedTask(task="sizes", task_spec=chat), LearnedTask(task="more", task_spec=first.task_spec)]
    joint = changed(folder, "joint", task_spec=None, learned=learned)
    assert list(joint.bank.manifest.learned) == ["colours", "shapes", "sizes", "more"]
    assert joint.bank.manifest.adapters[-1].learned == learned, "and it is read as it was written"
    assert joint.predict(TEXTS) == best_of(joint, TEXTS, ALL)
    assert "learned" not in read_manifest(folder / "format2").to_mapping()["adapters"][0], "other banks have no such key"
