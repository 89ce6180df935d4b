"""The durable run of a sequence: plan a stage, execute it, publish it; then the next one.

MLflow is the journal. Whatever dies, the same command goes on from there: finished stages are taken as they are, a stage
that another run has published is taken over by reference, the rest is trained from its newest checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from amlora_dist.config.loading import RunConfig, home, storage_of, to_mapping
from amlora_dist.crash_points import reach
from amlora_dist.errors import AmloraError, HeldError, TrainingError, UserError
from amlora_dist.privacy import public_configuration
from amlora_dist.registry import tags
from amlora_dist.registry.connection import VARIABLE
from amlora_dist.registry.places import DATABASE
from amlora_dist.registry.store import Store
from amlora_dist.training.failures import disk_watched
from amlora_dist.training.remote_storage import RemoteStorage
from pipelines.cluster import resources
from pipelines.cluster.resources import Demand
from pipelines.cluster.session import WorkerPlacement
from pipelines.runs import results
from pipelines.runs.executor import executor_of, threads_remark
from pipelines.runs.inputs import RunInputs, gather_inputs
from pipelines.runs.interrupts import Stops, stops_handled
from pipelines.runs.journal import RunJournal
from pipelines.runs.outlook import stage_sizes
from pipelines.runs.plan import StagePlan, plan_stage
from pipelines.runs.progress import Score
from pipelines.runs.rates import settle_rate
from pipelines.runs.resume_check import refuse_other_configuration, refuse_other_data
from pipelines.runs.retries import Failure, decide

if TYPE_CHECKING:
    from collections.abc import Iterator

    from amlora_dist.registry.leases import Lease
    from amlora_dist.training.stage_spec import StageWork
    from amlora_dist.training.worker_cache import WorkerCache
    from pipelines.runs.executor import Event, Executor
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
    progress.outline(())  # of a comparison, another run may have ended just now
    with _opened(config, run_id, progress, within, verbose=verbose, alone=alone, changed=allow_changed_data) as opened:
        journal, attempts = opened
        inputs, bank, plans = journal.inputs, journal.starting_bank(), list[StagePlan]()
        if (start := journal.version_of(bank)) is not None:
            progress.note(f"starting from {start.uri}: {', '.join(parent.task for parent in bank.parents)}")
        journal.note_inputs(bank, settle_rate(journal, bank, attempts.run, attempts.release, progress))
        progress.outline(stage_sizes(inputs, bank))
        for number, task in enumerate(inputs.stage_names, start=1):
            progress.stage(task, number, len(inputs.stage_names))
            plan = plan_stage(inputs, bank, task, plans)
            with journal.claimed(plan, attempts.release) as record:
                work = journal.open_work(plan, record)
                if work is not None:
                    attempts.run(work)
                progress.phase("publishing")
                journal.settle()  # the stage before was published while this one trained
                bank = journal.publish(plan, record, progress)
            plans.append(plan)
            if within is not None and within.on_stage is not None:
                within.on_stage(journal.settle())  # what a search gets is published
        journal.settle()
        result = journal.finish()
        if within is None and (now_served := journal.crown(bank)):
            progress.note(now_served)
    progress.note(f"done in {time.monotonic() - began:.0f} s")
    return result


FINAL = (UserError.exit_code, HeldError.exit_code, 130, 143)
"""Exit codes of errors that are passed on as they are: nothing failed in training."""
BEGUN = ("step", "scoring", "scored")
"""Events of work that a stage that is asked to stop may finish and keep."""


class Attempts:
    """Runs stages until each is done or has failed for good.

    Args:
        executor: where they run.
        placement: what they need there, of a cluster.
        lease: of the run, which ends training that no longer counts.
        progress: shows steps and scores.
    """

    def __init__(self, executor: Executor, placement: WorkerPlacement, lease: Lease, progress: Progress) -> None:
        self._executor, self._placement, self._lease, self._progress = executor, placement, lease, progress

    def run(self, work: StageWork) -> None:
        """Train (if need be) and score.

        Raises:
            UserError, HeldError, StoppedError: of the stage itself.
            TrainingError: it failed for good.
        """
        failures: list[Failure] = []
        while True:
            self._lease.check()
            work.path.mkdir(parents=True, exist_ok=True)
            self._executor.ready(self._placement, again=bool(failures))
            work.upload()
            try:
                with stops_handled(work.path) as stops:
                    self._executor.run(work, partial(self._on_event, stops), partial(self._watch, stops))
                work.fetch()
                return
            except AmloraError as error:
                with contextlib.suppress(UserError):  # what the attempt ended with is what to say
                    work.fetch()
                failures.append(Failure.of(error, work.progress()))
                verdict = decide(failures)
                if not verdict.retry:
                    if error.exit_code in FINAL:
                        raise
                    raise TrainingError(f"stage {work.task!r}: {verdict.reason}") from error
                self._progress.note(f"stage {work.task!r}: {verdict.reason}")

    def release(self) -> None:
        """Nothing will be run for a while: let go of what others may need."""
        self._executor.release()

    def _watch(self, stops: Stops) -> None:
        """End what no longer counts, because this driver was paused and another one took the run, and what was asked to stop
        before it had begun."""
        if self._lease.lost:
            self._lease.check()
        stops.end_what_has_not_begun()

    def _on_event(self, stops: Stops, event: Event) -> None:
        kind = event.get("kind")
        stops.begun = stops.begun or kind in BEGUN
        if kind == "step":
            rate = event["tokens"] / event["seconds"] if event["seconds"] else None
            self._progress.step(event["step"], event["steps"], event["loss"], rate)
        elif kind == "racing":
            self._progress.step(event["step"], event["steps"], event["loss"], None)
        elif kind == "trainable":
            total = sum(event["parameters"].values())
            parts = ", ".join(f"{name} {count:,}" for name, count in event["parameters"].items())
            self._progress.note(f"  trains {total:,} parameters in {len(event['modules'])} layers ({parts})")
            self._progress.phase("training")
        elif kind == "reading":
            self._progress.phase("reading texts for the router")
        elif kind == "resumed":
            self._progress.note(f"  resumed after step {event['step']}")
        elif kind == "scoring":
            self._progress.rows(event["task"], event["mode"], event.get("done", 0), event["rows"])
        elif kind == "scored":
            self._progress.score(
                Score(
                    event["task"], event["mode"], event["metric"], event["accuracy"], event["rows"], event.get("kept") or 0
                )
            )


@contextlib.contextmanager
def _opened(
    config: RunConfig, run_id: str, progress: Progress, within: SearchContext | None, *, verbose: bool, alone: bool,
    changed: bool,
) -> Iterator[tuple[RunJournal, Attempts]]:  # fmt: skip
    """Everything checked that can be, the run id taken, and at the end the run closed in MLflow and let go."""
    resources.check_folder(home())
    if config.workers and os.environ.get("RAY_ADDRESS"):
        resources.check_ray_address()
    with disk_watched(), executor_of(config, within.cache if within else None, verbose=verbose) as executor:
        executor.prepare(_expected(config, run_id) if within is None else None)
        from amlora_dist.inference.loading import remember_base  # imports what takes seconds, while Ray starts

        progress.phase("reading the rows and the model")
        inputs = gather_inputs(config, home(), run_id=run_id, gpus=_gpus(config, executor))
        _check_places(inputs, within)
        for name, took in ((name, data.took) for name, data in inputs.data.items() if data.took):
            progress.note(f"task {name!r}: columns: auto: {took}")
        for remark in dict.fromkeys(data.remarks for data in inputs.data.values() if data.remarks):
            progress.note(remark)
        progress.phase("opening MLflow")
        store = Store.open(home(), config.mlflow.tracking_uri)
        own, name = {tags.KIND: "sequence", tags.RUN_ID: run_id}, f"run id {run_id!r}"
        refuse_other_configuration(store, own, public_configuration(to_mapping(inputs.config)), name)
        if refuse_other_data(store, [own], inputs.facts(), results.INPUTS, name, allow=changed):
            progress.note("the data has changed since this run began: stages that read it are trained again")
        remember_base(inputs.base)
        with store.hold_run(run_id, inputs.model) as lease:
            if alone and within is None:
                if not config.workers and (remark := threads_remark()):
                    progress.note(remark)
                progress.note(f"run id {run_id}; after an interruption go on with: --run-id {run_id}")
            store.ensure_current(inputs.model, lease.check)  # a version may have been registered just before a crash
            journal = RunJournal(
                store, lease, inputs, below=within.run if within else None, share=within is None or within.share
            )
            placement = _placement(inputs.config, inputs.demand(within.gpus if within else 1.0), within)
            with _closed_at_the_end(journal):
                yield journal, Attempts(executor, placement, lease, progress)
        reach("run_closed")


def _gpus(config: RunConfig, executor: Executor) -> bool | None:
    """Whether stages run on GPUs, asked where something is to follow it (``auto``); a cluster's head may have none."""
    return executor.gpus() if "auto" in (config.dtype, config.model.attention) else None


