"""The result of a search as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from amlora_dist.config.search_space import brief, described
from pipelines.cli.tables import print_parts

if TYPE_CHECKING:
    from rich.console import Console


L1 = "training.l1"


def show_search(result: dict[str, Any], console: Console) -> None:
    """Print a result of ``pipelines.search.outcome``; in a pipe without trailing blanks."""
    print_parts(console, Group(*_parts(result)))


def _parts(result: dict[str, Any]) -> list[Any]:
    cost, winner = result["cost"], result["winner"]
    lines = [
        f"winner   trial {winner['number']} ({described(winner['values'])})",
        f"test     {_metrics(winner['test']['metrics'])}",
        f"model    models:/{result['registered_model']}@champion ({winner['version']})",
        f"stages   {cost['stages_trained']} trained, {cost['stages_reused']} reused, {cost['stages_pruned']} pruned"
        f" of {cost['stages_total']}",
        f"MLflow   {result['tracking_uri']}",
    ]
    if result["front"]:
        lines.insert(1, f"front    trials {', '.join(map(str, result['front']))}")
    failed = [f"failed   trial {trial['number']}: {trial['error']}" for trial in result["trials"] if trial["error"]]
    head = f"\nsearch {result['search_id']}: {len(result['trials'])} trials, {result['algorithm']}, best first\n"
    return [Text(head), _table(result), Text("\n" + "\n".join(lines), no_wrap=True), *map(Text, failed)]


def _table(result: dict[str, Any]) -> Table:
    table = Table(title="dev split", title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("trial", justify="right")
    for path in result["space"]:
        table.add_column(path, justify="right", no_wrap=True)
    with_l1 = L1 in result["space"] and any(trial.get("l1") for trial in result["trials"])
    for heading in ("average performance", "forgetting", "stages", "reused", *(["L1 reached"] if with_l1 else [])):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("outcome")
    by_number = {trial["number"]: trial for trial in result["trials"]}
    rest = [number for number in by_number if number not in result["ranking"]]
    for number in [*result["ranking"], *rest]:
        trial = by_number[number]
        reused = sum(stage["reused_from"] is not None for stage in trial["stages"])
        table.add_row(
            str(number),
            *(brief(value) for value in trial["values"].values()),
            _score(trial["metrics"].get("average_performance")) + _interval(trial["interval"]),
            _score(trial["metrics"].get("forgetting")),
            f"{len(trial['stages'])}/{result['stages']}",
            str(reused),
            *([_reached(trial.get("l1"))] if with_l1 else []),
            str(trial["outcome"]),
        )
    return table


def _reached(l1: dict[str, int] | None) -> str:
    """In how many stages, of those with a recipe, L1 has set weights to exactly 0."""
    return "-" if l1 is None else f"{l1['reached']}/{l1['recipes']}"


def _metrics(metrics: dict[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in metrics.items() if value is not None)


def _interval(interval: list[float] | None) -> str:
    return f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
