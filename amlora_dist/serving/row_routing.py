"""Texts for an engine that applies one row to each: routed here, asked in the words of the task that they are routed to.

A text between tasks gets the row of the strongest alone, a text of no task the base model.
"""

from __future__ import annotations

from collections.abc import Sequence

from amlora_dist.evaluation.requests import Request
from amlora_dist.inference.routed_prompts import RoutedPrompt, by_prompt, by_text
from amlora_dist.serving.bank import ServedBank


def routed_to_rows(bank: ServedBank, requests: Sequence[Request], *, to_classify: bool) -> list[RoutedPrompt]:
    """Route requests of one group, and put their prompts around them.

    Raises:
        UserError: a prompt or labels that cannot be.
    """
    model, answering = bank.model, bank.model.answering
    if answering is not None and not requests[0].raw:
        return by_text(answering, requests)
    if to_classify:
        model.former.with_labels(requests, len(requests), None)
    return by_prompt(model.former, requests, len(requests))
