from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amlora_dist.errors import BankError
from amlora_dist.methods import METHODS, MethodEntry
from amlora_dist.registry.card import readme
from amlora_dist.registry.manifest import (
    AccuracyMatrix,
    Manifest,
    adapter_folder,
    check_relative_path,
    parse_manifest,
    read_manifest,
    replace,
)
from tests.registry.tiny_banks import tiny_bank


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return tiny_bank(tmp_path_factory.mktemp("manifest") / "bank")


def test_text_reads_back_as_the_same_manifest(manifest: Manifest) -> None:
    again = parse_manifest(manifest.to_json())
    assert again == manifest
    assert again.digest() == manifest.digest()
    assert again.tasks == ["helpdesk/email", "agnews", "yahoo"]


def test_shared_targets_are_written_once(manifest: Manifest) -> None:
    written = json.loads(manifest.to_json())
    assert written["target_modules"] == manifest.targets
    assert [line["targets"] for line in written["adapters"]] == ["all"] * 3


def test_a_slash_in_a_task_is_no_folder() -> None:
    assert adapter_folder(1, "helpdesk/email") == "adapters/1-helpdesk-email"
    assert adapter_folder(2, "helpdesk-email") == "adapters/2-helpdesk-email"


def test_parent_digest_does_not_know_where_adapters_are_stored(manifest: Manifest) -> None:
    other = replace(manifest, epoch=9, run_id="another", accuracy_matrix=AccuracyMatrix())
    assert other.parent_digest() == manifest.parent_digest()
    assert other.digest() != manifest.digest()


def _set(*path: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return change


STORED = {"version_of": "x", "run": "0" * 32, "artifact_path": "bank/adapters/1"}
HOSTILE: list[tuple[str, Callable[[dict[str, Any]], None]]] = [
    ("schema_version", _set("schema_version", value=3)),
    ("files", _set("schema_version", value=1)),
    ("files", _set("files", value=None)),
    ("files.MLmodel.sha256", _set("files", "MLmodel", "sha256", value="zz")),
    ("files.MLmodel.size", _set("files", "MLmodel", "size", value=-1)),
    ("digest", _set("files", "MLmodel", "size", value=7)),
    ("schema_version", _set("schema_version", value="1")),
    ("schema_version", _set("schema_version", value=True)),
    ("digest", _set("digest", value="0" * 64)),
    ("digest", _set("digest", value=None)),
    ("digest", _set("stage", value=7)),
    ("surprise", _set("surprise", value=1)),
    ("base.digest", _set("base", "digest", value="not a digest")),
    ("adapters.0.digest", _set("adapters", 0, "digest", value="A" * 64)),
    ("adapters.0.digest", _set("adapters", 0, "digest", value="a" * 63)),
    ("adapters.0.rank", _set("adapters", 0, "rank", value=0)),
    ("adapters.0.rank", _set("adapters", 0, "rank", value="2")),
    ("adapters.0.rank", _set("adapters", 0, "rank", value=1e30)),
    ("adapters.0.alpha", _set("adapters", 0, "alpha", value=-1.0)),
    ("adapters.0.targets", _set("adapters", 0, "targets", value=[])),
    ("adapters.0.targets", _set("adapters", 0, "targets", value=["a", "../b"])),
    ("adapters.0.targets", _set("adapters", 0, "targets", value="everything")),
    ("adapters.0.task", _set("adapters", 0, "task", value="../../etc")),
    ("adapters.0.task", _set("adapters", 0, "task", value="a//b")),
    ("adapters.0.task", _set("adapters", 0, "task", value="a/../b")),
    ("adapters.0.task", _set("adapters", 0, "task", value="a\\b")),
    ("adapters.0.task", _set("adapters", 0, "task", value="a\nb")),
    ("adapters.0.task", _set("adapters", 0, "task", value="")),
    ("adapters.0.task", _set("adapters", 0, "task", value="x" * 200)),
    ("numbered 1, 2, 3", _set("adapters", 0, "index", value=2)),
    ("each task once", _set("adapters", 0, "task", value="agnews")),
    ("stored.artifact_path", _set("adapters", 0, "stored", value={**STORED, "artifact_path": "../x"})),
    ("stored.artifact_path", _set("adapters", 0, "stored", value={**STORED, "artifact_path": "/etc/passwd"})),
    ("stored.artifact_path", _set("adapters", 0, "stored", value={**STORED, "artifact_path": "a\\..\\b"})),
    ("stored.artifact_path", _set("adapters", 0, "stored", value={**STORED, "artifact_path": "s3://bucket/x"})),
    ("stored.run", _set("adapters", 0, "stored", value={**STORED, "run": "../../runs"})),
    ("stored.version_of", _set("adapters", 0, "stored", value={**STORED, "version_of": "a/b"})),
    ("router.file", _set("router", "file", value="../router.safetensors")),
    ("router.kind", _set("router", "kind", value="__import__('os')")),
    ("statistics.0.digest", _set("statistics", 0, "digest", value="zz")),
    ("accuracy_matrix", _set("accuracy_matrix", "accuracy", value=[[0.5]])),
    ("adapters", _set("adapters", value="none")),
    ("adapters", _set("adapters", value=[None])),
]


@pytest.mark.parametrize(("named", "change"), HOSTILE, ids=[f"{i}-{name}" for i, (name, _) in enumerate(HOSTILE)])
def test_a_changed_manifest_is_refused_and_the_message_names_the_key(
    manifest: Manifest, named: str, change: Callable[[dict[str, Any]], None]
) -> None:
    data = json.loads(manifest.to_json())
    change(data)
    with pytest.raises(BankError) as caught:
        parse_manifest(json.dumps(data), "somewhere/manifest.json")
    assert "somewhere/manifest.json" in str(caught.value)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '"x"', "{}", '{"schema_version": 1}', "[" * 100_000, '{"schema_version": NaN}']
)
def test_what_is_no_manifest_is_refused(text: str) -> None:
    with pytest.raises(BankError):
        parse_manifest(text)


