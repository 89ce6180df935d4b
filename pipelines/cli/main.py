"""``amlora``: run, validate and show sequences of tasks.

Exit codes: 0 done, 2 something the caller can fix, 3 the run id is held by another driver, 4 training failed after
its retries, 5 a version did not pass (``promote``), 130 interrupted, 143 terminated; 1 is a fault of this program.
Commands import what they need when they run, so that help and validation are quick.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.util
import inspect
import logging
import os
import re
import shlex
import signal
import sys
import sysconfig
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from amlora_dist.errors import AmloraError, UserError, no_room, visible
from amlora_dist.privacy import shown
from pipelines.cli import banks, cluster, evaluate, own_tasks, reports, search, serving, store
from pipelines.cli.options import Config, JsonObject, Overrides, TrackingUri, Verbose
from pipelines.cli.output import print_json, stdout_to_stderr
from pipelines.runs.run_ids import checked_run_id

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from types import FrameType, TracebackType

    from pipelines.cli.row_check import TaskRowCounts
    from pipelines.cluster.local_checks import Check

app = typer.Typer(
    name="amlora",
    help="Teach one language model task after task without forgetting, on a Ray cluster, with banks in MLflow.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM


@app.command()
def run(
    config: Config,
    overrides: Overrides = None,
    run_id: Annotated[
        str | None,
        typer.Option(help="Name of the durable run; the same id goes on where it was. Default: name and time."),
    ] = None,
    allow_changed_data: Annotated[
        bool, typer.Option("--allow-changed-data", help="Go on although rows or model have changed: train again what has.")
    ] = False,
    as_json: JsonObject = False,
    verbose: Verbose = False,
) -> None:
    """Learn the tasks of CONFIG one after another; every stage leaves a bank version in MLflow."""
    with _answered(verbose=verbose):
        from pipelines.runs.api import Sequence

        sequence = Sequence(config, overrides or [], run_id=run_id)
        with stdout_to_stderr():
            result = sequence.run(verbose=verbose, allow_changed_data=allow_changed_data).mapping
        _print_result(result, as_json=as_json)


@app.command()
def validate(
    config: Config,
    overrides: Overrides = None,
    rows: Annotated[
        bool, typer.Option("--rows", help="Read the rows too: bad ones by number, counts by split and label.")
    ] = False,
    as_json: JsonObject = False,
    verbose: Verbose = False,
) -> None:
    """List every fault of CONFIG at once, without loading a model; --json prints it resolved."""
    with _answered(verbose=verbose):
        from amlora_dist.config.loading import to_mapping, validate_config
        from pipelines.runs.validation import place_faults

        settings, specs = validate_config(config, overrides, place_faults)
        read: list[TaskRowCounts] = []
        if rows:
            from pipelines.cli.row_check import check_rows

            with stdout_to_stderr():
                read = check_rows(settings, config)
        if as_json:
            print_json(to_mapping(settings) | ({"rows": [asdict(one) for one in read]} if rows else {}))
            return
        most = settings.task_defaults.max_train
        typer.echo(f"{config}: valid")
        typer.echo(f"  model   {settings.model.source}, dtype {settings.dtype}")
        typer.echo(f"  method  {settings.method}, router {settings.router.kind}, rank {settings.adapters.rank}")
        zero = f"ZeRO {settings.zero_stage}" if settings.workers else "in the driver's process"
        where = f"{settings.workers} workers, {zero}" if settings.workers else zero
        typer.echo(f"  stages  {len(specs)}, {settings.training.epochs} epochs each, {where}")
        for number, spec in enumerate(specs, start=1):
            limit = spec.max_train or most
            at_most = f"at most {limit} training rows" if limit else "all training rows"
            named = f"{len(spec.label_texts)} labels" if spec.label_texts else "labels from the rows"
            answers = "free text" if spec.free_text else named
            typer.echo(f"    {number}. {spec.name}: {answers}, {at_most}, prompt style {spec.prompt_style}")
        if read:
            typer.echo("  rows")
        for one in read:
            for line in one.lines():
                typer.echo(f"    {line}")


@app.command()
def show(
    run_id: Annotated[str, typer.Argument(metavar="RUN", help="Run id.", show_default=False)],
    tracking_uri: TrackingUri = None,
    as_json: JsonObject = False,
    verbose: Verbose = False,
) -> None:
    """Print the result of a run again, as far as it has come."""
    with _answered(verbose=verbose):
        with stdout_to_stderr():
            from pipelines.runs.results import load_result

            result = load_result(checked_run_id(run_id), tracking_uri)
        _print_result(result, as_json=as_json)


@app.command()
def tasks(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A task's name or YAML.", show_default=False)
    ] = None,
    data_dir: Annotated[Path | None, typer.Option("--data-dir", help="Local rows in place of the Hub's.")] = None,
    style: Annotated[str | None, typer.Option("--style", help="question, options, bare or named.")] = None,
    verbose: Verbose = False,
) -> None:
    """List the built-in tasks, or show one with a prompt as the model sees it."""
    with _answered(verbose=verbose):
        from pipelines.cli.tasks import show_task, show_tasks

        if name is None:
            show_tasks(data_dir)
        else:
            show_task(name, data_dir=data_dir, style=style)


@app.command()
def doctor(
    tracking_uri: TrackingUri = None,
    address: Annotated[
        str | None, typer.Option(help="Dashboard of a cluster, such as http://head:8265: look at each of its nodes.")
    ] = None,
    storage: Annotated[str | None, typer.Option(help="With --address: the folder that all nodes share, or a URL.")] = None,
    working_dir: Annotated[Path, typer.Option(help="With --address: shipped, as `amlora submit` does.")] = Path("."),
    verbose: Verbose = False,
) -> None:
    """Look at versions, memory, disk and stores, and end with what to do first; exit code 2 where something is bad.

    Of this machine it prints what is not ok (all checks with -v); of a cluster every check of every node.
    """
    with _answered(verbose=verbose):
        from pipelines.cluster.local_checks import count_of, examine, first_of, line_of

        if address is None:
            checks = examine(tracking_uri)
        else:
            from pipelines.cluster.doctor import examine_cluster
            from pipelines.cluster.jobs import Jobs

            checks = examine_cluster(Jobs(address), storage, tracking_uri, working_dir)
        made: list[Check] = []
        while True:
            with stdout_to_stderr():
                check = next(checks, None)
            if check is None:
                break
            made.append(check)
            if line := line_of(check, every=verbose or address is not None):
                typer.echo(line)
        typer.echo(count_of(made))
        verdict = first_of(made)
        if any(check.state == "bad" for check in made):
            raise UserError(verdict)
        typer.echo(verdict)


def main() -> None:
    """Entry point of the console command."""
    sys.excepthook = _unexpected
    signal.signal(signal.SIGTERM, _terminate)
    try:
        os.getcwd()
    except FileNotFoundError:
        typer.echo("error: the folder that this was started in is gone; cd to one that exists and run it again", err=True)
        sys.exit(2)
    try:
        typer.main.get_command(app)(prog_name="amlora")
    except SystemExit as leaving:
        session = sys.modules.get("pipelines.cluster.session")
        if session is not None and session.must_end_at_once():
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(leaving.code if isinstance(leaving.code, int) else bool(leaving.code))
        gc.freeze()  # Python would look through all that torch and transformers have loaded, for seconds, before it ends
        raise


class _TerminatedError(BaseException):
    """SIGTERM: unwinds like KeyboardInterrupt, so that locks and workers are let go."""


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise _TerminatedError


@contextlib.contextmanager
def _answered(*, verbose: bool) -> Iterator[None]:
    """One clear message on standard error for what can go wrong, and its exit code."""
    from pipelines.cluster.library_output import set_up

    set_up(verbose=verbose)
    if verbose:
        sys.excepthook = sys.__excepthook__
    try:
        yield
    except AmloraError as error:
        if verbose:
            typer.echo(shown(traceback.format_exc()), err=True)
        stopped = error.exit_code in (INTERRUPTED, TERMINATED)
        typer.echo(visible(shown(str(error) if stopped else f"error: {error}")), err=True)
        raise typer.Exit(error.exit_code) from None
    except BrokenPipeError:
        raise
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if verbose or not package or importlib.util.find_spec(package) is not None:
            raise
        message = f"{package} is not installed, and this command needs it: pip install amlora-dist"
        typer.echo(f"error: {message} (a light installation asks and serves the folder of a bank)", err=True)
        raise typer.Exit(2) from None
    except EOFError as error:  # the command line's library would say "Aborted." and nothing else
        if verbose:
            typer.echo(shown(traceback.format_exc()), err=True)
        typer.echo(visible(f"error: {_too_short(error)}"), err=True)
        raise typer.Exit(1) from None
    except Exception as error:
        if (reason := no_room(error) or _no_user(error)) is None:
            raise
        if verbose:
            typer.echo(shown(traceback.format_exc()), err=True)
        typer.echo(visible(f"error: {reason}"), err=True)
        raise typer.Exit(UserError.exit_code) from None
    except KeyboardInterrupt:
        typer.echo("interrupted; the same command with the same run id goes on from here", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except _TerminatedError:
        raise typer.Exit(TERMINATED) from None
    except SystemExit as leaving:
        # Ray replaces our handler of SIGTERM by one that exits with the number of the signal.
        if leaving.code == signal.SIGTERM:
            raise typer.Exit(TERMINATED) from None
        raise


def _no_user(error: Exception) -> str | None:
    """What is wrong with a path that begins with ``~`` and a name that no user of this machine has; None for others."""
    if not isinstance(error, RuntimeError) or "home directory" not in str(error):
        return None
    named = next((text for text in sys.argv[1:] if re.match(r"([^/]*=)?~[^/]", text)), "a path that begins with ~")
    return f"found {named}, expected the name of a user of this machine behind ~; write the whole path"


def _too_short(error: EOFError) -> str:
    """What a file that ends too early is; Python itself leaves a half module behind where the disk was full."""
    message = f"unexpected EOFError: {error or 'a file ends too early'}"
    if "marshal" not in str(error):
        return message
    own = Path(__file__).parents[1]
    folders = map(str, (own.parent / "amlora_dist", own, sysconfig.get_path("purelib")))
    again = [sys.executable, "-m", "compileall", "-qf", *folders]
    return f"{message}: a module that Python compiled while the disk was full; compile all again: {shlex.join(again)}"


def _unexpected(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A fault of this program, in one line; -v shows where."""
    frames = traceback.extract_tb(trace)
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    message = visible(shown(str(error)))
    print(f"error: unexpected {kind.__name__}: {message}{where}; run it again with -v to see more", file=sys.stderr)


def _print_result(result: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(result)
        return
    from pipelines.cli.tables import console_for, show_result

    show_result(result, console_for(), tracking_uri=result.get("tracking_uri"))


def _guarded(command: Callable[..., None]) -> Callable[..., None]:
    """The command, with errors as messages and exit codes, and with ``--verbose`` also where it does not read it."""
    signature = inspect.signature(command, eval_str=True)
    reads = "verbose" in signature.parameters

    @functools.wraps(command)
    def guarded(*, verbose: bool = False, **options: Any) -> None:
        with _answered(verbose=verbose):
            command(**options, **({"verbose": verbose} if reads else {}))

    if not reads:
        own = inspect.Parameter("verbose", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Verbose)
        guarded.__signature__ = signature.replace(parameters=[*signature.parameters.values(), own])  # type: ignore[attr-defined]
        guarded.__annotations__ = command.__annotations__ | {"verbose": Verbose}
    return guarded


for _family in (own_tasks, banks, serving, cluster, store, evaluate, reports, search):
    for _command in _family.COMMANDS:
        app.command()(_guarded(_command))

if __name__ == "__main__":
    main()
