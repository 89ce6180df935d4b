"""Routers that are made again, or with one more adapter, keep what tells texts of no task: the background and abstention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from amlora_dist.adapters.keyed_router import KeyedRouter
from amlora_dist.adapters.router_override import OverridableRouter
from amlora_dist.adapters.statistics import TaskStatistics
from amlora_dist.base_model import load_tokenizer
from amlora_dist.errors import UserError
from amlora_dist.inference.model import AMLoRAModel
from amlora_dist.inference.rekeying import TaskRows, rekey
from amlora_dist.registry.bank_folder import read_bank
from amlora_dist.registry.exports import write_row
from amlora_dist.tasks import background
from amlora_dist.training.stage_statistics import BACKGROUND_TOKENS, PART_TEXTS
from pipelines.cli.exports import import_adapter
from tests.bank_with_base import TASKS, texts_of, write_working_bank


def rows_of(count: int) -> dict[str, TaskRows]:
    texts = {task: texts_of(task, count) for task in TASKS}
    return {task: TaskRows(own, [text.rpartition(" ")[2] for text in own]) for task, own in texts.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank of before that abstains, and the same with a router for plain text."""
    folder = tmp_path_factory.mktemp("backgrounds")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AMLORA_HOME", str(folder / "home"))
        stored: dict[str, Any] = {"router": {"gate": {"abstention": True, "lost": 0.05}}}
        write_working_bank(folder / "before", folder / "base", training_configuration=stored)
        rekey(folder / "before", folder / "bank", rows_of(40))
    return folder


def router_of(folder: Path, **options: Any) -> KeyedRouter:
    found = AMLoRAModel.from_bank(folder, device="cpu", **options).mixture.router
    assert isinstance(found, OverridableRouter) and isinstance(found.inner, KeyedRouter)
    return found.inner


def test_a_router_that_is_made_again_abstains_as_the_bank_did(folder: Path) -> None:
    router = router_of(folder / "bank")
    assert router.gate.abstention and router.gate.lost == 0.05 and router.background is not None
    assert router.threshold == dict(router.foreign_above)[0.05]
    found = AMLoRAModel.from_bank(folder / "bank", device="cpu").classify(["what ? paint"])
    assert found[0].foreign is not None
    assert not router_of(folder / "bank", abstain=0).gate.abstention
    assert router_of(folder / "bank", abstain=0.01).threshold == dict(router.foreign_above)[0.01]
    assert read_bank(folder / "bank").manifest.training_configuration["router"]["background"] is True


def test_its_background_is_what_the_router_reads_of_the_packages_texts(folder: Path) -> None:
    statistics = read_bank(folder / "bank", statistics=True).statistics
    own = TaskStatistics.from_tensors(TASKS[-1], statistics[TASKS[-1]])
    assert sorted(own.background) == list(background.parts())
    model = AMLoRAModel.from_bank(folder / "bank", device="cpu")
    assert model.answering is not None
    part = background.parts()[0]
    tokenizer = load_tokenizer(folder / "base")
    texts = []
    for text in background.texts(part)[:PART_TEXTS]:
        assert len(tokenizer(text)["input_ids"]) <= BACKGROUND_TOKENS
        texts.append(text)
    # What serving reads of a text may be cut at the bank's longest: read with room for all of it.
    object.__setattr__(model.prompter, "format", model.prompter.format.__class__(2, BACKGROUND_TOKENS))
    with torch.no_grad():
        features = model.answering.read(model.requests(texts)).features_BF
    torch.testing.assert_close(own.background[part], features.double().mean(dim=0), atol=1e-5, rtol=1e-5)


def test_a_router_that_is_made_again_keeps_features_of_a_sample_of_the_rows_that_it_counts(folder: Path) -> None:
    statistics = read_bank(folder / "bank", statistics=True).statistics
    own, texts = TaskStatistics.from_tensors(TASKS[0], statistics[TASKS[0]]), texts_of(TASKS[0], 40)
    assert own.sample is not None and own.held is not None and len(own.sample.labels) == own.count == 30
    model = AMLoRAModel.from_bank(folder / "bank", device="cpu")
    assert model.answering is not None
    features = model.answering.read(model.requests(texts)).features_BF
    nearest = (own.sample.features[:, None] - features).abs().amax(dim=2).amin(dim=1)
    assert float(nearest.max()) < 1e-5, "each is one of the texts that were given"


def test_too_few_rows_for_a_bank_that_abstains_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rekey: router\.gate\.abstention: found true in the bank, but too few rows"):
        rekey(folder / "before", tmp_path / "new", rows_of(3))
    assert not (tmp_path / "new").exists()


def test_an_adapter_from_elsewhere_leaves_the_background_and_abstention(folder: Path, tmp_path: Path) -> None:
    bank = read_bank(folder / "bank", statistics=True)
    write_row(tmp_path / "theirs", bank, "colours")
    sample = tmp_path / "fruit.txt"
    sample.write_text("\n".join(texts_of("fruit", 30)), encoding="utf-8")
    list(import_adapter(
        tmp_path / "theirs", tmp_path / "more", "fruit", sample, column="text", onto=str(folder / "bank"),
        labels=["apple", "pear"], question=None, base=str(folder / "base"), tracking_uri=None,
    ))  # fmt: skip
    router = router_of(tmp_path / "more")
    assert router.tasks == [*TASKS, "fruit"] and router.gate.abstention and router.foreign_above
    assert router_of(tmp_path / "more", abstain=0.1).threshold == dict(router.foreign_above)[0.1]
