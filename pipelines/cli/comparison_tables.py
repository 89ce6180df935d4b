"""A comparison as tables on a terminal: methods, and how far the first is ahead of each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from pipelines.cli.tables import print_parts

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from amlora_dist.reporting.figures import Table as Numbers


def show_comparison(comparison: dict[str, Any], console: Console) -> None:
    """Print a comparison (what ``amlora compare --json`` prints)."""
    from amlora_dist.reporting.comparison_report import also_table, difference_table, method_table

    parts: list[RenderableType] = [_table(method_table(comparison), f"comparison {comparison['comparison_id']}")]
    if comparison["differences"]:
        parts.append(_table(difference_table(comparison), "\npaired differences of average performance"))
    if (further := also_table(comparison)) is not None:
        parts.append(_table(further, "\ntest sets that no stage learned"))
    for failed in comparison["failed"]:
        parts.append(Text(f"failed: {failed['run_id']}: {failed['reason']}", style="bold red"))
    parts.append(Text(f"\nreport   amlora report {comparison['comparison_id']}"))
    print_parts(console, Group(*parts))


def _table(numbers: Numbers, title: str) -> Table:
    from amlora_dist.reporting.page import number

    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for place, column in enumerate(numbers.columns):
        table.add_column(column, justify="right" if place else "left", overflow="fold")
    digits = [1 if name == "train s" else 3 for name in numbers.columns]
    for row in numbers.rows:
        table.add_row(*(number(value, places) for value, places in zip(row, digits, strict=True)))
    return table
