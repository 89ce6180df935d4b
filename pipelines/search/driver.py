"""A search from its start, or from wherever it was, to the winner: ``amlora tune``.

Ray Tune starts a driver function for each trial (`trial.run_trial`), which runs an ordinary durable sequence scored on
the dev split. What a trial reports goes through here into the journal, the one record that a search is rebuilt from;
Tune's own state is not kept. The winner's sequence is then scored on the test split, which nothing before has opened.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from amlora_dist.config.loading import home, storage_of, to_mapping
from amlora_dist.config.search_space import DIRECTIONS, described
from amlora_dist.errors import AmloraError, FaultsError, TrainingError, UserError
from amlora_dist.privacy import public_configuration
from amlora_dist.registry import leases, tags
from amlora_dist.registry.housekeeping import aliases
from amlora_dist.registry.store import Store
from pipelines.cluster import resources
from pipelines.cluster.session import RayCluster, WorkerPlacement
from pipelines.runs import results
from pipelines.runs.inputs import gather_inputs
from pipelines.runs.resume_check import IRRELEVANT, refuse_other_configuration, refuse_other_data
from pipelines.runs.sequence import SearchContext, run_sequence
from pipelines.runs.stage_record import how_made
from pipelines.search.intervals import add_intervals
from pipelines.search.journal import Journal, Trial
from pipelines.search.outcome import FILE, search_result
from pipelines.search.plan import SearchPlan, plan_search
from pipelines.search.proposals import Proposals, proposals_for
from pipelines.search.schedulers import OPEN, Halving

if TYPE_CHECKING:
    from amlora_dist.config.loading import RunConfig
    from amlora_dist.registry.leases import Lease
    from pipelines.cluster.resources import Demand
    from pipelines.runs.progress import Progress


def run_search(
    config: RunConfig, *, file: str, search_id: str, progress: Progress, began: float, verbose: bool = False,
    allow_changed_data: bool = False,
) -> dict[str, Any]:
    """Run a search to its end, from wherever it is.

    Args:
        config: with its ``search`` section.
        file: where it was read, for messages.
        search_id: names the search; the same id goes on.
        progress: gets the trials' events.
        began: when the command was started, seconds since 1970.
        verbose: let Ray and the libraries talk.
        allow_changed_data: go on where rows, prompts or the base model have changed since the search began; what its
            trials found on the others does not count any more.

    Returns:
        The result as ``amlora tune --json`` prints it (docs/search.md).

    Raises:
        UserError: something in the space, the configuration, the data or the cluster is wrong.
        HeldError: another driver holds the search.
        TrainingError: no trial finished.
    """
    plan = plan_search(config, file)
    place = home()
    resources.check_folder(place)
    inputs = gather_inputs(plan.config({}), place)
    demand = inputs.demand(plan.settings.gpus or 1.0)
    storage, _ = storage_of(config)
    resources.check_folder(storage, "storage")
    resources.require(resources.shortfalls(demand, resources.local_supply(storage, alone=not os.environ.get("RAY_ADDRESS"))))
    resources.check_ray_address()
    store = Store.open(place, config.mlflow.tracking_uri)
    model = config.registered_model or search_id
    mapping = public_configuration(to_mapping(config))
    wanted = {tags.KIND: "search", tags.SEARCH: search_id}
    name, facts = f"--search-id {search_id!r}", inputs.facts()
    refuse_other_configuration(store, wanted, mapping, name, free=IRRELEVANT, grows=False)
    of_a_trial = {tags.KIND: "sequence", tags.RUN_ID: trial_run_id(search_id, 1)}  # searches of before 0.2 kept no facts
    changed = refuse_other_data(
        store, [wanted, of_a_trial], facts, results.INPUTS, name, allow=allow_changed_data, again="run all trials again"
    )
    key = f"{leases.RUN_KEY}search.{search_id}"
    with leases.acquire(store.lease_entries, key, label=f"search {search_id!r}") as lease:
        progress.note(f"search id {search_id}; after an interruption go on with: --search-id {search_id}")
        champion = f"{search_id}-champion"
        search_run = store.search_run(model, search_id, champion, mapping)
        status = "KILLED"
        try:
            if stale := store.close_open_runs(search_run):
                progress.note(f"closed {stale} runs that a killed start had left open")
            journal = Journal(store, search_run, search_id, lease.check)
            if changed:
                progress.note("the data has changed since this search began: its trials run again")
                journal.reopen()
            store.log_json(search_run, results.INPUTS, facts)
            search = _Search(plan, search_id, journal, progress, place, storage, demand, verbose)
            timing = search.run(began)
            store.close_open_runs(search_run)
            result = search_result(plan, search_id, model, list(journal.trials.values()), store.connection.shown)
            result["cost"] |= asdict(timing)
            add_intervals(result, store)
            _score_winner(
                plan, result, champion, model, search_run, store, lease, progress, verbose, allow_changed_data or changed
            )
            store.log_json(search_run, FILE, {key: value for key, value in result.items() if key != "tracking_uri"})
            status = "FINISHED"
        except AmloraError as error:
            status = "KILLED" if error.exit_code in (130, 143) else "FAILED"
            raise
        finally:
            with contextlib.suppress(AmloraError):
                lease.check()
                store.end_run(search_run, status)
    return result


def _score_winner(
    plan: SearchPlan,
    result: dict[str, Any],
    run_id: str,
    model: str,
    search_run: str,
    store: Store,
    lease: Lease,
    progress: Progress,
    verbose: bool,
    allow_changed_data: bool,
) -> None:
    """Score the winner on the test split, once, publish it, and point the alias ``champion`` at it."""
    winner, runner_up = result["winner"], result["runner_up"]
    progress.note(f"winner: trial {winner['number']} ({described(winner['values'])}); scoring it on the test split")
    config = plan.champion(winner["values"], model)
    within = SearchContext(run=search_run, gpus=plan.settings.gpus or 1.0)
    found = run_sequence(
        config, run_id=run_id, progress=progress, verbose=verbose, within=within, allow_changed_data=allow_changed_data
    )
    version = store.resolve(f"models:/{model}/{found['stages'][-1]['version']}")
    # By an earlier start: whoever has pointed the alias elsewhere since keeps it.
    crowned = tags.SEARCH in version.tags and tags.CHAMPION in aliases(store, model)
    store.tag_version(
        version,
        {
            tags.SEARCH: result["search_id"],
            tags.TRIAL: str(winner["number"]),
            tags.OBJECTIVE: ", ".join(f"{DIRECTIONS[name]} {name} (dev)" for name in plan.settings.objectives),
            tags.RUNNER_UP: f"trial {runner_up['number']} ({described(runner_up['values'])})" if runner_up else "none",
        },
        lease.check,
    )
    if not crowned:
        store.set_alias(model, tags.CHAMPION, version, lease.check)
    winner["version"] = version.uri
    winner["test"] = {key: found[key] for key in ("metrics", "accuracy_matrix", "untrained", "oracle", "run_id")}


def trial_run_id(search_id: str, number: int) -> str:
    """Of a trial's run."""
    return f"{search_id}-t{number:03d}"


