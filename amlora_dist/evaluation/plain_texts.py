"""Plain texts of a bank whose router has no keys: behind the bank's own prompt, by the best of all labels or freely.

Such a bank finds no task of a text by itself. So nobody is told one: the labels of all tasks that it has learned are ranked,
equal words once, unless held-out rows said that it is right more often by what it writes freely (``plain_choice``); a bank
that has learned a task of free text writes, for nobody says which kind of answer is wanted. The accuracy matrix and
``amlora score`` know the row's task, and with it the kind: they count rows of labelled tasks in the chosen way, and what is
written for the others. All of them prepare a text here, and rank by ``evaluation.ranking``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from amlora_dist.evaluation.plain_choice import Way
from amlora_dist.evaluation.requests import Prompter, Request
from amlora_dist.evaluation.served_scoring import PlainRow
from amlora_dist.tasks.batches import Example
from amlora_dist.tasks.conversations import joined


@dataclass(frozen=True, slots=True)
class PlainLabels:
    """What a bank without keys chooses from for a plain text of which nothing is told."""

    labels: tuple[str, ...] = ()
    """Of all its tasks that have some; none of a bank of before 0.2, which answers as it did."""
    writes: bool = True
    """Whether it is answered freely, unless a label is asked for."""
    way: Way = "ranks"
    """Chosen for rows of labelled tasks."""

    @property
    def mixed(self) -> bool:
        """Whether it has labels and writes all the same: by choice, or because tasks of both kinds were learned and nobody
        knows of a text which kind of answer is wanted."""
        return bool(self.labels) and self.writes

    @classmethod
    def of(cls, prompter: Prompter, tasks: Sequence[str] | None = None, way: Way = "ranks") -> PlainLabels:
        """Of the bank of ``prompter``, or of these of its ``tasks``, for which ``way`` was chosen."""
        if not prompter.format.text_alone:
            return cls()
        labels = prompter.all_labels(tasks)
        free = any(entry.free_text for name, entry in prompter.learned.items() if tasks is None or name in tasks)
        return cls(labels, free or not labels or way == "writes", way)


def fill_to_rank(prompter: Prompter, requests: Sequence[Request], labels: tuple[str, ...]) -> None:
    """Put the bank's prompt around texts whose ``labels`` are ranked: the text is cut for the longest of them alone."""
    for request in requests:
        request.labels = labels
    prompter.fill(requests, new_tokens=prompter.plan(labels).longest + 1)


def plain_examples(
    prompter: Prompter, rows: Sequence[PlainRow], labels: tuple[str, ...], new_tokens: int
) -> list[Example]:
    """Rows of a task as their texts are served, nothing named.

    Args:
        prompter: of the bank.
        rows: of one task.
        labels: that are ranked; none: ``new_tokens`` are written.
        new_tokens: of an answer that is written.
    """
    requests = []
    for place, row in enumerate(rows):
        in_turns = prompter.chat_bank or not row.turns
        requests.append(
            Request(place, row.text, turns=row.turns) if in_turns else Request(place, joined(row.turns))
        )
    if labels:
        fill_to_rank(prompter, requests, labels)
    else:
        prompter.fill(requests, new_tokens=new_tokens)
    return [
        Example(
            row.number, request.tokens, (), labels.index(row.answer) if row.answer in labels else None, row.answer,
            request.text_ids, request.span, references=row.references, source=row.text,
        )
        for row, request in zip(rows, requests, strict=True)
    ]  # fmt: skip
