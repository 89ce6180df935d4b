"""Texts of no task: what each stored threshold loses of the bank's own test rows, and what it catches of other texts.

A bank keeps, for shares of its training rows, the score from which on a text looks more like the background than like its
tasks (``KeyedRouter.foreign_above``). With abstention such a text goes to the base model, without an adapter.
"""

from __future__ import annotations

from collections.abc import Sequence

from amlora_dist.reporting.facts import RunFacts
from amlora_dist.reporting.figures import Number, Series, Table, Value, line_chart
from amlora_dist.reporting.page import Block, TableBlock
from amlora_dist.reporting.run_charts import short_names


def foreign_blocks(facts: RunFacts) -> list[Block]:
    """A curve and its table; nothing where the bank stores no thresholds, or no row was scored with a background."""
    above = sorted(facts.foreign_above)
    known = {task: scores for task in facts.tasks if (scores := _scores(facts, task))}
    if not above or not known:
        return []
    names = short_names(list(known))
    own = {name: _shares(scores, above) for name, scores in zip(names, known.values(), strict=True)}
    whole = _shares([score for scores in known.values() for score in scores], above)
    others = {task: _shares(scores, above) for task in _others(facts) if (scores := _scores(facts, task))}
    places, ticks = list(range(1, len(above) + 1)), [f"{lost:g}" for lost, _ in above]
    series = [Series("lost: the tasks' own test rows", places, whole)]
    series += [Series(name, places, shares) for name, shares in others.items()]
    expected: list[Number] = [lost for lost, _ in above]
    series.append(Series("lost: training rows", places, expected, muted=True))
    columns = ["training rows lost", *ticks]
    rows: list[list[Value]] = [["threshold, log odds", *(threshold for _, threshold in above)]]
    rows += [[name, *shares] for name, shares in (*own.items(), ("all of them", whole), *others.items())]
    what = "Share of texts that the base model would answer, by the threshold that loses so many of the training rows."
    if others:
        what += " Of a test set that no stage learned this is what is caught, if its texts belong to no task of the bank."
    return [
        line_chart(
            "foreign",
            "Texts taken for those of no task",
            f"{what} {_state(facts)}",
            series,
            x_name="share of training rows lost",
            y_name="share of texts",
            y_range=(0, 1.02 if others else None),
            x_ticks=ticks,
        ),
        TableBlock("foreign-by-task", "Share of texts taken for those of no task", Table(columns, rows),
                   "By task, and of the test sets that no stage learned."),
    ]  # fmt: skip


def _scores(facts: RunFacts, task: str) -> list[float]:
    """How foreign the last bank finds each test row; nothing where one of them has no score."""
    found = [p.foreign for p in facts.cell("router", task, len(facts.stages)) or []]
    known = [score for score in found if score is not None]
    return known if len(known) == len(found) else []


def _others(facts: RunFacts) -> list[str]:
    """Test sets that no stage learned; paraphrased questions go with the texts of a task, and are left out."""
    return [one["task"] for one in facts.result.get("also") or [] if ".paraphrase" not in one["task"]]


def _shares(scores: Sequence[float], above: Sequence[tuple[float, float]]) -> list[Number]:
    return [sum(score > threshold for score in scores) / len(scores) for _, threshold in above]


def _state(facts: RunFacts) -> str:
    gate = (facts.config.get("router") or {}).get("gate") or {}
    if gate.get("abstention"):
        return f"Abstention is on in this run, at {gate.get('lost', 0.03):g}."
    return "Abstention is off in this run: no text was lost or caught; --abstain turns it on for the finished bank."
