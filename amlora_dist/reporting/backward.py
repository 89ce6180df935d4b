"""Backward transfer stage by stage in a run's report: a line for each earlier task, and the rows that became wrong.

All of it follows from predictions that a run keeps: nothing is scored again.
"""

from __future__ import annotations

from amlora_dist.evaluation.stage_changes import StageChange, stage_changes
from amlora_dist.reporting.answers import shortened
from amlora_dist.reporting.facts import RunFacts
from amlora_dist.reporting.figures import Table, Value
from amlora_dist.reporting.page import Block, TableBlock

ALL = "all earlier tasks (BWT)"
SHOWN_LINES = 30
"""Of the table of changes; where there are more, the page shows the lines of all earlier tasks."""
LISTED_ROWS, SHOWN_ROWS = 500, 15
"""Rows that became wrong: in the CSV, and on the page."""


def backward_blocks(facts: RunFacts) -> list[Block]:
    """What each stage did to the tasks before it; nothing where earlier tasks were not scored at every stage."""
    if not facts.in_sequence:
        return []
    stages = range(1, len(facts.stages) + 1)
    answers = [[facts.cell("router", task, stage) for task in facts.tasks] for stage in stages]
    for place in range(len(facts.tasks)):  # of a run that went on with other rows there is nothing to compare
        known = {tuple(one.row for one in cell) for cell in (of_stage[place] for of_stage in answers) if cell is not None}
        if len(known) > 1:
            for of_stage in answers:
                of_stage[place] = None
    changes = stage_changes(facts.tasks, facts.matrix, answers, seed=int(facts.result["seed"]))
    if not changes:
        return []
    return [_table(changes, served=facts.how.plain), *_worse(facts, changes)]


def change_line(one: StageChange) -> dict[str, Value]:
    """A line of the table, by column."""
    low, high = (one.interval.low, one.interval.high) if one.interval else (None, None)
    return {
        "stage": one.stage, "task": one.task or ALL, "before": one.before, "after": one.after, "change": one.difference,
        "low": low, "high": high, **one.counts(),
    }  # fmt: skip


def _table(changes: list[StageChange], *, served: bool) -> TableBlock:
    lines = [change_line(one) for one in changes]
    many = len(lines) > SHOWN_LINES
    shown = [line for line in lines if line["task"] == ALL] if many else lines
    caption = (
        "A task's line compares with the stage before; that of all earlier tasks is the backward transfer (BWT) of the"
        " sequence so far: each task against its own stage. Intervals are paired over rows. Changed: answers in other words;"
        " worse: right before and wrong after (of free text, a lower score); rerouted: of these, the answers to rows that"
        " go to another task than before."
    )
    more = " The CSV has the lines of every task." if many else ""
    columns = list(lines[0])
    whole, part = (Table(columns, [list(line.values()) for line in some]) for some in (lines, shown))
    title = f"Backward transfer{' as served' if served else ''}, stage by stage"
    return TableBlock("backward-transfer", title, whole, f"{caption}{more}", shown=part if many else None)


def _worse(facts: RunFacts, changes: list[StageChange]) -> list[Block]:
    """The rows that a stage made worse, by their number in the data."""
    lines: list[list[Value]] = [
        [change.stage, facts.tasks[change.stage - 1], one.task, one.before.row, one.before.answer, one.before.given,
         one.after.given, one.before.route, one.after.route]
        for change in changes if change.task is not None
        for one in change.answers or () if one.worse
    ]  # fmt: skip
    if not lines:
        return []
    columns = ["stage", "learned", "task", "row", "right answer", "before", "after", "route before", "route after"]
    caption = "Row: its number in the data; its text is not in the predictions."
    if len(lines) > SHOWN_ROWS:
        caption += f" The first {SHOWN_ROWS} of {len(lines):,}; the CSV has {min(len(lines), LISTED_ROWS)}."
    shown = [[shortened(value) for value in line] for line in lines[:SHOWN_ROWS]]
    return [
        TableBlock(
            "became-worse", "Answers to earlier tasks that a stage made worse", Table(columns, lines[:LISTED_ROWS]), caption,
            shown=Table(columns, shown),
        )
    ]  # fmt: skip
