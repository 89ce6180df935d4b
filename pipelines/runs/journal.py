"""A run's journal in MLflow: which stages are done, who trains one, and the versions in which they are published.

A stage is done when, and only when, a version that counts carries its training fingerprint in this run's registered
model. Store, lease and ids are bound here once.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amlora_dist.config.loading import to_mapping
from amlora_dist.crash_points import reach
from amlora_dist.digests import tensors_digest
from amlora_dist.errors import UserError
from amlora_dist.evaluation.plain_choice import PlainChoice, read_choice
from amlora_dist.evaluation.scoring import in_way, read_predictions, write_predictions
from amlora_dist.privacy import public_configuration, public_name
from amlora_dist.registry import tags
from amlora_dist.registry.housekeeping import crown_first
from amlora_dist.registry.newest import take_up
from amlora_dist.registry.records import describe_run
from amlora_dist.registry.runs import RESULT
from amlora_dist.training.result import ADAPTER_OF, Result, is_whole, read_result, renew
from amlora_dist.training.stage_spec import CHOICE, Parent, is_plain
from pipelines.runs import results
from pipelines.runs.bank_versions import BankVersions, library_versions
from pipelines.runs.plan import BankState
from pipelines.runs.publisher import Publisher
from pipelines.runs.resume_check import check_layers_of_bank, check_rule_of_bank
from pipelines.runs.stage_pages import run_description, show_stage
from pipelines.runs.stage_record import StageRecord, how_made
from pipelines.runs.takeover import first_there

if TYPE_CHECKING:
    from amlora_dist.config.loading import RunConfig
    from amlora_dist.registry.leases import Lease
    from amlora_dist.registry.manifest import Manifest
    from amlora_dist.registry.store import Store
    from amlora_dist.registry.versions import Version
    from amlora_dist.training.stage_spec import StageWork
    from pipelines.runs.inputs import RunInputs
    from pipelines.runs.plan import StagePlan
    from pipelines.runs.progress import Progress

log = logging.getLogger(__name__)

CLAIM_DEADLINE_S = 24 * 3600.0
"""How long a run waits for another one that trains the same stage."""


class RunJournal:
    """The journal of one run, under its lease.

    Args:
        store: MLflow.
        lease: of the run; checked before every write that counts.
        inputs: of the run.
        below: MLflow's id of the run above this one, of a search.
        share: take over stages that other runs have published, or are about to.
    """

    def __init__(
        self,
        store: Store,
        lease: Lease,
        inputs: RunInputs,
        *,
        below: str | None = None,
        share: bool = True,
    ) -> None:
        self.store, self.lease, self.inputs, self._share = store, lease, inputs, share
        self.mapping = public_configuration(to_mapping(inputs.config))
        self.run = store.parent_run(inputs.model, inputs.run_id, self.mapping, below=below)
        """MLflow's id of the run."""
        self.versions = BankVersions(store, inputs.storage)
        self.stages: list[StageRecord] = []
        self._banks: dict[tuple[str, ...], Version] = {}
        """As which banks are published, by the fingerprints of their stages."""
        self._publisher = Publisher()
        self._so_far: dict[str, Any] = {}

    # -- before the first stage ---------------------------------------------------------------------------------

    def starting_bank(self) -> BankState:
        """An empty bank, or the published one that ``parent`` names (pinned at the first start).

        Raises:
            UserError: the parent has another base model, other rules, or a task of this run.
        """
        config = self.inputs.config
        if config.parent is None:
            return BankState()
        pinned = self.store.load_json(self.run, "parent.json")
        version = self.store.resolve(pinned["version"] if pinned else config.parent)
        if pinned is None:
            self.store.log_json(self.run, "parent.json", {"version": version.uri, "asked": config.parent})
        parents = self.versions.materialise(version)
        manifest, base = self.versions.manifest_of(version), self.inputs.base
        if manifest.base.digest != base.digest:
            raise UserError(
                f"parent: {version.uri} was trained on base {manifest.base.source} (digest {manifest.base.digest[:12]}),"
                f" model.source {base.source} has digest {base.digest[:12]}"
            )
        check_rule_of_bank(config, manifest.training_configuration, version.uri)
        check_layers_of_bank(config, manifest, version.uri, base, self.inputs.method)
        assert manifest.base.identity == base.identity, "its quantisation is a rule of the bank"
        if both := sorted({*manifest.tasks, *manifest.learned} & set(self.inputs.tasks)):
            raise UserError(f"tasks: {', '.join(both)} are in the parent bank {version.uri} already; rename or leave out")
        bank = BankState(
            tuple(parents),
            tuple(entry.training_fingerprint for entry in manifest.adapters),
            tuple(_statistics_digest(read_result(Path(parent.folder))) for parent in parents),
            {task: entry for task, entry in manifest.learned.items() if entry is not None},
        )
        self._banks[bank.fingerprints] = version
        return bank

    def version_of(self, bank: BankState) -> Version | None:
        """As which a bank is published; None of an empty one, and as long as it is not settled."""
        return self._banks.get(bank.fingerprints)

    def note_configuration(self, config: RunConfig) -> None:
        """Store the configuration with what ``auto`` has come to."""
        self.inputs.config = config
        self.mapping = public_configuration(to_mapping(config))
        self.store.log_json(self.run, "config.json", self.mapping)

    def note_inputs(self, bank: BankState, rate: dict[str, Any] | None) -> None:
        """Store what the run is made of, and how its learning rate was found."""
        self.inputs.rate = rate
        facts = self.inputs.facts() | {"parent_tasks": [parent.task for parent in bank.parents], "rate": rate}
        self.store.log_json(self.run, results.INPUTS, facts | {"versions": library_versions()})

    def has_published(self, fingerprint: str) -> bool:
        """Whether a stage of this training fingerprint is published that this run would take over."""
        return self._share and bool(self.store.find_stage(fingerprint))

    # -- one stage ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def claimed(self, plan: StagePlan, on_wait: Callable[[], None]) -> Iterator[StageRecord]:
        """The stage's record, with the version that it, or its adapter alone, is taken over from, and the claim to what is
        left to do, held until the end: of its publication, where it came to that.

        Args:
            plan: of the stage.
            on_wait: called before waiting for another run that has the claim.
        """
        record = StageRecord(plan.index, plan.task, plan.fingerprint, plan.adapter_fingerprint)
        own = self._own(plan) if plan.trains else None
        record.run = self.store.stage_run(self.run, f"{plan.index} {plan.task}", plan.fingerprint)
        if plan.trains:
            record.known = {one["fingerprint"]: one | {"seconds": 0.0} for stage in self.stages for one in stage.scores}
        if own is not None or not plan.trains:
            record.known |= self._known_scores(record.run)
        plan.work(self.inputs).fetch()
        try:
            if own is not None:
                self._drop_claims(plan)
                take_up(self.store, own, self.lease.epoch, self.lease.check)
                record.original, record.published, record.resumed = own, own, True
                record.plain_text = self._settled(record.run)
            elif plan.trains and self._share:
                self._find_or_claim(plan, record, on_wait)
            record.reused = record.source is not None
            yield record
        finally:
            record.release()

    def open_work(self, plan: StagePlan, record: StageRecord) -> StageWork | None:
        """What is still to be done of a stage; None where all is there."""
        work = plan.work(self.inputs)
        renew(work.trained, work.index)
        if record.original is not None and not work.is_trained:
            self.versions.copy_newest(record.original, work.trained)
        cells = record.open_cells(plan.cells)
        record.scored_now = bool(cells)
        if not plan.trains:
            record.reused = not cells
        if not cells and (not plan.trains or work.is_trained):
            return None
        taken = None if record.adapter_from is None or work.is_trained else self.versions.newest(record.adapter_from)
        return replace(work, cells=cells, taken=taken)

    def publish(self, plan: StagePlan, record: StageRecord, progress: Progress) -> BankState:
        """Take up what training and scoring gave, and have the bank with the stage published in the background.

        Args:
            plan: of the stage.
            record: of the stage, with its claim, which is held until the version is there.
            progress: shows the version.

        Returns:
            The bank with the stage, at once; ``settle`` says whether it is published.
        """
        bank, folder, manifest = plan.bank, None, None
        work = plan.work(self.inputs)
        if plan.trains:
            result = read_result(work.trained)
            record.take(result, learns_recipe=self.inputs.method.recipe(plan.index - 1).learned)
            parent = Parent(plan.task, result.adapter.digest(), str(work.trained))
            bank = plan.bank.grown(parent, plan.fingerprint, _statistics_digest(result))
        below = self.version_of(plan.bank) if plan.chooses else None
        extended = None if below is None else self.versions.manifest_of(below).plain_text
        record.score(plan.cells, chooses=plan.chooses, below=extended)
        if not plan.trains:
            record.scores += [score | {"mode": "router"} for score in record.scores]
        self.stages.append(record)
        if plan.trains and record.published is None:
            folder = self.inputs.storage / "publishing" / f"{self.inputs.run_id}-{record.index}-{self.lease.epoch}"
            manifest = self._written(folder, bank, record, self.version_of(plan.bank))
        record.end()
        claim, record.claim = record.claim, None

        def published() -> None:
            try:
                if not record.resumed or record.scored_now:
                    self._upload_scores(plan, record)
                if folder is not None and manifest is not None:
                    record.published = self._registered(folder, manifest, record)
                if record.published is not None:
                    self._banks[bank.fingerprints] = record.published
                if work.remote_checkpoints is not None:
                    work.remote_checkpoints.forget()
            finally:
                if claim is not None:
                    claim.release(forget=True)
            self._show(record, progress)

        self._publisher.begin(f"stage {record.index} {record.task!r}", published)
        return bank

    def settle(self) -> dict[str, Any]:
        """Wait until all stages so far are published.

        Returns:
            The run's result so far; empty before the first stage.

        Raises:
            Exception: what the last one failed with. All that was trained and scored is kept: the next start publishes it.
        """
        self._publisher.settle()
        return self._so_far

    def leave(self) -> None:
        """The run ends: let a publication that is at work come to its end, if that does not take long."""
        self._publisher.leave()

    def _show(self, record: StageRecord, progress: Progress) -> None:
        """Show a published stage on MLflow's pages, and tell of it."""
        self.lease.check()
        manifest = self.versions.at_hand(record.published)
        show_stage(self.store, self.inputs, record, parent_run=self.run, mapping=self.mapping, manifest=manifest)
        result = self.write_result()
        text = run_description(result, public_name(self.inputs.base.source), self.mapping)
        describe_run(self.store, self.run, text)
        if record.published is not None:
            how = how_made(record.public())
            progress.note(f"stage {record.index} {record.task}: {how}, version {record.version} of {self.inputs.model}")
        progress.stage_done(result)

    # -- after the last one -------------------------------------------------------------------------------------

    def finish(self) -> dict[str, Any]:
        """The result, with its metrics on the run."""
        result = self.write_result()
        now = int(time.time() * 1000)
        rows = [(key, value, len(self.stages), now) for key, value in result["metrics"].items() if value is not None]
        self.store.log_metrics_batch(self.run, rows)
        return result

    def crown(self, bank: BankState) -> str | None:
        """Have the bank of a complete run served, where no version of its registered model was ever served before.

        Returns:
            What the alias ``champion`` means now, in words; None for a bank that does not hold every stage.
        """
        version = self.version_of(bank)
        if version is None or len(bank.parents) < len(self.inputs.stage_names):
            return None
        number = crown_first(self.store, version, self.lease.check)
        name, own = self.inputs.model, version.number
        if number == own:
            return f"models:/{name}@{tags.CHAMPION} is version {own}"
        stays = f"stays at version {number}" if number else "was deleted by somebody and is not set again"
        return f"models:/{name}@{tags.CHAMPION} {stays}; to move it: amlora promote {name} {own} --sample ROWS"

    def write_result(self) -> dict[str, Any]:
        """The result so far, stored, with the place where it is."""
        result = results.result(self.inputs, self.stages)
        self.lease.check()
        self.store.log_json(self.run, RESULT, result)
        self._so_far = result | results.kept_at(self.store, self.run)
        return self._so_far

    # -- parts --------------------------------------------------------------------------------------------------

    def _own(self, plan: StagePlan) -> Version | None:
        """This run's version of the stage, of an earlier start."""
        run_id, fingerprint = self.inputs.run_id, plan.fingerprint
        counted = self.store.counted_versions(self.inputs.model)
        own = [one for one in counted if one.run_id == run_id and one.training_fingerprint == fingerprint]
        return first_there(self.store, own, self.inputs.storage)

    def _find_or_claim(self, plan: StagePlan, record: StageRecord, on_wait: Callable[[], None]) -> None:
        """Find a version of another run with this fingerprint, or with the adapter's; claim what is left to do.

        Whoever trains holds the claim on the adapter, whatever its statistics: runs that differ in nothing else train once.
        Who makes statistics alone holds the stage's own, so that nobody waits for other statistics.
        """
        stage = partial(self._same_stage, plan)
        found = self._found_or_claimed(
            plan, record, plan.adapter_fingerprint or plan.fingerprint, lambda: stage() or self._same_adapter(plan), on_wait
        )
        if found is not None and found.training_fingerprint != plan.fingerprint:
            record.release()
            record.adapter_from, found = found, self._found_or_claimed(plan, record, plan.fingerprint, stage, on_wait)
        if found is not None:
            record.original, record.adapter_from = found, None

    def _found_or_claimed(
        self, plan: StagePlan, record: StageRecord, key: str, look: Callable[[], Version | None], on_wait: Callable[[], None]
    ) -> Version | None:
        """What ``look`` finds, or None with the claim ``key`` held."""
        while (found := look()) is None:
            record.claim = self.store.claim_stage(
                key, label=self._label(plan), deadline_s=CLAIM_DEADLINE_S, on_wait=on_wait
            )
            if record.claim is not None:
                reach("stage_claimed")
                return look()
        self._drop_claims(plan)
        return found

    def _same_stage(self, plan: StagePlan) -> Version | None:
        """A version of the stage; where that is made here, one with these very bits: other workers may have come to others,
        which are not those that this run's manifest and the stages above are about."""
        made, found = self._made(plan), self.store.find_stage(plan.fingerprint)
        if made is None:
            return first_there(self.store, found, self.inputs.storage)
        digests = made.adapter.digest(), tensors_digest(made.continuation())
        for version in found:
            if first_there(self.store, [version], self.inputs.storage) is not None:
                manifest = self.versions.manifest_of(version)
                if (manifest.adapters[-1].digest, manifest.statistics[-1].digest) == digests:
                    return version
        return None

    def _same_adapter(self, plan: StagePlan) -> Version | None:
        """A version that has the stage's adapter, unless the stage has trained its own, or has taken another one."""
        if plan.adapter_fingerprint is None:
            return None
        made = self._made(plan)
        if made is not None and ADAPTER_OF not in made.training:
            return None
        found = first_there(self.store, self.store.find_adapter(plan.adapter_fingerprint), self.inputs.storage)
        if found is None or made is None:
            return found
        return found if self.versions.manifest_of(found).adapters[-1].digest == made.adapter.digest() else None

    def _made(self, plan: StagePlan) -> Result | None:
        """What the storage has of the stage, if it was trained here, or its statistics were made."""
        trained = plan.work(self.inputs).trained
        return read_result(trained) if is_whole(trained) else None

    def _drop_claims(self, plan: StagePlan) -> None:
        """Of an earlier start that died."""
        for key in filter(None, (plan.fingerprint, plan.adapter_fingerprint)):
            self.store.drop_claim(key, label=self._label(plan))

    def _label(self, plan: StagePlan) -> str:
        """What others read of a claim of this run."""
        return f"stage {plan.task!r} of run {self.inputs.run_id!r}"

    def _settled(self, stage_run: str) -> PlainChoice | None:
        """How the bank of a published stage answers plain text; None of one that was published before there was a choice."""
        stored = self.store.load_json(stage_run, results.STAGE_FILE) or {}
        return read_choice(stored.get("plain_text"), f"{results.STAGE_FILE} of MLflow's run {stage_run}")

    def _known_scores(self, stage_run: str) -> dict[str, dict[str, Any]]:
        """Scores that a stage has in MLflow, by scoring fingerprint."""
        stored = self.store.load_json(stage_run, results.STAGE_FILE) or {}
        return {score["fingerprint"]: score for score in stored.get("scores", [])}

    def _written(self, folder: Path, bank: BankState, record: StageRecord, below: Version | None) -> Manifest:
        """Write the folder of the version that a stage becomes."""
        epoch = self.lease.epoch
        return self.versions.write(
            folder,
            self.inputs,
            bank.parents,
            record,
            below=below,
            placement=self.store.placement(self.inputs.model, record.run, epoch),
            matrices=results.matrices(self.inputs.tasks, self.stages),
            about={
                "run_id": self.inputs.run_id, "epoch": epoch, "training_configuration": self.mapping,
                "plain_text": record.plain_text,
            },
        )

    def _registered(self, folder: Path, manifest: Manifest, record: StageRecord) -> Version:
        """Register a written folder as a version of the run's model."""
        values = {
            tags.RUN_ID: self.inputs.run_id,
            tags.TASK: record.task,
            tags.STAGE: str(record.index),
            tags.TRAINING_FINGERPRINT: record.fingerprint,
        }
        if record.adapter_fingerprint is not None:
            values[tags.ADAPTER_FINGERPRINT] = record.adapter_fingerprint
        if record.adapter_of is not None:
            values[tags.ADAPTER_OF] = record.adapter_of
        common: dict[str, Any] = {
            "stage_run": record.run, "tags": values, "epoch": self.lease.epoch, "guard": self.lease.check,
        }  # fmt: skip
        if record.source is None:
            version = self.store.publish(self.inputs.model, folder, **common)
        else:
            version = self.store.reuse(self.inputs.model, record.source, folder, **common)
        self.versions.keep(version, manifest)
        shutil.rmtree(folder, ignore_errors=True)
        return version

    def _upload_scores(self, plan: StagePlan, record: StageRecord) -> None:
        """Scores, and the predictions behind each, as artifacts of the stage's run."""
        self.lease.check()
        tmp = self.inputs.storage / "publishing" / f"scores-{self.inputs.run_id}-{record.index}-{self.lease.epoch}"
        shutil.rmtree(tmp, ignore_errors=True)
        for cell in plan.cells:
            file = Path(cell.folder) / "predictions.jsonl"
            if file.is_file() and cell.mode != CHOICE:
                target = tmp / f"{cell.mode}-{cell.task.replace('/', '.')}.jsonl"
                target.parent.mkdir(parents=True, exist_ok=True)
                if record.way == "ranks" or not is_plain(cell.mode):
                    shutil.copyfile(file, target)
                else:
                    write_predictions(target, [in_way(one, record.way) for one in read_predictions(file)])
        if tmp.is_dir():
            self.store.log_artifacts(record.run, tmp, "predictions")
            shutil.rmtree(tmp, ignore_errors=True)
        chosen = {} if record.plain_text is None else {"plain_text": record.plain_text.to_mapping()}
        scored = {"scores": record.scores, "training": record.training}
        self.store.log_json(record.run, results.STAGE_FILE, scored | chosen)


def _statistics_digest(result: Result) -> str:
    """sha256 over the tensors of a stage's statistics."""
    return tensors_digest(result.statistics.tensors())
