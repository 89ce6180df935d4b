"""safetensors files of a bank: renamed into place, read with every check, errors that name file and tensor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from amlora_dist.errors import BankError
from amlora_dist.files import write_bytes

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = {"F64", "F32", "F16", "BF16", "I64"}
"""What a bank may hold; anything else is damage or not ours."""


def write_text(file: Path, text: str) -> None:
    """Write UTF-8 text under another name, then rename."""
    write_bytes(file, text.encode())


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors by name; views are copied, so that no two names share storage."""
    from safetensors.torch import save

    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_bytes(file, save(copies, metadata={"format": "pt"}))


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Read every tensor of a file.

    Raises:
        BankError: missing, empty, truncated or otherwise no safetensors file; a dtype a bank never holds; NaN or
            infinity in a tensor.
    """
    if not file.is_file():
        raise BankError(f"{file}: missing; fetch the bank again (amlora pull)")
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a mapping)
                dtype = opened.get_slice(name).get_dtype()
                if dtype not in DTYPES:
                    raise BankError(
                        f"{file}: {name}: dtype: found {dtype}, expected one of {', '.join(sorted(DTYPES))}"
                    )
                tensors[name] = opened.get_tensor(name)
    except (SafetensorError, OSError, ValueError) as error:
        raise BankError(
            f"{file}: found {file.stat().st_size} bytes, expected a whole safetensors file; fetch the bank again"
        ) from error
    for name, tensor in tensors.items():
        check_finite(file, name, tensor)
    return tensors


def check_finite(file: Path | str, name: str, tensor: Tensor) -> None:
    """Refuse NaN and infinity."""
    import torch

    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        count = int((~torch.isfinite(tensor)).sum())
        raise BankError(
            f"{file}: {name}: found NaN or infinity in {count} of {tensor.numel()} values, expected finite values; "
            "training has diverged (lower training.learning_rate), or the file is damaged (fetch the bank again)"
        )
