"""The result of a run as tables: accuracy matrix, metrics, stages, and where MLflow keeps it.

A result is the mapping that ``amlora run --json`` prints (README, "Results").
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from amlora_dist.errors import visible
from amlora_dist.evaluation.plain_choice import OWN_PROMPT, shown_choice
from amlora_dist.evaluation.text_metrics import METRIC_NAMES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import TextIO

    from rich.console import RenderableType

PIPE_WIDTH = 200
"""Columns of text where the output is no terminal: wide enough not to wrap what a script may read."""

METRICS = {
    "average_performance": "mean of the last row",
    "average_incremental_performance": "mean over stages of the average performance there",
    "backward_transfer": "mean change of earlier tasks since they were learned",
    "forward_transfer_gem": "mean gain on the next task before it is learned, over the untrained model",
    "forward_transfer_single": "mean gain over learning each task alone",
    "forgetting": "mean loss of earlier tasks from their best",
    "learning_accuracy": "mean score right after learning",
}

_CELL_WIDTH = 8


class PlainConsole(Console):
    """Shows every text as it is, in tables too: brackets are no markup, colons no pictures, and what would move the cursor
    is an escape."""

    def render_str(self, text: str, **options: Any) -> Text:
        """See rich."""
        return super().render_str(visible(text), **options | {"markup": False, "emoji": False})


def console_for(stream: TextIO | None = None) -> Console:
    """A console on ``stream`` (default: standard output); in a pipe wide, without colours and control characters."""
    stream = stream or sys.stdout
    return PlainConsole(file=stream, highlight=False, width=None if stream.isatty() else PIPE_WIDTH)


def show_result(result: Mapping[str, Any], console: Console, *, tracking_uri: str | None = None) -> None:
    """Print a run's result; ``tracking_uri`` is where MLflow keeps it."""
    print_parts(console, Group(*_parts(result, console.width, tracking_uri)))


def print_parts(console: Console, parts: Group) -> None:
    """Print; where the console is no terminal, without blanks at the ends of lines."""
    if console.is_terminal:
        console.print(parts)
        return
    with console.capture() as captured:
        console.print(parts)
    console.file.writelines(f"{line.rstrip()}\n" for line in captured.get().splitlines())


def _parts(result: Mapping[str, Any], width: int, tracking_uri: str | None) -> Iterator[RenderableType]:
    facts = (f"method {result['method']}", f"seed {result['seed']}", f"{len(result['tasks'])} tasks")
    yield Text.assemble("\nrun ", (str(result["run_id"]), "bold"), f": {', '.join(facts)}\n")
    yield from matrix_tables(result, width)
    if result.get("last"):
        yield _last_table(result, width)
    if (chosen := shown_choice(result)) is not None:
        yield Text(f"\nanswers  {chosen.sentence}")
    yield _metrics_table(result["metrics"])
    yield _stages_table(result["stages"])
    if rate := result.get("learning_rate"):
        yield Text(f"\nrate     {_rate_line(rate)}")
    versions = [stage["version"] for stage in result["stages"] if stage.get("version") is not None]
    if versions:
        yield Text(f"\nmodel    models:/{result['registered_model']}/{versions[-1]}")
    if tracking_uri:
        yield Text(f"{'' if versions else chr(10)}MLflow   {tracking_uri}")
        if not tracking_uri.startswith(("http://", "https://")):
            yield Text(f"open it  mlflow ui --backend-store-uri {tracking_uri}", no_wrap=True)
        if result.get("mlflow_page"):
            yield Text(f"at       {result['mlflow_page']}", no_wrap=True)


