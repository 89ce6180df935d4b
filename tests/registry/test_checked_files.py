"""What is checked is what is run: whatever a loader of any kind reads of a version was published so, or it is refused."""

from __future__ import annotations

import shutil
import tracemalloc
from pathlib import Path

import pytest

from amlora_dist.errors import BankError
from amlora_dist.registry.manifest import (
    MAX_BYTES,
    AdapterEntry,
    BaseEntry,
    FileEntry,
    Manifest,
    RouterEntry,
    Stored,
    parse_manifest,
)
from amlora_dist.registry.store import Store
from amlora_dist.tasks.task_entry import TaskEntry
from pipelines.cli.bank_output import verify_bank
from tests.registry.tiny_banks import TASKS, fingerprint, publish_sequence


@pytest.fixture
def folder(tmp_path: Path, amlora_home: Path, empty_home: Path) -> Path:
    """The folder of a published version in the store."""
    shutil.copytree(empty_home, amlora_home)
    (tmp_path / "work").mkdir()
    (version,) = publish_sequence(Store.open(amlora_home), "banks", tmp_path / "work", tasks=TASKS[:1])
    return amlora_home / "artifacts" / "banks" / version.run / "artifacts" / version.artifact_path


@pytest.mark.integration
def test_mlmodel_swapped(folder: Path, tmp_path: Path, amlora_home: Path) -> None:
    """In the store itself, where MLflow's own loader would run what it names before any code of ours."""
    assert "good" in verify_bank("models:/banks@current", None)
    text = (folder / "MLmodel").read_text(encoding="utf-8")
    evil = text.replace("amlora_dist.registry.pyfunc", "amlora_dist.registry.pyfunk")
    for swapped in (evil, evil.replace("    config:", "    code: code\n    config:")):
        (folder / "MLmodel").write_text(swapped, encoding="utf-8")
        with pytest.raises(BankError, match=r"MLmodel: (sha256: )?found .*, the manifest has"):
            verify_bank("models:/banks@current", None)
        with pytest.raises(BankError, match="MLmodel"):
            Store.open(amlora_home).pull("models:/banks@current", tmp_path / "pulled")
        assert not (tmp_path / "pulled").exists()
    (folder / "MLmodel").write_text(text, encoding="utf-8")
    for name in ("code/evil.py", "conda.yaml", "requirements.txt", "adapters/1-helpdesk-email/x.pkl"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x", encoding="utf-8")
        with pytest.raises(BankError, match=rf"{name}: found a file that the manifest does not name"):
            verify_bank("models:/banks@current", None)
        (folder / name).unlink()
    (folder / "registered_model_meta").write_text("model_name: x", encoding="utf-8")
    assert "good" in verify_bank("models:/banks@current", None)


@pytest.mark.integration
@pytest.mark.parametrize(
    "name",
    ["router.safetensors", "adapters/1-helpdesk-email/adapter_model.safetensors", "statistics/1-helpdesk-email.safetensors"],
)
def test_a_file_that_grew_is_refused_before_it_is_fetched(
    name: str, folder: Path, tmp_path: Path, amlora_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (folder / name).open("ab") as file:
        file.truncate(1 << 30)  # a gigabyte that is not there
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

    fetched: list[str] = []
    fetch = LocalArtifactRepository.download_artifacts

    def watched(self: LocalArtifactRepository, artifact_path: str, dst_path: str | None = None) -> str:
        fetched.append(artifact_path)
        return str(fetch(self, artifact_path, dst_path))

    monkeypatch.setattr(LocalArtifactRepository, "download_artifacts", watched)
    with pytest.raises(BankError, match=rf"{name}.*: found {1 << 30} bytes"):
        Store.open(amlora_home).pull("models:/banks@current", tmp_path / "pulled")
    assert fetched and not [path for path in fetched if path.endswith(name)]


@pytest.mark.integration
def test_a_manifest_beyond_all_bounds_is_not_fetched(folder: Path, tmp_path: Path, amlora_home: Path) -> None:
    with (folder / "manifest.json").open("ab") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(BankError, match=rf"manifest.json of run .*: found {MAX_BYTES + 1} bytes.*at most {MAX_BYTES}"):
        Store.open(amlora_home).pull("models:/banks@current", tmp_path / "pulled")


@pytest.mark.integration
def test_thousands_of_adapters_share_one_list_of_modules_in_bounded_memory() -> None:
    count = 4000
    names = ("q", "k", "v", "o", "up", "down")
    modules = sorted(f"model.layers.{layer}.{name}_proj" for layer in range(32) for name in names)
    some = fingerprint("x")
    spec = TaskEntry(template="{{ text }}\nAnswer:" * 4, labels=["yes", "no"])
    stored = {"version_of": "m", "run": "f" * 32}
    manifest = Manifest(
        base=BaseEntry(source="base", digest=some, architecture="llama"),
        bank_template="{{ text }}",
        method="am_lora",
        adapters=[
            AdapterEntry(
                index=k, task=f"t{k}", rank=8, alpha=8.0, targets=modules, digest=some, training_fingerprint=some,
                stored=Stored(**stored, artifact_path=f"bank-e1/adapters/{k}-t{k}"), task_spec=spec,
            )
            for k in range(1, count + 1)
        ],
        router=RouterEntry(kind="posterior", settings={}, digest=some),
        files={f"adapters/{k}-t{k}/recipe.safetensors": FileEntry(sha256=some, size=8) for k in range(1, count + 1)},
    )  # fmt: skip
    text = manifest.to_json()
    assert len(text) < MAX_BYTES
    tracemalloc.start()
    try:
        read = parse_manifest(text)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert read == manifest and read.digest() == manifest.digest()
    assert len({id(line.targets) for line in read.adapters}) == 1
    assert peak < 12 * len(text), f"{peak} bytes for {len(text)} of text"
