"""What the last bank answered: confusions task by task, and some right and wrong answers with their routes.

Predictions hold the number of a row and the answers, never the row's text; neither does the page.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from amlora_dist.evaluation.scoring import Prediction
from amlora_dist.evaluation.text_metrics import normalise_label
from amlora_dist.reporting.facts import RunFacts
from amlora_dist.reporting.figures import Table, Value, heat_map
from amlora_dist.reporting.page import Block, TableBlock

DRAWN_LABELS = 12
"""Labels of a task up to which its confusions are a drawing; a task with more has a table of the most frequent ones."""
SHOWN_CONFUSIONS = 15
SHOWN_ANSWERS = 10
"""Right ones, and as many wrong ones."""
LONGEST_ANSWER = 80
"""Letters of an answer in the table; the CSV has the whole."""
OTHER = "other words"
"""What is none of the task's labels: another task's label, or what the model wrote freely."""

Counts = dict[str, Counter[str]]


def confusions(facts: RunFacts, task: str) -> Counts | None:
    """Rows after the last stage by right label and given answer; None of free text, and where nothing was scored.

    Labels are in the task's order. A given answer that is none of them counts as ``OTHER``.
    """
    labels = facts.inputs.get("tasks", {}).get(task, {}).get("labels")
    found = facts.cell("router", task, len(facts.stages))
    if not labels or not found:
        return None
    known = {normalise_label(label): label for label in labels}
    counts: Counts = {label: Counter() for label in labels}
    for p in found:
        right = known.get(normalise_label(p.answer), p.answer)
        counts.setdefault(right, Counter())[known.get(normalise_label(p.given), OTHER)] += 1
    return counts


def confusion_blocks(facts: RunFacts) -> list[Block]:
    """A drawing or a table for each labelled task, in the order of stages."""
    blocks: list[Block] = []
    for number, task in enumerate(facts.tasks, start=1):
        if (counts := confusions(facts, task)) is not None:
            name = f"confusion-{number}"
            blocks.append(_drawn(name, task, counts) if len(counts) <= DRAWN_LABELS else _listed(name, task, counts))
    return blocks


def _drawn(name: str, task: str, counts: Counts) -> Block:
    labels = list(counts)
    columns = [*labels, OTHER] if any(line[OTHER] for line in counts.values()) else labels
    return heat_map(
        name,
        f"{task}: right and given answers",
        "Number of rows by right answer; framed: answered right.",
        labels,
        columns,
        [[line[column] for column in columns] for line in counts.values()],
        low=0.0,
        digits=0,
        row_name="right answer",
        column_name="given answer",
        marked=[(n, n) for n in range(len(labels))],
    )


def _listed(name: str, task: str, counts: Counts) -> Block:
    wrong = [
        (right, given, rows, line.total())
        for right, line in counts.items()
        for given, rows in line.items()
        if given != right
    ]
    wrong.sort(key=lambda one: -one[2])
    lines: list[list[Value]] = [[right, given, rows, rows / of] for right, given, rows, of in wrong]
    table = Table(["right answer", "given answer", "rows", "share of the right answer's rows"], lines)
    cut = len(lines) > SHOWN_CONFUSIONS
    return TableBlock(
        name,
        f"{task}: most frequent confusions",
        table,
        f"The first {SHOWN_CONFUSIONS} of {len(lines)}; the CSV has all." if cut else "",
        shown=Table(table.columns, lines[:SHOWN_CONFUSIONS]) if cut else None,
    )


def answer_blocks(facts: RunFacts) -> list[Block]:
    """Ten right and ten wrong answers of the last bank with their routes, each task in turn."""
    blocks: list[Block] = []
    for name, title, wanted in (("right", "Answered right", True), ("wrong", "Answered wrong", False)):
        chosen = _in_turn(facts, wanted)
        if not chosen:
            continue
        whole = [_line(facts, task, p) for task, p in chosen]
        columns = ["task", "row", "right answer", "given answer", "score", "routed to", "its gate"]
        shown = [[shortened(value) for value in line] for line in whole]
        caption = (
            "The first ones of each task in turn. Row: its number in the data; its text is not in the predictions."
            " Free text counts as right from a score of 0.5 on."
        )
        blocks.append(TableBlock(f"answers-{name}", title, Table(columns, whole), caption, shown=Table(columns, shown)))
    return blocks


def _in_turn(facts: RunFacts, right: bool) -> list[tuple[str, Prediction]]:
    lines = {
        task: [p for p in facts.cell("router", task, len(facts.stages)) or [] if (p.correct >= 0.5) is right]
        for task in facts.tasks
    }
    longest = max((len(line) for line in lines.values()), default=0)
    turns = [(task, line[n]) for n in range(longest) for task, line in lines.items() if n < len(line)]
    chosen = turns[:SHOWN_ANSWERS]
    return sorted(chosen, key=lambda one: facts.tasks.index(one[0]))


def _line(facts: RunFacts, task: str, p: Prediction) -> list[Value]:
    route, gate = _route(p, [*facts.inputs.get("parent_tasks", []), *(stage.task for stage in facts.stages)])
    return [task, p.row, p.answer, p.given, p.correct, route, gate]


def _route(p: Prediction, adapters: Sequence[str]) -> tuple[str | None, float | None]:
    """Where the text was routed to and that adapter's gate; nothing without a router."""
    if not p.gates or len(p.gates) != len(adapters):
        return p.route, None
    gates = dict(zip(adapters, p.gates, strict=True))
    best = p.route if p.route in gates else max(gates, key=gates.__getitem__)
    return (best, gates[best]) if gates[best] > 0 or p.route else ("zero adapter", 0.0)


def shortened(value: Value) -> Value:
    """A text on one line, as long as a table has room for; anything else as it is."""
    if not isinstance(value, str):
        return value
    text = " ".join(value.split())
    return text if len(text) <= LONGEST_ANSWER else f"{text[: LONGEST_ANSWER - 1]}…"
