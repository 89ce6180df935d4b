"""The report of one run: from facts to a page. Every figure is computed here from stored predictions and scores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import yaml

from amlora_dist.evaluation import metrics
from amlora_dist.evaluation.intervals import (
    Interval,
    cell_means,
    mean_interval,
    metric_interval,
    percentiles,
    resampled,
)
from amlora_dist.evaluation.metrics import MatrixMetric
from amlora_dist.evaluation.plain_choice import OWN_PROMPT, shown_choice
from amlora_dist.reporting import run_charts
from amlora_dist.reporting.answers import answer_blocks, confusion_blocks
from amlora_dist.reporting.backward import backward_blocks
from amlora_dist.reporting.baselines import CHANCE, MAJORITY, Baselines, baselines
from amlora_dist.reporting.diagnosis import Finding, Recipe, RunFigures, diagnose
from amlora_dist.reporting.facts import RunFacts
from amlora_dist.reporting.figures import Table, Value
from amlora_dist.reporting.foreign_texts import foreign_blocks
from amlora_dist.reporting.page import Block, DownloadsBlock, Page, Section, TableBlock, TextBlock, Tile, fraction, signed
from amlora_dist.reporting.routing_facts import StageRouting, routing_by_stage

PREDICTIONS_BYTES = 900_000
"""Predictions that go into the page, the newest stages first; MLflow has all of them."""

FORMULAS = {
    "average_performance": "1/n Σ R[n,i]: mean of the last row (Lopez-Paz and Ranzato 2017)",
    "average_incremental_performance": "mean over stages of the average performance there (Rebuffi et al. 2017)",
    "backward_transfer": "1/(n−1) Σ (R[n,i] − R[i,i]) (Lopez-Paz and Ranzato 2017)",
    "forgetting": "1/(n−1) Σ (max R[t,i] − R[n,i]) (Chaudhry et al. 2018)",
    "forward_transfer_gem": "1/(n−1) Σ (R[i−1,i] − R[0,i]) (Lopez-Paz and Ranzato 2017)",
    "forward_transfer_single": "1/n Σ (R[i,i] − single_i), single_i from a per_task run of ours (Chaudhry et al. 2018)",
    "learning_accuracy": "1/n Σ R[i,i] (Riemer et al. 2019)",
    "oracle": "this bank, told the task: mean over tasks",
    "below_oracle": "oracle − average performance, on the same rows",
    "routing_accuracy": "share of inputs whose largest gate is their own task's adapter",
}


def run_metrics(facts: RunFacts) -> dict[str, tuple[float | None, Interval | None]]:
    """Every metric of a run with its bootstrap interval (None where predictions are missing), by name."""
    seed = int(facts.result["seed"])
    cells, matrix = facts.cells(), facts.matrix
    whole: dict[str, MatrixMetric] = metrics.METRICS if facts.in_sequence else {"average_performance": last_row_mean}
    found: dict[str, tuple[float | None, Interval | None]] = {}
    means, drawn = cell_means(cells), resampled(cells, seed=seed)
    for name, metric in whole.items():
        known = metric(means) is not None
        value = metric(matrix)
        interval = percentiles(value, [metric(one) for one in drawn]) if known and value is not None else None
        found[name] = (value, interval)
    if (oracle := facts.result.get("oracle")) is not None:
        found["oracle"] = (metrics.mean(oracle), metric_interval(facts.oracle_cells(), last_row_mean, seed=seed))
        gap = metrics.minus(metrics.mean(oracle), last_row_mean(matrix))
        found["below_oracle"] = (gap, metric_interval(facts.oracle_cells(), _gap, seed=seed))
    return found


def run_page(facts: RunFacts) -> Page:
    """The report of a run."""
    routing = routing_by_stage(facts)
    floor = baselines(facts)
    evidence = evidence_of(facts, routing, floor)
    findings = diagnose(evidence)
    found = run_metrics(facts)
    return Page(
        title=f"Run {facts.run_id}",
        summary=_summary(facts, found, findings),
        tiles=_tiles(found, routing),
        findings=findings,
        sections=[
            Section("What was learned", _learned_text(facts), _learned(facts, found, floor)),
            Section(
                "Answers",
                f"What the last bank answered. {facts.how.sentence} Predictions keep a row's number and its answers, never"
                " its text: neither does this page.",
                [*confusion_blocks(facts), *answer_blocks(facts)],
            ),
            Section(
                "Routing",
                f"Which adapters answer for which task, over {facts.split} rows. {facts.how.router}",
                [*run_charts.routing_blocks(routing), *foreign_blocks(facts), *run_charts.knockout_blocks(facts)],
            ),
            Section(
                "What stages took over",
                "A recipe is the set of weights of earlier adapters next to which a task was learned.",
                [*run_charts.recipe_blocks(evidence.recipes), *run_charts.memory_blocks(facts)],
            ),
            Section("Training", "", run_charts.training_blocks(facts)),
            Section("Raw data", "Every number above follows from these.", _raw(facts)),
            Section("How it was made", "", _made(facts)),
        ],
        facts=_facts(facts),
        links=[(f"run {facts.run} in MLflow", facts.page)],
    )


def evidence_of(facts: RunFacts, routing: Sequence[StageRouting], floor: Baselines) -> RunFigures:
    """What the diagnosis looks at."""
    last = routing[-1] if routing and routing[-1].stage == len(facts.stages) else None
    place = {task: n for n, task in enumerate(last.statistics.tasks)} if last else {}

    def in_order(values: Sequence[Any]) -> list[Any]:
        return [values[place[task]] if task in place else None for task in facts.tasks]

    about = facts.described
    mixed: dict[tuple[str, str], float] = {}
    recipes = []
    for stage in facts.stages:
        for task, others in (stage.training.get("mixed") or {}).items():
            mixed |= {(task, other): share for other, share in others.items()}
        if (recipe := stage.training.get("recipe")) is not None:
            recipes.append(Recipe(stage.task, stage.training.get("recipe_from"), recipe["weights"], recipe["zeros"]))
    training = facts.config.get("training", {})
    return RunFigures(
        tasks=facts.tasks,
        routed=last is not None,
        matrix=facts.matrix if facts.in_sequence else [],
        oracle=facts.result.get("oracle"),
        chance=floor.chance,
        majority=floor.majority,
        rows=[len(facts.cell("router", task, len(facts.stages)) or []) for task in facts.tasks],
        adapters=last.statistics.adapters if last else [],
        mass=in_order(last.statistics.mass) if last else [],
        zero_mass=in_order(last.statistics.zero_mass) if last else [],
        chosen=in_order(last.chosen) if last else [],
        effective=last.statistics.overall_effective if last else None,
        recipes=recipes,
        l1=float(training.get("l1", 0.0)),
        mixed=[(task, other, share) for (task, other), share in mixed.items()],
        losses={stage.task: stage.training["losses"] for stage in facts.stages if stage.training.get("losses")},
        text_alone=facts.how.plain,
        leaks={task: one["leaks"] for task, one in about.items() if one.get("leaks")},
        bad_rows={task: one["bad_rows"] for task, one in about.items() if one.get("bad_rows")},
    )


def memory_of(facts: RunFacts) -> int:
    """Rows of each earlier task that its row was refitted on; 0: no memory."""
    return max((int((stage.training.get("memory") or {}).get("rows", 0)) for stage in facts.stages), default=0)


def last_row_mean(matrix: metrics.Matrix) -> float | None:
    """Mean of the last row over all its columns: the average performance of one stage about all tasks."""
    return metrics.mean(matrix[-1])


def _gap(matrix: metrics.Matrix) -> float | None:
    return metrics.minus(metrics.mean(matrix[1]), metrics.mean(matrix[0]))


def _summary(
    facts: RunFacts, found: dict[str, tuple[float | None, Interval | None]], findings: Sequence[Finding]
) -> str:
    learned = len(facts.stages) if facts.in_sequence else len(facts.tasks)
    value, interval = found["average_performance"]
    text = f"{learned} of {len(facts.tasks)} tasks learned one after another by {facts.result['method']}"
    if not facts.in_sequence:
        text = f"{learned} tasks, {facts.result['method']}"
    if count := memory_of(facts):
        text += f" with a memory of {count} rows a task"
    if value is not None:
        text += f": {facts.measure} {fraction(value)} on average"
        text += f" ({fraction(interval.low)} to {fraction(interval.high)} for other test rows)" if interval else ""
    gap = found.get("below_oracle", (None, None))[0]
    if gap is not None:
        text += f", {fraction(abs(gap))} {'below' if gap >= 0 else 'above'} the same bank when told the task"
    text += _retained(facts)
    alarms = sum(finding.level == "alarm" for finding in findings)
    return text + (f". {alarms} alarm{'s' if alarms > 1 else ''}: see the diagnosis." if alarms else ".")


NOTHING = 0.0005
"""A change that the page's three decimals do not show."""


