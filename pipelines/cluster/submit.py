"""``amlora submit``: a run, or a search, as a Ray job. The same id attaches to the job that runs, or goes on as its next
attempt."""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amlora_dist.config.loading import load_config, to_mapping
from amlora_dist.config.strict_yaml import read_document
from amlora_dist.errors import FaultsError, TrainingError, UserError
from amlora_dist.privacy import DROPPED, public_configuration, public_name
from pipelines.cluster.jobs import STOP_WAIT_S, ClusterJob, Jobs
from pipelines.cluster.resources import DEADLINE, Demand, deadline_s, least_demand, shortfalls
from pipelines.cluster.working_dir import collect, pack
from pipelines.runs.resume_check import FREE_IN_RUN, IRRELEVANT, differences

if TYPE_CHECKING:
    from amlora_dist.config.loading import RunConfig

HOME = "home"
"""Folder below ``storage:`` that is a job's ``AMLORA_HOME``: its working directory is gone with the job."""

PRIVATE = ".amlora-overrides"
"""File of the shipped folder with the overrides that a command line would show to everybody who sees the cluster."""


@dataclass(frozen=True, slots=True)
class Submission:
    """What came of it. ``attached``: the job ran already."""

    job: ClusterJob
    attached: bool


def submit_run(
    jobs: Jobs, config_file: Path, overrides: list[str], run_id: str, *, working_dir: Path,
    environment: dict[str, str], runtime_env: dict[str, Any], search: bool = False, allow_changed_data: bool = False,
) -> Submission:  # fmt: skip
    """Start the run on the cluster, unless an attempt at it is running.

    Args:
        jobs: of the cluster.
        config_file: below ``working_dir``.
        overrides: as for ``amlora run``.
        run_id: name of the durable run, or search.
        working_dir: folder that is shipped and that relative paths are relative to.
        environment: variables of the driver and its workers.
        runtime_env: more of Ray's runtime environment, such as ``pip``.
        search: the job is ``amlora tune``, not ``amlora run``.
        allow_changed_data: give it ``--allow-changed-data``.

    Raises:
        UserError, FaultsError: the configuration, the folder or the cluster; the cluster can never hold the run; or a job
            of this id runs with another configuration.
    """
    config = load_config(config_file, overrides)
    attempts = jobs.of_run(run_id)
    if running := next((job for job in reversed(attempts) if job.running), None):
        return _attached(running, config, search)
    share = 1.0
    if search:
        from pipelines.search.plan import plan_search

        share = plan_search(config, str(config_file)).settings.gpus or share
    shipped = _below(config_file, working_dir)
    variables = _variables(config, environment)
    if not deadline_s(0, {**runtime_env.get("env_vars", {}), **variables}):
        _check_fit(jobs, least_demand(config, gpu_share=share))
    shipment = collect(working_dir)
    if shipped not in shipment.files:
        raise UserError(f"{config_file}: is not shipped, because git ignores it")
    what, named = ("tune", "--search-id") if search else ("run", "--run-id")
    private = [text for text in overrides if _is_private(text)]
    public = [*([f"@{PRIVATE}"] if private else []), *(text for text in overrides if text not in private)]
    command = ["python", "-m", "pipelines.cli", what, shipped, *public, named, run_id]
    command += ["--allow-changed-data"] if allow_changed_data else []
    with tempfile.TemporaryDirectory(prefix="amlora-submit-") as tmp:
        archive = Path(tmp) / "working_dir.zip"
        pack(shipment, archive, {PRIVATE: "".join(f"{text}\n" for text in private).encode()} if private else {})
        environment_of_job = runtime_env | {
            "working_dir": str(archive),
            "env_vars": {**runtime_env.get("env_vars", {}), **variables},
        }
        attempt = max((job.attempt or 0 for job in attempts), default=0) + 1
        job_id = f"{run_id}-{attempt}"
        # `exec`: signals and the exit code are the driver's own, not those of a shell around it.
        # Everybody who sees the cluster sees this: nothing that may hold a password, such as MLflow's address.
        compared = {key: value for key, value in public_configuration(to_mapping(config)).items() if key not in IRRELEVANT}
        metadata = {"amlora_run_id": run_id, "amlora_config": json.dumps(compared)}
        started = jobs.submit(job_id, f"exec {shlex.join(command)}", environment_of_job, metadata)
    job = jobs.get(job_id)
    if started:
        return Submission(job, attached=False)
    return _attached(job, config, search)  # somebody else has submitted it just now


