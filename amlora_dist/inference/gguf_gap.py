"""How far a GGUF export is from its bank: base model + scaled LoRAs, computed from the files' own tensors."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from amlora_dist.base_model import load_model
from amlora_dist.registry.exports import gap_between
from amlora_dist.registry.gguf_adapters import read_gguf

if TYPE_CHECKING:
    from amlora_dist.adapters.adapter import Adapter
    from amlora_dist.inference.model import AMLoRAModel


@torch.no_grad()
def gguf_gap(model: AMLoRAModel, folder: Path, texts: Sequence[str]) -> dict[str, float]:
    """What llama.cpp would compute of each text's prompt, were it transformers, against the bank's mixture; first tokens.

    Args:
        model: the bank that was exported.
        folder: of the export.
        texts: plain texts.
    """
    files = json.loads((folder / "routing.json").read_text(encoding="utf-8"))["adapters"]
    modules = model.bank.manifest.targets
    adapters = {task: read_gguf(folder / file, model.base, modules) for task, file in files.items()}
    plain = load_model(model.base, dtype=next(model.transformer.parameters()).dtype).to(model.device)
    found = []
    for prompt in model.prompts(texts):
        ids_BL = torch.tensor([prompt.tokens], device=model.device)
        with _scaled(plain, adapters, prompt.route.tasks):
            found.append(plain(input_ids=ids_BL).logits[:, -1].float().cpu())
    return gap_between(model.next_token_logits(texts), torch.cat(found))


@contextlib.contextmanager
def _scaled(plain: Any, adapters: dict[str, Adapter], scales: dict[str, float]) -> Iterator[None]:
    """Have every adapted layer add ``sum_t scale_t alpha_t / r_t B_t A_t x``, as llama.cpp does."""
    handles = []
    for module in {module for adapter in adapters.values() for module in adapter.a}:
        own = [(scales[task] * one.scale, one.a[module], one.b[module]) for task, one in adapters.items() if module in one.a]

        def add(_layer: Any, inputs: tuple[Tensor, ...], out: Tensor, own: list[Any] = own) -> Tensor:
            x = inputs[0]
            for scale, a, b in own:
                out = out + scale * ((x @ a.to(x).T) @ b.to(x).T)
            return out

        handles.append(plain.get_submodule(module).register_forward_hook(add))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