def _retained(facts: RunFacts) -> str:
    """The sentence on what later stages did to earlier tasks; empty where that is not known."""
    earlier = facts.tasks[: len(facts.stages) - 1] if facts.in_sequence else []
    moved = {task: metrics.minus(facts.matrix[-1][i], facts.matrix[i + 1][i]) for i, task in enumerate(earlier)}
    changes = {task: value for task, value in moved.items() if value is not None}
    if not changes:
        return ""
    mean = metrics.mean(list(changes.values())) or 0.0
    worst = min(changes, key=changes.__getitem__)
    if changes[worst] > -NOTHING:
        gained = f"; they gained {fraction(mean)} on average" if mean >= NOTHING else ""
        return f". Nothing was forgotten: no earlier task has less than after its own stage{gained}"
    lost = f"{worst} {signed(changes[worst])}"
    if mean > -NOTHING:
        gained = f"gains outweigh losses by {fraction(mean)}" if mean >= NOTHING else "gains and losses cancel out"
        return f". Nothing was forgotten on average: in earlier tasks {gained} (the one that lost most: {lost})"
    return f". Later stages changed earlier tasks by {signed(mean)} on average (the one that lost most: {lost})"


def _tiles(found: dict[str, tuple[float | None, Interval | None]], routing: Sequence[StageRouting]) -> list[Tile]:
    names = {
        "average_performance": "average performance",
        "below_oracle": "below the oracle",
        "backward_transfer": "backward transfer",
        "forgetting": "forgetting",
        "forward_transfer_gem": "forward transfer (GEM)",
    }
    tiles = []
    for name, label in names.items():
        value, interval = found.get(name, (None, None))
        if value is None:
            continue
        show = signed if name in ("backward_transfer", "forward_transfer_gem") else fraction
        between = f"{show(interval.low)} to {show(interval.high)}" if interval else "no interval: predictions missing"
        none = name == "forgetting" and value < NOTHING
        tiles.append(Tile(label, "none" if none else show(value), f"on average; {between}" if none else between))
    if routing and routing[-1].learned_accuracy is not None:
        last = routing[-1]
        tiles.append(Tile("routing accuracy", fraction(last.learned_accuracy or 0.0), f"after stage {last.stage}"))
        if last.statistics.overall_effective is not None:
            total = len(last.statistics.adapters)
            tiles.append(Tile("effective adapters", f"{last.statistics.overall_effective:.2f}", f"of {total}"))
    return tiles