def test_not_a_number_never_reads(manifest: Manifest) -> None:
    text = manifest.to_json().replace('"temperature": 1.5', '"temperature": Infinity')
    assert "Infinity" in text
    with pytest.raises(BankError, match="not a number"):
        parse_manifest(text)


def test_a_folder_without_manifest_and_a_link_to_one_are_refused(tmp_path: Path, manifest: Manifest) -> None:
    with pytest.raises(BankError, match="no such folder"):
        read_manifest(tmp_path / "nowhere")
    with pytest.raises(BankError, match="missing"):
        read_manifest(tmp_path)
    (tmp_path / "real.json").write_text(manifest.to_json())
    (tmp_path / "bank").mkdir()
    (tmp_path / "bank" / "manifest.json").symlink_to(tmp_path / "real.json")
    with pytest.raises(BankError, match="plain file"):
        read_manifest(tmp_path / "bank")
    (tmp_path / "manifest.json").write_bytes(b"\xff\xfe")
    with pytest.raises(BankError, match="UTF-8"):
        read_manifest(tmp_path)


@given(st.text(alphabet="ab./\\:~- \n\x00\x7f\u00e9", max_size=20))  # of all characters it would first make a table
def test_an_accepted_path_stays_below_its_root(path: str) -> None:
    try:
        check_relative_path(path)
    except ValueError:
        return
    root = Path("/root-of-all")
    assert (root / path).resolve().is_relative_to(root)
    assert not Path(path).is_absolute()


def test_scores_must_fit_their_tasks() -> None:
    with pytest.raises(ValueError, match="one for each task"):
        AccuracyMatrix(tasks=["a"], accuracy=[[0.1, 0.2]])


def test_a_key_that_is_there_twice_is_refused_whatever_its_values(manifest: Manifest) -> None:
    """The digest is of the last value; another reader of JSON may take the first."""
    text = manifest.to_json()
    for doubled in (text.replace("{", '{"method": "other",', 1), text.replace('"rank"', '"rank": 99, "rank"', 1)):
        assert doubled != text
        with pytest.raises(BankError, match=r"not JSON \(found the key '(method|rank)' twice\)"):
            parse_manifest(doubled)


def test_the_card_tells_of_a_memory_where_the_method_offers_one(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "mine", MethodEntry("nowhere:Mine", offers=frozenset({"memory"})))
    asked = manifest.training_configuration | {"method_settings": {"memory_rows": 8}}
    found = {
        method: "a memory of at most 8 rows" in readme(replace(manifest, method=method, training_configuration=asked))
        for method in ("am_lora", "replay", "mine", "not_known_here")
    }
    assert found == {"am_lora": True, "replay": False, "mine": True, "not_known_here": False}
