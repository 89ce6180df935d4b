from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from amlora_dist.errors import BankError
from amlora_dist.registry.bank_folder import Bank, check_publishable, read_bank, write_bank
from amlora_dist.registry.manifest import Stored, replace
from tests.registry.tiny_banks import MODULES, TASKS, tiny_adapter, tiny_bank

ADAPTER = "adapters/2-agnews/adapter_model.safetensors"
RECIPE = "adapters/2-agnews/recipe.safetensors"
CONFIG = "adapters/2-agnews/adapter_config.json"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("banks") / "bank"
    tiny_bank(folder)
    return folder


@pytest.fixture
def bank(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "bank")
    return tmp_path / "bank"


def same(left: Bank, right: Bank) -> bool:
    def of(bank: Bank) -> list[object]:
        tensors = {"router": bank.router, **bank.statistics}
        values = {part: {name: t.tolist() for name, t in named.items()} for part, named in tensors.items()}
        return [bank.manifest, [adapter.digest() for adapter in bank.adapters], values]

    return of(left) == of(right)


def test_a_bank_reads_back_bit_for_bit(bank: Path) -> None:
    read = read_bank(bank)
    for index, (task, adapter) in enumerate(zip(TASKS, read.adapters, strict=True), start=1):
        given_one = tiny_adapter(task, index)
        assert adapter.digest() == given_one.digest()
        assert all(torch.equal(adapter.recipe[m], given_one.recipe[m]) for m in given_one.recipe)
    assert read.router_settings == {"temperature": 1.5}
    assert list(read.statistics) == list(TASKS)
    assert read.statistics["agnews"]["mean"].dtype == torch.float64


