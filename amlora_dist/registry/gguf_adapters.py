"""LoRA adapters as GGUF files, as llama.cpp reads them: ``general.type`` is ``adapter``, tensors ``NAME.weight.lora_a`` and
``NAME.weight.lora_b``.

llama.cpp adds ``scale * alpha / r * B A x`` to a layer, ``scale`` being the request's. Tensors are called as those of the
base model are in GGUF. For Llama's family llama.cpp's converter permutes the rows of the query and key weights, because it
rotates pairs of neighbours where transformers rotates halves; the rows of B are permuted with them (its
``convert_hf_to_gguf.py``,
``LlamaModel.permute``, and ``convert_lora_to_gguf.py``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from amlora_dist.adapters.adapter import Adapter
from amlora_dist.errors import UserError
from amlora_dist.files import rename_synced

if TYPE_CHECKING:
    from amlora_dist.base_model import BaseModel

ARCHITECTURES = {
    "llama": ("llama", True), "mistral": ("llama", True), "qwen2": ("qwen2", False), "qwen3": ("qwen3", False),
    "gemma": ("gemma", False), "gemma2": ("gemma2", False),
}  # fmt: skip
"""transformers' ``model_type`` -> llama.cpp's architecture, and whether query and key are permuted there."""
FP16_LARGEST = 65504.0


def check_architecture(base: BaseModel) -> None:
    """Refuse a base model whose tensors are not known in GGUF.

    Raises:
        UserError: names the architecture and those that are known.
    """
    if base.model_type not in ARCHITECTURES:
        raise UserError(
            f"--format gguf: found a base model of type {base.model_type!r}, expected one of {', '.join(ARCHITECTURES)};"
            " for others export peft and take llama.cpp's convert_lora_to_gguf.py"
        )


def write_gguf(file: Path, adapter: Adapter, base: BaseModel) -> None:
    """Write an adapter without a recipe, in fp16, under another name; read it back, then rename.

    Raises:
        UserError: a layer that has no name in GGUF, a value that fp16 cannot hold, or a disk that gives back others.
    """
    import gguf

    names, heads = _names(base, list(adapter.a)), _Heads.of(base)
    halves: dict[str, Tensor] = {}
    for module, a in adapter.a.items():
        halves[f"{names[module]}.lora_a"] = _half(a, module)
        halves[f"{names[module]}.lora_b"] = _half(heads.permuted(module, adapter.b[module]), module)
    file.parent.mkdir(parents=True, exist_ok=True)
    tmp = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        writer = gguf.GGUFWriter(str(tmp), ARCHITECTURES[base.model_type][0])
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_name(adapter.task)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(adapter.alpha))
        for name, tensor in halves.items():
            writer.add_tensor(name, tensor.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        found = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in gguf.GGUFReader(str(tmp)).tensors}
        if found.keys() != halves.keys() or any(not torch.equal(found[name], halves[name]) for name in halves):
            raise UserError(f"{file}: reads back differently than it was written; check the disk")
        rename_synced(tmp, file)
    finally:
        tmp.unlink(missing_ok=True)


def read_gguf(file: Path, base: BaseModel, modules: Sequence[str]) -> Adapter:
    """Read back what ``write_gguf`` wrote, with the layers called as transformers calls them, in fp32.

    Args:
        file: the LoRA.
        base: its base model.
        modules: the layers that it may adapt.

    Raises:
        UserError: the file is no LoRA of this base model's architecture, or adapts other layers.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(str(file))
    except (ValueError, IndexError, KeyError, OSError) as error:  # gguf has no error of its own
        raise UserError(f"{file}: no whole GGUF file ({error}); was the disk full when it was written?") from error
    fields = {key: field.contents() for key, field in reader.fields.items()}
    architecture = ARCHITECTURES[base.model_type][0]
    if fields.get(gguf.Keys.Adapter.TYPE) != "lora" or fields.get("general.architecture") != architecture:
        raise UserError(f"{file}: found no LoRA of architecture {architecture!r}")
    there = {tensor.name: torch.from_numpy(tensor.data.copy()).float() for tensor in reader.tensors}
    heads = _Heads.of(base)
    a: dict[str, Tensor] = {}
    b: dict[str, Tensor] = {}
    for module, name in _names(base, modules).items():
        if f"{name}.lora_a" in there:
            a[module] = there.pop(f"{name}.lora_a")
            b[module] = heads.restored(module, there.pop(f"{name}.lora_b"))
    if there or not a:
        raise UserError(f"{file}: found {next(iter(there), 'no tensors')}, expected pairs of the layers that a bank adapts")
    rank = len(next(iter(a.values())))
    return Adapter(str(fields["general.name"]), rank, float(fields[gguf.Keys.Adapter.LORA_ALPHA]), a, b)


@dataclass(frozen=True, slots=True)
class _Heads:
    """How many query and key heads a model has, where llama.cpp permutes their rows; 0 where it does not."""

    query: int
    key: int

    @classmethod
    def of(cls, base: BaseModel) -> _Heads:
        if not ARCHITECTURES[base.model_type][1]:
            return cls(0, 0)
        config = _config(base)
        query = int(config["num_attention_heads"])
        return cls(query, int(config.get("num_key_value_heads") or query))

    def permuted(self, module: str, b: Tensor) -> Tensor:
        """B (d_out, r) with its rows in llama.cpp's order."""
        if not (heads := self._count(module)):
            return b
        return b.reshape(heads, 2, len(b) // heads // 2, -1).swapaxes(1, 2).reshape(b.shape)

    def restored(self, module: str, b: Tensor) -> Tensor:
        """The inverse of ``permuted``."""
        if not (heads := self._count(module)):
            return b
        return b.reshape(heads, len(b) // heads // 2, 2, -1).swapaxes(1, 2).reshape(b.shape)

    def _count(self, module: str) -> int:
        last = module.rpartition(".")[2]
        return self.query if last == "q_proj" else self.key if last == "k_proj" else 0


def _names(base: BaseModel, modules: Sequence[str]) -> dict[str, str]:
    """GGUF's name of each layer's weight."""
    import gguf

    architecture = ARCHITECTURES[base.model_type][0]
    number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    table = gguf.get_tensor_name_map(number, int(_config(base)["num_hidden_layers"]))
    found: dict[str, str] = {}
    for module in modules:
        name = table.get_name(f"{module}.weight", try_suffixes=(".weight",))
        if name is None:
            raise UserError(f"--format gguf: layer {module!r} has no name in llama.cpp's {architecture!r}; export peft")
        found[module] = str(name)
    return found


def _config(base: BaseModel) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((base.path / "config.json").read_text(encoding="utf-8"))
    return config


def _half(tensor: Tensor, module: str) -> Tensor:
    if (largest := float(tensor.abs().max())) > FP16_LARGEST:
        raise UserError(f"--format gguf: layer {module!r} has a value of {largest:g}, more than fp16 holds")
    return tensor.detach().half().contiguous()
