"""The figures of one run's report, from its facts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from amlora_dist.evaluation.intervals import mean_interval
from amlora_dist.evaluation.metrics import minus
from amlora_dist.reporting.baselines import Baselines
from amlora_dist.reporting.diagnosis import Recipe
from amlora_dist.reporting.facts import RunFacts
from amlora_dist.reporting.figures import Chart, Number, Series, Table, Value, bar_chart, heat_map, line_chart
from amlora_dist.reporting.page import Block, TableBlock
from amlora_dist.reporting.routing_facts import StageRouting

LINE_POINTS = 160
"""Points of a drawn loss curve; the CSV behind it has every step."""

FLOOR = " Chance draws the task's labels evenly; the majority label is always the most frequent one of these rows."
"""What a caption says of the two baselines."""

SHOWN_LINES = 30
"""Of a table that grows with tasks x stages."""


def capital(name: str) -> str:
    """A name as a title begins with it."""
    return f"{name[:1].upper()}{name[1:]}"


def short_names(tasks: Sequence[str]) -> list[str]:
    """Names without a folder that all share (``helpdesk/``)."""
    folders = {name.rpartition("/")[0] for name in tasks}
    return [name.rpartition("/")[2] for name in tasks] if len(folders) == 1 else list(tasks)


def accuracy_charts(facts: RunFacts, floor: Baselines) -> list[Chart]:
    """The accuracy matrix; and how each task fared from stage to stage; both with what needs no learning."""
    tasks = short_names(facts.tasks)
    stages = [f"after {n} {name}" for n, name in enumerate(tasks, start=1)] if facts.in_sequence else []
    rows = ["untrained", *(stages[: len(facts.stages)] or [stage.task for stage in facts.stages])]
    values: list[list[Number]] = facts.matrix
    framed = [(n, n - 1) for n in range(1, len(values))] if facts.in_sequence else []
    if facts.result.get("oracle"):
        rows, values = [*rows, "oracle"], [*values, list(facts.result["oracle"])]
    for name, line in floor.lines:
        rows, values = [*rows, name], [*values, line]
    charts = [
        heat_map(
            "accuracy-matrix",
            f"{capital(facts.measure)} matrix",
            "Read a column downwards: what was learned (framed) should stay. The oracle is the last bank, told the task."
            f"{FLOOR if floor.lines else ''}",
            rows,
            tasks,
            values,
            marked=framed,
            row_name="stage",
            column_name="task",
        )
    ]
    if facts.in_sequence and len(facts.stages) > 1:
        charts.append(_forgetting_curves(facts, tasks, floor))
    return charts


def _forgetting_curves(facts: RunFacts, tasks: Sequence[str], floor: Baselines) -> Chart:
    stages = range(1, len(facts.stages) + 1)
    series = []
    for i, name in enumerate(tasks[: len(facts.stages)]):
        y = [facts.matrix[t][i] for t in stages]
        low: list[Number] = []
        high: list[Number] = []
        for t in stages:
            scores = facts.row_scores("router", facts.tasks[i], t)
            interval = mean_interval(scores, seed=int(facts.result["seed"]), resamples=500) if scores else None
            low.append(interval.low if interval else None)
            high.append(interval.high if interval else None)
        shaded = len(tasks) <= 6
        series.append(Series(name, list(stages), y, low if shaded else None, high if shaded else None))
    for name, mean in floor.means:
        series.append(Series(f"{name}, mean", list(stages), [mean] * len(stages), muted=True))
    return line_chart(
        "learning-curves",
        "Each task from stage to stage",
        "Flat lines after a task's own stage mean that nothing was forgotten. Bands: 95% interval over test rows. Grey:"
        " means over the tasks of what needs no learning.",
        series,
        x_name="after stage",
        y_name=facts.measure,
        y_range=(0, 1.02),
        x_ticks=[str(t) for t in stages],
    )


def routing_blocks(routing: Sequence[StageRouting]) -> list[Block]:
    """Attention mass, routing accuracy and drift from stage to stage, and the figures task by task."""
    if not routing:
        return []
    last = routing[-1].statistics
    adapters = [*short_names(last.adapters), "zero adapter"]
    mass = [
        [None] * len(adapters) if line is None else [*line, zero]
        for line, zero in zip(last.mass, last.zero_mass, strict=True)
    ]
    own = [(n, last.adapters.index(task)) for n, task in enumerate(last.tasks) if task in last.adapters]
    charts: list[Block] = [
        heat_map(
            "attention",
            "Attention mass, task by adapter",
            f"Mean gate on each task's test rows after stage {routing[-1].stage}; framed: its own adapter. The zero adapter"
            " adds nothing: the base model answers.",
            short_names(last.tasks),
            adapters,
            mass,
            low=0.0,
            marked=own,
            row_name="task",
            column_name="adapter",
        )
    ]
    if len(routing) > 1:
        charts.append(_routing_curves(routing))
    rows: list[list[Value]] = [
        [task, last.accuracy[n], last.effective[n], last.zeros[n], last.zero_mass[n], last.abstention[n], last.inputs[n]]
        for n, task in enumerate(last.tasks)
    ]
    rows.append(["all", last.overall_accuracy, last.overall_effective, last.overall_zeros, None, last.overall_abstention,
                 sum(last.inputs)])  # fmt: skip
    columns = ["task", "routing accuracy", "effective adapters", "share of zeros", "zero adapter", "abstains", "inputs"]
    caption = (
        "Effective adapters: exp of the entropy of the gates, 1 for a single adapter. Share of zeros: gates that are"
        " exactly 0."
    )
    charts.append(TableBlock("routing", "Routing task by task", Table(columns, rows), caption))
    if len(routing) > 1:
        charts.append(_attention_by_stage(routing))
    return charts


def _attention_by_stage(routing: Sequence[StageRouting]) -> TableBlock:
    """The attention mass after every stage: what a new task took from the old ones."""
    adapters = routing[-1].statistics.adapters
    rows: list[list[Value]] = []
    for one in routing:
        found = one.statistics
        for task, line, zero in zip(found.tasks, found.mass, found.zero_mass, strict=True):
            mass = dict(zip(found.adapters, line or [], strict=False))
            rows.append([one.stage, task, *(mass.get(adapter) for adapter in adapters), zero])
    columns = ["after stage", "task", *short_names(adapters), "zero adapter"]
    many = len(rows) > SHOWN_LINES
    return TableBlock(
        "attention-by-stage",
        "Attention mass after every stage",
        Table(columns, rows),
        f"The first {SHOWN_LINES} lines; the CSV has all." if many else "",
        digits=2,
        shown=Table(columns, rows[:SHOWN_LINES]) if many else None,
    )


def knockout_blocks(facts: RunFacts) -> list[Block]:
    """What each task loses with each adapter disabled."""
    if (disabled := facts.result.get("knockout")) is None:
        return []
    adapters = [*facts.inputs.get("parent_tasks", []), *(stage.task for stage in facts.stages)]
    last = facts.matrix[-1]
    values = [[minus(score, whole) for score, whole in zip(line, last, strict=True)] for line in disabled]
    own = [(adapters.index(task), n) for n, task in enumerate(facts.tasks) if task in adapters]
    names = [f"without {name}" for name in short_names(adapters)]
    return [
        heat_map(
            "knockout",
            f"Knock-out: {facts.measure} lost with an adapter disabled",
            f"{capital(facts.measure)} of the last bank with one adapter adding nothing, wherever gates or recipes use it,"
            " less what it has as it is. Framed: a task's own adapter. What is off the frames is what tasks owe to each"
            " other.",
            names,
            short_names(facts.tasks),
            values,
            diverging=True,
            marked=own,
            row_name="bank",
            column_name="task",
        ),
        TableBlock(
            "knockout-accuracy",
            f"Knock-out {facts.measure}",
            Table(["", *facts.tasks], [["as it is", *last], *([n, *line] for n, line in zip(names, disabled, strict=True))]),
        ),
    ]


def _routing_curves(routing: Sequence[StageRouting]) -> Chart:
    stages = [one.stage for one in routing]
    drifts = [one.drift for one in routing]
    series = [
        Series("routing accuracy", stages, [one.learned_accuracy for one in routing]),
        Series("old inputs that changed adapter", stages, [None if d is None else d.changed for d in drifts]),
        Series("old gates moved (total variation)", stages, [None if d is None else d.moved for d in drifts]),
        Series("old inputs taken by the new task", stages, [None if d is None else d.taken for d in drifts]),
    ]
    return line_chart(
        "routing-by-stage",
        "Routing and its drift from stage to stage",
        "Over the tasks learned so far. Drift compares a stage with the one before, on the test rows of the tasks that both"
        " know: moved and changed among the old adapters, taken by the newest.",
        series,
        x_name="after stage",
        y_name="share",
        y_range=(-0.02, 1.02),
        x_ticks=[str(stage) for stage in stages],
    )


def recipe_blocks(recipes: Sequence[Recipe]) -> list[Block]:
    """Mean absolute weight of each earlier adapter in each later task's recipe."""
    if not recipes:
        return []
    earlier = list(dict.fromkeys(task for recipe in recipes for task in recipe.weights))
    values = [[recipe.weights.get(task) for task in earlier] for recipe in recipes]
    names = short_names([recipe.task for recipe in recipes])
    zeros = ", ".join(f"{name} {recipe.zeros:.2f}" for name, recipe in zip(names, recipes, strict=True))
    chart = heat_map(
        "recipes",
        "Recipes: weights of earlier adapters",
        f"Mean absolute weight over the adapted layers; 1 is as much as the task's own adapter. Share of exact"
        f" zeros: {zeros}.",
        names,
        short_names(earlier),
        values,
        low=0.0,
        row_name="task",
        column_name="earlier adapter",
    )
    return [chart]


