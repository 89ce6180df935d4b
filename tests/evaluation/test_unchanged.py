"""A row whose gate is what it was is not scored again, and its prediction is the one that scoring it again would give."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from amlora_dist.adapters.adapter import Adapter, tasks_using
from amlora_dist.adapters.inject import Mixture, inject
from amlora_dist.adapters.router import FixedRouter, PosteriorRouter
from amlora_dist.adapters.settings import AdapterSettings, GateSettings
from amlora_dist.adapters.targets import find_targets
from amlora_dist.evaluation.scoring import Prediction, score_task, summarise, write_predictions
from amlora_dist.evaluation.unchanged import gates_from, read_features, unchanged, write_features
from tests.evaluation.tiny_models import EOS, LABELS, PAD, Words, examples, tiny

ROWS = 24
MANY = LABELS["many tokens"]


NAMES = ["first", "second", "third", "fourth"]


def bank(model: Any) -> list[Adapter]:
    """Four adapters, the third with a recipe over the first."""
    generator = torch.Generator().manual_seed(4)
    targets = find_targets(model, AdapterSettings(rank=2, alpha=2), 1)
    adapters = []
    for place, task in enumerate(NAMES):
        a = {t.path: torch.randn(2, t.in_features, generator=generator) for t in targets}
        b = {t.path: torch.randn(t.out_features, 2, generator=generator) for t in targets}
        recipe = {t.path: torch.tensor([0.5, 0.0]) for t in targets} if place == 2 else {}
        adapters.append(Adapter(task, 2, 2.0, a, b, recipe))
    return adapters


def with_bank(tasks: int, kind: str) -> Mixture:
    """The first ``tasks`` adapters behind a sparse posterior router."""
    model = tiny(kind)
    keys = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)).double()[:tasks]
    router = PosteriorRouter(NAMES[:tasks], keys, torch.zeros(tasks).double(), 0.5, GateSettings(threshold=0.1))
    targets = find_targets(model, AdapterSettings(rank=2, alpha=2), 1)
    return inject(model, targets, bank(model)[:tasks], router=router, router_layer=1)


def score(mixture: Mixture, kind: str, **more: Any) -> list[Prediction]:
    settings: dict[str, Any] = {"tokenizer": Words(), "pad_id": PAD, "eos_id": EOS, "batch_size": 5, "labels": MANY}
    settings |= {"tasks": len(mixture.task_names), "encoder_decoder": kind == "t5"}
    return score_task(mixture.model, more.pop("rows", examples(ROWS, labels=MANY)), **(settings | more))


def keep(folder: Path, found: list[Prediction]) -> None:
    """As a finished score lies in its folder."""
    write_predictions(folder / "predictions.jsonl", found)
    (folder / "summary.json").write_text(json.dumps(summarise(found) | {"kept": 0}), encoding="utf-8")


def agree(found: list[Prediction], expected: list[Prediction]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.loglikelihoods == pytest.approx(theirs.loglikelihoods, abs=1e-4)
        assert replace(mine, loglikelihoods=None) == replace(theirs, loglikelihoods=None)


@pytest.fixture(params=["llama", "t5"])
def scored(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path, list[Prediction]]:
    """Kind of model, folder, and predictions under two tasks, with the features that the router read."""
    features: dict[int, torch.Tensor] = {}
    found = score(with_bank(2, request.param), request.param, on_features=features.__setitem__)
    keep(tmp_path, found)
    write_features(tmp_path / "features.safetensors", features)
    return request.param, tmp_path, found


def test_what_holds_after_new_tasks_is_what_scoring_again_gives(scored: tuple[str, Path, list[Prediction]]) -> None:
    kind, folder, before = scored
    mixture = with_bank(4, kind)
    assert mixture.router is not None
    rows = [p.row for p in before]
    gates = gates_from(mixture.router, folder / "features.safetensors", rows)
    assert gates is not None
    kept = unchanged([folder], rows, gates, noted=True)
    assert 3 < len(kept) < ROWS, "some rows are answered as before, some by new tasks"
    full = score(mixture, kind)
    known = {p.row for p in kept}
    agree(kept, [p for p in full if p.row in known])
    rest = score(mixture, kind, rows=[e for e in examples(ROWS, labels=MANY) if e.row not in known])
    agree(sorted([*kept, *rest], key=lambda p: p.row), full)


def test_the_oracle_takes_over_what_the_router_gave_wholly_to_the_right_task(
    scored: tuple[str, Path, list[Prediction]],
) -> None:
    kind, folder, before = scored
    mixture = with_bank(2, kind)
    kept = unchanged([folder], [p.row for p in before], mixture.one_hot(1, ROWS), noted=False)
    assert kept and {p.row for p in kept} == {p.row for p in before if p.gates == [0.0, 1.0]}
    oracle = {p.row: p for p in score(mixture, kind, task_gate_row=1)}
    agree(kept, [oracle[p.row] for p in kept])


@pytest.mark.parametrize("disabled", [0, 1, 2])
def test_a_disabled_adapter_changes_the_rows_that_use_it(disabled: int, tmp_path: Path) -> None:
    mixture = with_bank(3, "llama")
    before = score(mixture, "llama")
    keep(tmp_path, before)
    mixture.disable_adapter(disabled)
    changed = tasks_using(bank(tiny("llama"))[:3], disabled)
    assert changed == {0: [0, 2], 1: [1], 2: [2]}[disabled], "the third task's recipe uses the first adapter"
    gates = torch.tensor([p.gates for p in before])
    kept = unchanged([tmp_path], [p.row for p in before], gates, noted=True, changed=changed)
    assert 0 < len(kept) < ROWS
    full = {p.row: p for p in score(mixture, "llama")}
    agree(kept, [full[p.row] for p in kept])
    assert any(full[p.row].loglikelihoods != pytest.approx(p.loglikelihoods, abs=1e-3) for p in before)


def test_a_text_of_no_task_is_scored_again_whatever_came_since(tmp_path: Path) -> None:
    before = [replace(p, gates=[0.0, 0.0] if p.row % 2 else p.gates) for p in score(with_bank(2, "llama"), "llama")]
    keep(tmp_path, before)
    gates = torch.tensor([[*(p.gates or ()), 0.0] for p in before])
    kept = unchanged([tmp_path], [p.row for p in before], gates, noted=True)
    assert [p.row for p in kept] == [p.row for p in before if p.row % 2 == 0]


def test_routers_without_features_are_asked_without_a_file() -> None:
    gates = gates_from(FixedRouter.newest(["a", "b"]), None, [1, 2, 3])
    assert gates is not None and gates.tolist() == [[0.0, 1.0]] * 3


def test_whatever_is_missing_damaged_or_of_other_rows_is_scored_again(
    scored: tuple[str, Path, list[Prediction]],
) -> None:
    kind, folder, before = scored
    mixture = with_bank(2, kind)
    assert mixture.router is not None
    rows, file = [p.row for p in before], folder / "features.safetensors"
    gates = gates_from(mixture.router, file, rows)
    assert gates is not None
    assert unchanged([folder / "nowhere", folder], rows, gates, noted=True) == before
    assert unchanged([folder], rows[1:], gates[1:], noted=True) == [], "predictions of other rows"
    assert unchanged([folder / "nowhere"], rows, gates, noted=True) == []
    assert read_features(file, rows[1:]) is None, "features of other rows"
    assert read_features(folder / "nowhere", rows) is None
    backwards = read_features(file, rows[::-1])
    forwards = read_features(file, rows)
    assert backwards is not None and forwards is not None and torch.equal(backwards.flip(0), forwards)
    features = file.read_bytes()
    for damaged in (features[:-9], features[:-9] + bytes([features[-9] ^ 1]) + features[-8:], b""):
        file.write_bytes(damaged)
        assert gates_from(mixture.router, file, rows) is None
    answers = (folder / "predictions.jsonl").read_text(encoding="utf-8")
    assert '"correct": 0.0' in answers
    for text in (answers.replace('"correct": 0.0', '"correct": 1.0', 1), answers[:-30], '{"row": 1, \udcff\n'):
        (folder / "predictions.jsonl").write_text(text, encoding="utf-8", errors="surrogateescape")
        assert unchanged([folder], rows, gates, noted=True) == []
    keep(folder, before)
    (folder / "summary.json").unlink()
    assert unchanged([folder], rows, gates, noted=True) == [], "not a finished score"
