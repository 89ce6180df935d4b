"""Texts for an engine that applies one row to each: routed here, asked in the words of the task that they are routed to.

A text between tasks gets the row of the strongest alone, a text of no task the base model. The labels of a task are weighed
by what the engine says of them and by the keys, which only this process has, in ``evaluation.answering``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from amlora_dist.evaluation.answering import EvidenceKind, Weighed
from amlora_dist.evaluation.label_plan import LabelPlan
from amlora_dist.evaluation.requests import Request, Route, routes
from amlora_dist.serving.bank import ServedBank

WHOLE = 1 - 1e-6
"""A row of this weight is all of the mixture."""


@dataclass(frozen=True, slots=True)
class RowRequest:
    """One text on its way to one row."""

    request: Request
    """With its prompt's tokens."""
    route: Route
    between: bool
    """Whether the bank would mix rows, or weigh its row less: the strongest alone is not what it computes."""
    weighed: Callable[[Sequence[float]], Weighed]
    """Of the model's log-likelihoods of its labels what is known of them."""
    kind: EvidenceKind = "model"
    foreign: float | None = None

    @property
    def row(self) -> str | None:
        """The task whose row answers; None: the base model."""
        return self.route.task


def routed_to_rows(bank: ServedBank, requests: Sequence[Request], *, to_classify: bool) -> list[RowRequest]:
    """Route requests of one group, and put their prompts around them.

    Raises:
        UserError: a prompt or labels that cannot be.
    """
    model, answering = bank.model, bank.model.answering
    if answering is None or requests[0].raw:
        if to_classify:
            model.former.with_labels(requests, len(requests), None)
        found = _by_prompt(bank, requests)
        pairs = zip(requests, found, strict=True)
        return [RowRequest(request, route, _between(route), partial(_by_model, request)) for request, route in pairs]
    known = answering.prepare(list(requests), answering.read(requests))
    made = []
    for row, (request, route) in enumerate(zip(known.requests, known.routes, strict=True)):
        weighed = partial(answering.weighed, known, row, request.labels or ())
        made.append(
            RowRequest(request, route, _between(route), weighed, answering.kind, known.foreign[row])
        )
    return made


def label_plan(bank: ServedBank, asked: RowRequest) -> LabelPlan | None:
    """How the labels of a text are scored behind its prompt; None where it has none."""
    labels = asked.request.labels
    return bank.model.prompter.plan(labels, asked.request.task) if labels else None


def _by_prompt(bank: ServedBank, requests: Sequence[Request]) -> list[Route]:
    """Routes of whole prompts: raw ones, and those of banks whose router reads prompts."""
    former = bank.model.former
    open_ones = [request for request in requests if request.gate is None]
    if open_ones:
        gates_BT: Tensor = former.gates(open_ones, len(open_ones), None)
        for request, gate_T in zip(open_ones, gates_BT, strict=True):
            request.gate = gate_T
    gates = [request.gate for request in requests if request.gate is not None]
    return routes(torch.stack([gate_T.to(bank.model.device) for gate_T in gates]), bank.tasks, bank.model.rows_TN)


def _between(route: Route) -> bool:
    return 0 < max(route.tasks.values(), default=0.0) < WHOLE


def _by_model(request: Request, model: Sequence[float]) -> Weighed:
    return Weighed(request.labels or (), tuple(model), None)
