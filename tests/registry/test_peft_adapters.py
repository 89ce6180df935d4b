"""LoRAs of others: each kind that is taken computes what PEFT's own model does, every other one is refused by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from amlora_dist.errors import BankError, UserError
from amlora_dist.registry.peft_adapters import KNOWN, read_peft
from amlora_dist.registry.tensor_files import write_tensors
from tests.registry.test_peft_loads import add_by_hand, logits, tiny_model

LAYER = "model.layers.1.self_attn.q_proj"
PLAIN: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "up_proj"]}

TAKEN: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    "plain": ({}, {}, ()),
    "import-alpha: left out": ({"lora_alpha": 8}, {}, ("lora_alpha",)),
    "import-alpha: rank and alpha left out": ({"r": 8, "lora_alpha": 8}, {}, ("r", "lora_alpha")),
    "a fraction as alpha": ({"lora_alpha": 2.5}, {}, ()),
    "rsLoRA": ({"use_rslora": True}, {}, ()),
    "random init": ({"init_lora_weights": False}, {}, ()),
    "gaussian": ({"init_lora_weights": "gaussian"}, {}, ()),
    "orthogonal": ({"init_lora_weights": "orthogonal"}, {}, ()),
    "eva": ({"init_lora_weights": "eva"}, {}, ()),
    "no word of the init": ({}, {"init_lora_weights": None}, ()),
    "dropout": ({"lora_dropout": 0.5}, {}, ()),
    "ranks by pattern": ({"rank_pattern": {"v_proj": 2, r"layers\.0.*up_proj": 7}}, {}, ()),
    "alphas by pattern": ({"alpha_pattern": {"v_proj": 1, "^model.layers.1.self_attn.q_proj": 20}}, {}, ()),
    "both by pattern, rsLoRA": (
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3, "up_proj": 11}, "use_rslora": True}, {}, ()
    ),
    "some layers": ({"layers_to_transform": [1]}, {}, ()),
    "one layer of a list by name": ({"layers_to_transform": 1, "layers_pattern": "layers"}, {}, ()),
    "without some": ({"exclude_modules": ["layers.0.mlp.up_proj"]}, {}, ()),
    "targets by pattern": ({"target_modules": r".*\.(q|v)_proj"}, {}, ()),
    "all linear layers": ({"target_modules": "all-linear"}, {}, ()),
    "a list that PEFT writes out": ({"target_modules": [LAYER, "model.layers.0.mlp.up_proj"]}, {}, ()),
    "an old configuration": ({}, {"enable_lora": None, "merge_weights": False}, ()),
    "leftovers of an init": ({}, {"loftq_config": {}, "eva_config": None, "corda_config": {"corda_method": "ipm"}}, ()),
    "for an encoder-decoder": ({"task_type": "SEQ_2_SEQ_LM"}, {}, ()),
    "ensure_weight_tying": ({}, {"ensure_weight_tying": True}, ()),
}  # fmt: skip
"""What PEFT is given, what is written into its file afterwards, and what is left out of it."""


def saved(folder: Path, made: dict[str, Any], written: dict[str, Any], left_out: tuple[str, ...] = ()) -> Path:
    """A LoRA with random values on a tiny Llama, as PEFT saves it."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    model = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(**PLAIN | {"task_type": "CAUSAL_LM"} | made))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.4)
    model.save_pretrained(folder)
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | written
    file.write_text(json.dumps({key: value for key, value in config.items() if key not in left_out}), encoding="utf-8")
    return folder


