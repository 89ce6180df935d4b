"""The report of a comparison: from its stored result to a page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import yaml

from amlora_dist.methods import offered
from amlora_dist.reporting.baselines import CHANCE, MAJORITY
from amlora_dist.reporting.figures import Chart, Dot, Number, Series, Table, Value, dot_plot, heat_map, line_chart
from amlora_dist.reporting.page import Block, DownloadsBlock, Page, Section, TableBlock, TextBlock, Tile, fraction
from amlora_dist.reporting.run_charts import FLOOR, capital, short_names

SHOWN = {
    "average_performance": "AP",
    "by_ranking": "by ranking",
    "written_freely": "written freely",
    "told": "told, own prompt",
    "ranked_average_performance": "ranked AP",
    "backward_transfer": "BWT",
    "forgetting": "forgetting",
    "forward_transfer_gem": "FWT (GEM)",
    "forward_transfer_single": "FWT (single)",
    "learning_accuracy": "LA",
    "average_incremental_performance": "AIP",
    "oracle": "oracle",
    "oracle_gap_recovered": "oracle gap recovered",
    "routing_accuracy": "routing accuracy",
}
"""Metrics in the order of the tables, with their headings."""
BOTH = {MAJORITY: "majority", CHANCE: "chance"}
"""Baselines by what they are called, and their keys in a comparison."""


def comparison_page(comparison: dict[str, Any]) -> Page:
    """The page of a comparison.

    Args:
        comparison: what ``amlora compare --json`` prints.
    """
    found = comparison["methods"]
    ranking = sorted(found, key=lambda method: -(_mean(found[method], "average_performance") or 0.0))
    count = len(comparison["runs"])
    return Page(
        title=f"Comparison {comparison['comparison_id']}",
        summary=_summary(comparison, ranking),
        tiles=[_tile(method, found[method]) for method in ranking[:6]],
        findings=None,
        sections=[
            Section(
                "Average performance",
                f"Mean over the runs of each method ({count} in all). Bars: 95% bootstrap interval over test rows. The"
                " spread over seeds and orders is in the table.",
                _performance(comparison, ranking),
            ),
            Section("Task by task", "", _tasks(comparison)),
            Section("Learning rates", _budget(comparison), _tuning(comparison)),
            Section("Runs", "Every run has a report of its own: amlora report RUN.", _runs(comparison)),
            Section(
                "How it was made",
                "",
                [
                    TextBlock("Command", comparison["command"]),
                    TextBlock("Configuration", yaml.safe_dump(comparison["config"], sort_keys=False), folded=True),
                    DownloadsBlock("The comparison as JSON", [("comparison.json", json.dumps(comparison, indent=1))]),
                ],
            ),
        ],
        facts={
            "methods": ", ".join(found),
            "seeds": ", ".join(map(str, comparison["seeds"])),
            "orders": ", ".join(comparison["orders"]),
            "split": comparison["config"]["evaluation"]["split"],
            "model": str(comparison["config"]["model"]["source"]),
        },
    )


def method_table(comparison: dict[str, Any]) -> Table:
    """One line a method: means, spread and interval of the average performance, and the means of the other metrics."""
    found = comparison["methods"]
    names = [name for name in SHOWN if any(one["metrics"].get(name) for one in found.values())]
    headings = [SHOWN[name] for name in names[1:]]
    chosen = ["plain text"] if any("plain_text" in one for one in found.values()) else []
    columns = ["method", *chosen, "AP", "± over runs", "low", "high", *headings, "runs", "train s", "learning rate"]
    rows: list[list[Value]] = []
    for method, one in found.items():
        own = one["metrics"].get("average_performance") or {}
        low, high = own.get("interval") or [None, None]
        others = [_mean(one, name) for name in names[1:]]
        rate = comparison["tuning"].get(method, {}).get("chosen")
        shown = with_memory(comparison, method) + _unlike_plain(one)
        rows.append(
            [shown, *[_ways(one) for _ in chosen], own.get("mean"), own.get("deviation"), low, high, *others, one["runs"],
             one["train_seconds"], None if rate is None else f"{rate:g}"]
        )  # fmt: skip
    return Table(columns, rows)


def _ways(one: dict[str, Any]) -> str | None:
    """How a method that finds no task by itself answers plain text; with the number of runs where they differ."""
    ways = one.get("plain_text") or {}
    return next(iter(ways)) if len(ways) == 1 else ", ".join(f"{way} {count}" for way, count in ways.items()) or None


def with_memory(comparison: dict[str, Any], method: str) -> str:
    """A method's name, with the memory of earlier rows that the configuration gives it and the name does not tell."""
    count = (comparison["config"].get("method_settings") or {}).get("memory_rows", 0)
    own = "memory" in offered(method.partition(":")[0]) and "memory_rows" not in method
    return f"{method} (memory: {count} rows a task)" if own and count else method


def _unlike_plain(one: dict[str, Any]) -> str:
    """What belongs behind a method's name whose scores are not of plain text; comparisons of before say nothing."""
    asked = one.get("asked", "plain text")
    return "" if asked == "plain text" else f" ({asked})"