@dataclass(slots=True)
class SearchTiming:
    """Of this start of a search."""

    began_at: float
    """When Ray was asked for the first thing, seconds since 1970."""
    wall_seconds: float
    """From then to the end of the last trial."""
    first_step_seconds: float | None
    """From the command to the first optimizer step of any trial; None: nothing was trained."""
    concurrent: int
    """Trials at once; 0: there was nothing left to do."""


class _Search:
    """What Ray Tune asks and tells, in terms of the journal."""

    def __init__(
        self,
        plan: SearchPlan,
        search_id: str,
        journal: Journal,
        progress: Progress,
        place: Path,
        storage: Path,
        demand: Demand,
        verbose: bool,
    ) -> None:
        self.plan, self.search_id, self.journal, self.progress = plan, search_id, journal, progress
        self.home, self.storage, self.demand, self.verbose = place, storage, demand, verbose
        self.objective = plan.settings.objectives[0]
        self.sign = 1.0 if DIRECTIONS[self.objective] == "max" else -1.0
        self.proposals: Proposals = proposals_for(plan, journal.events())
        self.halving: Halving | None = None
        if plan.settings.scheduler == "halving":
            settings = plan.settings
            self.halving = Halving(plan.stages, plan.order, grace=settings.grace_stages, reduction=settings.reduction)
            for trial in journal.trials.values():
                if trial.outcome:
                    self._relive(self.halving, trial)
        self._reports: dict[int, dict[int, dict[str, Any]]] = {}
        """What each trial has reported after each stage."""
        self._at_work: dict[int, int] = {}
        """Trials that Ray Tune has, and after how many stages each was when it was given to it."""
        self._undecided: dict[int, dict[str, Any]] = {}
        """The last reports of trials that have ended, and of which the scheduler cannot say yet whether they should have."""
        self.first_step: float | None = None
        self.broken: AmloraError | None = None
        """Why the search itself cannot go on."""

    def run(self, began: float) -> SearchTiming:
        """Run what is left of the trials."""
        began_at, started, concurrent = time.time(), time.monotonic(), 0
        done = [trial for trial in self.journal.trials.values() if trial.outcome]
        if done:
            self.progress.note(f"{len(done)} of {self.plan.trials} trials have ended in an earlier start")
        if len(done) < self.plan.trials:
            placement = WorkerPlacement(self.plan.base.workers, self.storage / "ray", self.demand)
            with RayCluster(placement.workers, verbose=self.verbose) as cluster:
                cluster.ready(placement, again=False)
                concurrent = self.room(cluster.use_gpus())
                self.progress.note(
                    f"search id {self.search_id}: {self.plan.trials} trials of {self.plan.stages} stages,"
                    f" {concurrent} at once"
                )
                from pipelines.search.tuning import tune_trials

                tune_trials(self, concurrent, gpus=cluster.use_gpus())
            if left := sorted(number for number, trial in self.journal.trials.items() if not trial.outcome):
                raise TrainingError(f"trials {left} have not ended; start the same command again to go on with them")
        first = None if self.first_step is None else self.first_step - began
        return SearchTiming(began_at, time.monotonic() - started, first, concurrent)

    def room(self, gpus: bool) -> int:
        """Trials that the cluster has room for at once.

        Raises:
            UserError: not even for one.
        """
        share = self.demand.gpu_share
        most, fewest = max(1, self.plan.base.workers), max(1, self.demand.workers)
        have = resources.in_cluster()
        cpus, cards = math.floor(have.cpus or 0), have.gpus or 0.0

        def fitting(workers: int) -> int:
            slots = cpus // workers
            if gpus:
                # A share of one GPU does not reach into another: 0.6 of a GPU fits once into each.
                seats = int(cards) * math.floor(1 / share) if share < 1 else int(cards // share)
                slots = min(slots, seats) if self.plan.base.workers == 0 else seats // workers
            elif have.memory is not None:
                slots = min(slots, have.memory // self.demand.memory)
            return slots

        slots = fitting(most) or min(fitting(fewest), 1)  # with fewer than it wants, a trial takes all that there is
        if slots < 1:
            raise UserError(
                f"workers: one trial needs {fewest} processes, {fewest * share if gpus else 0:g} GPUs and"
                f" {self.demand.memory / 1e9:.1f} GB, the cluster has {cpus} CPUs, {cards:g} GPUs and"
                f" {(have.memory or 0) / 1e9:.1f} GB; lower `workers` or add nodes"
            )
        return min(slots, self.plan.settings.max_concurrent or slots, self.plan.trials)

    @contextlib.contextmanager
    def breaking(self) -> Iterator[None]:
        """Inside, what ends the search is kept in ``broken``: Ray Tune would make a traceback, or a failed trial, of it."""
        try:
            yield
        except AmloraError as error:
            self.broken = self.broken or error

    # -- called by Ray Tune ---------------------------------------------------------------------------------------

    def next(self) -> tuple[Trial, dict[str, Any]] | Literal["later"] | None:
        """The next trial to start, or to go on, and the configuration of its run; ``later``: there will be one when others
        have come further; None: there is none."""
        while (proposed := self.proposals.next()) is not None:
            number, values = proposed
            trial = self.journal.start(number, values)
            self.progress.note(f"trial {number}/{self.plan.trials}: {described(values)}")
            try:
                config = self.plan.config(values)
            except FaultsError as error:  # of an algorithm's: listed points were checked before anything started
                self.ended(number, None, str(error))
                continue
            return self._started(trial, config)
        for number in self.halving.due() if self.halving else []:
            if number not in self._at_work:
                self._undecided.pop(number, None)
                trial = self.journal.trials[number]
                self.progress.note(f"trial {number} goes on: {described(trial.values)}")
                return self._started(trial, self.plan.config(trial.values))
        return "later" if self.halving and self.halving.due() else None

    def _started(self, trial: Trial, config: RunConfig) -> tuple[Trial, dict[str, Any]]:
        self._at_work[trial.number] = max(self._reports.get(trial.number, {}), default=0)
        if not self.plan.settings.share_stages:
            config.storage = str(self.storage / "trials" / self.run_id(trial.number))
        return trial, to_mapping(config)

    def run_id(self, number: int) -> str:
        """Of a trial's run."""
        return trial_run_id(self.search_id, number)

    def stopped_by(self, report: dict[str, Any]) -> bool:
        """A trial has reported; whether the scheduler stops it.

        Raises:
            UserError: it lacked what all trials need (``trial.is_outage``).
        """
        if "error" in report:
            if report.get("outage"):
                raise UserError(f"trial {report['number']}: {report['error']} (the same command goes on from there)")
            return False
        trial = self.journal.trials[report["number"]]
        at = report.get("first_step")
        if at is not None:
            self.first_step = min(at, self.first_step or at)
        self.journal.log(trial, report)
        value = report["metrics"].get(self.objective)
        shown = "undefined" if value is None else f"{value:.3f}"
        record = report["records"][-1]
        self.progress.note(
            f"  trial {trial.number}, stage {report['stage']}/{self.plan.stages} {record['task']}: {how_made(record)},"
            f" {self.objective} {shown}"
        )
        self._reports.setdefault(trial.number, {})[int(report["stage"])] = report
        if self.halving is None:
            return False
        self.halving.record(trial.number, report["stage"], None if value is None else self.sign * value)
        self._decide()
        return self.halving.waits(trial.number) or self.halving.verdict(trial.number) not in (None, OPEN)

    def ended(self, number: int, report: dict[str, Any] | None, error: str | None) -> None:
        """A trial has ended, by itself, by the scheduler, or because its process died too often."""
        report = report or {"number": number, "stage": 0, "metrics": {}, "records": [], "objectives": []}
        self._undecided[number] = report | {"error": error} if error else report
        came_on = report["stage"] > self._at_work.pop(number, 0) and "error" not in self._undecided[number]
        if self.halving is not None and not (came_on and (self.halving.waits(number) or number in self.halving.due())):
            self.halving.end(number)
        self._decide()

    def _decide(self) -> None:
        """Close the trials that have ended and of which the scheduler knows by now where they should have."""
        for number, report in sorted(self._undecided.items()):
            stop = None if self.halving is None else self.halving.verdict(number)
            if stop != OPEN:
                del self._undecided[number]
                self._close(number, report, stop)

    def _close(self, number: int, report: dict[str, Any], stop: int | None) -> None:
        if stop is not None:  # it counts as it was then, whatever became of it while it waited
            report = self._reports[number][stop]
        elif "error" not in report and report["stage"] < self.plan.stages:
            report = report | {"error": f"it ended after stage {report['stage']} of {self.plan.stages}"}
        outcome: Any = "pruned" if stop is not None else "failed" if "error" in report else "finished"
        self.journal.end(self.journal.trials[number], outcome, report)
        self.proposals.tell(number, outcome, report.get("objectives") or [])
        if outcome != "finished":
            reason = report.get("error") or f"stopped after stage {report['stage']}, behind the others"
            self.progress.note(f"  trial {number} {outcome}: {reason}")

    def _relive(self, halving: Halving, trial: Trial) -> None:
        """Let the scheduler know what an ended trial reported, stage by stage."""
        for stage, metrics in enumerate(trial.report.get("curve") or [], start=1):
            value = metrics.get(self.objective)
            halving.record(trial.number, stage, None if value is None else self.sign * value)
        halving.end(trial.number)
