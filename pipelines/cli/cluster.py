"""Clusters from the command line: ``plan``, ``submit``, ``jobs``, ``logs`` and ``stop``. What they do is in
``pipelines.cli.plan`` and ``pipelines.cluster.submit``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from pipelines.cli.options import Config, JsonObject, Overrides
from pipelines.cli.output import print_json, stdout_to_stderr

Address = Annotated[
    str,
    typer.Option(
        envvar="RAY_API_SERVER_ADDRESS", help="Dashboard of the head node. A token is taken from RAY_AUTH_TOKEN,"
        " RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token.",
    ),
]  # fmt: skip
DASHBOARD = "http://127.0.0.1:8265"
Named = Annotated[str, typer.Argument(metavar="JOB", help="Submission id, or a run id for its newest attempt.")]


def plan(
    config: Config,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="GPUs of each; default: 8.")] = None,
    gpu_memory: Annotated[str | None, typer.Option(help="Of one GPU; default: 80GiB.")] = None,
    cpus_per_node: Annotated[
        int | None, typer.Option(min=1, help="CPUs of each, on a cluster without GPUs; a worker takes one.")
    ] = None,
    memory_per_node: Annotated[str | None, typer.Option(help="Of one node without GPUs, such as 64GiB.")] = None,
    host_memory: Annotated[str | None, typer.Option(help="Of one node; default: not looked at.")] = None,
    tflops: Annotated[
        float | None, typer.Option(min=0.001, help="Peak of one GPU (or CPU) in the model's dtype; default: 312 (or 0.1).")
    ] = None,
    utilisation: Annotated[float, typer.Option(min=0.001, max=1, help="Share of the peak that is reached.")] = 0.3,
    bandwidth: Annotated[
        float | None,
        typer.Option(min=0.001, help="GB/s into one GPU (or worker); default: 25 (1.25) between nodes, 300 (10) within."),
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Rows of tasks on the Hub that have no limit.")
    ] = None,
    as_json: JsonObject = False,
) -> None:
    """Memory, hours and bytes of a run on a cluster, from the model's configuration alone; exit code 2 if it cannot fit."""
    from amlora_dist.errors import UserError
    from pipelines.cli.plan import cluster_of, plan_of, show_plan

    with stdout_to_stderr():
        cluster = cluster_of(
            nodes, gpus=gpus_per_node, gpu_memory=gpu_memory, host_memory=host_memory, cpus=cpus_per_node,
            memory=memory_per_node,
        )  # fmt: skip
        peak = tflops or (312.0 if cpus_per_node is None else 0.1)
        made = plan_of(
            config, overrides, cluster=cluster, tflops=peak, utilisation=utilisation, bandwidth=bandwidth, rows=rows
        )
    if as_json:
        print_json(made.to_json())
    else:
        show_plan(made)
    if not made.configured.fits:
        raise UserError("the run does not fit this cluster as configured; see above for the smallest change")


def submit(
    config: Config,
    overrides: Overrides = None,
    address: Address = DASHBOARD,
    run_id: Annotated[
        str | None, typer.Option(help="Name of the durable run; the same id attaches or goes on. Default: name and time.")
    ] = None,
    search_id: Annotated[
        str | None, typer.Option(help="The same for `amlora tune`, where CONFIG has a `search` section.")
    ] = None,
    working_dir: Annotated[Path, typer.Option(help="Shipped but for what git ignores; at most 100 MB.")] = Path("."),
    env: Annotated[list[str] | None, typer.Option(help="KEY=VALUE for the driver and its workers; repeat.")] = None,
    runtime_env: Annotated[Path | None, typer.Option(help="YAML of Ray's runtime environment, such as pip.")] = None,
    allow_changed_data: Annotated[
        bool, typer.Option("--allow-changed-data", help="As of `amlora run` and `amlora tune`.")
    ] = False,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Print the submission id and leave.")] = False,
) -> None:
    """Run CONFIG as a job on a Ray cluster, print what it prints, and exit with its exit code.

    A CONFIG with a `search` section is searched (`amlora tune`), unless --run-id is given.
    """
    import time

    from amlora_dist.config.loading import load_config
    from amlora_dist.errors import UserError
    from pipelines.cluster.jobs import Jobs
    from pipelines.cluster.submit import environment_from, exit_code_of, runtime_env_from, submit_run, to_stdout
    from pipelines.runs.run_ids import checked_run_id, checked_search_id

    if run_id and search_id:
        raise UserError("--run-id and --search-id: found both, expected one: a job is a run or a search")
    settings = load_config(config, overrides)
    search = search_id is not None or (run_id is None and settings.search is not None)
    checked = checked_search_id if search else checked_run_id
    name = checked(search_id or run_id or f"{settings.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    environment, more = environment_from(env or []), runtime_env_from(runtime_env)
    cluster = Jobs(address)
    made = submit_run(
        cluster, config, overrides or [], name, working_dir=working_dir, environment=environment, runtime_env=more,
        search=search, allow_changed_data=allow_changed_data,
    )  # fmt: skip
    state = "runs already; following it" if made.attached else "submitted"
    typer.echo(f"job {made.job.id}: {state}; `amlora logs {made.job.id} --follow` shows it, `amlora stop` ends it", err=True)
    if no_wait:
        typer.echo(made.job.id)
        return
    try:
        job = cluster.follow(made.job.id, to_stdout)
    except KeyboardInterrupt:
        typer.echo(f"left job {made.job.id}, which goes on; `amlora stop {made.job.id}` would end it", err=True)
        raise
    raise typer.Exit(exit_code_of(job))


def jobs(address: Address = DASHBOARD, as_json: JsonObject = False) -> None:
    """List the jobs of a cluster, with their runs and attempts."""
    from dataclasses import asdict

    from pipelines.cluster.jobs import Jobs

    found = Jobs(address).all()
    if as_json:
        print_json([asdict(job) for job in found])
        return
    from pipelines.cli.jobs import show_jobs

    show_jobs(found)


def logs(
    job: Named,
    address: Address = DASHBOARD,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends; exit with its code.")] = False,
) -> None:
    """Print what a job has printed."""
    from pipelines.cluster.jobs import Jobs
    from pipelines.cluster.submit import exit_code_of, to_stdout

    cluster = Jobs(address)
    found = cluster.find(job)
    if not follow:
        to_stdout(cluster.logs(found.id))
        return
    raise typer.Exit(exit_code_of(cluster.follow(found.id, to_stdout)))


def stop(
    job: Named,
    address: Address = DASHBOARD,
    deadline: Annotated[float, typer.Option(min=1, help="Seconds to wait for its checkpoint.")] = 600.0,
) -> None:
    """Let a job finish its step, write a checkpoint and end; submitting its run id again goes on from there."""
    from pipelines.cluster.jobs import Jobs

    cluster = Jobs(address)
    found = cluster.find(job)
    if not found.running:
        typer.echo(f"job {found.id} has ended already: {found.status}")
        return
    ended = cluster.stop(found.id, deadline)
    typer.echo(f"job {ended.id}: {ended.status}; submit the same run id again to go on")


COMMANDS: tuple[Callable[..., None], ...] = (plan, submit, jobs, logs, stop)
