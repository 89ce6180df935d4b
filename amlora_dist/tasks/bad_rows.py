"""Rows that cannot be used: why, how many, and the messages about them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from amlora_dist.errors import Fault
from amlora_dist.tasks.conversations import NO_ANSWER, NO_USER
from amlora_dist.tasks.tables import AGAIN, UNEVEN
from amlora_dist.tasks.task import SPLITS, TaskSpec

MISSING_LABEL = "no label"
MISSING_ANSWER = "no answer"
UNKNOWN_LABEL = "an unknown label"
EMPTY_TEXT = "an empty text"
DUPLICATE = "a text that is also in"
MOST_DUPLICATES = 0.1
"""Share of a split's rows that may be in an evaluation split too: so many are left out and counted, more are a fault."""
NAMED_ROWS = 12
"""Row numbers that a message names before it only counts."""
NAMED_LABELS = 6

_SKIP = "fix the rows, or set on_bad_row: skip"


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used, and why."""

    split: str
    number: int
    reason: str
    file: str = ""

    @property
    def duplicate(self) -> bool:
        """Its text is in another split, too."""
        return self.reason.startswith(DUPLICATE)


def faults_of(bad: Sequence[BadRow], spec: TaskSpec, read: Mapping[str, int]) -> list[Fault]:
    """One fault for each split, file and reason, with the first row numbers and the count.

    Texts that are in two splits are a fault only where they are more than ``MOST_DUPLICATES`` of a split's rows.

    Args:
        bad: the rows.
        spec: their task.
        read: usable rows of each split before duplicates were taken out.
    """
    groups: dict[tuple[str, str, str], list[int]] = {}
    for one in sorted(bad, key=lambda one: SPLITS.index(one.split)):
        groups.setdefault((one.split, one.file, one.reason), []).append(one.number)
    twice = Counter((one.split, one.reason) for one in bad if one.duplicate)
    doubled = Counter(one.split for one in bad if one.duplicate)
    faults = []
    for (split, file, reason), numbers in groups.items():
        found, expected, hint = reason, _expected(reason, spec), _SKIP
        if (split, reason) in twice:
            if doubled[split] <= MOST_DUPLICATES * read[split]:
                continue
            share = f"{twice[split, reason]} of the {read[split]} rows of {split}, {doubled[split] / read[split]:.0%}"
            found, hint = f"{reason} ({share})", "give the splits different rows, or set on_bad_row: skip to leave them out"
            if doubled[split] == read[split] and split == "dev":
                found = f"{reason}: all {read[split]} rows of dev do, it is the same data"
                hint = "give another dev file, or leave `splits.dev` out: rows are then held out of train"
        named = ", ".join(str(number) for number in numbers[:NAMED_ROWS])
        more = f" and {len(numbers) - NAMED_ROWS} more" if len(numbers) > NAMED_ROWS else ""
        faults.append(Fault(f"{split} ({file}), row{'s' * (len(numbers) > 1)} {named}{more}", found, expected, hint))
    return faults


def remarks_on(bad: Iterable[BadRow], name: str) -> str:
    """What was left out of a task, in one line; empty where nothing was."""
    counts = Counter((one.split, one.reason) for one in bad)
    parts = [
        f"{count} of {split} ({reason})"
        for (split, reason), count in sorted(counts.items(), key=lambda item: SPLITS.index(item[0][0]))
    ]
    rows = "row" if sum(counts.values()) == 1 else "rows"
    return f"task {name!r}: left out {sum(counts.values())} {rows}: {', '.join(parts)}" if parts else ""


def _expected(reason: str, spec: TaskSpec) -> str:
    column = spec.columns.label or spec.columns.answer
    if reason.startswith(DUPLICATE):
        return f"at most {MOST_DUPLICATES:.0%} of a split's rows (so many are left out and counted)"
    if reason == EMPTY_TEXT:
        return "a text in the columns of `columns.text`"
    if reason == MISSING_LABEL:
        return f"a label in column {column!r}"
    if reason == MISSING_ANSWER:
        return f"an answer in column {column!r}"
    if reason.startswith(UNKNOWN_LABEL):
        values = [label.value for label in spec.known_labels]
        more = f" or {len(values) - NAMED_LABELS} more" if len(values) > NAMED_LABELS else ""
        return f"one of {', '.join(values[:NAMED_LABELS])}{more}"
    if reason == AGAIN:
        return "rows"
    if reason == UNEVEN:
        return "as many cells as the header has"
    if reason in (NO_ANSWER, NO_USER) or spec.columns.conversational:
        return "turns of text, the user's and then the assistant's at the end"
    return "a text"