def _check_fit(jobs: Jobs, demand: Demand) -> None:
    """See that the nodes of now can hold the run, by the rule by which it would refuse them itself."""
    if lacking := shortfalls(demand, jobs.supply()):
        raise UserError(
            f"--address: the cluster at {jobs.address} can never hold this run, nothing was submitted:\n"
            + "\n".join(f"  - {one}" for one in lacking)
            + f"\nWhere nodes come on demand: --env {DEADLINE}=600 (seconds that the run waits for them)"
        )


def _attached(job: ClusterJob, config: RunConfig, search: bool) -> Submission:
    """The job that runs, if it runs what is asked for."""
    free = IRRELEVANT if search else FREE_IN_RUN
    if job.configuration is not None and (differing := differences(job.configuration, to_mapping(config), free=free)):
        raise UserError(
            f"job {job.id} runs with another configuration: {differing}. Use another id, undo that, or end it first with:"
            f" amlora stop {job.id}"
        )
    return Submission(job, attached=True)


def exit_code_of(job: ClusterJob) -> int:
    """The exit code of the command on the cluster.

    Raises:
        TrainingError: the job ended without one: its node died, or its environment could not be made.
    """
    if job.status == "SUCCEEDED":
        return 0
    if job.exit_code is not None and job.exit_code > 0:
        return job.exit_code
    if job.status == "STOPPED":
        return 143
    raise TrainingError(f"job {job.id}: {job.status}: {job.message.strip() or 'no message'}; submit it again to go on")


def _is_private(override: str) -> bool:
    """Whether it says where things lie, or with which password."""
    key, _, value = override.partition("=")
    return key.split(".")[0] in DROPPED or "://" in value or public_name(value) != value or "\n" in override


def _below(config_file: Path, working_dir: Path) -> str:
    """The configuration's path as the job sees it."""
    try:
        return config_file.resolve().relative_to(working_dir.resolve()).as_posix()
    except ValueError:
        raise UserError(f"{config_file}: is not below --working-dir {working_dir}, which is what is shipped") from None


def _variables(config: RunConfig, given: dict[str, str]) -> dict[str, str]:
    """The job's environment; what outlives the job must lie on shared storage."""
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), **given}
    url = config.storage is not None and "://" in config.storage
    if config.storage is not None and not url and not Path(config.storage).is_absolute():
        raise UserError(
            f"storage: found {config.storage!r}, expected an absolute path that all nodes share: a job's current directory"
            " is thrown away with the job"
        )
    if "AMLORA_HOME" not in variables:
        if config.storage is None:
            raise UserError(
                "storage: found nothing, expected a folder that all nodes share (storage=/mnt/shared/amlora): checkpoints in"
                " a job's own directory would be thrown away with the job"
            )
        if url:
            raise UserError(
                f"--env: found no AMLORA_HOME next to storage={config.storage}, expected --env AMLORA_HOME=FOLDER, of any"
                " node its own: models and checkpoints in work lie there"
            )
        variables["AMLORA_HOME"] = str(Path(config.storage) / HOME)
    return variables


def environment_from(pairs: list[str]) -> dict[str, str]:
    """``KEY=VALUE`` arguments as a mapping.

    Raises:
        UserError: one has no ``=``.
    """
    out: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UserError(f"--env: found {pair!r}, expected KEY=VALUE")
        out[key] = value
    return out


def runtime_env_from(file: Path | None) -> dict[str, Any]:
    """Ray's runtime environment from a YAML file.

    Raises:
        UserError, FaultsError: no such file, no mapping, a key twice, or a ``working_dir`` in it.
    """
    if file is None:
        return {}
    try:
        document = read_document(file)
    except FaultsError as error:
        raise UserError(f"--runtime-env: cannot read {error}; expected a mapping such as `pip: [...]`") from error
    if document.faults:
        raise FaultsError(f"--runtime-env: {file}", document.faults)
    value = document.data
    if "working_dir" in value:
        raise UserError(f"--runtime-env: {file}: working_dir is given by --working-dir")
    variables = value.get("env_vars", {})
    if not isinstance(variables, dict):
        raise UserError(f"--runtime-env: {file}: env_vars: expected a mapping of strings")
    for key, given in variables.items():
        if not isinstance(key, str) or not isinstance(given, str):
            raise UserError(f"--runtime-env: {file}: env_vars.{key}: found {given!r}, expected a string: quote it")
    return value


def to_stdout(text: str) -> None:
    """Print what a job has printed, as it comes."""
    sys.stdout.write(text)
    sys.stdout.flush()
