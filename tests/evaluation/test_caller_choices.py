"""What a caller chooses is what happens: a subset of tasks, labels in any order, a share of rows that may be lost."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from amlora_dist.errors import UserError
from amlora_dist.inference.loading import check_description, described_router
from amlora_dist.inference.model import AMLoRAModel
from amlora_dist.registry.bank_folder import Bank
from tests.bank_with_base import texts_of, write_keyed_bank
from tests.tiny_config import TOPICS


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> AMLoRAModel:
    folder: Path = tmp_path_factory.mktemp("choices")
    write_keyed_bank(folder / "bank", folder / "base")
    return AMLoRAModel.from_bank(folder / "bank", device="cpu")


def test_a_subset_of_tasks_gives_the_logits_of_these_tasks(model: AMLoRAModel) -> None:
    texts = texts_of("colours", 3, "subset")
    named = model.requests(texts, task="shapes")
    assert model.answering is not None
    wanted = model.answering.begin(named).state.logits
    torch.testing.assert_close(model.use_tasks(["shapes"]).next_token_logits(texts), wanted, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(model.next_token_logits(texts), wanted, atol=1e-2)


def test_labels_in_another_order_have_the_same_shares(model: AMLoRAModel) -> None:
    labels = TOPICS["colours"][0]
    texts = texts_of("colours", 6, "order")
    for task in (None, "colours"):
        wanted = [one for one in model.classify(texts, task=task) if one.task == "colours"]
        found = [one for one in model.classify(texts, labels[::-1], task=task) if one.task == "colours"]
        assert len(found) > 2 and [one.label for one in found] == [one.label for one in wanted]
        for mine, theirs in zip(found, wanted, strict=True):
            assert list(mine.scores) == labels[::-1] and mine.scores == pytest.approx(theirs.scores, abs=1e-5)
    some = model.classify(texts, labels[:2], task="colours")
    assert [list(one.scores) for one in some] == [labels[:2]] * 6


def bank(*shares: float) -> Any:
    described = {"foreign_above": [[share, 1.0 - share] for share in shares], "gate": {"abstention": False, "lost": 0.03}}
    return SimpleNamespace(router_settings=described)


def test_a_share_that_no_threshold_covers_is_refused() -> None:
    assert described_router(bank(0.01, 0.1), 0.1)["gate"] == {"abstention": True, "lost": 0.1}
    assert described_router(bank(0.01, 0.1), 0.0)["gate"]["abstention"] is False
    for share in (0.3, 0.005):
        with pytest.raises(UserError, match=rf"abstain: found {share}, this bank stores thresholds for 0\.01, 0\.1; give"):
            described_router(bank(0.01, 0.1), share)


def test_a_share_between_two_says_as_which_it_acts(
    caplog: pytest.LogCaptureFixture, model: AMLoRAModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Bank, "router_settings", bank(0.01, 0.1).router_settings)
    with caplog.at_level(logging.WARNING, "amlora_dist"):
        check_description(model.bank, 0.1)
        assert caplog.text == ""
        check_description(model.bank, 0.08)
    assert "abstain: 0.08 acts as 0.1" in caplog.text
