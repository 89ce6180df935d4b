"""The digest of a base model covers what transformers reads of its folder, wherever it lies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from amlora_dist.base_model import ModelSettings, folder_digest, resolve_base
from amlora_dist.errors import UserError
from amlora_dist.inference.loading import resolve_bank_base
from amlora_dist.registry.manifest import BaseEntry
from tests.tiny_config import write_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", "llama")


def test_a_default_chat_template_in_a_folder_of_its_own_is_covered(model: Path, tmp_path: Path) -> None:
    digests = {folder_digest(model, tmp_path)}
    for template in ("first", "second one"):
        file = model / "additional_chat_templates" / "default.jinja"
        file.parent.mkdir(exist_ok=True)
        file.write_text(template)
        assert AutoTokenizer.from_pretrained(model).chat_template == template, "it is what transformers takes"
        digests.add(folder_digest(model, tmp_path))
    assert len(digests) == 3
    (model / "additional_chat_templates" / "rag.jinja").write_text("nobody asks for it")
    assert folder_digest(model, tmp_path) in digests


@pytest.mark.parametrize("name", ["source.spm", "bpe.codes", "tokenizer.model.v3"])
def test_vocabularies_with_other_endings_are_covered_where_they_are_read(model: Path, tmp_path: Path, name: str) -> None:
    before = folder_digest(model, tmp_path)
    (model / name).write_bytes(b"a vocabulary")
    assert folder_digest(model, tmp_path) == before, "transformers takes tokenizer.json"
    (model / "tokenizer.json").unlink()
    without = folder_digest(model, tmp_path)
    (model / name).write_bytes(b"another vocabulary")
    assert folder_digest(model, tmp_path) != without
    assert folder_digest(model, tmp_path, as_before=True) == folder_digest(model, tmp_path, as_before=True) != without


def test_a_bank_of_before_finds_its_base_by_the_digest_of_then(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AMLORA_HOME", str(tmp_path / "home"))
    file = model / "additional_chat_templates" / "default.jinja"
    file.parent.mkdir()
    file.write_text("a template")
    found = resolve_base(ModelSettings(source=str(model)), tmp_path / "home")
    then = folder_digest(model, tmp_path / "home", as_before=True)
    assert then != found.digest
    entry = BaseEntry(source=str(model), digest=found.digest, architecture="llama")
    assert resolve_bank_base(replace(entry, digest=then), None).path == found.path
    with pytest.raises(UserError, match="digest: found"):
        resolve_bank_base(replace(entry, digest="0" * 64), None)