@pytest.mark.integration  # importing transformers and peft
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", TAKEN)
def test_import_kinds_that_are_taken_compute_what_peft_does(case: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    folder = saved(tmp_path / "theirs", *TAKEN[case])
    theirs = logits(peft.PeftModel.from_pretrained(tiny_model("llama"), folder), "llama")
    made, _ = read_peft(folder, "task")
    ours = tiny_model("llama")
    add_by_hand(ours, made)
    torch.testing.assert_close(logits(ours, "llama"), theirs, rtol=1e-5, atol=1e-5)
    assert float((theirs - logits(tiny_model("llama"), "llama")).abs().max()) > 0.01, "an adapter that does something"
    assert len({tensor.shape[0] for tensor in made.a.values()}) == 1, "one rank, as a bank keeps it"


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_import_kinds_that_are_refused_would_compute_something_else(init: str, tmp_path: Path) -> None:
    """PEFT takes their part out of the base model again; A and B alone are not what it computes."""
    peft = pytest.importorskip("peft")
    folder = saved(tmp_path / "theirs", {"init_lora_weights": init}, {})
    theirs = logits(peft.PeftModel.from_pretrained(tiny_model("llama"), folder), "llama")
    with pytest.raises(UserError, match=f"init_lora_weights: found '{init}'"):
        read_peft(folder, "task")
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    (folder / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": True}), encoding="utf-8")
    ours = tiny_model("llama")
    add_by_hand(ours, read_peft(folder, "task")[0])
    assert float((logits(ours, "llama") - theirs).abs().max()) > 1e-3


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights: found 'pissa', expected true, false, gaussian or eva"),
    "pissa_niter_4": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: found 'pissa_niter_4'"),
    "olora": ({"init_lora_weights": "OLoRA"}, "init_lora_weights: found 'OLoRA'"),
    "corda": ({"init_lora_weights": "corda"}, "init_lora_weights: found 'corda'"),
    "loftq": ({"init_lora_weights": "loftq"}, "init_lora_weights: found 'loftq'"),
    "lora_ga": ({"init_lora_weights": "lora_ga"}, "init_lora_weights: found 'lora_ga'"),
    "an init of next year": ({"init_lora_weights": "nova"}, "init_lora_weights: found 'nova'"),
    "aLoRA": ({"alora_invocation_tokens": [3, 4]}, r"alora_invocation_tokens: found \[3, 4\], expected null"),
    "a key that nobody knows": ({"use_nova": False}, "use_nova: found false, a key that this version does not know"),
    "DoRA": ({"use_dora": True}, "use_dora: found true, expected false"),
    "QALoRA": ({"use_qalora": True}, "use_qalora: found true"),
    "block-diagonal": ({"use_bdlora": {"nblocks": 2}}, "use_bdlora: found a section"),
    "arrow": ({"arrow_config": {"top_k": 2}}, "arrow_config: found a section, expected null"),
    "KaSA": ({"kasa_config": {}}, "kasa_config: found an empty section, expected null"),
    "Monte Carlo": ({"monteclora_config": {"num_samples": 4}}, "monteclora_config: found a section"),
    "VeLoRA": ({"velora_config": {"num_groups": 2}}, "velora_config: found a section"),
    "a bias": ({"bias": "lora_only"}, "bias: found 'lora_only', expected none"),
    "a bias of B": ({"lora_bias": True}, "lora_bias: found true"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save: found"),
    "tokens": ({"trainable_token_indices": [1]}, "trainable_token_indices: found"),
    "parameters": ({"target_parameters": ["experts.down_proj"]}, "target_parameters: found"),
    "layers twice": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication: found"),
    "another method": ({"peft_type": "IA3"}, "peft_type: found 'IA3', expected LORA"),
    "a classifier": ({"task_type": "SEQ_CLS"}, "task_type: found 'SEQ_CLS', expected CAUSAL_LM"),
    "import-alpha: alpha null": ({"lora_alpha": None}, "lora_alpha: found null, expected a number above 0"),
    "import-alpha: rank null": ({"r": None}, "r: found null, expected a whole number above 0"),
    "alpha in quotes": ({"lora_alpha": "16"}, "lora_alpha: found '16', expected a number"),
    "alpha that is no number": ({"lora_alpha": float("nan")}, "lora_alpha: found NaN, expected a number"),
    "alpha 0": ({"lora_alpha": 0}, "lora_alpha: found 0, expected a number above 0"),
    "rank true": ({"r": True}, "r: found true, expected a whole number"),
    "rank in fractions": ({"r": 4.0}, "r: found 4.0, expected a whole number"),
    "rank of 0 by pattern": ({"rank_pattern": {"q_proj": 0}}, "rank_pattern: found a section, expected whole numbers"),
    "ranks in a list": ({"rank_pattern": [4]}, r"rank_pattern: found \[4\]"),
    "a pattern without end": ({"rank_pattern": {"(a+)+b": 4}}, "rank_pattern: .* short patterns"),
    "a pattern that is none": ({"alpha_pattern": {"(": 4}}, "alpha_pattern: .* short patterns"),
    "targets without end": ({"target_modules": "(.*)*x"}, r"target_modules: found '\(\.\*\)\*x', expected a short pattern"),
    "targets that leave a tensor out": ({"target_modules": ["q_proj"]}, "a LoRA of .*v_proj, which the configuration"),
    "an exclusion of what is there": ({"exclude_modules": ["v_proj"]}, "a LoRA of .*v_proj, which the configuration"),
    "layers that are not theirs": ({"layers_to_transform": [0]}, "a LoRA of model.layers.1.* which the configuration"),
    "no targets": ({"target_modules": None}, "target_modules: found null, expected a list of modules' names"),
    "a base that is a number": ({"base_model_name_or_path": 3}, "base_model_name_or_path: found 3, expected text"),
    "another rank": ({"r": 77}, "not pairs of rank 77"),
}  # fmt: skip


def written(folder: Path, config: object, names: tuple[str, ...] = (LAYER, LAYER.replace("q_", "v_")), **more: Any) -> Path:
    """An adapter as PEFT writes it, without PEFT."""
    tensors = {f"base_model.model.{name}.lora_A.weight": torch.ones(4, 16) for name in names}
    tensors |= {f"base_model.model.{name}.lora_B.weight": torch.ones(16, 4) for name in names}
    write_tensors(folder / "adapter_model.safetensors", tensors | more)
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


GOOD = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}


@pytest.mark.parametrize("case", REFUSED)
def test_import_kinds_that_are_not_known_are_refused_by_name(case: str, tmp_path: Path) -> None:
    change, message = REFUSED[case]
    read_peft(written(tmp_path / "good", GOOD), "task")
    with pytest.raises(UserError, match=message) as caught:
        read_peft(written(tmp_path / "odd", GOOD | change), "task")
    assert str(caught.value).startswith(str(tmp_path / "odd")) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "found no JSON object"), ("null", "found no JSON object"), ("{", "give the folder of a PEFT adapter"),
        ("[" * 100_000, "give the folder of a PEFT adapter"), ('{"r": 4}', "peft_type: found nothing, expected LORA"),
        ('{"peft_type": "LORA"}', "target_modules: found nothing"),
    ],
)  # fmt: skip
def test_import_alpha_a_configuration_that_is_none_is_reported(content: str, message: str, tmp_path: Path) -> None:
    folder = written(tmp_path, GOOD)
    (folder / "adapter_config.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_peft(folder, "task")


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("base_model.model.lm_head.modules_to_save.weight", torch.ones(3), "not the A or B of a linear layer"),
        (f"base_model.model.{LAYER}.lora_magnitude_vector", torch.ones(16), "not the A or B of a linear layer"),
        (f"base_model.model.{LAYER}.lora_A.default.weight", torch.ones(4, 16), "not the A or B of a linear layer, as PEFT"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", torch.ones(4, 9), "not the A or B of a linear layer"),
        (f"base_model.model.{LAYER}.2.lora_A.weight", torch.ones(4, 16), "found only one of A and B of"),
        (f"base_model.model.{LAYER}.lora_A.weight", torch.ones(4, 16, 1), "not pairs of rank 4"),
        (f"base_model.model.{LAYER}.lora_B.weight", torch.ones(16, 3), "not pairs of rank 4"),
        (f"base_model.model.{LAYER}.lora_B.weight", torch.ones(16, 4, dtype=torch.int64), "expected floating-point"),
    ],
)
def test_tensors_that_are_no_pairs_are_refused(name: str, tensor: torch.Tensor, message: str, tmp_path: Path) -> None:
    with pytest.raises((UserError, BankError), match=message):
        read_peft(written(tmp_path, GOOD, **{name: tensor}), "task")


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    folder = written(tmp_path, GOOD)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match=r"adapter_model.safetensors: missing; pickled weights"):
        read_peft(folder, "task")


