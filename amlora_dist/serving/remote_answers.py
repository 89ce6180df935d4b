"""Answers of a bank whose adapters another server applies: what the clients of exports do, and what measures them.

::

    (prompt,) = AMLoRAModel.from_bank(bank).prompts(text)
    answer = await answered(prompt, VllmModel(client, name))

The text is routed in this process; of the labels of its task the bank's own rule chooses one, by the server's likelihoods
and the keys here (``evaluation.answering``). A text of no task, or of one whose answers are free text, is written by the
server.
"""

from __future__ import annotations

from dataclasses import dataclass

from amlora_dist.inference.routed_prompts import RoutedPrompt
from amlora_dist.serving.remote_labels import RemoteModel, best_label


@dataclass(frozen=True, slots=True)
class RemoteAnswer:
    """What is answered to one text."""

    text: str
    label: str | None
    """None: it was written."""


async def answered(prompt: RoutedPrompt, model: RemoteModel) -> RemoteAnswer:
    """The answer to a text that was routed.

    Args:
        prompt: of ``AMLoRAModel.prompts``.
        model: with what the text is routed to.

    Raises:
        EngineAwayError: the server cannot be reached, or does not say what it must.
    """
    if prompt.plan is None:
        return RemoteAnswer((await model.write(prompt.tokens, prompt.answer_tokens)).strip(), None)
    unknown = prompt.weighed([0.0] * len(prompt.plan.candidates))
    if unknown.needs_model(prompt.kind):
        place = await best_label(
            model, prompt.tokens, prompt.plan, lambda scores: prompt.weighed(scores).best(prompt.kind)
        )
    else:
        place = unknown.best(prompt.kind)
    return RemoteAnswer(unknown.labels[place], unknown.labels[place])
