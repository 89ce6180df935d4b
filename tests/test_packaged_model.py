"""``amlora convert``: a GGUF file becomes a base model that a run takes, or one line says why not."""

from __future__ import annotations

from pathlib import Path

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
    code, told = amlora("convert", file, folder)
    assert code == 0, told
    assert "as coarse as own-F32.gguf has them" in told and f"model.source={folder}" in told
    before, after = (AutoModelForCausalLM.from_pretrained(one).state_dict() for one in (base.path, folder))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert resolve_base(ModelSettings(source=str(folder)), tmp_path).digest
    assert [one.name for one in folder.parent.iterdir()] == ["own"], "nothing half-written is left"
    code, told = amlora("convert", file, folder)
    assert code == 2 and "exists" in told, "a folder is never written over"


def test_what_cannot_be_converted_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    code, told = amlora("convert", tmp_path / "none.gguf", tmp_path / "out")
    assert code == 2 and "no such file; give a GGUF file" in " ".join(told.split())
    (tmp_path / "weights.gguf").write_bytes(b"PK\x03\x04 a zip")
    code, told = amlora("convert", tmp_path / "weights.gguf", tmp_path / "out")
    assert code == 2 and "expected b'GGUF'" in told
    (tmp_path / "big-00001-of-00003.gguf").write_bytes(b"GGUF")
    code, told = amlora("convert", tmp_path / "big-00001-of-00003.gguf", tmp_path / "out")
    assert code == 2 and "found part 1 of 3" in told
    (tmp_path / "short.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    code, told = amlora("convert", tmp_path / "short.gguf", tmp_path / "out")
    assert code == 2 and "transformers cannot make a model of it" in told
    assert not (tmp_path / "out").exists()
    assert not [one for one in tmp_path.iterdir() if one.name.startswith(".")]
