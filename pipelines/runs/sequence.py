"""The durable run of a sequence: stages one after another, with MLflow as the journal.

A stage is done when, and only when, a version that counts carries its training fingerprint in this run's registered
model. Whatever dies, the same command goes on from there: finished stages are taken as they are, a stage that another
run has published is taken over by reference, the rest is trained from its newest checkpoint.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amlora_dist.config.loading import RunConfig, home, storage_of, to_mapping
from amlora_dist.crash_points import reach
from amlora_dist.errors import AmloraError, HeldError, TrainingError, UserError
from amlora_dist.methods import method_for
from amlora_dist.privacy import public_configuration
from amlora_dist.registry import tags
from amlora_dist.registry.store import Store
from amlora_dist.training.failures import disk_watched
from amlora_dist.training.remote_storage import Copies
from amlora_dist.training.result import read_result, write_result
from amlora_dist.training.stage_spec import WITHOUT, Cell, Mode, Parent, StageWork
from pipelines.cluster import resources
from pipelines.cluster.session import Placement
from pipelines.runs import results
from pipelines.runs.executor import Event, Executor, executor_of
from pipelines.runs.inputs import Materials, gather_materials
from pipelines.runs.interrupts import stops_handled
from pipelines.runs.journal import GrowingBank, Publication, StageRecord, library_versions, statistics_digest
from pipelines.runs.rates import settle_rate
from pipelines.runs.resume_check import check_rule_of_bank, refuse_other_configuration, refuse_other_data
from pipelines.runs.retries import Failure, decide
from pipelines.runs.takeover import first_there

if TYPE_CHECKING:
    from amlora_dist.registry.leases import Lease
    from amlora_dist.registry.versions import Version
    from amlora_dist.training.worker_cache import WorkerCache
    from pipelines.runs.progress import Progress

log = logging.getLogger(__name__)

CLAIM_DEADLINE_S = 24 * 3600.0


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
    with disk_watched():
        return _run_sequence(
            config, run_id, progress, verbose, within, alone and within is None, allow_changed_data
        )


def _run_sequence(
    config: RunConfig,
    run_id: str,
    progress: Progress,
    verbose: bool,
    within: SearchContext | None,
    alone: bool,
    allow_changed_data: bool,
) -> dict[str, Any]:
    place = home()
    resources.check_folder(place)
    elsewhere = bool(config.workers and os.environ.get("RAY_ADDRESS"))
    if elsewhere:
        resources.knock()
    began = time.monotonic()
    with executor_of(config, within.cache if within else None, verbose=verbose) as executor:
        executor.prepare()
        from amlora_dist.inference.loading import remember_base  # imports what takes seconds, while Ray starts

        materials = gather_materials(config, place)
        config = materials.config
        model = config.registered_model = config.registered_model or run_id
        storage, copies = storage_of(config)
        resources.check_folder(storage, "storage")
        demand = materials.demand(within.gpus if within else 1.0)
        resources.refuse(resources.missing(demand, resources.here(storage, alone=not elsewhere)))
        if copies:
            Copies(copies, storage).check()
        store = Store.open(place, config.mlflow.tracking_uri)
        mapping = public_configuration(to_mapping(config))
        own, name = {tags.KIND: "sequence", tags.RUN_ID: run_id}, f"run id {run_id!r}"
        refuse_other_configuration(store, own, mapping, name)
        if refuse_other_data(store, [own], materials.facts(), results.MATERIALS, name, allow=allow_changed_data):
            progress.note("the data has changed since this run began: stages that read it are trained again")
        remember_base(materials.base)
        placement = Placement(
            config.workers, storage / "ray", demand, within.threads if within else None, config.training.batch_size,
            config.placement, None if copies is None else f"{copies}/ray",
        )  # fmt: skip
        with store.hold_run(run_id, model) as lease:
            if alone:
                progress.note(f"run id {run_id}; after an interruption go on with: --run-id {run_id}")
            store.ensure_current(model, lease.check)  # a version may have been registered just before a crash
            parent_run = store.parent_run(model, run_id, mapping, below=within.run if within else None)
            driver = _Driver(
                config, mapping, run_id, materials, store, lease, parent_run, progress, storage, executor, placement, within
            )
            status = "FAILED"
            try:
                result = driver.run(began)
                status = "FINISHED"
            except AmloraError as error:
                status = "KILLED" if error.exit_code in (130, 143) else "FAILED"
                raise
            except KeyboardInterrupt:
                status = "KILLED"
                raise
            finally:
                with contextlib.suppress(AmloraError):
                    lease.check()
                    store.end_run(parent_run, status)
        reach("run_closed")
    return result


class _Driver:
    """One driver's work on one run, under its lease."""

    def __init__(
        self,
        config: RunConfig,
        mapping: dict[str, Any],
        run_id: str,
        materials: Materials,
        store: Store,
        lease: Lease,
        parent_run: str,
        progress: Progress,
        storage: Path,
        executor: Executor,
        placement: Placement,
        within: SearchContext | None = None,
    ) -> None:
        self.config, self.run_id, self.materials = config, run_id, materials
        self.store, self.lease, self.parent_run, self.progress = store, lease, parent_run, progress
        self.storage, self.executor, self.placement, self.within = storage, executor, placement, within
        self.settings = materials.stage_settings()
        self.method = method_for(self.settings)
        self.tasks = materials.tasks
        self.names = self.method.stages(self.tasks)
        """Names of the stages: the tasks, for most methods."""
        self.model_name = str(config.registered_model)
        self.publication = Publication(store, lease, self.model_name, run_id, parent_run, mapping, materials)
        self.stages: list[StageRecord] = []

    def run(self, began: float) -> dict[str, Any]:
        """All stages; the result."""
        bank = self._starting_bank()
        chosen = settle_rate(self, bank)
        facts = self.materials.facts() | {"parent_tasks": [parent.task for parent in bank.parents], "rate": chosen}
        self.store.log_json(self.parent_run, results.MATERIALS, facts | {"versions": library_versions()})
        for index, task in enumerate(self.names, start=1):
            self.progress.stage(task, index, len(self.names))
            started = time.monotonic()
            record = self._stage(index, task, bank) if self.method.trains else self._untrained(task)
            record.other_seconds = max(
                0.0, time.monotonic() - started - (0.0 if record.reused else record.train_seconds) - record.score_seconds
            )
            self.stages.append(record)
            self.publication.log_stage(record)
            sofar = self._write_result()
            if self.within is not None and self.within.on_stage is not None:
                self.within.on_stage(sofar)
        result = self._write_result()
        now = int(time.time() * 1000)
        self.store.log_metrics_batch(
            self.parent_run,
            [(key, value, len(self.stages), now) for key, value in result["metrics"].items() if value is not None],
        )
        if self.within is None and (said := self.publication.crown(bank, len(self.names))):
            self.progress.note(said)
        self.progress.note(f"done in {time.monotonic() - began:.0f} s")
        return result

    # -- one stage ----------------------------------------------------------------------------------------------

    def _stage(self, index: int, task: str, bank: GrowingBank) -> StageRecord:
        if not self.method.inherits:
            bank.parents, bank.fingerprints, bank.statistics, bank.version = [], [], [], None
        position = len(bank.parents) + 1
        rows, mixed = self._training_rows(task, bank), self.materials.mixed_rows(task, self.names)
        fingerprint = self.materials.training_fingerprint(
            self.method, position, task, [p.digest for p in bank.parents], bank.statistics, rows, mixed
        )
        fingerprints = [*bank.fingerprints, fingerprint]
        record = StageRecord(index=index, task=task, fingerprint=fingerprint)
        folder = self.storage / "stages" / fingerprint
        own = [version for version in self._own_versions() if version.training_fingerprint == fingerprint]
        mine = first_there(self.store, own, self.storage)
        record.run = self.store.stage_run(self.parent_run, f"{index} {task}", fingerprint)
        cells = self._cells(index, fingerprints)
        known = {score["fingerprint"]: score | {"seconds": 0.0} for stage in self.stages for score in stage.scores}
        if mine:
            known |= self._known_scores(record.run)
        work = self._work(index=position, task=task, fingerprint=fingerprint, folder=folder, bank=bank, rows=rows)
        replace(work, cells=cells).bring()
        with contextlib.ExitStack() as stack:
            original = mine
            if mine is None:
                original = self._find_or_claim(fingerprint, task, stack)
            else:
                self.store.drop_claim(fingerprint, label=self._label(task))
            record.reused = original is not None
            if original is not None:
                record.reused_from = original.tags.get(tags.REUSED_FROM) if mine else original.uri
            if original is not None and not work.is_trained:
                parents = self._materialise(original)
                write_result(work.trained, read_result(Path(parents[-1].folder)))
            open_cells = [cell for cell in cells if cell.fingerprint not in known and not cell.done]
            if open_cells or not work.is_trained:
                self._execute(work, open_cells)
            result = read_result(work.trained)
            record.take(result, cells, known)
            bank.parents = [*bank.parents, Parent(task, result.adapter.digest(), str(work.trained))]
            bank.fingerprints = fingerprints
            bank.statistics = [*bank.statistics, statistics_digest(result)]
            matrix = self._matrix_rows([*self.stages, record])
            if mine is None or open_cells:
                self.publication.upload_scores(record, cells, self.storage)
            if mine is None:
                version = self.publication.publish(record, bank.parents, matrix, original, bank.version, self.storage)
            else:
                version = mine
            record.published, record.version, record.resumed = version, version.number, mine is not None
            bank.version = version
            if work.mirror is not None:
                work.mirror.forget()
        told = "reused" if record.reused else f"trained in {record.train_seconds:.0f} s"
        self.progress.note(f"stage {index} {task}: {told}, version {record.version} of {self.model_name}")
        return record

    def _untrained(self, name: str) -> StageRecord:
        """The one stage of a method that trains nothing: scores of the base model, and no version."""
        fingerprint = self.materials.training_fingerprint(self.method, 1, name, [], [], {})
        record = StageRecord(index=1, task=name, fingerprint=fingerprint)
        record.run = self.store.stage_run(self.parent_run, f"1 {name}", fingerprint)
        cells = [self._cell("untrained", task, []) for task in (*self.tasks, *self.materials.also)]
        known = self._known_scores(record.run)
        open_cells = [cell for cell in cells if cell.fingerprint not in known and not cell.done]
        folder = self.storage / "stages" / fingerprint
        if open_cells:
            work = self._work(index=1, task=name, fingerprint=fingerprint, folder=folder, bank=GrowingBank(), rows={})
            replace(work, cells=cells).bring()
            self._execute(work, open_cells)
        record.reused = not open_cells
        record.score(cells, known)
        record.scores += [score | {"mode": "router"} for score in record.scores]
        self.publication.upload_scores(record, cells, self.storage)
        return record

    def _training_rows(self, task: str, bank: GrowingBank) -> dict[str, int | None]:
        rows = self.method.rows(task, [parent.task for parent in bank.parents], self.tasks)
        if missing := sorted(set(rows) - set(self.tasks)):
            raise UserError(
                f"tasks: method {self.config.method!r} trains on rows of {', '.join(missing)} too, which stand in the"
                " parent bank and not in this run's tasks"
            )
        return rows

    def _own_versions(self) -> list[Version]:
        return [v for v in self.store.counted_versions(self.model_name) if v.run_id == self.run_id]

    def _find_or_claim(self, fingerprint: str, task: str, stack: contextlib.ExitStack) -> Version | None:
        """A version of another run with this fingerprint, or None with the claim to train it held until the end."""
        while self.within is None or self.within.share:
            found = first_there(self.store, self.store.find_stage(fingerprint), self.storage)
            if found is not None:
                self.store.drop_claim(fingerprint, label=self._label(task))
                return found
            claim = self.store.claim_stage(
                fingerprint, label=self._label(task), deadline_s=CLAIM_DEADLINE_S, on_wait=self.executor.release
            )
            if claim is None:
                continue
            stack.callback(claim.release, forget=True)
            reach("stage_claimed")
            return first_there(self.store, self.store.find_stage(fingerprint), self.storage)
        return None

    def _label(self, task: str) -> str:
        """What others read of a claim of this run."""
        return f"stage {task!r} of run {self.run_id!r}"

    def _execute(self, work: StageWork, cells: list[Cell]) -> None:
        """Train (if need be) and score, with as many attempts as the failure policy allows."""
        work = replace(work, cells=cells)
        failures: list[Failure] = []
        while True:
            self.lease.check()
            work.path.mkdir(parents=True, exist_ok=True)
            self.executor.ready(self.placement, again=bool(failures))
            work.send()
            try:
                with stops_handled(work.path):
                    self.executor.run(work, self._on_event, self._still_ours)
                work.bring()
                return
            except AmloraError as error:
                with contextlib.suppress(UserError):  # what the attempt ended with is what to say
                    work.bring()
                failures.append(Failure.of(error, work.progress()))
                verdict = decide(failures)
                if not verdict.retry:
                    if error.exit_code in (UserError.exit_code, HeldError.exit_code, 130, 143):
                        raise
                    raise TrainingError(f"stage {work.task!r}: {verdict.reason}") from error
                self.progress.note(f"stage {work.task!r}: {verdict.reason}")

    def _still_ours(self) -> None:
        """End training that no longer counts: this driver was paused, and another one took the run."""
        if self.lease.lost:
            self.lease.check()

    def _on_event(self, event: Event) -> None:
        kind = event.get("kind")
        if kind == "step":
            rate = event["tokens"] / event["seconds"] if event["seconds"] else None
            self.progress.step(event["step"], event["steps"], event["loss"], rate)
        elif kind == "trainable":
            total = sum(event["parameters"].values())
            parts = ", ".join(f"{name} {count:,}" for name, count in event["parameters"].items())
            self.progress.note(f"  trains {total:,} parameters in {len(event['modules'])} layers ({parts})")
        elif kind == "resumed":
            self.progress.note(f"  resumed after step {event['step']}")
        elif kind == "scored":
            value = event["accuracy"]
            kept = f", {event['kept']} of them answered as before" if event.get("kept") else ""
            self.progress.note(f"  {event['mode']:9} {event['task']}: accuracy {value:.3f} ({event['rows']} rows{kept})")

    def _work(
        self, *, index: int, task: str, fingerprint: str, folder: Path, bank: GrowingBank, rows: dict[str, int | None]
    ) -> StageWork:
        m, c = self.materials, self.config
        base = asdict(m.base) | {"path": str(m.base.path)}
        split, url = c.evaluation.split, storage_of(c)[1]
        digests = {f"{name}/{split}": data.digest(split) for name, data in m.data.items()}
        mixed = m.mixed_rows(task, self.names)
        digests |= {f"{name}/train": m.data[name].digest("train") for name in (*rows, *mixed)}
        return StageWork(
            fingerprint=fingerprint,
            index=index,
            task=task,
            folder=str(folder),
            settings=self.settings,
            base=base,
            tasks={name: spec.to_mapping() for name, spec in m.specs.items()},
            data_seed=c.seed,
            data_dir=str(c.data_dir.absolute()) if c.data_dir else None,
            parents=list(bank.parents),
            cells=[],
            deepspeed=c.deepspeed,
            evaluation_batch_size=c.evaluation.batch_size,
            rows=rows,
            mixed=mixed,
            data_digests=digests,
            plain_texts=m.plain_texts,
            entries={name: asdict(entry) for name, entry in bank.entries.items()},
            sealed=c.evaluation.sealed,
            cache=str((self.storage if c.storage is not None and url is None else home()) / "cache"),
            root=str(self.storage),
            url=url,
            apart=bool(url and c.workers),
        )

    # -- scores -------------------------------------------------------------------------------------------------

    def _cells(self, index: int, fingerprints: list[str]) -> list[Cell]:
        """What is scored after stage ``index``: the configured cells, what is untrained, and at the end the oracle."""
        evaluation = self.config.evaluation
        last = index == len(self.names)
        if self.method.told_task:
            done = [*(stage.fingerprint for stage in self.stages), fingerprints[-1]]
            cells = [self._cell("router", task, [own]) for task, own in zip(self.tasks, done, strict=False)]
        else:
            wanted = {"all": len(self.tasks), "last": index if last else 0, "seen": index}
            upto = wanted.get(evaluation.cells, index + 1)
            upto = upto if self.names == self.tasks else len(self.tasks)
            before = self.stages[-1].scores if self.stages and self.method.inherits else []
            known = {score["task"]: score["fingerprint"] for score in before if score["mode"] == "router"}
            cells = [self._cell("router", task, fingerprints, known.get(task)) for task in self.tasks[:upto]]
        routed = {cell.task: cell.fingerprint for cell in cells}
        if last and not self.method.told_task:
            cells += [self._cell("router", task, fingerprints) for task in self.materials.also]
        if last and self.materials.plain_texts and not (self.method.told_task or self.method.answers_plain_text):
            cells += [self._cell("own", task, fingerprints) for task in self.tasks]
        if evaluation.untrained and (index == 1 or last):
            cells += [self._cell("untrained", task, fingerprints) for task in self.tasks]
        if evaluation.oracle and last and self.method.inherits:
            cells += [self._cell("oracle", task, fingerprints, routed[task]) for task in self.tasks]
        if evaluation.knockout and last and self.method.inherits:
            silent = [f"{WITHOUT}{n}" for n in range(1, len(fingerprints) + 1)]
            cells += [self._cell(mode, task, fingerprints, routed[task]) for mode in silent for task in self.tasks]
        return cells

    def _cell(self, mode: Mode, task: str, fingerprints: list[str], before: str | None = None) -> Cell:
        return self.materials.cell(self.method, self.storage, mode, task, fingerprints, before)

    def _known_scores(self, stage_run: str) -> dict[str, dict[str, Any]]:
        """Scores that this stage has in MLflow, by scoring fingerprint."""
        stored = self.store.load_json(stage_run, results.STAGE_FILE) or {}
        return {score["fingerprint"]: score for score in stored.get("scores", [])}

    def _matrix_rows(self, stages: list[StageRecord]) -> results.Matrices:
        return results.matrices(self.tasks, stages)

    # -- parents ------------------------------------------------------------------------------------------------

    def _starting_bank(self) -> GrowingBank:
        """An empty bank, or the published one that ``parent`` names (pinned at the first start)."""
        bank = GrowingBank()
        if self.config.parent is None:
            return bank
        pinned = self.store.load_json(self.parent_run, "parent.json")
        version = self.store.resolve(pinned["version"] if pinned else self.config.parent)
        if pinned is None:
            self.store.log_json(self.parent_run, "parent.json", {"version": version.uri, "asked": self.config.parent})
        bank.parents = self._materialise(version)
        manifest = self.publication.manifest_of(version, self.storage)
        if manifest.base.digest != self.materials.base.digest:
            raise UserError(
                f"parent: {version.uri} was trained on base {manifest.base.source} (digest {manifest.base.digest[:12]}),"
                f" model.source {self.materials.base.source} has digest {self.materials.base.digest[:12]}"
            )
        check_rule_of_bank(self.config, manifest.training_configuration, version.uri)
        bank.entries = {one.task: one.task_spec for one in manifest.adapters if one.task_spec is not None}
        if both := sorted(set(manifest.tasks) & set(self.tasks)):
            raise UserError(f"tasks: {', '.join(both)} stand in the parent bank {version.uri} already; rename or leave out")
        bank.fingerprints = [entry.training_fingerprint for entry in manifest.adapters]
        bank.statistics = [statistics_digest(read_result(Path(parent.folder))) for parent in bank.parents]
        bank.version = version
        self.progress.note(f"starting from {version.uri}: {', '.join(manifest.tasks)}")
        return bank

    def _materialise(self, version: Version) -> list[Parent]:
        """The adapters of a published version as folders that workers can read."""
        return self.publication.materialise(version, self.storage)

    def _write_result(self) -> dict[str, Any]:
        result = results.result(
            run_id=self.run_id,
            registered_model=self.model_name,
            method=self.config.method,
            seed=self.config.seed,
            tasks=self.tasks,
            stages=self.stages,
            in_sequence=self.names == self.tasks,
        )
        self.lease.check()
        self.store.log_json(self.parent_run, results.FILE, result)
        return result | results.kept_at(self.store, self.parent_run)