def _check_places(inputs: RunInputs, within: SearchContext | None) -> None:
    """Room, memory and processors for the run, and the URL that it copies to."""
    resources.check_folder(inputs.storage, "storage")
    alone = not (inputs.config.workers and os.environ.get("RAY_ADDRESS"))
    demand = inputs.demand(within.gpus if within else 1.0)
    resources.require(resources.shortfalls(demand, resources.local_supply(inputs.storage, alone=alone)))
    if inputs.url:
        RemoteStorage(inputs.url, inputs.storage).check()


def _placement(config: RunConfig, demand: Demand, within: SearchContext | None) -> WorkerPlacement:
    """What stages need of a cluster."""
    storage, url = storage_of(config)
    return WorkerPlacement(
        config.workers, storage / "ray", demand, within.threads if within else None, config.training.batch_size,
        config.placement, None if url is None else f"{url}/ray",
    )  # fmt: skip


def _expected(config: RunConfig, run_id: str) -> WorkerPlacement | None:
    """What stages will need, before the model and the rows are known; None where workers may not be needed at all, or
    nobody can say how many, or whether this machine can hold them."""
    if not 0 < config.workers <= (os.cpu_count() or 1) or config.min_workers not in (None, config.workers):
        return None
    if _has_finished(run_id, config.mlflow.tracking_uri):
        return None  # as many stages as it has are there
    return _placement(config, Demand(config.workers, 0, 0, len(config.tasks), "fp32", config.zero_stage), None)


def _has_finished(run_id: str, tracking_uri: str | None) -> bool:
    """Whether a run of this id has come to its end before; asked before anything is opened to write.

    Raises:
        UserError: the store is none, or does not answer.
    """
    if not (tracking_uri or os.environ.get(VARIABLE)) and not (home() / DATABASE).is_file():
        return False
    found = Store.open(home(), tracking_uri, reads=True).find_runs({tags.KIND: "sequence", tags.RUN_ID: run_id})
    return bool(found) and found[-1].status == "FINISHED"


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
