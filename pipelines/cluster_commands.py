"""Clusters from the command line: ``plan``. What it does is in ``pipelines.plan_page``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

import typer

Answered = Callable[..., AbstractContextManager[None]]
"""Turns errors into messages and exit codes; takes ``verbose``."""

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML of the run.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY.PATH=VALUE", help="Overrides, such as training.epochs=3.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output, the rest on standard error.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log lines of all libraries, tracebacks of errors.")]


def plan(
    config: Config,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of each.")] = 8,
    gpu_memory: Annotated[str, typer.Option(help="Of one GPU, such as 80GiB.")] = "80GiB",
    host_memory: Annotated[str | None, typer.Option(help="Of one node; default: not looked at.")] = None,
    tflops: Annotated[float, typer.Option(min=0.001, help="Peak of one GPU in the model's dtype.")] = 312.0,
    utilisation: Annotated[float, typer.Option(min=0.001, max=1, help="Share of the peak that is reached.")] = 0.3,
    bandwidth: Annotated[
        float | None, typer.Option(min=0.001, help="GB/s into one GPU; default: 25 between nodes, 300 within one.")
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Rows of tasks on the Hub that have no limit.")
    ] = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Memory, hours and bytes of a run on a cluster, from the model's configuration alone; exit code 2 if it cannot fit."""
    from amlora_dist.errors import UserError
    from amlora_dist.planning.plan import Cluster
    from pipelines.plan_page import bytes_of, plan_of, show_plan
    from pipelines.quiet import standard_output_kept

    with standard_output_kept():
        cluster = Cluster(
            nodes, gpus_per_node, bytes_of(gpu_memory, "--gpu-memory"),
            None if host_memory is None else bytes_of(host_memory, "--host-memory"),
        )  # fmt: skip
        made = plan_of(
            config, overrides, cluster=cluster, tflops=tflops, utilisation=utilisation, bandwidth=bandwidth, rows=rows
        )
    if as_json:
        _print_json(made.to_json())
    else:
        show_plan(made)
    if not made.configured.fits:
        raise UserError("the run does not fit this cluster as configured; see above for the smallest change")


def _print_json(value: Any) -> None:
    import json

    typer.echo(json.dumps(value, indent=2, allow_nan=False))


_COMMANDS: dict[str, Callable[..., None]] = {"plan": plan}


def add_commands(app: typer.Typer, answered: Answered) -> None:
    """Add the commands of this module to the program."""
    for name, command in _COMMANDS.items():
        app.command(name)(_guarded(command, answered))


def _guarded(command: Callable[..., None], answered: Answered) -> Callable[..., None]:
    @functools.wraps(command)
    def guarded(*args: Any, verbose: bool = False, **options: Any) -> None:
        with answered(verbose=verbose):
            command(*args, verbose=verbose, **options)

    return guarded
