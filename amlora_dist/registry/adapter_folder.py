"""One adapter as a folder in PEFT's own format, with our recipe and selector in a second file next to it.

Tensor names are PEFT's, without an adapter name: ``base_model.model.<module>.lora_A.weight``. The configuration
follows from the bank's manifest, and is compared with it when it is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amlora_dist.errors import BankError
from amlora_dist.methods import LORA
from amlora_dist.registry.bank_files import ADAPTER_CONFIG, ADAPTER_MODEL, ADAPTER_RECIPE
from amlora_dist.registry.manifest import AdapterEntry, Manifest
from amlora_dist.registry.tensor_files import read_tensors, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from amlora_dist.adapters.adapter import Adapter

MODEL_FILE, CONFIG_FILE, RECIPE_FILE = ADAPTER_MODEL, ADAPTER_CONFIG, ADAPTER_RECIPE
ADAPTER_FILES = (MODEL_FILE, RECIPE_FILE)
"""The files of an adapter that MLflow stores; its configuration follows from the manifest."""

_PEFT = "base_model.model."


def write_adapter(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the two tensor files of an adapter, given ``Adapter.tensors``."""
    pairs = {name: tensor for name, tensor in tensors.items() if name.startswith(("a.", "b."))}
    peft = {f"{_PEFT}{name[2:]}.lora_{name[0].upper()}.weight": tensor for name, tensor in pairs.items()}
    write_tensors(folder / MODEL_FILE, peft)
    write_tensors(folder / RECIPE_FILE, {name: tensor for name, tensor in tensors.items() if name not in pairs})


def read_adapter(folder: Path, manifest: Manifest, line: AdapterEntry) -> Adapter:
    """Read one adapter of a bank, as ``read_parts``, and compare its configuration with the manifest."""
    home = folder / line.folder
    if not (home / MODEL_FILE).exists() and line.stored is not None:
        where = f"run {line.stored.run}, {line.stored.artifact_path}"
        raise BankError(
            f"{home}: adapter {line.index} ({line.task}) is not in this folder, it is stored once in MLflow ({where}); "
            "make a self-contained folder with: amlora pull"
        )
    _check_config(home / CONFIG_FILE, peft_config(manifest, line))
    return read_parts(home, line)


def read_parts(folder: Path, line: AdapterEntry) -> Adapter:
    """Read the two tensor files of an adapter and compare names, shapes, dtypes, values and digest with its entry."""
    from amlora_dist.adapters.adapter import Adapter

    a, b = _read_pairs(folder / MODEL_FILE, line)
    rest = _read_rest(folder / RECIPE_FILE, line)
    adapter = Adapter(line.task, line.rank, line.alpha, a, b, **rest)
    check_digest(folder, adapter.digest(), line.digest)
    return adapter


def peft_config(manifest: Manifest, line: AdapterEntry) -> dict[str, Any]:
    """PEFT's ``adapter_config.json`` of one adapter; of what is no LoRA one that PEFT refuses."""
    return {
        "peft_type": "LORA" if manifest.form == LORA else f"AMLORA_{manifest.form.upper()}",
        "task_type": "SEQ_2_SEQ_LM" if manifest.base.encoder_decoder else "CAUSAL_LM",
        "base_model_name_or_path": manifest.base.source,
        "revision": manifest.base.revision,
        "r": line.rank,
        "lora_alpha": int(line.alpha) if line.alpha.is_integer() else line.alpha,
        "target_modules": sorted(line.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": manifest.fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }


def _check_config(file: Path, expected: dict[str, Any]) -> None:
    if not file.is_file():
        raise BankError(f"{file}: missing; fetch the bank again (amlora pull)")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BankError(f"{file}: not JSON ({error}); fetch the bank again") from error
    if not isinstance(found, dict):
        raise BankError(f"{file}: holds no JSON object; fetch the bank again")
    for key in sorted(expected.keys() | found.keys()):
        if (
            key not in expected
            or key not in found
            or found[key] != expected[key]
            or type(found[key]) is not type(expected[key])
        ):
            raise BankError(
                f"{file}: {key}: found {str(found.get(key, 'nothing'))[:120]}, the manifest says "
                f"{str(expected.get(key, 'nothing'))[:120]}; fetch the bank again"
            )


def _read_pairs(file: Path, line: AdapterEntry) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A (rank, d_in) and B (d_out, rank) by module."""
    tensors = read_tensors(file)
    expected = {f"{_PEFT}{module}.lora_{letter}.weight" for module in line.targets for letter in "AB"}
    _check_names(file, set(tensors), expected)
    if len(kinds := {str(tensor.dtype) for tensor in tensors.values()}) != 1 or "int" in kinds.pop():
        raise BankError(f"{file}: dtype: expected one floating-point dtype for all tensors; fetch the bank again")
    a: dict[str, Tensor] = {}
    b: dict[str, Tensor] = {}
    for module in line.targets:
        a[module] = tensors[f"{_PEFT}{module}.lora_A.weight"]
        b[module] = tensors[f"{_PEFT}{module}.lora_B.weight"]
        for name, tensor, axis in (("lora_A", a[module], 0), ("lora_B", b[module], 1)):
            if tensor.dim() != 2 or tensor.shape[axis] != line.rank or not tensor.numel():
                wanted = f"({line.rank}, d_in)" if axis == 0 else f"(d_out, {line.rank})"
                raise BankError(
                    f"{file}: {module}.{name}: found shape {tuple(tensor.shape)}, expected {wanted}; an empty tensor "
                    "means that it was saved without gathering (ZeRO-3)"
                )
    return a, b


def _read_rest(file: Path, line: AdapterEntry) -> dict[str, dict[str, Tensor]]:
    """Recipe (index - 1,) and refitted rows of earlier tasks (index - 1, index) by module, and the selectors' dense
    layers."""
    tensors = read_tensors(file)
    found: dict[str, dict[str, Tensor]] = {"recipe": {}, "refitted": {}, "selector": {}}
    weights = {
        "recipe": ((line.index - 1,), "one weight for each earlier adapter"),
        "refitted": ((line.index - 1, line.index), "a row for each earlier task"),
    }
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        module = rest.rpartition(".")[0] if kind == "selector" else rest
        if kind not in found or module not in line.targets:
            raise BankError(f"{file}: {name}: found a tensor for no adapted module; fetch the bank again")
        if kind in weights and (tensor.shape != weights[kind][0] or str(tensor.dtype) != "torch.float32"):
            shape, what = weights[kind]
            raise BankError(
                f"{file}: {name}: found {tensor.dtype} of shape {tuple(tensor.shape)}, expected torch.float32 of shape "
                f"{shape}, {what}"
            )
        found[kind][rest] = tensor
    return found


def _check_names(file: Path, found: set[str], expected: set[str]) -> None:
    if missing := sorted(expected - found):
        raise BankError(f"{file}: {len(missing)} tensors missing, the first is {missing[0]}; fetch the bank again")
    if extra := sorted(found - expected):
        raise BankError(f"{file}: {len(extra)} tensors for no adapted module, the first is {extra[0]}")


def check_digest(path: Path, found: str, expected: str) -> None:
    if found != expected:
        raise BankError(f"{path}: digest: found {found}, the manifest has {expected}; fetch the bank again")
