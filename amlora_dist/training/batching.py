"""Which rows a rank sees at a step, and the loss of a global batch: independent of world size and micro-batches."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amlora_dist.adapters.packed_rows import PackedRows
from amlora_dist.tasks.batches import IGNORED, Example, collate, collate_seq2seq, epoch_order

if TYPE_CHECKING:
    from amlora_dist.adapters.dropout import DropoutKeys
    from amlora_dist.adapters.gate_context import Selection
    from amlora_dist.adapters.trunk import Trunk

    Chosen = list[tuple[Selection, Tensor | None]]


@dataclass(frozen=True, slots=True)
class Layout:
    """How a global batch is cut: ``world`` ranks of ``accumulation`` micro-batches of at most ``micro`` examples."""

    batch_size: int
    world: int
    micro: int
    accumulation: int

    @classmethod
    def of(cls, batch_size: int, world: int, micro_batch_size: int | None) -> Layout:
        share = math.ceil(batch_size / world)
        micro = min(micro_batch_size or share, share)
        return cls(batch_size, world, micro, math.ceil(share / micro))


class Schedule:
    """The rows of every optimizer step: seed, stage and epoch decide the order, nothing else."""

    def __init__(self, count: int, *, batch_size: int, epochs: int, seed: int, stage: str) -> None:
        self.count, self.batch_size, self.seed, self.stage = count, batch_size, seed, stage
        self.steps_per_epoch = math.ceil(count / batch_size)
        self.steps = self.steps_per_epoch * epochs
        self._epoch, self._order = -1, [0]

    def rows(self, step: int) -> list[int]:
        """Indices of the examples of 0-based ``step``; the last step of an epoch may have fewer."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._order = epoch_order(self.count, seed=self.seed, stage=self.stage, epoch=epoch)
            self._epoch = epoch
        return self._order[place * self.batch_size : (place + 1) * self.batch_size]


def micro_batches(rows: Sequence[Example], rank: int, layout: Layout) -> list[tuple[list[Example], bool]]:
    """This rank's micro-batches of a global batch and whether they count; always ``layout.accumulation`` of them.

    Where rows run short a rank computes on one row at weight 0: under ZeRO every rank must make equally many passes.
    """
    by_length = sorted(rows, key=lambda e: (len(e.prompt) + len(e.target), e.row))
    mine = by_length[rank :: layout.world]
    parts = [mine[i * layout.micro : (i + 1) * layout.micro] for i in range(layout.accumulation)]
    return [(part, True) if part else ([by_length[0]], False) for part in parts]


def prompt_positions(model: nn.Module, attention_mask_BL: Tensor, *, encoder_decoder: bool) -> dict[str, Tensor]:
    """``position_ids`` that count the tokens behind left padding, for architectures that take them."""
    if encoder_decoder or "position_ids" not in inspect.signature(type(model).forward).parameters:
        return {}
    return {"position_ids": (attention_mask_BL.cumsum(-1) - 1).clamp(min=0)}


