"""Whether a model can tell a task's labels apart: what only labels and tokenizer together show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from amlora_dist.errors import UserError
from amlora_dist.tasks.batches import answer_tokens
from amlora_dist.tasks.chat import ChatTemplate


def check_labels(
    labels: Sequence[str], tokenizer: Any, *, encoder_decoder: bool, where: str, task: str, chat: bool = False
) -> None:
    """See that every label has tokens, and tokens of its own.

    Args:
        labels: the different texts that a model may answer.
        tokenizer: of the model.
        encoder_decoder: whether it has a decoder of its own, whose answers begin without a prompt.
        where: the file and key, or the option, that the labels come from.
        task: the task's name.
        chat: whether they are turns of the assistant.

    Raises:
        UserError: names the task and the labels.
    """
    template = ChatTemplate(tokenizer) if chat else None
    known: dict[tuple[int, ...], str] = {}
    for text in labels:
        tokens = answer_tokens(text, tokenizer, encoder_decoder, chat=template)
        found = f"{where}: found {text!r} of task {task!r}"
        if not tokens:
            raise UserError(f"{found}, which has no tokens, expected a text that the model's tokenizer can write")
        if tokens in known:
            raise UserError(
                f"{found}, which has the same tokens as {known[tokens]!r}, expected labels that the model's tokenizer can"
                " tell apart; give one of them another text"
            )
        known[tokens] = text