def _learned_text(facts: RunFacts) -> str:
    name = run_charts.capital(facts.measure)
    if facts.how.plain:
        meaning = (
            f"{name} over the {facts.split} rows, as served. {facts.how.sentence} Only the oracle, and lines that are called"
            " told, are given the task; the untrained model is asked behind each task's own prompt."
        )
    else:
        meaning = (
            f"{name} over the {facts.split} rows, by {facts.how.what} (of free text: by the task's metric)."
            f" {facts.how.sentence}"
        )
    return (
        f"{meaning} Intervals (95%, bootstrap) say what other test rows would have given, and nothing of other seeds. All"
        " scores and shares on this page are fractions from 0 to 1."
    )


ELSEWHERE = "keys_elsewhere"
"""A number of rows; what stands next to it in the table are shares."""
LAST = {
    "routing_accuracy": "routed right", "model_accuracy": "model alone", "keys_accuracy": "keys alone",
    "greedy_accuracy": "written freely", "told_model_accuracy": "told the task, model alone",
    "own_prompt": "own prompt (told the task)", ELSEWHERE: "rows whose keys prefer another task's label",
}  # fmt: skip
"""Rows about the last bank next to the accuracy of its served answers, and what they are called."""
RANKED = "by ranking"
"""What the model alone does with plain text of which it knows no task."""