class LossComputer:
    """Sum of the target tokens' cross-entropy of one micro-batch, in nats.

    Logits are computed at the targets only (they are at the right end of left-padded rows) where the architecture
    can be asked for that: the output layer of a small model is a quarter of its arithmetic.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        pad_id: int,
        encoder_decoder: bool,
        device: torch.device,
        packing_width: int = 0,
    ) -> None:
        """``packing_width``: rows share sequences that are filled up to so many tokens (``Mixture.packing_width``); 0: each
        has its own."""
        self._width = packing_width
        self._keeps_logits = "logits_to_keep" in inspect.signature(type(model).forward).parameters
        self._model, self._pad, self.encoder_decoder, self._device = model, pad_id, encoder_decoder, device

    def __call__(
        self, forward: Any, examples: Sequence[Example], gate_T: Tensor | None, states_BLD: Tensor | None = None
    ) -> Tensor:
        """Summed loss, a scalar with gradient; ``gate_T`` (tasks,) weighs the adapters for every row; ``states_BLD``: of
        ``lower_states`` for these rows."""
        return self.cross_entropy(*self.logits(forward, examples, gate_T, states_BLD=states_BLD))

    def lower_states(self, trunk: Trunk | None, examples: Sequence[Example]) -> Tensor | None:
        """What the frozen layers below the adapters make of these rows, (B, L, D), for several passes of them that differ in
        their gates: the same bits as in a pass without. None where such a pass computes them."""
        if trunk is None or self._width or self.encoder_decoder:
            return None
        batch = {k: t.to(self._device) for k, t in collate(examples, pad_id=self._pad, side="left").items()}
        mask_BL = batch["attention_mask"]
        return trunk.batch_states(
            batch["input_ids"], mask_BL, prompt_positions(self._model, mask_BL, encoder_decoder=False)
        )

    @staticmethod
    def cross_entropy(
        logits_BLV: Tensor, labels_BL: Tensor, examples: Sequence[Example] = (), smoothing: float = 0.0
    ) -> Tensor:
        """Summed over the targets, fp32; ``smoothing`` for those of the ``examples`` that have a label. Of packed rows B is
        1, and their targets follow each other."""
        if not smoothing:
            return F.cross_entropy(
                logits_BLV.flatten(0, 1).float(), labels_BL.flatten(), ignore_index=IGNORED, reduction="sum"
            )
        total = logits_BLV.new_zeros((), dtype=torch.float32)
        labelled_BL = torch.tensor([[example.label is not None] for example in examples], device=labels_BL.device)
        if len(labels_BL) == len(examples):
            labelled_BL = labelled_BL.expand_as(labels_BL)
        else:
            learned = torch.tensor([example.learned for example in examples], device=labels_BL.device)
            labelled_BL = labelled_BL.flatten().repeat_interleave(learned)[None]
        for smoothed in (True, False):
            if any((example.label is not None) == smoothed for example in examples):
                chosen_BL = labelled_BL == smoothed
                total = total + F.cross_entropy(
                    logits_BLV[chosen_BL].float(), labels_BL[chosen_BL], ignore_index=IGNORED, reduction="sum",
                    label_smoothing=smoothing if smoothed else 0.0,
                )  # fmt: skip
        return total

    def logits(
        self,
        forward: Any,
        examples: Sequence[Example],
        gate_T: Tensor | None,
        chosen: Chosen | None = None,
        dropout_keys: DropoutKeys | None = None,
        states_BLD: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits (B, L, V) that predict the labels (B, L); where the labels are ``IGNORED`` there is no target. Of packed
        rows (1, N, V) and (1, N): the targets alone, row after row.

        ``chosen`` is filled with what the layers' selectors chose (``MicroBatch.answers``); with ``dropout_keys`` the
        new adapter drops parts of what it reads; ``states_BLD`` as in a call.
        """
        if self._width:
            return self._packed_logits(forward, examples, gate_T, dropout_keys)
        make = collate_seq2seq if self.encoder_decoder else collate
        side = "right" if self.encoder_decoder else "left"
        batch = {k: t.to(self._device) for k, t in make(examples, pad_id=self._pad, side=side).items()}  # type: ignore[arg-type]
        labels_BL = batch.pop("labels")
        inputs: dict[str, Any] = dict(batch) | {"use_cache": False}
        if dropout_keys is not None:
            inputs["dropout_keys"] = dropout_keys
        if chosen is not None:
            inputs["on_select"] = partial(self._note, chosen, batch["attention_mask"], labels_BL != IGNORED)
        if gate_T is not None:
            inputs["task_gate"] = gate_T.to(self._device).expand(len(examples), -1)
        if self.encoder_decoder:
            inputs["decoder_input_ids"] = self._model.prepare_decoder_input_ids_from_labels(labels_BL)  # type: ignore[operator]
            logits = forward(**inputs).logits
        else:
            keep = max(len(example.earlier) + len(example.target) for example in examples) + 1
            inputs |= prompt_positions(self._model, batch["attention_mask"], encoder_decoder=False)
            if states_BLD is not None:
                inputs["trunk_states"] = states_BLD
            if self._keeps_logits:
                inputs["logits_to_keep"] = keep
            logits = forward(**inputs).logits[:, -keep:-1]
            labels_BL = labels_BL[:, -(keep - 1) :]
        return logits, labels_BL

    def _packed_logits(
        self, forward: Any, examples: Sequence[Example], gate_T: Tensor | None, dropout_keys: DropoutKeys | None
    ) -> tuple[Tensor, Tensor]:
        lengths = [len(example.prompt) + len(example.target) for example in examples]
        packed = PackedRows.of(lengths, self._width, self._device)
        batch = {k: t.to(self._device) for k, t in collate(examples, pad_id=self._pad, side="left").items()}
        labels_BL = batch["labels"][:, 1:]
        target_BL = labels_BL != IGNORED
        inputs = packed.inputs(batch["input_ids"], self._pad, self._model.dtype)  # type: ignore[arg-type]
        inputs["prompt_mask"] = batch["prompt_mask"]
        inputs["logits_at"] = packed.index_BL[:, :-1][target_BL]
        if dropout_keys is not None:
            inputs["dropout_keys"] = packed.dropout_keys(dropout_keys)
        if gate_T is not None:
            inputs["task_gate"] = gate_T.to(self._device)[None]
        return forward(**inputs).logits, labels_BL[target_BL][None]

    def _note(self, chosen: Chosen, tokens_BL: Tensor, answer_BL: Tensor, path: str, selection: Selection) -> None:
        """With the positions that count, every row alike: no padding, and of a decoder that is not its own prompt the
        answer. What a gate of a whole row was pooled from is the selector's business."""
        mask = None
        if selection.pooled is None:
            layer = self._model.get_submodule(path)
            mask = (answer_BL if getattr(layer, "pools_start", False) else tokens_BL).float()
            mask = mask / mask.sum(dim=1, keepdim=True).clamp(min=1)
        chosen.append((selection, mask))


def target_tokens(rows: Sequence[Example]) -> int:
    """Tokens that the loss is taken over, end-of-sequence included."""
    return sum(example.learned for example in rows)


def all_tokens(rows: Sequence[Example]) -> int:
    """Prompt and target tokens, without padding."""
    return sum(len(example.prompt) + len(example.target) for example in rows)