def difference_table(comparison: dict[str, Any]) -> Table:
    """The reference minus each other method, in average performance."""
    rows: list[list[Value]] = []
    for method, one in comparison["differences"].items():
        low, high = (one or {}).get("interval") or [None, None]
        one = one or {}
        rows.append([method, one.get("mean"), one.get("deviation"), low, high, one.get("wins"), one.get("runs")])
    return Table([f"{comparison['reference']} minus", "AP", "± over runs", "low", "high", "wins", "of runs"], rows)


def also_table(comparison: dict[str, Any]) -> Table | None:
    """Mean scores on test sets that no stage learned, by method; None where there are none."""
    further = {method: one for method, one in (comparison.get("also") or {}).items() if one}
    sets = list(dict.fromkeys(name for one in further.values() for name in one))
    rows: list[list[Value]] = [[method, *(one.get(name) for name in sets)] for method, one in further.items()]
    return Table(["method", *sets], rows) if sets else None


def _summary(comparison: dict[str, Any], ranking: Sequence[str]) -> str:
    found, reference = comparison["methods"], comparison["reference"]
    best = ranking[0]
    text = f"{best} has the highest average performance, {fraction(_mean(found[best], 'average_performance'))}"
    differences = {m: one for m, one in comparison["differences"].items() if one is not None}
    behind = [m for m in differences if m not in ("per_task", "joint") and differences[m]["mean"] > 0]
    if behind:
        closest = min(behind, key=lambda m: differences[m]["mean"])
        low, high = differences[closest]["interval"] or (None, None)
        text += f". {reference} is ahead of {closest} by {fraction(differences[closest]['mean'])}"
        text += f" ({fraction(low)} to {fraction(high)})" if low is not None else ""
        text += f", of {len(behind)} methods behind it the closest" if len(behind) > 1 else ""
    for failed in comparison.get("failed", []):
        text += f". {failed['run_id']} failed: {failed['reason']}"
    return text + "."


def _tile(method: str, one: dict[str, Any]) -> Tile:
    own = one["metrics"].get("average_performance") or {}
    spread = f"± {fraction(own['deviation'])} over {own['runs']} runs" if own.get("deviation") is not None else "one run"
    return Tile(method, fraction(own.get("mean")), spread)


def _performance(comparison: dict[str, Any], ranking: Sequence[str]) -> list[Block]:
    found = comparison["methods"]
    dots = []
    for method in ranking:
        own = found[method]["metrics"].get("average_performance") or {}
        low, high = own.get("interval") or [None, None]
        dots.append(Dot(method, own.get("mean"), low, high, emphasised=method == comparison["reference"]))
    dots += [Dot(f"{name}, no learning", mean) for name, mean in _floor_means(comparison)]
    blocks: list[Block] = [
        dot_plot("average-performance", "Average performance by method", "Highest first.", dots, x_name=_measure(comparison))
    ]
    differences = [(m, one) for m, one in comparison["differences"].items() if one is not None]
    if differences:
        reference = comparison["reference"]
        lines = [Dot(m, one["mean"], *(one["interval"] or [None, None])) for m, one in differences]
        blocks.append(
            dot_plot(
                "differences",
                f"{reference} minus each other method",
                "Paired: same seeds, orders and test rows. Right of 0: ahead.",
                sorted(lines, key=lambda dot: -(dot.value or 0.0)),
                x_name=f"difference in {_measure(comparison)}",
                zero=True,
            )
        )
    if (curves := _curves(comparison)) is not None:
        blocks.append(curves)
    asked = ""
    if any("asked" in one for one in found.values()):
        asked = (
            "AP and all that follows from it are of plain text, unless the name says what else went in; methods that find no"
            " task by themselves rank the labels of all tasks learned so far, or write freely, whichever held-out rows"
            " prefer (column plain text). By ranking, written freely: the same rows in either way. Told, own prompt: the"
            " same bank behind each task's own prompt and labels, which tells it the task. "
        )
    caption = asked + (
        "AP average performance, BWT backward transfer, FWT forward transfer, LA learning accuracy, AIP average incremental"
        " performance; formulas in docs/comparing.md. – is undefined. low and high: of AP, over test rows."
    )
    blocks += [
        TableBlock("methods", "Methods", method_table(comparison), caption),
        TableBlock("differences-table", "Paired differences", difference_table(comparison), "Of average performance."),
    ]
    return blocks


def _curves(comparison: dict[str, Any]) -> Chart | None:
    lines: dict[str, list[list[Number]]] = {}
    for run in comparison["runs"]:
        if len(run["average_performance_by_stage"]) > 1:
            lines.setdefault(run["method"], []).append(run["average_performance_by_stage"])
    if not lines:
        return None
    longest = max(len(line) for group in lines.values() for line in group)
    stages = range(1, longest + 1)
    series = []
    for method, group in lines.items():
        means: list[Number] = []
        for t in stages:
            known = [line[t - 1] for line in group if len(line) >= t]
            values = [value for value in known if value is not None]
            means.append(sum(values) / len(values) if values and len(values) == len(known) else None)
        series.append(Series(method, list(stages), means))
    for name, mean in _floor_means(comparison):
        series.append(Series(f"{name}, all tasks", list(stages), [mean] * longest, muted=True))
    return line_chart(
        "by-stage",
        "Average performance from stage to stage",
        "Over the tasks learned so far, mean over runs.",
        series,
        x_name="after stage",
        y_name=_measure(comparison),
        y_range=(0, 1.02),
        x_ticks=[str(t) for t in stages],
    )