def memory_blocks(facts: RunFacts) -> list[Block]:
    """What the refits of earlier tasks' rows came to, where the run had a memory."""
    rows: list[list[Value]] = [
        [stage.task, task, one["rows"], one["before"], one["after"], one["refitted"]]
        for stage in facts.stages
        for task, one in ((stage.training.get("memory") or {}).get("tasks") or {}).items()
    ]
    columns = ["after stage", "task", "memory rows", "loss as it was", "loss refitted", "taken"]
    caption = (
        "Weights of a task's row, refitted on held-out rows of it. Losses are nats per target token on the half of the"
        " memory that each fit has not seen; a refit that is no better is not taken."
    )
    return [TableBlock("memory", "Refits of earlier tasks' rows", Table(columns, rows), caption)] if rows else []


def training_blocks(facts: RunFacts) -> list[Block]:
    """Loss curves, and where the time went."""
    blocks: list[Block] = []
    curves = {stage.task: stage.training["losses"] for stage in facts.stages if stage.training.get("losses")}
    if curves:
        blocks.append(_loss_chart(curves))
    names = short_names([stage.task for stage in facts.stages])
    parts = {"training": "train_seconds", "scoring": "score_seconds", "other": "other_seconds"}
    blocks.append(
        bar_chart(
            "time",
            "Where the time went",
            "Seconds of each stage; a reused stage shows what its training took where it was trained. Other: loading,"
            " statistics, publishing.",
            names,
            [(name, [stage.public.get(key) for stage in facts.stages]) for name, key in parts.items()],
            x_name="seconds",
        )
    )
    rows: list[list[Value]] = [
        [stage.task, stage.reused, *(stage.public.get(key) for key in (*parts.values(), "tokens", "tokens_per_second")),
         stage.public.get("recipe_from"), _won_by(stage.public), (stage.public.get("race") or {}).get("losers_seconds"),
         stage.public.get("kept_step"), stage.public.get("held_seconds")]
        for stage in facts.stages
    ]  # fmt: skip
    columns = ["stage", "reused", *(f"{name}, s" for name in parts), "tokens", "tokens/s", "recipe started from"]
    columns += ["its race won by", "its losers, s", "step kept, where the best is", "looks at held-out rows, s"]
    caption = (
        "Looks are part of the training's seconds; the losers of the race for a recipe's start are not, nor are those of the"
        " race for the learning rate. A stage that was taken over does not say what its race and its looks took."
    )
    blocks.append(TableBlock("cost", "Cost of each stage", Table(columns, rows), caption, digits=2))
    return [*blocks, *_rate_blocks(facts)]


