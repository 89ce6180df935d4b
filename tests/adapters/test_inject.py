"""Finding the layers to adapt, putting a bank into a model, and taking the new adapter out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from amlora_dist.adapters.adapter import Adapter
from amlora_dist.adapters.inject import NewAdapter, inject
from amlora_dist.adapters.mixture import MixtureLinear
from amlora_dist.adapters.selector_layer import Selectors
from amlora_dist.adapters.settings import AdapterSettings, LiteralSettings
from amlora_dist.adapters.targets import DEFAULT_TARGETS, default_router_layer, find_targets
from amlora_dist.errors import UserError
from tests.adapters.banks import LinearRouter, prompts, random_adapters, targets_of, tiny_llama, tiny_t5
from tests.adapters.test_architectures import build

NOT_FOR_TEXT_GENERATION = {
    "bert", "roberta", "xlm-roberta", "electra", "deberta", "deberta-v2", "layoutlm", "blip-2",
    "btlm", "RefinedWeb", "RefinedWebModel", "rwkv", "rwkv7", "nemotron_h", "gemma4",
}  # fmt: skip
"""Encoders, types of remote code, and layers that are not attention."""


# -- targets ----------------------------------------------------------------------------------------------------------


def test_auto_targets_are_pefts() -> None:
    for kind, names in DEFAULT_TARGETS.items():
        assert names == PEFT_TARGETS[kind], kind
    assert PEFT_TARGETS.keys() - DEFAULT_TARGETS.keys() - NOT_FOR_TEXT_GENERATION == set()


@pytest.mark.parametrize(
    ("layers", "expected"), [("above_router", [2, 3]), ("last:1", [3]), ("last:3", [1, 2, 3]), ("all", [0, 1, 2, 3])]
)
def test_layers_select_by_depth(layers: str, expected: list[int]) -> None:
    targets = targets_of(tiny_llama(), layers=layers)
    assert sorted({target.layer for target in targets}) == expected
    assert len(targets) == 2 * len(expected)


@pytest.mark.parametrize(
    ("layers", "encoder", "decoder"),
    [("above_router", [2, 3], [0, 1]), ("last:1", [3], [1]), ("all", [0, 1, 2, 3], [0, 1])],
)
def test_an_encoder_decoder_is_adapted_above_the_router_and_in_the_decoder(
    layers: str, encoder: list[int], decoder: list[int]
) -> None:
    targets = targets_of(tiny_t5(), layers=layers)
    assert sorted({t.layer for t in targets if t.part == "encoder"}) == encoder
    assert sorted({t.layer for t in targets if t.part == "decoder"}) == decoder
    assert any("EncDecAttention" in t.path for t in targets)


def test_named_targets_match_the_end_of_the_path() -> None:
    names = {t.path.split(".", 3)[3] for t in targets_of(tiny_llama(), targets=["mlp.down_proj", "o_proj"])}
    assert names == {"mlp.down_proj", "self_attn.o_proj"}


LLAMA_ATTENTION, LLAMA_MLP = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}
BART_ATTENTION = {f"{owner}.{name}_proj" for owner in ("self_attn", "encoder_attn") for name in ("q", "k", "v", "out")}


def test_by_default_the_mlps_are_adapted() -> None:
    assert find_targets(tiny_llama(), AdapterSettings(), 2) == targets_of(tiny_llama(), targets="mlp")


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("attention", LLAMA_ATTENTION),
        ("mlp", LLAMA_MLP),
        ("all-linear", LLAMA_ATTENTION | LLAMA_MLP),
        (["mlp", "v_proj"], LLAMA_MLP | {"v_proj"}),
        (["mlp", "attention"], LLAMA_ATTENTION | LLAMA_MLP),
    ],
)
def test_words_mean_layers_by_what_they_do(targets: Any, expected: set[str]) -> None:
    found = targets_of(tiny_llama(), targets=targets)
    assert {target.path.rsplit(".", 1)[-1] for target in found} == expected, "and never the output head"
    assert len(found) == 2 * len(expected)


def test_words_mean_the_same_in_an_encoder_decoder_whose_mlp_has_no_part_of_its_own() -> None:
    def names(word: str) -> set[str]:
        found = targets_of(build("bart"), targets=word)
        return {t.path.partition(f"layers.{t.layer}.")[2] for t in found if t.part == "decoder"}

    assert names("attention") == BART_ATTENTION
    assert names("mlp") == {"fc1", "fc2"}
    assert names("all-linear") == BART_ATTENTION | {"fc1", "fc2"}


def test_all_linear_is_what_peft_means_by_it() -> None:
    from peft import LoraConfig, get_peft_model

    for kind in ("llama", "gpt2", "phi", "t5", "bart"):
        ours = {target.path for target in targets_of(build(kind), targets="all-linear", layers="all")}
        wrapped: Any = get_peft_model(build(kind), LoraConfig(target_modules="all-linear"))
        theirs = {path.removeprefix("base_model.model.") for path, m in wrapped.named_modules() if hasattr(m, "lora_A")}
        assert ours == theirs, kind


def test_where_every_mlp_is_a_mixture_of_experts_mlp_means_attention_and_the_log_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for kind in ("mixtral", "qwen2_moe"):
        model = build(kind)
        assert targets_of(model, targets="mlp") == targets_of(model, targets="attention")
        assert targets_of(model, targets="all-linear") == targets_of(model, targets="attention")
        assert f"model type {kind} are mixtures of experts" in caplog.text


def test_a_target_that_matches_nothing_lists_what_could() -> None:
    with pytest.raises(UserError, match=r"'q_porj' matches no linear layer.*did you mean 'q_proj'.*v_proj \(4\)"):
        targets_of(tiny_llama(), targets=["q_porj", "v_proj"])


def test_an_architecture_without_default_lists_its_linear_layers() -> None:
    model = tiny_t5()
    model.config.model_type = "unheard_of"
    with pytest.raises(UserError, match=r"no default for model type 'unheard_of'.*wi \(6\)"):
        targets_of(model)


def test_later_architectures_with_llamas_names_need_no_entry() -> None:
    model = tiny_llama()
    model.config.model_type = "unheard_of"
    assert targets_of(model) == targets_of(tiny_llama())


def test_more_layers_than_there_are_is_an_error() -> None:
    with pytest.raises(UserError, match="at most last:4"):
        targets_of(tiny_llama(), layers="last:5")


@pytest.mark.parametrize("layer", [-1, 4])
def test_a_routing_layer_outside_of_the_model_is_an_error(layer: int) -> None:
    with pytest.raises(UserError, match="expected 0 to 3"):
        find_targets(tiny_llama(), AdapterSettings(), layer)


def test_targets_are_found_on_the_meta_device() -> None:
    config = LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    targets = targets_of(model)
    assert default_router_layer(model) == 40
    assert len(targets) == 80
    assert (targets[1].in_features, targets[1].out_features) == (8192, 1024)


def test_experts_are_left_alone_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    from transformers import MixtralConfig

    config = MixtralConfig(
        vocab_size=67,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=3,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with caplog.at_level("INFO"):
        targets = targets_of(model)
    assert {target.path.rsplit(".", 1)[-1] for target in targets} == {"q_proj", "v_proj"}
    assert "experts" in caplog.text
    experts = {name: p.clone() for name, p in model.named_parameters() if "experts" in name}
    mixture = inject(model, targets, random_adapters(targets, [2, 3]))
    assert {name for name, _ in model.named_parameters() if "experts" in name} == experts.keys()
    model(input_ids=prompts(2, 4), task_gate=mixture.one_hot(0, 2))


def test_linear_experts_are_left_alone_too() -> None:
    model = tiny_llama()
    for layer in model.model.layers:
        layer.mlp.experts = nn.ModuleList([nn.ModuleDict({"up_proj": nn.Linear(32, 8)})])
    assert not any("experts" in target.path for target in targets_of(model, targets=["up_proj"]))


# -- inject -----------------------------------------------------------------------------------------------------------


def test_a_fresh_adapter_changes_nothing_and_only_it_is_trainable() -> None:
    model, ids = tiny_llama(), prompts(2, 5)
    with torch.no_grad():
        before = model(input_ids=ids).logits
    targets = targets_of(model)
    mixture = inject(model, targets, [], new=NewAdapter(task="first", rank=2, alpha=4.0))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids, task_gate=mixture.one_hot(0, 2)).logits, before)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{t.path}.{kind}" for t in targets for kind in ("new_a", "new_b")}


def test_trainable_names_are_stable() -> None:
    model = tiny_llama()
    targets = targets_of(model, targets=["q_proj"])
    mixture = inject(model, targets, random_adapters(targets, [2]), new=NewAdapter(task="new", rank=2, alpha=4.0))
    paths = [f"model.layers.{i}.self_attn.q_proj" for i in (2, 3)]
    assert list(mixture.trainable()) == [f"{kind}.{path}" for kind in ("a", "b", "recipe") for path in paths]


def test_a_new_adapter_depends_on_its_seed_and_module_alone() -> None:
    def first(layers: str, seed: int) -> Adapter:
        model = tiny_llama()
        targets = targets_of(model, layers=layers)
        return inject(model, targets, [], new=NewAdapter(task="t", rank=2, alpha=4.0, seed=seed)).extract_new()

    all_layers, last, other = first("all", 1), first("last:1", 1), first("last:1", 2)
    path = "model.layers.3.self_attn.q_proj"
    assert torch.equal(all_layers.a[path], last.a[path])
    assert not torch.equal(last.a[path], other.a[path])
    assert not torch.equal(all_layers.a[path], all_layers.a["model.layers.2.self_attn.q_proj"])
    assert float(last.a[path].abs().max()) <= 32**-0.5


def test_given_starts_are_taken() -> None:
    model = tiny_llama()
    targets = targets_of(model)
    old, start = random_adapters(targets, [2, 3])
    recipe = {t.path: torch.tensor([0.5]) for t in targets}
    new = NewAdapter(
        task="new", rank=3, alpha=6.0, init={m: (start.a[m], start.b[m]) for m in start.a}, recipe_init=recipe
    )
    adapter = inject(model, targets, [old], new=new).extract_new()
    assert Adapter("new", 3, 6.0, start.a, start.b, recipe).digest() == adapter.digest()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_adapter_gives_bit_equal_outputs(tmp_path: Path, dtype: torch.dtype) -> None:
    ids = prompts(2, 6)
    model = tiny_llama().to(dtype)
    targets = targets_of(model)
    old = random_adapters(targets, [2, 3])
    mixture = inject(model, targets, old, new=NewAdapter(task="new", rank=2, alpha=4.0))
    generator = torch.Generator().manual_seed(0)
    for parameter in mixture.trainable().values():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    gate = torch.rand(2, 3, generator=generator)
    with torch.no_grad():
        learned = model(input_ids=ids, task_gate=gate).logits
    adapter = mixture.extract_new()
    save_file(adapter.tensors(), tmp_path / "adapter.safetensors")

    loaded = load_file(tmp_path / "adapter.safetensors")
    parts: dict[str, Any] = {"a": {}, "b": {}, "recipe": {}}
    for name, tensor in loaded.items():
        kind, path = name.split(".", 1)
        parts[kind][path] = tensor
    again = Adapter("new", 2, 4.0, **parts)
    assert again.digest() == adapter.digest()
    assert inject(tiny_llama().to(dtype), targets, [*old, again]).task_names == ["task0", "task1", "new"]
    model = tiny_llama().to(dtype)
    inject(model, targets, [*old, again])
    with torch.no_grad():
        served = model(input_ids=ids, task_gate=gate).logits
    # The same numbers through one wide product instead of two.
    torch.testing.assert_close(served, learned, atol=1e-5 if dtype == torch.float32 else 0.05, rtol=1e-5)


def test_extraction_gathers_parameter_by_parameter() -> None:
    model = tiny_llama()
    targets = targets_of(model)
    mixture = inject(model, targets, random_adapters(targets, [2]), new=NewAdapter(task="new", rank=2, alpha=4.0))
    gathered: list[int] = []

    @contextlib.contextmanager
    def gather(parameters: list[nn.Parameter]) -> Iterator[None]:
        gathered.append(len(parameters))
        yield

    adapter = mixture.extract_new(gather)
    assert gathered == [1] * len(mixture.trainable())
    mixture.modules[targets[0].path].new_a.data.zero_()  # type: ignore[union-attr]
    assert float(adapter.a[targets[0].path].abs().max()) > 0  # a copy


def test_a_constant_recipe_is_extracted() -> None:
    model = tiny_llama()
    targets = targets_of(model)
    recipe = {t.path: torch.tensor([1.0]) for t in targets}
    new = NewAdapter(task="new", rank=2, alpha=4.0, recipe_init=recipe, learn_recipe=False)
    mixture = inject(model, targets, random_adapters(targets, [2]), new=new)
    assert not any(name.startswith("recipe") for name in mixture.trainable())
    assert torch.equal(mixture.extract_new().recipe[targets[0].path], torch.tensor([1.0]))


def test_a_recipe_can_be_set_while_it_is_learned() -> None:
    model = tiny_llama()
    targets = targets_of(model)
    mixture = inject(model, targets, random_adapters(targets, [2]), new=NewAdapter(task="new", rank=2, alpha=4.0))
    with torch.no_grad():
        mixture.modules[targets[1].path].recipe.fill_(0.25)  # type: ignore[union-attr]
    assert torch.equal(mixture.extract_new().recipe[targets[1].path], torch.tensor([0.25]))
    assert torch.equal(mixture.extract_new().recipe[targets[0].path], torch.tensor([0.0]))


def test_selectors_survive_extraction() -> None:
    model = tiny_llama()
    targets = targets_of(model)
    literal = Selectors(settings=LiteralSettings())
    first = inject(model, targets, [], new=NewAdapter(task="a", rank=2, alpha=4.0), layers=literal).extract_new()
    model = tiny_llama()
    second = inject(model, targets, [first], new=NewAdapter(task="b", rank=2, alpha=4.0), layers=literal).extract_new()
    path = targets[0].path
    assert second.selector[f"{path}.weight"].shape == (2, targets[0].out_features)
    assert torch.equal(second.selector[f"{path}.weight"][:1], first.selector[f"{path}.weight"])


def test_a_bank_without_selectors_is_refused_by_the_literal_router() -> None:
    model = tiny_llama()
    targets = targets_of(model)
    with pytest.raises(UserError, match="has no selector"):
        inject(model, targets, random_adapters(targets, [2]), layers=Selectors(settings=LiteralSettings()))


def test_selectors_can_be_switched_off_for_two_stage_training() -> None:
    model = tiny_llama()
    targets = targets_of(model)
    layers = Selectors(settings=LiteralSettings())
    mixture = inject(model, targets, [], new=NewAdapter(task="a", rank=2, alpha=4.0), layers=layers)
    for name, parameter in mixture.trainable().items():
        if name.startswith("b."):
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    ids = prompts(2, 5)
    with torch.no_grad():
        selected = model(input_ids=ids).logits
        mixture.use_selectors(False)
        alone = model(input_ids=ids, task_gate=mixture.one_hot(0, 2)).logits
    assert not torch.allclose(selected, alone)


def test_an_adapter_of_other_layers_or_sizes_is_refused() -> None:
    model = tiny_llama()
    targets = targets_of(model)
    with pytest.raises(UserError, match="'task0' was trained on other layers"):
        inject(model, targets, random_adapters(targets[:-1], [2]))
    adapters = random_adapters(targets, [2])
    adapters[0].a[targets[0].path] = torch.zeros(2, 31)
    with pytest.raises(UserError, match=r"\(2, 31\).*another base model"):
        inject(model, targets, adapters)


def test_nothing_to_inject_and_injecting_twice_are_errors() -> None:
    model = tiny_llama()
    targets = targets_of(model)
    with pytest.raises(UserError, match="nothing to inject"):
        inject(model, targets, [])
    inject(model, targets, random_adapters(targets, [2]))
    with pytest.raises(UserError, match="already"):
        inject(model, targets, random_adapters(targets, [2]))


@pytest.mark.parametrize("make", [tiny_llama, tiny_t5])
def test_a_removed_mixture_gives_the_model_back(make: Any) -> None:
    model, ids = make(), prompts(2, 5)
    inputs = {"input_ids": ids, "decoder_input_ids": ids} if model.config.is_encoder_decoder else {"input_ids": ids}
    with torch.no_grad():
        before = model(**inputs).logits
    names = list(model.state_dict())
    attributes = set(vars(model))
    targets = targets_of(model)
    mixture = inject(model, targets, random_adapters(targets, [2]), router=LinearRouter.random(["task0"], 32))
    mixture.remove()
    assert list(model.state_dict()) == names
    assert set(vars(model)) == attributes
    assert not any(isinstance(module, MixtureLinear) for module in model.modules())
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)
