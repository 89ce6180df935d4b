"""Searches from the command line: ``tune``. What it does is in ``pipelines.search``."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from pipelines.cli.options import JsonObject, Verbose
from pipelines.cli.output import print_json, stdout_to_stderr
from pipelines.runs.run_ids import checked_search_id


def tune(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="YAML of a run with a `search` section.", show_default=False)
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY.PATH=VALUE", help="Overrides, such as search.num_samples=8.", show_default=False),
    ] = None,
    search_id: Annotated[
        str | None,
        typer.Option(help="Name of the durable search; the same id goes on where it was. Default: name and time."),
    ] = None,
    allow_changed_data: Annotated[
        bool, typer.Option("--allow-changed-data", help="Go on although rows or model have changed: all trials run again.")
    ] = False,
    as_json: JsonObject = False,
    verbose: Verbose = False,
) -> None:
    """Search over whole sequences with Ray Tune; the winner gets the alias `champion`."""
    import psutil

    from amlora_dist.config.loading import named_file, named_keys, validate_config
    from pipelines.runs.progress import progress_for

    settings, _ = validate_config(config, overrides)
    search_id = checked_search_id(search_id or f"{settings.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    progress = progress_for()
    with stdout_to_stderr(), contextlib.closing(progress), named_file(config, overrides):
        from pipelines.runs.resume_check import going_on
        from pipelines.search.driver import run_search

        settings = going_on(settings, named=named_keys(config, overrides), search_id=search_id)
        result = run_search(
            settings, file=str(config), search_id=search_id, progress=progress, began=psutil.Process().create_time(),
            verbose=verbose, allow_changed_data=allow_changed_data,
        )  # fmt: skip
    if as_json:
        print_json(result)
        return
    from pipelines.cli.search_tables import show_search
    from pipelines.cli.tables import console_for

    show_search(result, console_for())


COMMANDS: tuple[Callable[..., None], ...] = (tune,)