def matrix_tables(result: Mapping[str, Any], width: int) -> Iterator[Table]:
    """The accuracy matrix: tasks as columns, what has been learned as rows; several tables where they do not fit."""
    tasks = list(result["tasks"])
    rows = _matrix_rows(result)
    label_width = max(len(label) for label, _ in rows)
    headings, scores = _short_names(tasks), metric_names(result)
    measured = scores[0] if len(set(scores)) == 1 else "scores"
    if measured == "scores":
        headings = [f"{name} ({score})" for name, score in zip(headings, scores, strict=True)]
    cell = max(_CELL_WIDTH, min(16, max(len(name) for name in headings) + 2))
    fitting = max(1, (width - label_width - 4) // (cell + 1))
    for start in range(0, len(tasks), fitting):
        stop = min(start + fitting, len(tasks))
        title = measured if len(tasks) <= fitting else f"{measured}, tasks {start + 1} to {stop}"
        table = _table(title)
        table.add_column("", no_wrap=True)
        for name in headings[start:stop]:
            table.add_column(name, justify="right", overflow="fold", min_width=5)
        for label, values in rows:
            style = "dim" if label in ("untrained", "oracle") else ""
            table.add_row(label, *(_cell(values, column) for column in range(start, stop)), style=style)
        yield table


def metric_names(result: Mapping[str, Any]) -> list[str]:
    """What the scores of each task are called; of results of before 0.2, which do not say, accuracy."""
    known = result.get("task_metrics") or {}
    return [METRIC_NAMES[known.get(task, "accuracy")] for task in result["tasks"]]


LAST = {
    "routing_accuracy": "routed right",
    "model_accuracy": "model alone",
    "keys_accuracy": "keys alone",
    "greedy_accuracy": "written freely",
    "told_model_accuracy": "told, model alone",
    "own_prompt": "own prompt (told)",
    "keys_elsewhere": "keys elsewhere",
}
"""Rows about the last bank, and what they are called."""
RANKED = "by ranking"
"""What the model alone does with plain text of which it knows no task."""


def _last_table(result: Mapping[str, Any], width: int) -> Table:
    """What the last bank answers, by kind of evidence, next to the accuracy of the answers that count."""
    tasks = list(result["tasks"])
    headings = _short_names(tasks)
    fitting = max(1, (width - max(map(len, LAST.values())) - 4) // (max(_CELL_WIDTH, *map(len, headings)) + 1))
    table = _table(f"\nthe last bank, by kind of evidence{'' if len(tasks) <= fitting else ', mean of all tasks'}")
    table.add_column("", no_wrap=True)
    for name in headings if len(tasks) <= fitting else ["mean"]:
        table.add_column(name, justify="right", overflow="fold", min_width=5)
    for key, words in LAST.items():
        values = result["last"].get(key)
        if values is None:
            continue
        known = [value for value in values if value is not None]
        shown = values if len(tasks) <= fitting else [sum(known) / len(known)]
        cells = [_cell(shown, column) for column in range(len(shown))]
        if key == "keys_elsewhere":  # rows, not a share of them
            cells = ["-" if value is None else f"{value:g}" for value in shown]
        table.add_row(RANKED if key == "model_accuracy" and OWN_PROMPT in result["last"] else words, *cells)
    return table


def _matrix_rows(result: Mapping[str, Any]) -> list[tuple[str, Sequence[float | None]]]:
    stages = _short_names(list(result["tasks"]))
    if [stage["task"] for stage in result["stages"]] in (["joint"], ["base"]):  # one row, about all tasks
        stages = [result["stages"][0]["task"]]
    rows: list[tuple[str, Sequence[float | None]]] = []
    if result.get("untrained"):
        rows.append(("untrained", result["untrained"]))
    for number, values in enumerate(result["accuracy_matrix"], start=1):
        rows.append((f"after {number} {stages[number - 1]}", values))
    if result.get("oracle"):
        rows.append(("oracle", result["oracle"]))
    return rows or [("nothing yet", [])]


def _short_names(tasks: list[str]) -> list[str]:
    """Names without a folder that all share (``helpdesk/``)."""
    folders = {name.rpartition("/")[0] for name in tasks}
    return [name.rpartition("/")[2] for name in tasks] if len(folders) == 1 else tasks


def _cell(values: Sequence[float | None], column: int) -> str:
    value = values[column] if column < len(values) else None
    return "-" if value is None else f"{value:.3f}"


def _metrics_table(metrics: dict[str, Any]) -> Table:
    table = _table("\nmetrics", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim")
    for name in [*(name for name in METRICS if name in metrics), *(name for name in metrics if name not in METRICS)]:
        value = metrics[name]
        shown = value if isinstance(value, str) else "undefined" if value is None else f"{value:.3f}"
        table.add_row(name.replace("_", " "), shown, METRICS.get(name, ""))
    return table


def _stages_table(stages: list[dict[str, Any]]) -> Table:
    table = _table("\nstages")
    table.add_column("", justify="right")
    table.add_column("task", overflow="fold")
    for heading in ("version", "reused", "train s", "score s", "other s", "tokens", "tokens/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("fingerprint", no_wrap=True)
    for number, stage in enumerate(stages, start=1):
        table.add_row(
            str(number),
            str(stage["task"]),
            _figure(stage.get("version"), ""),
            "adapter" if stage.get("adapter_of") else "yes" if stage.get("reused") else "no",
            *(_figure(stage.get(key), ".1f") for key in ("train_seconds", "score_seconds", "other_seconds")),
            _figure(stage.get("tokens"), ",.0f"),
            _figure(stage.get("tokens_per_second"), ",.0f"),
            str(stage.get("fingerprint") or "-")[:12],
        )
    return table


def _rate_line(rate: Mapping[str, Any]) -> str:
    """How ``training.learning_rate: auto`` was settled."""
    if rate["how"] != "race":
        why = "that of the bank it began on" if rate["how"] == "parent" else "the default, without a race"
        return f"{rate['chosen']:g}, {why}"
    seconds = rate.get("seconds") or {}
    losses = [f"{name} {'diverged' if loss is None else f'{loss:.3f}'}" for name, loss in rate["losses"].items()]
    lost = sum(spent for name, spent in seconds.items() if float(name) != rate["chosen"])
    cost = f"; the losers took {lost:.0f} s" if seconds else ""
    return f"{rate['chosen']:g} won over {rate['steps']} steps (held-out losses: {', '.join(losses)}{cost})"


def _table(title: str, *, show_header: bool = True) -> Table:
    return Table(
        title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, show_header=show_header
    )


def _figure(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form if isinstance(value, (int, float)) else "")
