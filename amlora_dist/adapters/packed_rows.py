"""Several short rows in one sequence: what the model is given so that each is as if it were alone.

Attention is block-diagonal, by an explicit mask: a token sees the tokens of its own row up to itself. Each row's positions
begin at 0, features are pooled row by row, a token is weighed by its own row's gate, and dropout knows it by its place in
its row. So packing changes how many padding tokens are computed, and nothing else but the order of sums.

Shapes in names: P sequences of S tokens hold B rows, the longest of L tokens; X = P x S; R ranks; N tokens that are asked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amlora_dist.adapters.dropout import DropoutKeys
from amlora_dist.adapters.gate_context import active_call
from amlora_dist.errors import UserError

if TYPE_CHECKING:
    from amlora_dist.adapters.inject import Mixture

WIDTH = 256
"""Tokens that a sequence is filled up to, or the longest row's: attention costs their square."""
TRIED_ROWS = (4, 6)
"""Tokens of the rows of a trial."""
TOLERANCE = 0.02
"""Relative difference of logits that a trial may show: bf16 has three digits, a row that sees another shows in the first."""


@dataclass(frozen=True, slots=True, eq=False)
class PackedRows:
    """Where each row lies: in one piece, in one of the sequences; what is left at their ends is padding."""

    row_PS: Tensor
    """Which row a token is of, int64; -1 at padding."""
    place_PS: Tensor
    """Which of its row's tokens it is, int64, from 0: its position."""
    index_BL: Tensor
    """Of each row, padded on the left, where its tokens lie among the X."""
    mask_BL: Tensor
    """False at that padding."""

    @classmethod
    def of(cls, lengths: Sequence[int], width: int, device: torch.device | str = "cpu") -> PackedRows:
        """Rows of these lengths, in the number of sequences that leaves the least padding; at least as many as have room for
        their tokens at ``width`` (the longest row's, if it is longer), at most one for each row. The same for the same
        lengths, always."""
        fewest = math.ceil(sum(lengths) / max(width, *lengths))
        made = [_dealt(lengths, count) for count in range(fewest, len(lengths) + 1)]
        packs, size = min(made, key=lambda one: len(one[0]) * one[1])
        count, longest = len(packs), max(lengths)
        row_PS, place_PS = torch.full((count, size), -1), torch.zeros(count, size, dtype=torch.int64)
        index_BL = torch.zeros(len(lengths), longest, dtype=torch.int64)
        mask_BL = torch.zeros(len(lengths), longest, dtype=torch.bool)
        for number, pack in enumerate(packs):
            start = 0
            for row in pack:
                end = start + lengths[row]
                row_PS[number, start:end] = row
                place_PS[number, start:end] = torch.arange(lengths[row])
                index_BL[row, longest - lengths[row] :] = number * size + torch.arange(start, end)
                mask_BL[row, longest - lengths[row] :] = True
                start = end
            place_PS[number, start:] = torch.arange(size - start)
        return cls(*(tensor.to(device) for tensor in (row_PS, place_PS, index_BL, mask_BL)))

    @property
    def count(self) -> int:
        """B."""
        return len(self.index_BL)

    @property
    def tokens(self) -> int:
        """X."""
        return self.row_PS.numel()

    def pack(self, values_BL: Tensor, fill: int = 0) -> Tensor:
        """(P, S, ...) from the values of rows that are padded on the left, (B, L, ...)."""
        values_BL = values_BL.to(self.index_BL.device)
        out_X = values_BL.new_full((self.tokens, *values_BL.shape[2:]), fill)
        out_X[self.index_BL[self.mask_BL]] = values_BL[self.mask_BL]
        return out_X.view(*self.row_PS.shape, *values_BL.shape[2:])

    def unpack(self, values_PS: Tensor) -> Tensor:
        """(B, L, ...), padded on the left by anything, from (P, S, ...)."""
        return values_PS.flatten(0, 1)[self.index_BL]

    def of_tokens(self, values_BR: Tensor) -> Tensor:
        """(X, R): for each token its row's."""
        return values_BR.index_select(0, self.row_PS.flatten().clamp(min=0))

    def attention_mask(self, dtype: torch.dtype) -> Tensor:
        """(P, 1, S, S), to be added to scores: 0 on a token's own row up to itself, the lowest number elsewhere."""
        size = self.row_PS.shape[1]
        own_PSS = self.row_PS[:, :, None] == self.row_PS[:, None, :]
        seen_PSS = own_PSS & torch.ones(size, size, dtype=torch.bool, device=own_PSS.device).tril()
        lowest = torch.finfo(dtype).min
        return torch.zeros(seen_PSS.shape, dtype=dtype, device=own_PSS.device).masked_fill_(~seen_PSS, lowest)[:, None]

    def dropout_keys(self, keys: DropoutKeys) -> DropoutKeys:
        """The keys of rows for their tokens."""
        length_B = self.mask_BL.sum(dim=1)
        place_PS, row_PS = self.place_PS, self.row_PS.clamp(min=0)
        if keys.from_right:
            place_PS = (length_B[row_PS] - 1 - place_PS).clamp(min=0)
        return replace(keys, keys_B=keys.keys_B[row_PS], place_BS=place_PS.to(torch.int32))

    def inputs(self, ids_BL: Tensor, pad_id: int, dtype: torch.dtype) -> dict[str, Any]:
        """What a call of the model takes for rows with these tokens, (B, L), padded on the left."""
        return {
            "input_ids": self.pack(ids_BL, pad_id),
            "attention_mask": self.attention_mask(dtype),
            "position_ids": self.place_PS,
            "packed_rows": self,
            "use_cache": False,
        }


