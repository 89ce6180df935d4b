"""``amlora tasks``: the built-in tasks as a table, one task with a prompt as the model sees it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

from rich.table import Table

from amlora_dist.tasks.conversations import Turn
from amlora_dist.tasks.prompts import template_for
from amlora_dist.tasks.sources import at_hand, load_task
from amlora_dist.tasks.task import TaskDefaults, builtin_tasks, placed, resolve_task
from pipelines.cli.tables import console_for

if TYPE_CHECKING:
    from amlora_dist.tasks.task import PromptStyle, TaskSpec

SHOWN_LABELS = 4


def show_tasks(data_dir: Path | None) -> None:
    """Print the built-in tasks: name, answers, rows, source."""
    table = Table(box=None, pad_edge=False)
    for heading in ("name", "kind", "answers", "rows", "source"):
        table.add_column(heading, overflow="fold", no_wrap=heading in ("name", "rows"))
    for spec in (placed(one, data_dir) for one in builtin_tasks()):
        table.add_row(spec.name, spec.kind, _answers(spec), _rows(spec, data_dir), _source(spec))
    console_for().print(table)


def show_task(name: str, *, data_dir: Path | None, style: str | None) -> None:
    """Print one task and, where its rows are at hand, a prompt with its answer."""
    spec = resolve_task(name, data_dir=data_dir, base_dir=Path.cwd(), defaults=TaskDefaults())
    console = console_for()
    if spec.labels == "auto" and at_hand(spec, data_dir):
        spec = load_task(spec, data_dir=data_dir, splits=("train",)).spec
    lines = {
        "task": f"{spec.name} (version {spec.version})",
        "about": spec.description,
        "kind": spec.kind,
        "answers": "free text" if spec.free_text else ", ".join(spec.label_texts) or "labels from the rows",
        "metric": str(spec.metric),
        "rows": _rows(spec, data_dir),
        "source": _source(spec) + (f", revision {spec.source.revision}" if spec.source.kind == "hub" else ""),
    }
    for key, value in lines.items():
        if not value:
            continue
        console.print(f"{key:8} {value}", markup=False, soft_wrap=True)
    show_prompt(spec, data_dir=data_dir, style=style)


def show_prompt(spec: TaskSpec, *, data_dir: Path | None = None, style: str | None = None) -> None:
    """Print the first training row as the model sees it, with its answer; without rows the prompt around a text."""
    if spec.columns.conversational:
        _show_conversation(spec, data_dir)
        return
    console, template = console_for(), template_for(spec, cast("PromptStyle | None", style))
    console.print(f"\nprompt, style {style or spec.prompt_style}:", markup=False)
    if at_hand(spec, data_dir):
        row = load_task(spec, data_dir=data_dir, splits=("train",)).rows["train"][0]
        prompt, answer = template.render(row), row.target
    else:
        prompt, answer = template.render_text("<text>"), "<answer>"
    if spec.prompt.format == "chat":
        system = [f"system: {spec.prompt.system}"] if spec.prompt.system is not None else []
        prompt, answer = "\n".join([*system, f"user: {prompt}"]), f"assistant: {answer}"
        console.print(f"{prompt}\n{answer}", markup=False, soft_wrap=True)
        return
    console.print(f"{prompt}[ {answer}]", markup=False, soft_wrap=True)


def _show_conversation(spec: TaskSpec, data_dir: Path | None) -> None:
    """Which columns were taken, and the turns of one row; the words around them are the model's template's."""
    console = console_for()
    if not at_hand(spec, data_dir):
        return
    data = load_task(spec, data_dir=data_dir, splits=("train",))
    row = data.rows["train"][0]
    if data.took:
        console.print(f"columns  {data.took}, recognised", markup=False, soft_wrap=True)
    console.print("\na conversation:", markup=False)
    turns = row.turns or (Turn("user", row.text), Turn("assistant", row.target))
    if spec.prompt.system is not None and turns[0].role != "system":
        turns = (Turn("system", spec.prompt.system), *turns)
    for turn in turns:
        console.print(f"{turn.role}: {turn.text}", markup=False, soft_wrap=True)


def _answers(spec: TaskSpec) -> str:
    texts = spec.label_texts
    if spec.free_text:
        return f"free text ({spec.metric})"
    return f"{len(texts)}: {', '.join(texts[:SHOWN_LABELS])}{', ...' if len(texts) > SHOWN_LABELS else ''}"


def _rows(spec: TaskSpec, data_dir: Path | None) -> str:
    """Rows of train / dev / test, where they can be counted without the network."""
    if not at_hand(spec, data_dir):
        return "on the Hub" if spec.source.kind == "hub" else "in data_dir"
    rows = load_task(spec, defaults=TaskDefaults(on_bad_row="skip"), data_dir=data_dir).rows
    return " / ".join(str(len(rows[split])) for split in ("train", "dev", "test"))


def _source(spec: TaskSpec) -> str:
    if spec.source.kind == "hub":
        return f"Hub {spec.source.repository}"
    return "this package" if spec.source.kind == "builtin" else str(spec.splits.train)