def _tasks(comparison: dict[str, Any]) -> list[Block]:
    table = comparison["tasks"]
    tasks = list(dict.fromkeys(task for one in table.values() for task in one))
    lines: dict[str, list[Number]] = {method: [one.get(task) for task in tasks] for method, one in table.items()}
    lines |= _floor(comparison, tasks)
    blocks: list[Block] = [
        heat_map(
            "tasks",
            f"{capital(_measure(comparison))} after the last stage",
            f"Mean over runs.{FLOOR if len(lines) > len(table) else ''}",
            list(lines),
            short_names(tasks),
            list(lines.values()),
            row_name="method",
            column_name="task",
        )
    ]
    if (further := also_table(comparison)) is not None:
        caption = "Mean over runs, after the last stage: shifted text, or questions in other words."
        blocks.append(TableBlock("also", "Test sets that no stage learned", further, caption))
    orders = list(comparison["orders"])
    if len(orders) > 1:
        rows: list[list[Value]] = [
            [method, *((one.get(order) or {}).get("mean") for order in orders)]
            for method, one in comparison["by_order"].items()
        ]
        listed = "; ".join(f"{name}: {', '.join(tasks)}" for name, tasks in comparison["orders"].items())
        blocks.append(TableBlock("orders", "Average performance by order", Table(["method", *orders], rows), listed))
    return blocks


def _budget(comparison: dict[str, Any]) -> str:
    rates = comparison["learning_rates"]
    if not rates:
        return "Not tuned: every method used training.learning_rate of the configuration."
    return (
        f"Every method had the same budget: {len(rates)} candidates, one run each on the dev split of order"
        f" {comparison['tuned_on']['order']} with seed {comparison['tuned_on']['seed']}; the highest average performance was"
        " taken. Test rows were not looked at."
    )


def _tuning(comparison: dict[str, Any]) -> list[Block]:
    tuned = {method: one for method, one in comparison["tuning"].items() if one.get("scores")}
    rates = sorted(comparison["learning_rates"] or [])
    if not tuned:
        return []
    places = list(range(1, len(rates) + 1))
    series = [Series(method, places, [one["scores"].get(f"{rate:g}") for rate in rates]) for method, one in tuned.items()]
    chart = line_chart(
        "learning-rates",
        "Average performance on dev by learning rate",
        "A gap is a run that diverged.",
        series,
        x_name="learning rate",
        y_name=_measure(comparison),
        y_range=(0, 1.02),
        x_ticks=[f"{rate:g}" for rate in rates],
    )
    rows: list[list[Value]] = [
        [method, f"{one['chosen']:g}", *(one["scores"].get(f"{rate:g}") for rate in rates)] for method, one in tuned.items()
    ]
    table = Table(["method", "chosen", *(f"{rate:g}" for rate in rates)], rows)
    return [chart, TableBlock("learning-rate-table", "Candidates", table)]


def _runs(comparison: dict[str, Any]) -> list[Block]:
    names = [name for name in SHOWN if any(run["metrics"].get(name) is not None for run in comparison["runs"])]
    rows: list[list[Value]] = [
        [run["run_id"], run["method"], run["order"], run["seed"], *(run["metrics"].get(name) for name in names),
         run["reused_stages"]]
        for run in comparison["runs"]
    ]  # fmt: skip
    columns = ["run", "method", "order", "seed", *(SHOWN[name] for name in names), "reused stages"]
    return [TableBlock("runs", "Every run", Table(columns, rows))]


def _mean(one: dict[str, Any], name: str) -> Number:
    found = one["metrics"].get(name)
    return None if found is None else float(found["mean"])


def _measure(comparison: dict[str, Any]) -> str:
    """What the scores are called; comparisons of before it was recorded are called what they were called then."""
    return str(comparison.get("measure", "accuracy"))


def _floor(comparison: dict[str, Any], tasks: Sequence[str]) -> dict[str, list[Number]]:
    """What needs no learning, task by task, by name; nothing where it is not known."""
    known = comparison.get("baselines") or {}
    both = {name: [known.get(task, {}).get(key) for task in tasks] for name, key in BOTH.items()}
    return {name: line for name, line in both.items() if any(value is not None for value in line)}


def _floor_means(comparison: dict[str, Any]) -> list[tuple[str, float]]:
    """The means of both over all tasks, where every task has them."""
    floor = _floor(comparison, list(comparison.get("baselines") or {}))
    whole = {name: [v for v in line if v is not None] for name, line in floor.items() if None not in line}
    return [(name, sum(line) / len(line)) for name, line in whole.items()]
