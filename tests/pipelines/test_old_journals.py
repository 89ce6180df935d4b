"""Runs and banks that older code left: today's code reads them, and goes on with them."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from amlora_dist.inference.model import AMLoRAModel
from amlora_dist.registry.bank_folder import read_bank
from amlora_dist.registry.manifest import SCHEMA_VERSION, read_manifest
from amlora_dist.registry.store import Store
from amlora_dist.training.result import in_bank, is_whole, read_result, renew
from tests.fork_server import Server
from tests.journals.make import PLACE, RUN, rewrite_texts
from tests.pipelines.crash_cases import outcome_of

JOURNALS = Path(__file__).resolve().parents[1] / "journals"
ARCHIVES = sorted(JOURNALS.glob("schema-*.tar.xz"))


def test_every_schema_so_far_has_a_journal() -> None:
    assert [archive.name for archive in ARCHIVES] == [f"schema-{n}.tar.xz" for n in range(1, SCHEMA_VERSION + 1)]


@pytest.mark.parametrize("archive", ARCHIVES, ids=[archive.name.partition(".")[0] for archive in ARCHIVES])
def test_what_training_left_then_becomes_byte_for_byte_what_its_bank_keeps(archive: Path, tmp_path: Path) -> None:
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path, filter="data")
    home = tmp_path / "home"
    manifests = [read_manifest(file.parent) for file in sorted(home.glob("artifacts/old/*/artifacts/bank-e1/manifest.json"))]
    assert len(manifests) == 2
    for manifest in manifests:
        line = manifest.adapters[-1]
        trained = home / "storage" / "stages" / line.training_fingerprint / "trained"
        before = json.loads((trained / "training.json").read_text(encoding="utf-8"))
        assert not is_whole(trained)
        renew(trained, line.index)
        now = read_result(trained)
        assert (now.adapter.digest(), now.index) == (line.digest, line.index)
        assert now.training == {key: value for key, value in before.items() if key != "adapter"}
        assert line.stored is not None
        bank = home / "artifacts" / "old" / line.stored.run / "artifacts" / "bank-e1"
        for name, path in in_bank(line).items():
            assert (trained / name).read_bytes() == (bank / path).read_bytes(), path
        marked = (trained / "COMMIT").stat().st_mtime_ns
        renew(trained, line.index)
        assert (trained / "COMMIT").stat().st_mtime_ns == marked, "what is as it should be stays"


@pytest.mark.integration
@pytest.mark.parametrize("archive", ARCHIVES, ids=[archive.name.partition(".")[0] for archive in ARCHIVES])
def test_a_bank_of_then_answers_as_it_did(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path, filter="data")
    home = tmp_path / "home"
    rewrite_texts(home, PLACE, str(tmp_path))
    monkeypatch.setenv("AMLORA_HOME", str(home))
    monkeypatch.chdir(tmp_path)
    model = AMLoRAModel.from_bank("models:/old@current", base=tmp_path / "model-llama", device="cpu", dtype="fp32")
    compared = 0
    for file in home.glob("storage/scores/*/summary.json"):
        score = json.loads(file.read_text(encoding="utf-8"))
        lines = file.with_name("predictions.jsonl").read_text(encoding="utf-8").splitlines()
        then = [json.loads(line) for line in lines]
        if score["task"] not in model.tasks or len(then[0]["gates"] or ()) != len(model.tasks):
            continue  # of the untrained model, or of an earlier version
        rows = (tmp_path / "tasks" / score["task"] / "test.jsonl").read_text(encoding="utf-8").splitlines()
        texts = [json.loads(rows[one["row"] - 1])["text"] for one in then]
        labels = model.labels_of(score["task"])
        for one, answer, label in zip(then, model.answer(texts), model.classify(texts, labels), strict=True):
            assert (answer.text, answer.ended) == (one["output"], one["ended"])
            assert label.label == labels[one["ranked"]]
            assert list(answer.route.tasks.values()) == pytest.approx(one["gates"], abs=1e-5)
            compared += 1
    assert compared == 2 * 9


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.parametrize("archive", ARCHIVES, ids=[archive.name.partition(".")[0] for archive in ARCHIVES])
def test_a_run_that_died_under_older_code_is_finished_by_todays(
    archive: Path, forking: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path, filter="data")
    home = tmp_path / "home"
    rewrite_texts(home, PLACE, str(tmp_path))
    expected = json.loads((tmp_path / "expected.json").read_text(encoding="utf-8"))
    store = Store.open(home)
    bank = read_bank(store.pull_version(store.resolve("models:/old@current"), tmp_path / "pulled"))
    assert [adapter.digest() for adapter in bank.adapters] == expected["adapters"][:2], "a bank of its time reads as it was"
    del store

    config = tmp_path / "run.yaml"
    assert config.is_file()
    child = forking.start(tmp_path / "start", *RUN, cwd=tmp_path, AMLORA_HOME=str(home))
    assert child.wait() == 0, child.stderr
    assert "resumed after step 4" in child.stderr
    result = json.loads(child.stdout)
    assert [stage["reused"] for stage in result["stages"]] == [True, True, False]
    found = outcome_of(home, child.stdout)
    assert found.stages == expected["stages"], "the fingerprints are those of then"
    assert found.adapters[:2] == expected["adapters"][:2]
    for name, then in expected["matrices"].items():
        assert close(found.matrices[name], then), f"{name}: {found.matrices[name]}, then {then}"


def close(now: object, then: object) -> bool:
    """Within one row of nine: the arithmetic of another processor may round otherwise."""
    if isinstance(then, list):
        return isinstance(now, list) and len(now) == len(then) and all(map(close, now, then))
    return now is None if then is None else abs(float(str(now)) - float(str(then))) <= 1 / 9 + 1e-9