def _by_evidence(facts: RunFacts) -> list[Block]:
    """What the last bank answers, by kind of evidence; nothing where that was not scored."""
    found = facts.result.get("last") or {}
    rows: list[list[Value]] = [
        [RANKED if key == "model_accuracy" and OWN_PROMPT in found else words, *found[key]]
        for key, words in LAST.items()
        if key in found
    ]
    if not rows:
        return []
    note = "Written freely: nothing limits the output to labels."
    if (chosen := shown_choice(facts.result)) is not None:
        note = f"By ranking: the best of the labels of all tasks learned so far. {note} {chosen.sentence}"
    if "keys_accuracy" in found:
        note = (
            "The served answer of a labelled task weighs two kinds of evidence: what the model says of each label, and what"
            f" the keys say. {note}"
        )
    if ELSEWHERE in found:
        note += (
            " Where the keys prefer another task's label, the label that they like best of all is none of the routed task's:"
            " the task won as a whole, by its other labels or by the keys for whole tasks."
        )
    return [TableBlock("evidence", "The last bank's answers, by kind of evidence", Table(["", *facts.tasks], rows), note)]


def _learned(
    facts: RunFacts, found: dict[str, tuple[float | None, Interval | None]], floor: Baselines
) -> list[Block]:
    seed = int(facts.result["seed"])
    last = len(facts.stages)
    rows: list[list[Value]] = []
    for i, task in enumerate(facts.tasks):
        scores = facts.row_scores("router", task, last)
        interval = mean_interval(scores, seed=seed) if scores else None
        own = facts.matrix[i + 1][i] if facts.in_sequence and i < last else None
        ranked = facts.result["ranked_accuracy_matrix"][-1][i]
        oracle = facts.result["oracle"][i] if facts.result.get("oracle") else None
        ends = [interval.low, interval.high] if interval else [None, None]
        rows.append([task, facts.matrix[0][i], floor.chance[i], floor.majority[i], own, facts.matrix[-1][i], *ends, oracle,
                     ranked, len(scores or []) or None])  # fmt: skip
    ranks = f"Ranked: the best of the task's own labels as the answer.{run_charts.FLOOR if floor.lines else ''}"
    columns = ["task", "untrained", CHANCE, MAJORITY, "own stage", "last", "low", "high", "oracle", "ranked, last", "rows"]
    also: list[list[Value]] = []
    for one in facts.result.get("also") or []:
        scores = facts.row_scores("router", one["task"], last)
        interval = mean_interval(scores, seed=seed) if scores else None
        ends = [interval.low, interval.high] if interval else [None, None]
        also.append([one["task"], one["accuracy"], *ends, one["ranked_accuracy"], one["rows"]])
    further = TableBlock(
        "also",
        "Test sets that no stage learned",
        Table(["test set", "accuracy", "low", "high", "ranked", "rows"], also),
        "Scored after the last stage: shifted text, or questions in other words.",
    )
    single = facts.result["metrics"].get("forward_transfer_single")
    named = [*found.items(), *([("forward_transfer_single", (single, None))] if single is not None else [])]
    lines: list[list[Value]] = [
        [name.replace("_", " "), value, *([i.low, i.high] if i else [None, None]), FORMULAS[name]]
        for name, (value, i) in named
    ]
    return [
        *run_charts.accuracy_charts(facts, floor),
        TableBlock("tasks", "Task by task", Table(columns, rows), ranks),
        *backward_blocks(facts),
        *([further] if also else []),
        *_by_evidence(facts),
        TableBlock("metrics", "Metrics", Table(["metric", "value", "low", "high", "formula"], lines), "– is undefined."),
    ]