def _dealt(lengths: Sequence[int], count: int) -> tuple[list[list[int]], int]:
    """Rows in ``count`` sequences, the longest first, each into the emptiest: their lengths come out nearly equal; and the
    longest sequence's."""
    packs: list[list[int]] = [[] for _ in range(count)]
    filled = [0] * count
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        emptiest = filled.index(min(filled))
        packs[emptiest].append(row)
        filled[emptiest] += lengths[row]
    return packs, max(filled)


def pick_tokens(_head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Goes before the output layer: hands it the tokens alone that a packed call asks for, as one sequence."""
    call = active_call()
    if call is None or call.options.logits_at is None:
        return None
    return (args[0].flatten(0, 1)[call.options.logits_at][None], *args[1:])


def try_packing(mixture: Mixture) -> nn.Module:
    """See on two rows that this model makes of them, packed, what it makes of each alone. The same passes on every rank.

    Returns:
        its output layer.

    Raises:
        UserError: it does not, or takes no mask and positions of rows.
    """
    model: Any = mixture.model
    head: nn.Module | None = model.get_output_embeddings()
    if head is None:
        raise _refused(model, " (it has no output layer)")
    top = int(model.config.get_text_config().vocab_size)
    packed = PackedRows.of(TRIED_ROWS, WIDTH, mixture.device)
    rows = [torch.arange(1, 1 + length, device=mixture.device)[None] % top for length in TRIED_ROWS]
    gate = torch.zeros(1, len(mixture.task_names), device=mixture.device)
    ids_BL = torch.cat([F.pad(row, (max(TRIED_ROWS) - row.shape[1], 0)) for row in rows])
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            alone = [model(input_ids=row, task_gate=gate, use_cache=False).logits.float() for row in rows]
            together = model(**packed.inputs(ids_BL, 0, model.dtype), task_gate=gate).logits.float()
    except (TypeError, ValueError, RuntimeError) as error:
        raise _refused(model, f" ({str(error).splitlines()[0]})") from error
    finally:
        model.train(training)
    found = packed.unpack(together)
    for number, logits in enumerate(alone):
        apart = (found[number, -logits.shape[1] :] - logits[0]).abs().max()
        if not float(apart) <= TOLERANCE * float(logits.abs().max()):
            raise _refused(model, "")
    return head


def _refused(model: nn.Module, why: str) -> UserError:
    return UserError(
        f"training.packing: found true with {type(model).__name__}, which does not keep rows apart by an attention mask and"
        f" positions{why}; expected false"
    )
