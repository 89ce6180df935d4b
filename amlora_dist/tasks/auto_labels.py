"""``labels: auto``: the labels of a task as its training rows have them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable

from amlora_dist.errors import UserError
from amlora_dist.tasks.files import RawRow
from amlora_dist.tasks.task import Label, TaskSpec, plain_value
from amlora_dist.tasks.texts import NoTextError

MOST_LABELS = 1000
FEW_ROWS = 20
"""Rows below which their number of labels is not checked."""


def label_text(value: str) -> str:
    """What the model answers for a label as the data have it: underscores become spaces, runs of white space one."""
    return " ".join(value.replace("_", " ").split())


def found_labels(values: Iterable[str], where: str) -> list[Label]:
    """The labels of rows, sorted by text.

    Args:
        values: the label of each row, as ``plain_value`` makes it; empty ones do not count.
        where: the task or file, for messages.

    Raises:
        UserError: fewer than two; one that is nothing but underscores; so many that the column must be free text.
    """
    counts = Counter(value for value in values if value)
    if len(counts) < 2:
        what = f"only {next(iter(counts))!r}" if counts else "none"
        raise UserError(f"{where}: labels: auto: found {what} in the training rows, expected at least two labels")
    rows = sum(counts.values())
    if len(counts) > MOST_LABELS or (rows >= FEW_ROWS and len(counts) > rows / 2):
        raise UserError(
            f"{where}: labels: auto: found {len(counts)} different labels in {rows} training rows, expected at most"
            f" {MOST_LABELS} and one in two rows; if answers are free text, name the column as `columns.answer` and leave"
            " `labels` out"
        )
    made = [Label(value=value, text=label_text(value) or value) for value in counts]
    return sorted(made, key=lambda label: (label.text, label.value))


def with_found_labels(spec: TaskSpec, rows: Iterable[RawRow], *, mirrored: bool) -> TaskSpec:
    """The task with its labels written out, as if its file had listed them.

    A mirror (``data_dir``) has the verbalisers themselves, which stay as they are.

    Raises:
        UserError: as ``found_labels``.
    """
    column = "label" if mirrored else spec.columns.label or ""
    values = []
    for row in rows:
        try:
            values.append(plain_value(row.values.get(column, "")))
        except NoTextError:
            continue  # a bad row, which is reported where rows are made
    labels = found_labels(values, f"task {spec.name!r}")
    if mirrored:
        labels = [Label(value=label.value, text=label.value) for label in sorted(labels, key=lambda one: one.value)]
    return dataclasses.replace(spec, labels=labels)
