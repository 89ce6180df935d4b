"""A stage that this storage has trained, and another run has published with other bits: each version is whole by itself.

Equal fingerprints mean equal results up to the order in which workers add; a digest is of the bits."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from amlora_dist.adapters.adapter import Adapter
from amlora_dist.config.loading import load_config
from amlora_dist.registry.bank_folder import read_bank
from amlora_dist.registry.store import Store
from amlora_dist.training.result import read_result, write_result
from pipelines.runs.progress import Silent
from pipelines.runs.sequence import run_sequence
from tests.tiny_config import write_config

pytestmark = pytest.mark.integration

QUICK = ("training.epochs=1", "evaluation.untrained=false", "evaluation.oracle=false")


def nudged(home: Path, what: str) -> str:
    """Make the storage's one trained stage another worker's: other bits of the adapter, or of the statistics alone."""
    (folder,) = home.glob("storage/stages/*/trained")
    result = read_result(folder)
    shutil.rmtree(folder)
    if what == "adapter":
        adapter: Adapter = replace(result.adapter, b={path: b * 1.0001 for path, b in result.adapter.b.items()})
        write_result(folder, replace(result, adapter=adapter))
    else:
        statistics = replace(result.statistics, mean=result.statistics.mean * 1.0001)
        write_result(folder, replace(result, statistics=statistics))
    return read_result(folder).adapter.digest()


@pytest.mark.parametrize("what", ["adapter", "statistics"])
def test_a_stage_that_other_workers_have_published_too_is_published_as_it_was_trained_here(
    what: str, tmp_path: Path, amlora_home: Path, empty_home: Path
) -> None:
    shutil.copytree(empty_home, amlora_home)
    config = load_config(write_config(tmp_path, tasks=("colours",)), list(QUICK))
    run_sequence(config, run_id="theirs", progress=Silent())
    digest = nudged(amlora_home, what)
    run_sequence(config, run_id="ours", progress=Silent())
    store = Store.open(amlora_home)
    bank = read_bank(store.pull("models:/ours@current", tmp_path / "pulled"))  # every file is checked by its digest
    assert [line.digest for line in bank.manifest.adapters] == [digest]
