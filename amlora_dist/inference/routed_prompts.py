"""Texts for engines elsewhere, which have the bank's adapters but not its router: routed here, behind their task's prompt.

The labels of a task are weighed by what such an engine says of them and by the keys, which only this process has, in
``evaluation.answering``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from amlora_dist.evaluation.answering import Answering, EvidenceKind, Weighed
from amlora_dist.evaluation.label_plan import LabelPlan
from amlora_dist.evaluation.requests import Prompter, Request, Route, routes

if TYPE_CHECKING:
    from amlora_dist.adapters.keyed_router import KeyedRouter
    from amlora_dist.adapters.router import Router
    from amlora_dist.inference.prompt_answering import PromptAnswering

WHOLE = 1 - 1e-6
"""A row of this weight is all of the mixture."""


@dataclass(frozen=True, slots=True)
class RoutedPrompt:
    """What another engine is asked to have it read what the bank itself would read."""

    request: Request
    route: Route
    answer_tokens: int
    """New tokens that the answer may need."""
    plan: LabelPlan | None
    """How its labels are scored behind the prompt; None: it has none, an answer is written."""
    weighed: Callable[[Sequence[float]], Weighed]
    """Of the model's log-likelihoods of its labels what is known of them."""
    kind: EvidenceKind = "model"
    """The evidence that decides between them."""
    foreign: float | None = None

    @property
    def tokens(self) -> tuple[int, ...]:
        """The whole prompt, special tokens included."""
        return self.request.tokens

    @property
    def row(self) -> str | None:
        """The task whose row answers, where an engine applies one; None: the base model."""
        return self.route.task

    @property
    def between(self) -> bool:
        """Whether the bank would mix rows, or weigh its row less: the strongest alone is not what it computes."""
        return 0 < max(self.route.tasks.values(), default=0.0) < WHOLE


def by_text(answering: Answering, requests: Sequence[Request], router: KeyedRouter | None = None) -> list[RoutedPrompt]:
    """Route texts of one batch by themselves, and put the prompts of their tasks around them.

    Args:
        answering: of the bank.
        requests: whose ``tokens`` and ``labels`` are filled in.
        router: in place of the bank's own.

    Raises:
        UserError: a prompt or labels that cannot be.
    """
    known = answering.prepare(list(requests), answering.read(requests), router=router)
    return [
        _made(
            answering.prompter, request, route, partial(answering.weighed, known, row, request.labels or ()),
            answering.kind, known.foreign[row],
        )
        for row, (request, route) in enumerate(zip(known.requests, known.routes, strict=True))
    ]  # fmt: skip


def by_prompt(
    former: PromptAnswering, requests: Sequence[Request], batch_size: int, router: Router | None = None
) -> list[RoutedPrompt]:
    """Route whole prompts, which are there already: raw ones, and those of banks whose router reads prompts.

    Args:
        former: of the bank.
        requests: with ``tokens``; their ``gate`` is filled in.
        batch_size: of one pass.
        router: in place of the bank's own.
    """
    open_ones = [request for request in requests if request.gate is None]
    if open_ones:
        gates_BT = former.gates(open_ones, batch_size, router)
        for request, gate_T in zip(open_ones, gates_BT, strict=True):
            request.gate = gate_T
    gates = [request.gate.to(former.mixture.device) for request in requests if request.gate is not None]
    found = routes(torch.stack(gates), former.tasks, former.rows_TN)
    return [
        _made(former.prompter, request, route, partial(_by_model, request))
        for request, route in zip(requests, found, strict=True)
    ]


def _made(
    prompter: Prompter,
    request: Request,
    route: Route,
    weighed: Callable[[Sequence[float]], Weighed],
    kind: EvidenceKind = "model",
    foreign: float | None = None,
) -> RoutedPrompt:
    plan = prompter.plan(request.labels, request.task) if request.labels else None
    return RoutedPrompt(request, route, prompter.limit_of(request), plan, weighed, kind, foreign)


def _by_model(request: Request, model: Sequence[float]) -> Weighed:
    return Weighed(request.labels or (), tuple(model), None)