def test_a_lora_of_several_dtypes_becomes_one_of_fp32(tmp_path: Path) -> None:
    name = f"base_model.model.{LAYER}.lora_B.weight"
    made, _ = read_peft(written(tmp_path, GOOD, **{name: torch.full((16, 4), 0.5, dtype=torch.bfloat16)}), "task")
    assert {tensor.dtype for tensor in (*made.a.values(), *made.b.values())} == {torch.float32}


def test_alpha_is_kept_to_the_last_bit(tmp_path: Path) -> None:
    made, _ = read_peft(written(tmp_path, GOOD | {"lora_alpha": 0.7}), "task")
    assert (made.rank, made.alpha) == (4, 0.7)


def test_every_key_of_the_installed_peft_is_known() -> None:
    """A new one shows here first: see what it does, then name it."""
    peft = pytest.importorskip("peft")
    assert not set(peft.LoraConfig.__dataclass_fields__) - set(KNOWN)


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "rank_pattern"])
def test_a_pattern_that_takes_for_ever_is_refused(tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("amlora_dist.registry.peft_adapters.PATIENCE_S", 0.2)
    module, slow = "a" * 90, "(a|aa)" * 60 + "b"
    given = {"target_modules": [module], key: {slow: 2} if key == "rank_pattern" else slow}
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2} | given))
    parts = {"A": torch.zeros(2, 8), "B": torch.zeros(8, 2)}
    tensors = {f"base_model.model.{module}.lora_{letter}.weight": part for letter, part in parts.items()}
    write_tensors(tmp_path / "adapter_model.safetensors", tensors)
    with pytest.raises(UserError, match=r"cannot be compared with the name .* \(it takes too long\); give a list of names"):
        read_peft(tmp_path, "task")
