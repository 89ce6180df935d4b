"""A run on a published bank adapts the layers that the bank adapts, whatever today's default is."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from amlora_dist.adapters.adapted_layers import AdaptedLayers
from amlora_dist.base_model import ModelSettings, resolve_base
from amlora_dist.config.loading import load_config, named_keys, to_mapping
from amlora_dist.errors import UserError
from amlora_dist.registry.store import Store
from pipelines.runs.resume_check import check_layers_of_bank, going_on
from tests.registry.tiny_banks import publish_sequence, tiny_adapter, tiny_bank
from tests.tiny_config import write_config

ABOVE = {f"model.layers.{layer}.self_attn.{name}": size for layer in (2, 3) for name, size in
         (("q_proj", (32, 32)), ("v_proj", (32, 16)))}  # fmt: skip
"""What ``targets: auto`` adapts of the tiny model: q and v above the routing layer."""
LAST = {path: size for path, size in ABOVE.items() if ".3." in path}


def test_layers_are_the_banks_unless_the_file_names_others(tmp_path: Path, amlora_home: Path, empty_home: Path) -> None:
    shutil.copytree(empty_home, amlora_home)
    file = write_config(tmp_path, adapters={"rank": 4})
    old = ["adapters.targets=auto", "adapters.layers=last:1", "adapters.rank=2", "seed=9"]
    stored = to_mapping(load_config(file, old)) | {"prompt_format": 1}
    publish_sequence(Store.open(amlora_home), "old", tmp_path, tasks=["fruit"], training_configuration=stored)

    def begun(*overrides: str) -> Any:
        given = ["parent=models:/old/1", *overrides]
        return going_on(load_config(file, given), named=named_keys(file, given), run_id="child")

    plain = begun()
    assert (plain.adapters.targets, plain.adapters.layers) == ("auto", "last:1")
    assert plain.prompt_format == 1, "its texts are read as the bank reads them"
    assert (plain.adapters.rank, plain.seed) == (4, 0), "all else is the run's own"
    assert begun("adapters.targets=[q_proj]").adapters.targets == ["q_proj"], "which is refused, with both"


@pytest.mark.parametrize(
    ("modules", "configured", "expected"),
    [
        (ABOVE, {"prompt_format": 2, "adapters": {"targets": "auto", "layers": "above_router"}}, ("auto", "above_router")),
        (LAST, {"prompt_format": 2, "adapters": {"rank": 2}}, (["q_proj", "v_proj"], "last:1")),
        (ABOVE, {}, (["q_proj", "v_proj"], "above_router")),
    ],
)
def test_a_bank_that_no_run_here_made_keeps_its_layers_by_its_manifest_or_its_adapters(
    modules: dict[str, tuple[int, int]], configured: dict[str, Any], expected: tuple[Any, str], tmp_path: Path,
    amlora_home: Path, empty_home: Path,
) -> None:  # fmt: skip
    shutil.copytree(empty_home, amlora_home)
    file, store = write_config(tmp_path, adapters={"rank": 4}), Store.open(amlora_home)
    adapters = [tiny_adapter("fruit", 1, modules=modules)]
    publish_sequence(store, "brought", tmp_path, tasks=["fruit"], adapters=adapters, training_configuration=configured)
    given = ["parent=models:/brought/1"]
    begun = going_on(load_config(file, given), named=named_keys(file, given), run_id="child")
    assert (begun.adapters.targets, begun.adapters.layers) == expected
    assert begun.prompt_format == configured.get("prompt_format", 1), "as the bank, which is of before where it does not say"
    assert begun.adapters.rank == 4, "all else is the run's own"


@pytest.mark.parametrize(
    ("targets", "layers", "stored", "fix"),
    [
        ("mlp", "above_router", {"targets": "auto", "layers": "above_router"}, 'adapters.targets="auto"'),
        ("auto", "last:1", {"targets": ["q_proj", "v_proj"], "layers": "above_router"}, 'adapters.layers="above_router"'),
        ("all-linear", "above_router", {}, 'adapters.targets=["q_proj","v_proj"] adapters.layers="above_router"'),
    ],
)
def test_other_layers_than_the_banks_are_refused_before_anything_starts_with_what_to_write(
    targets: str, layers: str, stored: dict[str, Any], fix: str, tmp_path: Path
) -> None:
    file = write_config(tmp_path, adapters={"rank": 4})
    manifest = tiny_bank(
        tmp_path / "bank", ["fruit"], adapters=[tiny_adapter("fruit", 1, modules=ABOVE)],
        training_configuration={"adapters": stored},
    )  # fmt: skip
    base = resolve_base(ModelSettings(source=str(tmp_path / "model-llama")), tmp_path)

    def check(*overrides: str) -> None:
        config = load_config(file, list(overrides))
        method = SimpleNamespace(layers=AdaptedLayers())
        check_layers_of_bank(config, manifest, "models:/brought/1", base, cast("Any", method))

    for same in (["adapters.targets=auto"], ["adapters.targets=[v_proj,q_proj]", "adapters.layers=last:2"]):
        check(*same)  # other words for the same layers
    with pytest.raises(UserError, match=re.escape(fix)) as refused:
        check(f"adapters.targets={targets}", f"adapters.layers={layers}")
    assert "models:/brought/1" in str(refused.value)