def test_writing_twice_gives_the_same_bytes(bank: Path, tmp_path: Path) -> None:
    tiny_bank(tmp_path / "again")
    files = sorted(path.relative_to(bank) for path in bank.rglob("*") if path.is_file())
    assert files == sorted(p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*") if p.is_file())
    assert all((bank / file).read_bytes() == (tmp_path / "again" / file).read_bytes() for file in files)


def test_writing_replaces_an_older_bank_whole(bank: Path) -> None:
    tiny_bank(bank, TASKS[:1])
    assert len(read_bank(bank).adapters) == 1
    assert sorted(path.name for path in bank.parent.iterdir()) == ["bank"]


def test_bf16_adapters_and_a_router_without_tensors_keep_their_form(tmp_path: Path) -> None:
    adapter = tiny_adapter("agnews", 1)
    half = dataclasses.replace(adapter, a={m: t.bfloat16() for m, t in adapter.a.items()})
    half = dataclasses.replace(half, b={m: t.bfloat16() for m, t in half.b.items()}, alpha=4)
    tiny_bank(tmp_path / "bank", ["agnews"], adapters=[half], router={"keys": torch.zeros(0, 8)})
    read = read_bank(tmp_path / "bank")
    assert read.adapters[0].a[next(iter(MODULES))].dtype == torch.bfloat16
    assert read.router["keys"].shape == (0, 8)


def test_views_of_one_storage_are_written_apart(tmp_path: Path) -> None:
    adapter = tiny_adapter("agnews", 1)
    wide = torch.randn(4, 8)
    names = list(adapter.a)
    adapter.a = {names[0]: wide[:2], names[1]: wide[2:]}
    tiny_bank(tmp_path / "bank", ["agnews"], adapters=[adapter])
    assert torch.equal(read_bank(tmp_path / "bank").adapters[0].a[names[1]], wide[2:])


def test_selector_layers_of_the_literal_router_are_kept(tmp_path: Path) -> None:
    adapter = tiny_adapter("agnews", 1)
    module = next(iter(MODULES))
    adapter.selector = {f"{module}.weight": torch.randn(8), f"{module}.bias": torch.randn(1)}
    tiny_bank(tmp_path / "bank", ["agnews"], adapters=[adapter])
    read = read_bank(tmp_path / "bank").adapters[0]
    assert torch.equal(read.selector[f"{module}.weight"], adapter.selector[f"{module}.weight"])


def test_statistics_may_be_absent(bank: Path) -> None:
    (bank / "statistics" / "1-helpdesk-email.safetensors").unlink()
    assert list(read_bank(bank).statistics) == ["agnews", "yahoo"]


def _rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def _name(letter: str) -> str:
    return f"base_model.model.{next(iter(MODULES))}.lora_{letter}.weight"


def _truncate(bank: Path) -> None:
    data = (bank / ADAPTER).read_bytes()
    (bank / ADAPTER).write_bytes(data[:-7])


def _nan(bank: Path) -> None:
    _rewrite(bank / ADAPTER, lambda t: t[_name("B")].fill_(float("nan")))


def _link_out(bank: Path) -> None:
    (bank.parent / "secret").write_bytes((bank / ADAPTER).read_bytes())
    (bank / ADAPTER).unlink()
    (bank / ADAPTER).symlink_to(bank.parent / "secret")


def _link_folder_out(bank: Path) -> None:
    shutil.move(bank / "adapters", bank.parent / "adapters-elsewhere")
    (bank / "adapters").symlink_to(bank.parent / "adapters-elsewhere")


def _config(key: str, value: object) -> Callable[[Path], None]:
    def change(bank: Path) -> None:
        config = json.loads((bank / CONFIG).read_text())
        config[key] = value
        (bank / CONFIG).write_text(json.dumps(config))

    return change


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (_truncate, "expected a whole safetensors file"),
    "empty file": (lambda b: (b / ADAPTER).write_bytes(b""), "expected a whole safetensors file"),
    "40 bytes, as ungathered adapters have": (lambda b: save_file({}, b / ADAPTER), "4 tensors missing"),
    "huge header": (lambda b: (b / ADAPTER).write_bytes(b"\xff" * 64), "expected a whole safetensors file"),
    "a pickle for weights": (
        lambda b: (b / ADAPTER).write_bytes(pickle.dumps({"a": 1})), "expected a whole safetensors file"
    ),
    "missing": (lambda b: (b / ADAPTER).unlink(), "missing"),
    "a folder instead of a file": (lambda b: ((b / RECIPE).unlink(), (b / RECIPE).mkdir()), "missing"),
    "not a number": (_nan, "NaN or infinity in 16 of 16"),
    "infinity in the router": (
        lambda b: _rewrite(b / "router.safetensors", lambda t: t["keys"].fill_(float("inf"))),
        "router.safetensors: keys: found NaN or infinity",
    ),
    "other values": (lambda b: _rewrite(b / ADAPTER, lambda t: t[_name("A")].add_(1)), "digest"),
    "other router": (lambda b: _rewrite(b / "router.safetensors", lambda t: t["keys"].add_(1)), "digest"),
    "other recipe": (lambda b: _rewrite(b / RECIPE, lambda t: next(iter(t.values())).add_(1)), "digest"),
    "recipe of another length": (
        lambda b: _rewrite(b / RECIPE, lambda t: t.update({next(iter(t)): torch.zeros(5)})),
        r"shape \(5,\), expected torch.float32 of shape \(1,\)",
    ),
    "recipe of another dtype": (
        lambda b: _rewrite(b / RECIPE, lambda t: t.update({next(iter(t)): torch.zeros(1).double()})),
        "float64",
    ),
    "recipe of a stranger": (
        lambda b: _rewrite(b / RECIPE, lambda t: t.update({"recipe.lm_head": torch.zeros(1)})),
        "no adapted module",
    ),
    "wrong rank": (
        lambda b: _rewrite(b / ADAPTER, lambda t: t.update({_name("A"): torch.zeros(3, 8)})),
        r"found shape \(3, 8\), expected \(2, d_in\)",
    ),
    "empty tensor": (
        lambda b: _rewrite(b / ADAPTER, lambda t: t.update({_name("B"): torch.zeros(0, 2)})),
        "without gathering",
    ),
    "one dimension": (lambda b: _rewrite(b / ADAPTER, lambda t: t.update({_name("A"): torch.zeros(2)})), "shape"),
    "mixed dtypes": (
        lambda b: _rewrite(b / ADAPTER, lambda t: t.update({_name("A"): t[_name("A")].bfloat16()})),
        "one floating-point dtype",
    ),
    "integers": (
        lambda b: _rewrite(b / ADAPTER, lambda t: t.update({k: v.long() for k, v in t.items()})),
        "one floating-point dtype",
    ),
    "booleans": (
        lambda b: _rewrite(b / ADAPTER, lambda t: t.update({k: v > 0 for k, v in t.items()})),
        "dtype: found BOOL",
    ),
    "one tensor too many": (
        lambda b: _rewrite(b / ADAPTER, lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(1)})),
        "no adapted module",
    ),
    "one tensor too few": (lambda b: _rewrite(b / ADAPTER, lambda t: t.pop(_name("A"))), "1 tensors missing"),
    "PEFT's rank": (_config("r", 4), "r: found 4"),
    "PEFT's rank as a truth value": (_config("use_dora", 0), "use_dora"),
    "another key for PEFT": (_config("auto_mapping", {"parent_library": "os"}), "auto_mapping"),
    "no configuration": (lambda b: (b / CONFIG).unlink(), "missing"),
    "configuration is no JSON": (lambda b: (b / CONFIG).write_text("{"), "not JSON"),
    "configuration is a list": (lambda b: (b / CONFIG).write_text("[]"), "no JSON object"),
    "an unknown safetensors": (lambda b: save_file({}, b / "adapters" / "extra.safetensors"), "does not name"),
    "an unknown pickle": (lambda b: (b / "python_model.pkl").write_bytes(pickle.dumps(1)), "does not name"),
    "pickled weights": (lambda b: (b / "adapters/2-agnews/adapter_model.bin").write_bytes(b"x"), "does not name"),
    "code": (lambda b: (b / "modeling_amlora.py").write_text("raise SystemExit"), "does not name"),
    "a pipe": (lambda b: os.mkfifo(b / "pipe"), "does not name"),
    "a link out of the folder": (_link_out, "leads out"),
    "a folder that is a link out": (_link_folder_out, "leads out"),
    "statistics of another bank": (
        lambda b: shutil.copy(b / "statistics/1-helpdesk-email.safetensors", b / "statistics/2-agnews.safetensors"),
        "digest",
    ),
    "adapters swapped": (
        lambda b: shutil.copy(b / "adapters/1-helpdesk-email/adapter_model.safetensors", b / ADAPTER),
        "digest",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused_and_named(bank: Path, damage: str) -> None:
    act, message = DAMAGE[damage]
    act(bank)
    with pytest.raises(BankError, match=message) as caught:
        read_bank(bank)
    assert str(bank) in str(caught.value)


def test_what_mlflow_the_hub_and_people_add_and_no_loader_reads_is_no_harm(bank: Path) -> None:
    before = read_bank(bank).manifest
    for name in ("registered_model_meta", ".gitattributes", ".cache/huggingface/download/x.metadata", "model.sig"):
        (bank / name).parent.mkdir(parents=True, exist_ok=True)
        (bank / name).write_text("model_name: x")
    (bank / "README.md").write_text("# The bank of our help desk")
    assert read_bank(bank).manifest == before


@pytest.mark.parametrize(
    "name", ["conda.yaml", "requirements.txt", "python_env.yaml", "notes.txt", "code/x.py", "adapters/x", "MLmodel.bak"]
)
def test_any_other_file_is_refused_and_named(bank: Path, name: str) -> None:
    (bank / name).parent.mkdir(parents=True, exist_ok=True)
    (bank / name).write_text("hello")
    with pytest.raises(BankError, match=f"{name}: found a file that the manifest does not name"):
        read_bank(bank)


@pytest.mark.parametrize("name", ["MLmodel", "input_example.json"])
@pytest.mark.parametrize("change", ["longer", "same length"])
def test_what_mlflow_reads_is_under_the_manifests_digest(bank: Path, name: str, change: str) -> None:
    text = (bank / name).read_text()
    (bank / name).write_text(text + " " if change == "longer" else text.replace("text", "tixt"))
    with pytest.raises(BankError, match=rf"{name}: (sha256: )?found .*, the manifest has"):
        read_bank(bank)


def test_tensors_with_something_more_in_their_file_are_refused(bank: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = bank / "adapters" / "2-agnews" / "adapter_model.safetensors"
    save_file(load_file(file), file, metadata={"note": "hello" * 20})
    with pytest.raises(BankError, match=r"adapter_model.safetensors: found \d+ bytes, the manifest has \d+"):
        read_bank(bank)


def test_a_bank_of_schema_1_is_read_and_its_mlmodel_may_name_no_code(bank: Path) -> None:
    old = replace(read_bank(bank).manifest, files=None, schema_version=1)
    (bank / "manifest.json").write_text(old.to_json())
    assert "files" not in json.loads((bank / "manifest.json").read_text())
    assert read_bank(bank).manifest == old
    text = (bank / "MLmodel").read_text()
    for before, after in (
        ("amlora_dist.registry.pyfunc", "evil"), ("    config:", "    code: code\n    config:"),
        ("flavors:", "flavors:\n  sklearn:\n    pickled_model: x"), ("flavors:", "flavors: ["),
        ("flavors:", "x: " + "[" * 5000 + "\nflavors:"), ("flavors:", "x: !!timestamp 2001-99-99\nflavors:"),
        ("flavors:", "x: \0\nflavors:"),
    ):  # fmt: skip
        (bank / "MLmodel").write_text(text.replace(before, after))
        with pytest.raises(BankError, match=r"MLmodel: found (another flavour|no YAML)"):
            read_bank(bank)


def test_an_mlmodel_of_many_megabytes_is_not_read(bank: Path) -> None:
    old = replace(read_bank(bank).manifest, files=None, schema_version=1)
    (bank / "manifest.json").write_text(old.to_json())
    (bank / "MLmodel").write_text("#" * (2 << 20))
    with pytest.raises(BankError, match=r"MLmodel: found \d+ bytes, expected at most 1048576"):
        read_bank(bank)


def test_a_version_without_its_referred_adapters_says_how_to_get_them(bank: Path) -> None:
    manifest = read_bank(bank).manifest
    stored = Stored(version_of="m", run="f" * 32, artifact_path="bank-e1/adapters/2-agnews")
    lines = [dataclasses.replace(line, stored=stored if line.index == 2 else None) for line in manifest.adapters]
    (bank / "manifest.json").write_text(replace(manifest, adapters=lines).to_json())
    shutil.rmtree(bank / "adapters" / "2-agnews")
    with pytest.raises(BankError, match="amlora pull"):
        read_bank(bank)


def test_adapters_of_different_base_models_do_not_make_a_bank(tmp_path: Path) -> None:
    wide = {module: (16, d_out) for module, (_, d_out) in MODULES.items()}
    adapters = [tiny_adapter("a", 1), tiny_adapter("b", 2, modules=wide)]
    with pytest.raises(BankError, match="different base models"):
        tiny_bank(tmp_path / "bank", ["a", "b"], adapters=adapters)
    assert not (tmp_path / "bank").exists()
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_that_is_not_its_entry_is_not_written(tmp_path: Path) -> None:
    manifest = tiny_bank(tmp_path / "bank", ["a"])
    with pytest.raises(BankError, match="not the one its entry was made for"):
        write_bank(tmp_path / "other", manifest, [tiny_adapter("a", 1, seed=9)], {})
    with pytest.raises(BankError, match="2 adapters given, the manifest has 1"):
        write_bank(tmp_path / "other", manifest, [tiny_adapter("a", 1), tiny_adapter("b", 2)], {})


def test_an_adapter_that_adds_nothing_is_not_publishable(bank: Path) -> None:
    read = read_bank(bank)
    check_publishable(read.manifest, read.adapters)
    first, *rest = read.adapters[1].b.values()
    for tensor in rest:
        tensor.zero_()
    check_publishable(read.manifest, read.adapters)  # one layer that learned nothing is no failure
    first.zero_()
    with pytest.raises(BankError, match="adapters/2-agnews: every B is zero"):
        check_publishable(read.manifest, read.adapters)
    with pytest.raises(BankError, match="without adapters"):
        check_publishable(replace(read.manifest, adapters=[]), [])


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def right(original: Path) -> Bank:
    return read_bank(original)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_changed_byte_gives_the_right_bank_or_a_bank_error(
    original: Path, right: Bank, data: st.DataObject
) -> None:
    file = data.draw(st.sampled_from(_files(original)))
    content = file.read_bytes()
    kind = data.draw(st.sampled_from(["change", "insert", "delete", "cut"]))
    place = data.draw(st.integers(0, max(0, len(content) - 1)))
    byte = bytes([data.draw(st.integers(0, 255))])
    changed = {
        "change": content[:place] + byte + content[place + 1 :],
        "insert": content[:place] + byte + content[place:],
        "delete": content[:place] + content[place + 1 :],
        "cut": content[:place],
    }[kind]
    try:
        file.write_bytes(changed)
        try:
            read = read_bank(original)
        except BankError as error:
            assert str(original) in str(error)
        else:
            assert same(read, right)
    finally:
        file.write_bytes(content)
