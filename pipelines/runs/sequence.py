"""The durable run of a sequence: plan a stage, execute it, publish it; then the next one.

MLflow is the journal. Whatever dies, the same command goes on from there: finished stages are taken as they are, a stage
that another run has published is taken over by reference, the rest is trained from its newest checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from amlora_dist.config.loading import RunConfig, home, storage_of, to_mapping
from amlora_dist.crash_points import reach
from amlora_dist.errors import AmloraError
from amlora_dist.privacy import public_configuration
from amlora_dist.registry import tags
from amlora_dist.registry.store import Store
from amlora_dist.training.failures import disk_watched
from amlora_dist.training.remote_storage import RemoteStorage
from pipelines.cluster import resources
from pipelines.cluster.resources import Demand
from pipelines.cluster.session import Placement
from pipelines.runs import results
from pipelines.runs.attempts import Attempts
from pipelines.runs.executor import executor_of, threads_remark
from pipelines.runs.inputs import RunInputs, gather_inputs
from pipelines.runs.journal import RunJournal
from pipelines.runs.outlook import stage_sizes
from pipelines.runs.plan import StagePlan, plan_stage
from pipelines.runs.rates import settle_rate
from pipelines.runs.resume_check import refuse_other_configuration, refuse_other_data

if TYPE_CHECKING:
    from collections.abc import Iterator

    from amlora_dist.training.worker_cache import WorkerCache
    from pipelines.runs.executor import Executor
    from pipelines.runs.progress import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchContext:
    """What a run that is part of a search gets from it."""

    run: str
    """MLflow's id of the run above this one."""
    on_stage: Callable[[dict[str, Any]], None] | None = None
    """Called with the result so far after every stage."""
    share: bool = True
    """Take over stages that other runs have published, or are about to."""
    gpus: float = 1.0
    """Share of a GPU for each worker."""
    threads: int | None = None
    """Of each worker; other trials use the other CPUs of its node."""
    cache: WorkerCache | None = None
    """What this process keeps from run to run, for stages that it runs itself."""


def run_sequence(
    config: RunConfig,
    *,
    run_id: str,
    progress: Progress,
    verbose: bool = False,
    within: SearchContext | None = None,
    alone: bool = True,
    allow_changed_data: bool = False,
) -> dict[str, Any]:
    """Run a sequence to its end, from wherever it is; ``within`` a search, in a comparison (not ``alone``), or on its own.

    Rows, prompts or a base model that have changed since its first start are refused, unless ``allow_changed_data``.

    Returns:
        The result as ``amlora run --json`` prints it.

    Raises:
        UserError: something in the configuration, the data or the model is wrong; nothing was started.
        HeldError: another driver holds the run id.
        TrainingError: a stage failed for good.
        StoppedError: stopped by a signal, after a checkpoint.
    """
    began = time.monotonic()
    resources.check_folder(home())
    if config.workers and os.environ.get("RAY_ADDRESS"):
        resources.check_ray_address()
    with disk_watched(), executor_of(config, within.cache if within else None, verbose=verbose) as executor:
        executor.prepare(_expected(config, run_id) if within is None else None)
        from amlora_dist.inference.loading import remember_base  # imports what takes seconds, while Ray starts

        progress.phase("reading the rows and the model")
        inputs = _checked_inputs(config, run_id, within, _gpus(config, executor))
        for remark in dict.fromkeys(data.remarks for data in inputs.data.values() if data.remarks):
            progress.note(remark)
        progress.phase("opening MLflow")
        store = Store.open(home(), config.mlflow.tracking_uri)
        own, name = {tags.KIND: "sequence", tags.RUN_ID: run_id}, f"run id {run_id!r}"
        refuse_other_configuration(store, own, public_configuration(to_mapping(inputs.config)), name)
        if refuse_other_data(store, [own], inputs.facts(), results.INPUTS, name, allow=allow_changed_data):
            progress.note("the data has changed since this run began: stages that read it are trained again")
        remember_base(inputs.base)
        model = str(inputs.config.registered_model)
        with store.hold_run(run_id, model) as lease:
            if alone and within is None:
                if not config.workers and (remark := threads_remark()):
                    progress.note(remark)
                progress.note(f"run id {run_id}; after an interruption go on with: --run-id {run_id}")
            store.ensure_current(model, lease.check)  # a version may have been registered just before a crash
            journal = RunJournal(
                store, lease, inputs, run_id=run_id, model=model,
                below=within.run if within else None, share=within is None or within.share,
            )  # fmt: skip
            placement = _placement(inputs.config, inputs.demand(within.gpus if within else 1.0), within)
            with _closed_at_the_end(journal):
                attempts = Attempts(executor, placement, lease, progress)
                result = run_stages(journal, attempts, progress, within)
        reach("run_closed")
    progress.note(f"done in {time.monotonic() - began:.0f} s")
    return result


