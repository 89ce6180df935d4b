"""``amlora convert``: a GGUF file becomes a base model that a run takes, or one line says why not."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from amlora_dist.base_model import ModelSettings, resolve_base
from pipelines.cli.main import app
from tests.registry.base_gguf import write_base_gguf
from tests.tiny_config import write_model


def amlora(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(one) for one in arguments])
    return done.exit_code, done.output


def test_a_gguf_file_becomes_a_folder_that_a_run_takes(tmp_path: Path) -> None:
    base = resolve_base(ModelSettings(source=str(write_model(tmp_path / "tiny", "llama"))), tmp_path)
    file, folder = tmp_path / "own-F32.gguf", tmp_path / "made" / "own"
    write_base_gguf(file, base)
    code, shown = amlora("convert", file, folder)
    assert code == 0, shown
    assert "as coarse as own-F32.gguf has them" in shown and f"model.source={folder}" in shown
    before, after = (AutoModelForCausalLM.from_pretrained(one).state_dict() for one in (base.path, folder))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert resolve_base(ModelSettings(source=str(folder)), tmp_path).digest
    assert [one.name for one in folder.parent.iterdir()] == ["own"], "nothing half-written is left"
    code, shown = amlora("convert", file, folder)
    assert code == 2 and "exists" in shown, "a folder is never written over"


def test_what_cannot_be_converted_is_reported_and_leaves_nothing(tmp_path: Path) -> None:
    code, shown = amlora("convert", tmp_path / "none.gguf", tmp_path / "out")
    assert code == 2 and "no such file; give a GGUF file" in " ".join(shown.split())
    (tmp_path / "weights.gguf").write_bytes(b"PK\x03\x04 a zip")
    code, shown = amlora("convert", tmp_path / "weights.gguf", tmp_path / "out")
    assert code == 2 and "expected b'GGUF'" in shown
    (tmp_path / "big-00001-of-00003.gguf").write_bytes(b"GGUF")
    code, shown = amlora("convert", tmp_path / "big-00001-of-00003.gguf", tmp_path / "out")
    assert code == 2 and "found part 1 of 3" in shown
    (tmp_path / "short.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    code, shown = amlora("convert", tmp_path / "short.gguf", tmp_path / "out")
    assert code == 2 and "transformers cannot make a model of it" in shown
    assert not (tmp_path / "out").exists()
    assert not [one for one in tmp_path.iterdir() if one.name.startswith(".")]


def test_weights_that_a_file_lacks_are_not_drawn_at_random(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = resolve_base(ModelSettings(source=str(write_model(tmp_path / "tiny", "llama"))), tmp_path)
    add = gguf.GGUFWriter.add_tensor

    def all_but_one(writer: gguf.GGUFWriter, name: str, *rest: object) -> None:
        if name != "blk.0.ffn_down.weight":
            add(writer, name, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "add_tensor", all_but_one)
        write_base_gguf(tmp_path / "lacking.gguf", base)
    code, shown = amlora("convert", tmp_path / "lacking.gguf", tmp_path / "out")
    assert code == 2, shown
    line = " ".join(shown.split())
    assert "lacking.gguf: found no weights for 1 of the" in line and "first model.layers.0.mlp.down_proj.weight;" in line
    assert not (tmp_path / "out").exists() and not [one for one in tmp_path.iterdir() if one.name.startswith(".")]


def test_a_folder_that_cannot_be_made_is_reported_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("amlora_dist.packaged_model._convert", lambda *_: pytest.fail("the model was read"))
    (tmp_path / "own.gguf").write_bytes(b"GGUF")
    (tmp_path / "file").touch()
    code, shown = amlora("convert", tmp_path / "own.gguf", tmp_path / "file" / "out")
    assert code == 2 and "give the name of a folder that can be made" in " ".join(shown.split())
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    code, shown = amlora("convert", tmp_path / "own.gguf", tmp_path / "link")
    assert code == 2 and "exists" in shown


def test_a_folder_that_somebody_else_makes_meanwhile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = resolve_base(ModelSettings(source=str(write_model(tmp_path / "tiny", "llama"))), tmp_path)
    write_base_gguf(tmp_path / "own.gguf", base)

    def digest(file: Path) -> str:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "notes").touch()
        return ""

    monkeypatch.setattr("amlora_dist.packaged_model.file_digest", digest)
    code, shown = amlora("convert", tmp_path / "own.gguf", tmp_path / "out")
    assert code == 2 and "out exists; give the name" in " ".join(shown.split())
    assert [one.name for one in (tmp_path / "out").iterdir()] == ["notes"]
    assert not [one for one in tmp_path.iterdir() if one.name.startswith(".")]