def _raw(facts: RunFacts) -> list[Block]:
    tables: list[Block] = []
    titles = {"accuracy_matrix": run_charts.capital(facts.measure), "ranked_accuracy_matrix": "Ranked accuracy"}
    for key, title in titles.items():
        lines: list[list[Value]] = []
        if key == "accuracy_matrix":
            lines.append(["untrained", *facts.matrix[0]])
        lines += [
            [f"after {n} {stage.task}" if facts.in_sequence else stage.task, *row]
            for n, (stage, row) in enumerate(zip(facts.stages, facts.result[key], strict=True), start=1)
        ]
        if key == "accuracy_matrix" and facts.result.get("oracle"):
            lines.append(["oracle", *facts.result["oracle"]])
        tables.append(TableBlock(f"raw-{key}".replace("_", "-"), title, Table(["", *facts.tasks], lines)))
    files, left_out, size = [("result.json", json.dumps(facts.result, indent=1))], [], 0
    for number in range(len(facts.stages), 0, -1):
        text = predictions_csv(facts, number)
        if text is None:
            continue
        size += len(text.encode())
        if size > PREDICTIONS_BYTES:
            left_out.append(number)
        else:
            files.append((f"predictions-after-{number}.csv", text))
    where = ", ".join(f"stage {n} {facts.stages[n - 1].task}: run {facts.stages[n - 1].run}" for n in sorted(left_out))
    elsewhere = f"Too much for this page; artifacts predictions/ at {facts.tracking_uri}: {where}." if where else ""
    return [*tables, DownloadsBlock("Predictions and the result as JSON", files, elsewhere)]


def predictions_csv(facts: RunFacts, stage: int) -> str | None:
    """All predictions after a stage, one row of a task a line; None if there are none."""
    rows: list[list[Value]] = []
    for mode in ("router", "oracle", "untrained"):
        for task in facts.tasks:
            if any(s["mode"] == mode and s["task"] == task for s in facts.stages[stage - 1].scores):
                for p in facts.cell(mode, task, stage) or []:
                    gates = " ".join(f"{gate:.4g}" for gate in p.gates or [])
                    rows.append([mode, task, p.row, p.answer, p.output, p.correct, p.ranked_correct, gates])
    columns = ["mode", "task", "row", "answer", "output", "score", "ranked_correct", "gates"]
    return Table(columns, rows).csv() if rows else None


def _made(facts: RunFacts) -> list[Block]:
    rows: list[list[Value]] = []
    for stage in facts.stages:
        made = stage.training.get("trained_with") or {}
        rows.append(
            [stage.task, stage.public["version"], stage.reused, made.get("workers"), made.get("zero_stage"),
             made.get("threads"), made.get("device"), facts.page_of(stage.run) or None, stage.public["fingerprint"]]
        )  # fmt: skip
    data: list[list[Value]] = []
    for task, one in facts.described.items():
        for split, count in one["rows"].items():
            data.append([task, split, count, one["bad_rows"], one["prompt_style"], one["metric"], one["digests"][split]])
    versions: list[list[Value]] = [[name, version] for name, version in facts.inputs.get("versions", {}).items()]
    stages = ["stage", "version", "reused", "workers", "ZeRO", "threads", "device", "MLflow", "training fingerprint"]
    return [
        TableBlock("stages", "Stages and their fingerprints", _short(stages, rows)),
        TableBlock(
            "rows", "Rows that were used", _short(["task", "split", "rows", "bad", "prompts", "metric", "digest"], data)
        ),
        TableBlock("versions", "Versions", Table(["library", "version"], versions)),
        TextBlock("Configuration", yaml.safe_dump(facts.config, sort_keys=False, allow_unicode=True), folded=True),
    ]


def _short(columns: list[str], rows: list[list[Value]]) -> Table:
    """A table whose last column, a digest, is cut to what a person compares."""
    return Table(columns, [[*row[:-1], str(row[-1])[:16]] for row in rows])


def _facts(facts: RunFacts) -> dict[str, str]:
    base = facts.inputs.get("base", {})
    source = base.get("source") or facts.config.get("model", {}).get("source", "")
    return {
        "method": str(facts.result["method"]),
        "router": str(facts.config.get("router", {}).get("kind", "")),
        "seed": str(facts.result["seed"]),
        **({"memory": f"{count} rows of each earlier task"} if (count := memory_of(facts)) else {}),
        "model": f"{source} ({facts.inputs.get('dtype', 'dtype unknown')})",
        "base digest": str(base.get("digest", ""))[:12],
        "amlora-dist": str(facts.inputs.get("versions", {}).get("amlora-dist", "")),
    }

