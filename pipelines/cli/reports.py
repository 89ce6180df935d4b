"""``amlora compare``: a grid of runs; ``amlora report``: one page about a run or a comparison."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from pipelines.cli.options import Json, TrackingUri, Verbose
from pipelines.cli.output import print_json, stdout_to_stderr

NumberT = TypeVar("NumberT", int, float)


def report(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Id of a run, a search or a comparison.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Default: reports/NAME.html in AMLORA_HOME.", show_default=False)
    ] = None,
    tracking_uri: TrackingUri = None,
) -> None:
    """Write one self-contained HTML page about NAME, as far as it has come, with a diagnosis; MLflow gets it too."""
    from amlora_dist.config.loading import home

    with stdout_to_stderr():
        from amlora_dist.registry.store import Store
        from amlora_dist.reporting.page import file_name
        from amlora_dist.reporting.report import report as write
        from pipelines.cluster.resources import check_file

        file = (output or home() / "reports" / f"{file_name(name)}.html").absolute()
        if output is not None:
            check_file(output, "--output")
        page = write(Store.open(home(), tracking_uri), name, file)
    for finding in page.findings or []:
        typer.echo(f"{finding.level}: {finding.title}. {finding.detail}", err=True)
    typer.echo(file)


def compare(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML of a run.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY.PATH=VALUE", help="Overrides for every run.", show_default=False),
    ] = None,
    methods: Annotated[
        str,
        typer.Option(help="Names with commas between, or all; the first is what the others are subtracted from."),
    ] = "am_lora,seq_lora,o_lora,replay,per_task,joint",
    seeds: Annotated[str, typer.Option(help="Numbers with commas between; default: the configuration's.")] = "",
    orders: Annotated[
        str,
        typer.Option(help="Configurations whose tasks are taken, places such as 3-1-2, or given; commas between."),
    ] = "given",
    learning_rates: Annotated[
        str, typer.Option(help="Candidates for every method, tried on dev with the first order and seed.")
    ] = "",
    run_id: Annotated[
        str | None, typer.Option(help="Name of the comparison; the same goes on. Default: the CONFIG's name, -compared.")
    ] = None,
    allow_changed_data: Annotated[
        bool,
        typer.Option("--allow-changed-data", help="Go on although rows or model have changed: all of it runs again."),
    ] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Run CONFIG by each method, seed and task order, and show them in one table; the same command goes on where it was."""
    import contextlib

    from pipelines.runs.progress import progress_for

    progress = progress_for()
    with stdout_to_stderr(), contextlib.closing(progress):
        from amlora_dist.config.loading import load_config, named_file
        from pipelines.runs.comparison import plan_comparison, run_comparison

        name = run_id or f"{load_config(config, overrides).name}-compared"
        plan = plan_comparison(
            config,
            overrides or [],
            methods=_listed(methods),
            seeds=_numbers("--seeds", seeds, int),
            orders=_listed(orders),
            learning_rates=_numbers("--learning-rates", learning_rates, float),
            comparison_id=name,
        )
        with named_file(config, overrides):
            result = run_comparison(
                plan, command=_command(), progress=progress, verbose=verbose, allow_changed_data=allow_changed_data
            )
    if as_json:
        print_json(result)
        return
    from pipelines.cli.comparison_tables import show_comparison
    from pipelines.cli.tables import console_for

    show_comparison(result, console_for())


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(option: str, text: str, kind: Callable[[str], NumberT]) -> list[NumberT]:
    from amlora_dist.errors import UserError

    found = []
    for part in _listed(text):
        try:
            found.append(kind(part))
        except ValueError:
            raise UserError(f"{option}: found {part!r}, expected numbers with commas between") from None
    return found


def _command() -> str:
    import shlex
    import sys

    return shlex.join(["amlora", *sys.argv[1:]])


COMMANDS: tuple[Callable[..., None], ...] = (compare, report)