HOW_RATE = {
    "parent": "that of the bank that the run began on",
    "default": "the documented default: there was no race",
}


def _rate_blocks(facts: RunFacts) -> list[Block]:
    """How ``training.learning_rate: auto`` was settled; nothing where the rate was given, or nobody noted it."""
    rate = facts.inputs.get("rate")
    if not rate:
        return []
    text = f"training.learning_rate was auto, and came to {rate['chosen']:g}."
    losses, seconds = rate.get("losses"), rate.get("seconds") or {}
    if not losses:
        how = Table(["rate", "what it is"], [[rate["chosen"], HOW_RATE.get(rate["how"], rate["how"])]])
        return [TableBlock("rates", "Learning rate", how, text, digits=4)]
    rows: list[list[Value]] = [
        [name, loss, seconds.get(name), float(name) == rate["chosen"]] for name, loss in losses.items()
    ]
    lost = sum(spent for name, spent in seconds.items() if float(name) != rate["chosen"])
    text += f" Each took the first {rate['steps']} steps of the first stage; the winner's are the stage's own."
    text += f" The losers took {lost:.0f} s." if seconds else ""
    columns = ["rate", "loss on held-out rows", "seconds", "won"]
    return [TableBlock("rates", "The race for the learning rate", Table(columns, rows), text, digits=4)]


def _won_by(stage: Mapping[str, Any]) -> float | None:
    """By how much, as a share of the held-out loss, the start of a recipe beat the start at zero; None: no race."""
    race = stage.get("race")
    if race is None:
        return None
    losses: dict[str, float | None] = race["losses"]
    won, none = losses[stage.get("recipe_from") or "none"], losses["none"]
    return 1.0 if none is None or won is None else 1.0 - won / none  # None: it diverged


def _loss_chart(curves: dict[str, list[float]]) -> Chart:
    series = []
    for name, losses in zip(short_names(list(curves)), curves.values(), strict=True):
        smooth = _smoothed(losses)
        places = sorted({round(n * (len(smooth) - 1) / (LINE_POINTS - 1)) for n in range(LINE_POINTS)})
        series.append(Series(name, [place + 1 for place in places], [smooth[place] for place in places]))
    drawn = line_chart(
        "loss",
        "Training loss",
        "Nats per target token, mean over a tenth of the steps before; the CSV has every step.",
        series,
        x_name="step of the stage",
        y_name="loss",
        y_range=(0, None),
        markers=False,
    )
    steps: list[list[Value]] = [[task, n, loss] for task, losses in curves.items() for n, loss in enumerate(losses, start=1)]
    return Chart(drawn.name, drawn.title, drawn.caption, drawn.figure, Table(["stage", "step", "loss"], steps))


def _smoothed(losses: Sequence[float]) -> list[float]:
    window = max(1, len(losses) // 10)
    return [math.fsum(losses[max(0, n - window + 1) : n + 1]) / min(window, n + 1) for n in range(len(losses))]
