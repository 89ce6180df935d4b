"""What a finished stage becomes in MLflow: a bank version, its metrics, its scores and predictions."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import amlora_dist
from amlora_dist.adapters.router import PRIOR_KEY
from amlora_dist.config.loading import home
from amlora_dist.digests import tensors_digest
from amlora_dist.errors import BankError
from amlora_dist.methods import method_for
from amlora_dist.privacy import public_configuration, public_name
from amlora_dist.registry import tags
from amlora_dist.registry.bank_folder import adapter_entry, read_bank, statistics_entry, write_version
from amlora_dist.registry.housekeeping import crown_first
from amlora_dist.registry.manifest import (
    AccuracyMatrix,
    BaseEntry,
    Lineage,
    Manifest,
    RouterEntry,
    Stored,
    adapter_folder,
    read_manifest,
    statistics_file,
)
from amlora_dist.registry.pulling import manifest_of
from amlora_dist.registry.records import DataInput, TaskScore, describe, described, log_data, log_model
from amlora_dist.tasks.prompts import BANK_TEMPLATE
from amlora_dist.tasks.task_entry import TaskEntry, task_entry
from amlora_dist.training.result import Result, is_whole, read_result, split_continuation, write_result
from amlora_dist.training.stage_spec import Cell, Parent
from pipelines.runs.results import STAGE_FILE, Matrices
from pipelines.runs.trackers import StageFigures, write_stage

if TYPE_CHECKING:
    from amlora_dist.adapters.statistics import TaskStatistics
    from amlora_dist.registry.leases import Lease
    from amlora_dist.registry.store import Store
    from amlora_dist.registry.versions import Version
    from pipelines.runs.inputs import Materials

log = logging.getLogger(__name__)

CONV1D_MODELS = {"gpt2", "openai-gpt", "imagegpt"}
"""Architectures whose linear layers keep their weight as (d_in, d_out)."""


@dataclass(slots=True)
class StageRecord:
    """What a run says of one of its stages."""

    index: int
    task: str
    fingerprint: str
    reused: bool = False
    reused_from: str | None = None
    """The version of another run that it was taken over from."""
    version: int | None = None
    run: str = ""
    """MLflow's id of the stage's run."""
    train_seconds: float = 0.0
    published: Version | None = None
    """The version; None of a method that publishes none."""
    resumed: bool = False
    """It was published by an earlier start of this run, which has noted its seconds."""
    score_seconds: float = 0.0
    other_seconds: float = 0.0
    tokens: int = 0
    scores: list[dict[str, Any]] = field(default_factory=list)
    training: dict[str, Any] = field(default_factory=dict)

    def take(self, result: Result, cells: Sequence[Cell], known: dict[str, dict[str, Any]]) -> None:
        """Fill in what training and scoring gave."""
        self.training = result.training
        self.train_seconds, self.tokens = result.training["seconds"], result.training["tokens"]
        self.score(cells, known)

    def score(self, cells: Sequence[Cell], known: dict[str, dict[str, Any]]) -> None:
        """Fill in what scoring gave."""
        for cell in cells:
            score = known.get(cell.fingerprint)
            if score is None:
                score = cell.summary() or {}
                score.pop("folder", None)
            self.scores.append(score | {"mode": cell.mode, "task": cell.task})
            self.score_seconds += score["seconds"]

    def public(self) -> dict[str, Any]:
        """The stage's entry in the result."""
        rate = self.tokens / self.train_seconds if self.train_seconds else None
        return {
            "task": self.task,
            "fingerprint": self.fingerprint,
            "reused": self.reused,
            "reused_from": self.reused_from,
            "version": self.version,
            "train_seconds": self.train_seconds,
            "score_seconds": self.score_seconds,
            "other_seconds": self.other_seconds,
            "tokens": self.tokens,
            "tokens_per_second": rate,
            "recipe_from": self.training.get("recipe_from"),
            "race": self.training.get("race"),
            "kept_step": self.training.get("kept_step"),
        }


