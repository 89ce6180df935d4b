"""The page of a promotion: what was required of a version, what it scored, and which rows it answers worse."""

from __future__ import annotations

import json
from typing import Any

from amlora_dist.evaluation.text_metrics import METRIC_NAMES, common_name
from amlora_dist.reporting.figures import Table
from amlora_dist.reporting.page import DownloadsBlock, Page, Section, TableBlock, Tile

SHOWN_ROWS = 200
"""Rows that a table lists; the JSON has them all."""

KEY = "accuracy in a check is the key of a task's score, whatever its metric."
_WORD = {True: "passed", False: "FAILED"}


def promotion_page(result: dict[str, Any]) -> Page:
    """The page of what ``amlora promote --json`` prints. It holds rows' places and answers, never their texts."""
    replaced = result["replaced"]
    sections = [
        Section("Checks", "", [TableBlock("checks", "What was looked at", _checks(result), f"{_margin(result)} {KEY}")]),
        Section("Scores", "Shares of the sample's rows, answered as plain text, without being told the task.",
                [TableBlock("scores", "By task", _scores(result))]),
    ]  # fmt: skip
    if replaced is not None:
        worse = result["worse_rows"]
        shown = Table(["row", "task", "right answer", "before", "now"],
                      [[row[key] for key in ("row", "task", "answer", "before", "now")] for row in worse])  # fmt: skip
        cut = Table(shown.columns, shown.rows[:SHOWN_ROWS])
        caption = f"{len(worse)} rows, {result['better_rows']} are answered better."
        table = TableBlock("worse-rows", "Answered right before and wrong now", shown, caption, shown=cut)
        sections.append(Section("Rows that get worse", "", [table]))
    download = DownloadsBlock("The result as JSON", [("promotion.json", json.dumps(result, indent=1))])
    sections.append(Section("How it was made", "", [download]))
    mean, measure = result["mean_accuracy"], _measure(result)
    return Page(
        title=f"Promotion of {result['version']} to {result['alias']}",
        summary=result["verdict"],
        tiles=[
            Tile("verdict", "passed" if result["passed"] else "refused", f"{len(result['checks'])} checks"),
            Tile(f"{measure}, mean of the tasks", f"{mean:.3f}",
                 "" if result["replaced_mean_accuracy"] is None else f"replaced: {result['replaced_mean_accuracy']:.3f}"),
            Tile("rows", f"{sum(one['rows'] for one in result['scores'].values()):,}", result["sample"]["name"]),
        ],
        findings=None,
        sections=sections,
        facts={
            "version": result["version"], "alias": result["alias"], "replaced": replaced or "none",
            "sample": f"{result['sample']['name']}, sha256 {result['sample']['sha256'][:12]}", "made": result["time"],
        },
    )  # fmt: skip


def _checks(result: dict[str, Any]) -> Table:
    rows = [[one["what"], one["found"], one["replaced"], _WORD[one["passed"]]] for one in result["checks"]]
    return Table(["check", "found", "replaced version", "result"], rows)


def _metric(one: dict[str, Any]) -> str:
    """The metric of a task's scores; results of before it was recorded are called what they were called then."""
    return str(one.get("metric", "accuracy"))


def _measure(result: dict[str, Any]) -> str:
    return common_name(_metric(one) for one in result["scores"].values())


def _margin(result: dict[str, Any]) -> str:
    if result["replaced"] is None:
        return "No version had the alias before: only the requirements count."
    return f"A task's {_measure(result)} may fall by {result['margin']:g} at most."


def _scores(result: dict[str, Any]) -> Table:
    before = result["replaced_scores"] or {}
    rows = []
    for task, one in result["scores"].items():
        earlier = before.get(task, {}).get("accuracy")
        rows.append([task, one["rows"], METRIC_NAMES[_metric(one)], one["accuracy"], earlier,
                     None if earlier is None else one["accuracy"] - earlier, one["routing_accuracy"]])  # fmt: skip
    return Table(["task", "rows", "metric", _measure(result), "replaced version", "difference", "routing accuracy"], rows)
