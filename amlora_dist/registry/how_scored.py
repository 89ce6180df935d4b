"""In words, how the scores of a run or of a bank were made: cards, MLflow's pages and reports say it by these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from amlora_dist.config.former_values import completed
from amlora_dist.evaluation.plain_choice import PlainChoice
from amlora_dist.methods import Asked, asked_of


@dataclass(frozen=True, slots=True)
class HowScored:
    """What a test row was asked with, and what of the answer was counted."""

    asked: Asked
    """``plain text``: the text alone went in, as a user sends it."""
    what: str
    """What is right or wrong of a labelled row, as in "share of test rows whose WHAT is right"."""
    sentence: str
    """All that the model was given, and what that means for plain text."""
    router: str
    """What the router read."""

    @property
    def plain(self) -> bool:
        """Whether nothing but the text went in."""
        return self.asked == "plain text"


def how_scored(configuration: Mapping[str, Any], method: str, plain_text: PlainChoice | None = None) -> HowScored:
    """How the scores of the accuracy matrix were made.

    Args:
        configuration: resolved, of the run, as it was stored.
        method: name of its method; one that is not known here is taken for one that routes.
        plain_text: how its banks answer plain text, where they find no task by themselves.
    """
    whole = completed(configuration)
    text_alone = whole["prompt_format"] == 2
    served = text_alone and whole["evaluation"]["prompts"] == "served"
    asked = asked_of(method)
    if asked == "told the task":
        return HowScored(
            asked=asked,
            what="likeliest label behind the task's own prompt" if served else "greedy output behind the task's own prompt",
            sentence="Each row was told its task: asked behind that task's own prompt, and answered by its adapter. It says"
            " nothing of plain text.",
            router="There is no router: each row was told its task.",
        )
    if served and asked == "plain text":
        return HowScored(
            asked="plain text",
            what="served answer",
            sentence="Each row's text was asked by itself, as a user sends it: nothing told its task."
            + ("" if plain_text is None else f" {plain_text.sentence}"),
            router="The router read the text alone.",
        )
    return HowScored(
        asked="own prompt",
        what="greedy output behind the task's own prompt",
        sentence="Each row was asked behind its own task's prompt, whose question or list of labels can tell the task: a"
        " user's plain text may be answered worse than these scores say.",
        router="The router read the text within its own task's prompt: what stands before the text there can tell it the"
        " task."
        if text_alone
        else "The router read the whole prompt of each row's own task, which can tell it the task.",
    )