@dataclass(slots=True)
class GrowingBank:
    """The bank as it grows: what the next stage is trained on."""

    parents: list[Parent] = field(default_factory=list)
    fingerprints: list[str] = field(default_factory=list)
    statistics: list[str] = field(default_factory=list)
    version: Version | None = None
    entries: dict[str, TaskEntry] = field(default_factory=dict)
    """Of the tasks that a parent bank brought along."""


class Publication:
    """Writes one run's versions, under its lease."""

    def __init__(
        self,
        store: Store,
        lease: Lease,
        registered_model: str,
        run_id: str,
        parent_run: str,
        mapping: dict[str, Any],
        materials: Materials,
    ) -> None:
        self.store, self.lease, self.registered_model, self.run_id = store, lease, registered_model, run_id
        self.parent_run, self.mapping, self.materials = parent_run, mapping, materials
        self._manifests: dict[str, Manifest] = {}
        self._statistics: dict[str, TaskStatistics] = {}

    def publish(
        self,
        record: StageRecord,
        parents: Sequence[Parent],
        rows: Matrices,
        original: Version | None,
        below: Version | None,
        storage: Path,
    ) -> Version:
        """Publish the bank after a stage; ``original`` is the version of another run that it is taken over from."""
        newest = read_result(Path(parents[-1].folder))
        placement = self.store.placement(self.registered_model, record.run, self.lease.epoch)
        before = self.manifest_of(below, storage) if below is not None else None
        index = len(parents)
        adapter = newest.adapter
        stored, stored_statistics = self._stored(placement, original, index, record.task, storage)
        earlier = list(before.adapters) if before else []
        earlier_statistics = list(before.statistics) if before else []
        spec = self.materials.specs.get(record.task)
        entry = adapter_entry(
            adapter,
            index,
            training_fingerprint=record.fingerprint,
            parent=before.parent_digest() if before else None,
            stored=stored,
            task_spec=None if spec is None else task_entry(spec),
        )
        method = method_for(self.materials.stage_settings())
        router = method.router([*(self._statistics_of(parent) for parent in parents[:-1]), newest.statistics])
        tensors = {} if router is None else router.tensors()
        settings = {} if router is None else router.settings()
        if method.uses_selectors:
            kind: str = self.materials.config.router.kind
            settings = asdict(self.materials.config.router.literal) | ({} if router is None else {PRIOR_KEY: settings})
        else:
            assert router is not None, "without selectors something else weighs the adapters"
            kind = router.kind
        base = self.materials.base
        manifest = Manifest(
            base=BaseEntry(
                source=public_name(base.source),
                revision=base.revision,
                digest=base.digest,
                architecture=base.model_type,
                encoder_decoder=base.encoder_decoder,
            ),
            bank_template=BANK_TEMPLATE,
            method=self.materials.config.method,
            adapters=[*earlier, entry],
            router=RouterEntry(kind=kind, settings=settings, digest="0" * 64),
            fan_in_fan_out=base.model_type in CONV1D_MODELS,
            statistics=[
                *earlier_statistics,
                statistics_entry(index, record.task, newest.continuation(), stored_statistics),
            ],
            training_configuration=public_configuration(self.mapping),
            accuracy_matrix=AccuracyMatrix(
                tasks=self.materials.tasks, accuracy=rows.accuracy, ranked_accuracy=rows.ranked_accuracy
            ),
            lineage=Lineage(
                parent=below.uri if below is not None else None,
                reused_from=original.uri if original is not None else None,
            ),
            library_versions=library_versions(),
            run_id=self.run_id,
            stage=record.index,
            epoch=self.lease.epoch,
        )
        folder = storage / "publishing" / f"{self.run_id}-{record.index}-{self.lease.epoch}"
        manifest = write_version(
            folder,
            manifest,
            record.run,
            [adapter] if original is None else [],
            tensors,
            {record.task: newest.continuation()} if original is None else {},
        )
        self._statistics[parents[-1].folder] = newest.statistics
        values = {
            tags.RUN_ID: self.run_id,
            tags.TASK: record.task,
            tags.STAGE: str(record.index),
            tags.TRAINING_FINGERPRINT: record.fingerprint,
        }
        common: dict[str, Any] = {
            "stage_run": record.run, "tags": values, "epoch": self.lease.epoch, "guard": self.lease.check
        }  # fmt: skip
        if original is None:
            version = self.store.publish(self.registered_model, folder, **common)
        else:
            version = self.store.reuse(self.registered_model, original, folder, **common)
        self._manifests[version.uri] = manifest
        shutil.rmtree(folder, ignore_errors=True)
        return version

    def _record(self, record: StageRecord, version: Version) -> None:
        """What MLflow's pages say of a version; that of an earlier start, or of older code, is made up for."""
        if described(self.store, version):
            return
        manifest = self._manifests.get(version.uri) or manifest_of(self.store, version)
        scores = [
            TaskScore(self._input(score["task"], "evaluation"), float(score["accuracy"]))
            for score in record.scores
            if score["mode"] == "router" and score.get("accuracy") is not None
        ]
        log_model(self.store, version, manifest, scores, step=record.index, timestamp=int(time.time() * 1000))
        describe(self.store, version, manifest)

    def _input(self, task: str, context: str) -> DataInput:
        """The rows of a task that are trained on, or scored."""
        spec, data = self.materials.specs[task], self.materials.data[task]
        split = "train" if context == "training" else self.materials.config.evaluation.split
        hub = spec.source.kind == "hub"
        source = {"path": spec.source.repository, "revision": spec.source.revision} if hub else {"uri": public_name(task)}
        return DataInput(
            task, data.digest(split), len(data.rows[split]), context, source, "hugging_face" if hub else "local"
        )

    def _statistics_of(self, parent: Parent) -> TaskStatistics:
        """Statistics of an earlier stage, read once: a publication costs the same at every stage."""
        if parent.folder not in self._statistics:
            self._statistics[parent.folder] = read_result(Path(parent.folder)).statistics
        return self._statistics[parent.folder]

    def _stored(
        self, placement: Any, original: Version | None, index: int, task: str, storage: Path
    ) -> tuple[Stored | None, Stored | None]:
        """Where the new adapter and its statistics are kept: with this version, or where another run has them."""
        if original is None:
            return placement.of(adapter_folder(index, task)), placement.of(statistics_file(index, task))
        theirs = self.manifest_of(original, storage)
        return theirs.adapters[-1].stored, theirs.statistics[-1].stored

    def manifest_of(self, version: Version, storage: Path) -> Manifest:
        """The manifest of a published version."""
        if version.uri not in self._manifests:
            self._manifests[version.uri] = read_manifest(self._pulled(version, storage))
        return self._manifests[version.uri]

    def materialise(self, version: Version, storage: Path) -> list[Parent]:
        """The adapters of a published version as folders that workers can read; fetched once."""
        bank = read_bank(self._pulled(version, storage))
        out = []
        for entry, adapter in zip(bank.manifest.adapters, bank.adapters, strict=True):
            folder = storage / "adapters" / entry.digest
            if not is_whole(folder):
                from amlora_dist.adapters.statistics import TaskStatistics

                kept, memory = split_continuation(bank.statistics[entry.task])
                statistics = TaskStatistics.from_tensors(entry.task, kept)
                training = {"fingerprint": entry.training_fingerprint, "seconds": 0.0, "tokens": 0, "losses": []}
                folder.parent.mkdir(parents=True, exist_ok=True)
                write_result(folder, Result(adapter, statistics, training, memory))
            out.append(Parent(entry.task, entry.digest, str(folder)))
        return out

    def _pulled(self, version: Version, storage: Path) -> Path:
        digest = version.tags.get(tags.MANIFEST_DIGEST, "")[:12]
        dest = storage / "banks" / f"{version.registered_model}-{version.number}-{digest}"
        dest.parent.mkdir(parents=True, exist_ok=True)
        try:
            return self.store.pull_version(version, dest)
        except BankError:
            if not dest.exists():
                raise
        log.warning("%s: the copy of %s is damaged: fetching it again", dest, version.uri)
        shutil.rmtree(dest, ignore_errors=True)
        return self.store.pull_version(version, dest)

    def upload_scores(self, record: StageRecord, cells: Sequence[Cell], storage: Path) -> None:
        """Scores, and the predictions behind each, as artifacts of the stage's run."""
        self.lease.check()
        tmp = storage / "publishing" / f"scores-{self.run_id}-{record.index}"
        shutil.rmtree(tmp, ignore_errors=True)
        for cell in cells:
            file = Path(cell.folder) / "predictions.jsonl"
            if file.is_file():
                target = tmp / f"{cell.mode}-{cell.task.replace('/', '.')}.jsonl"
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
        if tmp.is_dir():
            self.store.log_artifacts(record.run, tmp, "predictions")
            shutil.rmtree(tmp, ignore_errors=True)
        self.store.log_json(record.run, STAGE_FILE, {"scores": record.scores, "training": record.training})

    def crown(self, bank: GrowingBank, stages: int) -> str | None:
        """Have the bank of a complete run served, where no version of its registered model was ever served before.

        Returns:
            What the alias ``champion`` means now, in words; None for a bank that does not hold every stage.
        """
        if bank.version is None or len(bank.parents) < stages:
            return None
        number = crown_first(self.store, bank.version, self.lease.check)
        name, own = self.registered_model, bank.version.number
        if number == own:
            return f"models:/{name}@{tags.CHAMPION} is version {own}"
        stays = f"stays at version {number}" if number else "was deleted by somebody and is not set again"
        return f"models:/{name}@{tags.CHAMPION} {stays}; to move it: amlora promote {name} {own} --sample ROWS"

    def log_stage(self, record: StageRecord) -> None:
        """Loss curve, speed, scores and data of the stage's run, which is closed; its scores on the run above too, where
        MLflow draws them as curves over the stages. What is there already is not written again."""
        now = int(time.time() * 1000)
        rows = [("loss", loss, step, now) for step, loss in enumerate(record.training.get("losses", []), start=1)]
        figures = record.public()
        for key in ("train_seconds", "score_seconds", "other_seconds", "tokens_per_second"):
            if figures[key] is not None and not record.resumed:
                rows.append((key, float(figures[key]), record.index, now))
        above = []
        for score in record.scores:
            for key in ("accuracy", "ranked_accuracy"):
                if score.get(key) is not None:
                    name = f"{key}/{score['mode']}/{score['task']}"
                    rows.append((name, float(score[key]), record.index, now))
            if score["mode"] == "router" and score.get("accuracy") is not None:
                above.append((f"accuracy/{score['task']}", float(score["accuracy"]), record.index, now))
        self.lease.check()
        self.store.add_metrics(record.run, rows)
        self.store.add_metrics(self.parent_run, above)
        trained = [record.task] if record.task in self.materials.data else self.materials.tasks
        if record.published is not None:
            self._record(record, record.published)
        inputs = [self._input(task, "training") for task in trained]
        scored = dict.fromkeys(score["task"] for score in record.scores if score["task"] in self.materials.data)
        log_data(self.store, record.run, [*inputs, *(self._input(task, "evaluation") for task in scored)])
        log_data(self.store, self.parent_run, inputs)
        config = self.materials.config
        scores = {key: value for key, value, *_ in above}
        shown = StageFigures(record.index, record.task, record.training.get("losses", []), scores)
        write_stage(config.tracking, self.store, record.run, self.run_id, home(), self.mapping, shown)
        self.store.end_run(record.run, "FINISHED")


def statistics_digest(result: Result) -> str:
    """sha256 over the tensors of a stage's statistics."""
    return tensors_digest(result.statistics.tensors())


def library_versions() -> dict[str, str]:
    """Versions of this project and of the libraries that decide a result, by name."""
    from importlib.metadata import version

    names = ("torch", "transformers", "deepspeed", "ray", "mlflow", "safetensors")
    return {"amlora-dist": amlora_dist.__version__} | {name: version(name) for name in names}