def run_stages(
    journal: RunJournal, attempts: Attempts, progress: Progress, within: SearchContext | None = None
) -> dict[str, Any]:
    """The whole story of a run: plan, execute, publish, stage after stage; each is published while the next one trains."""
    inputs = journal.inputs
    bank = journal.starting_bank()
    if (start := journal.version_of(bank)) is not None:
        progress.note(f"starting from {start.uri}: {', '.join(parent.task for parent in bank.parents)}")
    journal.note_inputs(bank, settle_rate(journal, bank, attempts, progress))
    progress.outline(stage_sizes(inputs, bank))
    plans: list[StagePlan] = []
    for number, task in enumerate(inputs.stage_names, start=1):
        progress.stage(task, number, len(inputs.stage_names))
        plan = plan_stage(inputs, bank, task, plans)
        with journal.claimed(plan, attempts.release) as record:
            work = journal.open_work(plan, record)
            if work is not None:
                attempts.run(work)
            progress.phase("publishing")
            journal.settle()
            bank = journal.publish(plan, record, progress)
        plans.append(plan)
        if within is not None and within.on_stage is not None:
            within.on_stage(journal.settle())  # what a search hears of is published
    journal.settle()
    result = journal.finish()
    if within is None and (now_served := journal.crown(bank)):
        progress.note(now_served)
    return result


def _gpus(config: RunConfig, executor: Executor) -> bool | None:
    """Whether stages run on GPUs, asked where something is to follow it (``auto``); a cluster's head may have none."""
    return executor.gpus() if "auto" in (config.dtype, config.model.attention) else None


def _checked_inputs(config: RunConfig, run_id: str, within: SearchContext | None, gpus: bool | None) -> RunInputs:
    """All that a run is made of, with everything checked that can be before a process is started."""
    inputs = gather_inputs(config, home(), gpus=gpus)
    inputs.config = replace(inputs.config, registered_model=config.registered_model or run_id)
    resources.check_folder(inputs.storage, "storage")
    alone = not (config.workers and os.environ.get("RAY_ADDRESS"))
    demand = inputs.demand(within.gpus if within else 1.0)
    resources.require(resources.shortfalls(demand, resources.local_supply(inputs.storage, alone=alone)))
    if inputs.url:
        RemoteStorage(inputs.url, inputs.storage).check()
    return inputs


def _placement(config: RunConfig, demand: Demand, within: SearchContext | None) -> Placement:
    """What stages need of a cluster."""
    storage, url = storage_of(config)
    return Placement(
        config.workers, storage / "ray", demand, within.threads if within else None, config.training.batch_size,
        config.placement, None if url is None else f"{url}/ray",
    )  # fmt: skip


def _expected(config: RunConfig, run_id: str) -> Placement | None:
    """What stages will need, before the model and the rows are known; None where workers may not be needed at all, or
    nobody can say how many, or whether this machine can hold them."""
    if not 0 < config.workers <= (os.cpu_count() or 1) or config.min_workers not in (None, config.workers):
        return None
    if results.has_finished(run_id, config.mlflow.tracking_uri):
        return None  # as many stages as it has are there
    return _placement(config, Demand(config.workers, 0, 0, len(config.tasks), "fp32", config.zero_stage), None)


@contextlib.contextmanager
def _closed_at_the_end(journal: RunJournal) -> Iterator[None]:
    """Close the run in MLflow, with the status that it ended in; a publication at work may end before."""
    status = "FAILED"
    try:
        yield
        status = "FINISHED"
    except AmloraError as error:
        status = "KILLED" if error.exit_code in (130, 143) else "FAILED"
        raise
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        journal.leave()
        with contextlib.suppress(AmloraError):
            journal.lease.check()
            journal.store.end_run(journal.run, status)
