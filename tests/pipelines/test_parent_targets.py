"""A run on a published bank adapts the layers that the bank adapts, whatever today's default is."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from amlora_dist.config.loading import load_config, named_keys, to_mapping
from pipelines.runs.resume_check import _on_parent
from tests.tiny_config import write_config


class Banks:
    """The part of a store that is asked: a version, and the configuration of the run that made it."""

    def __init__(self, stored: dict[str, Any] | None) -> None:
        self._stored = stored

    def resolve(self, uri: str) -> SimpleNamespace:
        assert uri == "models:/old@current"
        return SimpleNamespace(run_id="old")

    def find_runs(self, wanted: dict[str, str]) -> list[SimpleNamespace]:
        return [] if self._stored is None else [SimpleNamespace(run="run")]

    def load_json(self, run: str, file: str) -> dict[str, Any] | None:
        return self._stored


def test_layers_are_the_banks_unless_the_file_names_others(tmp_path: Path) -> None:
    file = write_config(tmp_path, adapters={"rank": 4})
    old = ["adapters.targets=auto", "adapters.layers=last:1", "adapters.rank=2", "seed=9"]
    stored = to_mapping(load_config(file, old)) | {"prompt_format": 1}

    def begun(*overrides: str, of: dict[str, Any] | None = stored) -> Any:
        given = ["parent=models:/old@current", *overrides]
        store: Any = Banks(of)
        return _on_parent(load_config(file, given), store, named_keys(file, given))

    plain = begun()
    assert (plain.adapters.targets, plain.adapters.layers) == ("auto", "last:1")
    assert plain.prompt_format == 1, "its texts are read as the bank reads them"
    assert (plain.adapters.rank, plain.seed) == (4, 0), "all else is the run's own"
    assert begun("adapters.targets=[q_proj]").adapters.targets == ["q_proj"], "which training refuses, with both"
    assert begun(of=None).adapters.targets == "mlp", "a bank from elsewhere: nothing is known of its run"
