"""How an answer's next token is drawn."""

from __future__ import annotations

from dataclasses import dataclass

import torch

COLDEST = 1e-3
"""Below this temperature, and this ``top_p``, the most likely token is all that is left; dividing by less overflows."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How an answer is written."""

    new_tokens: int
    """At most, whatever the task that a text is routed to needs."""
    temperature: float = 0.0
    """0: greedy, as the bank's free-text answers were scored."""
    top_p: float = 1.0
    seed: int | None = None
    stops: tuple[str, ...] = ()

    @property
    def draws(self) -> bool:
        """Whether chance has a say; if not, the most likely token is taken."""
        return self.temperature >= COLDEST and self.top_p >= COLDEST


def drawn(logits_V: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """A token from softmax(logits / temperature), cut to the fewest that hold ``top_p`` of the probability.

    Raises:
        RuntimeError: the scores of this row are no numbers.
    """
    scores_V = logits_V.double().cpu()
    shares_V = torch.softmax((scores_V - scores_V.max()) / sampling.temperature, dim=-1)
    if sampling.top_p < 1:
        ordered_V, place_V = shares_V.sort(descending=True)
        ordered_V[ordered_V.cumsum(0) - ordered_V >= sampling.top_p] = 0
        shares_V = torch.zeros_like(shares_V).scatter(0, place_V, ordered_V)
    return int(torch.multinomial(shares_V, 1, generator=generator))
