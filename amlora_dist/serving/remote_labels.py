"""How likely a model behind another server holds labels: the sum over their tokens, each behind its label's beginning.

The beginnings form a trie (``evaluation.label_plan``): each is one question for the tokens that may follow it.
``label_scores`` asks them all; ``best_label`` asks no more than it takes to know the label that wins, as
``evaluation.ranking.choosing`` does in this process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from amlora_dist.evaluation.label_plan import LabelPlan

Beginning = tuple[int, ...]
"""Token ids of a label before one of its tokens; none before the first."""


class RemoteModel(Protocol):
    """The base model behind another server, with what adapts it to one text."""

    async def next_scores(
        self, prompt: Sequence[int], asked: Sequence[tuple[Beginning, Sequence[int]]]
    ) -> list[list[float]]:
        """Behind the prompt and each beginning, the log probability of each of its tokens, nats.

        Raises:
            EngineAwayError: the server cannot be reached, or does not say it.
        """

    async def write(self, prompt: Sequence[int], new_tokens: int) -> str:
        """The greedy text behind a prompt, of so many tokens at most; errors as ``next_scores``."""


async def label_scores(model: RemoteModel, prompt: Sequence[int], plan: LabelPlan) -> list[tuple[float, ...]]:
    """Log-likelihood of each token of each label, nats; their sum is the label's.

    The first question, of the prompt alone, goes ahead, so that a server may have the prompt in its cache when the others
    come.

    Args:
        model: that is asked.
        prompt: token ids.
        plan: of the labels.
    """
    known = _Known(model, prompt, plan)
    first, *others = known.beginnings
    await known.ask([first])
    await known.ask(others)
    return [tuple(known.scores(candidate)) for candidate in plan.candidates]


async def best_label(
    model: RemoteModel, prompt: Sequence[int], plan: LabelPlan, best: Callable[[Sequence[float]], int]
) -> int:
    """The label that wins, exactly: what is known of a label bounds its likelihood from above, so that one of which all is
    known and which is still the best cannot be beaten.

    Args:
        model: that is asked.
        prompt: token ids.
        plan: of the labels.
        best: the place of the label that wins, given the log-likelihood of each; may only rise with them.
    """
    known = _Known(model, prompt, plan)
    await known.ask([()])
    while True:
        place = best([sum(known.scores(candidate)) for candidate in plan.candidates])
        missing = known.missing(plan.candidates[place])
        if not missing:
            return place
        await known.ask(missing)


class _Known:
    """What a model was asked of the labels' tokens."""

    def __init__(self, model: RemoteModel, prompt: Sequence[int], plan: LabelPlan) -> None:
        self._model, self._prompt = model, prompt
        self._next: dict[Beginning, dict[int, None]] = {}
        for candidate in plan.candidates:
            for cut, token in enumerate(candidate):
                self._next.setdefault(candidate[:cut], {})[token] = None
        self._scores: dict[Beginning, float] = {}
        """Of a beginning's last token."""

    @property
    def beginnings(self) -> list[Beginning]:
        """All of the plan's, the empty one first."""
        return list(self._next)

    async def ask(self, beginnings: Sequence[Beginning]) -> None:
        """Ask for all tokens that may follow."""
        if not beginnings:
            return
        asked = [(beginning, list(self._next[beginning])) for beginning in beginnings]
        found = await self._model.next_scores(self._prompt, asked)
        for (beginning, tokens), scores in zip(asked, found, strict=True):
            for token, score in zip(tokens, scores, strict=True):
                known = (*beginning, token)
                self._scores[known] = min(score, 0.0)  # rounding may lift a probability above 1

    def scores(self, candidate: Beginning) -> list[float]:
        """Of each token of a label; 0 of one that is not known yet."""
        return [self._scores.get(candidate[: cut + 1], 0.0) for cut in range(len(candidate))]

    def missing(self, candidate: Beginning) -> list[Beginning]:
        """Beginnings of a label whose next token is not known."""
        return [candidate[:cut] for cut in range(len(candidate)) if candidate[: cut + 1] not in self._scores]
