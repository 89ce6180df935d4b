"""What a stage will do, decided before anything is done: rows, fingerprints, and the cells to score.

Pure: a plan follows from the run's inputs, the bank below and the plans before; nothing is read and no store is asked. So
the rule by which a stage is trained or taken over is the fingerprint of its plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from amlora_dist.errors import UserError
from amlora_dist.methods.kinds import Stages, Trains
from amlora_dist.training.stage_spec import WITHOUT, Cell, Mode, Parent, StageWork
from pipelines.runs.plain_choice import choice_cells, chooses

if TYPE_CHECKING:
    from amlora_dist.tasks.task_entry import TaskEntry
    from pipelines.runs.inputs import RunInputs


@dataclass(frozen=True, slots=True)
class BankState:
    """The bank as it grows: what the next stage is trained on. Empty before the first one."""

    parents: tuple[Parent, ...] = ()
    fingerprints: tuple[str, ...] = ()
    """Training fingerprints of its stages."""
    statistics: tuple[str, ...] = ()
    """Digests of its router statistics."""
    entries: Mapping[str, TaskEntry] = field(default_factory=dict)
    """Of the tasks that a parent bank brought along."""

    def grown(self, parent: Parent, fingerprint: str, statistics: str) -> BankState:
        """The same with one more adapter."""
        return replace(
            self,
            parents=(*self.parents, parent),
            fingerprints=(*self.fingerprints, fingerprint),
            statistics=(*self.statistics, statistics),
        )

    def emptied(self) -> BankState:
        """Of a method whose stages do not build on each other."""
        return BankState(entries=self.entries)


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage: what it learns from, what decides it, and what is scored after it."""

    index: int
    """1-based place in the run."""
    task: str
    fingerprint: str
    """Of training: a published version that carries it is this stage."""
    adapter_fingerprint: str | None
    """A published version that carries it has this stage's adapter, with whatever statistics; None where there is none."""
    bank: BankState
    """Below the stage."""
    rows: Mapping[str, int | None]
    """Tasks whose training rows it learns from, and how many of each at most."""
    cells: tuple[Cell, ...]
    trains: bool = True
    """False of a method that only scores."""
    chooses: bool = False
    """Whether the scores of its cells say how its bank answers plain text."""

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """Of the bank with this stage."""
        return (*self.bank.fingerprints, self.fingerprint)

    def work(self, inputs: RunInputs) -> StageWork:
        """What workers get, all cells among it."""
        work = stage_work(inputs, self.bank, self.task, dict(self.rows), self.fingerprint)
        return replace(work, cells=list(self.cells))


def plan_stage(inputs: RunInputs, bank: BankState, task: str, earlier: Sequence[StagePlan]) -> StagePlan:
    """The plan of the next stage of a run.

    Args:
        inputs: of the run.
        bank: so far.
        task: the stage's name: a task, for most methods.
        earlier: plans of the run's stages before this one.

    Raises:
        UserError: the method needs rows of a task that the run does not have.
    """
    method = inputs.method
    if method.trains is Trains.NOTHING:
        fingerprint = inputs.training_fingerprint(method, 1, task, [], [], {})
        cells = [_cell(inputs, "untrained", one, ()) for one in (*inputs.tasks, *inputs.also)]
        return StagePlan(1, task, fingerprint, None, BankState(), {}, tuple(cells), trains=False)
    if method.stages is not Stages.CHAINED:
        bank = bank.emptied()
    rows = training_rows(inputs, bank, task)
    stage, mixed = len(bank.parents) + 1, inputs.mixed_rows(task, inputs.stage_names)
    below = [parent.digest for parent in bank.parents]
    fingerprint = inputs.training_fingerprint(method, stage, task, below, list(bank.statistics), rows, mixed)
    adapter = inputs.adapter_fingerprint(method, stage, task, below, rows, mixed)
    bare = StagePlan(len(earlier) + 1, task, fingerprint, adapter, bank, rows, ())
    cells = _cells(inputs, bare, earlier)
    if not chooses(inputs, method) or all(cell.mode != "router" for cell in cells):
        return replace(bare, cells=tuple(cells))
    learned = inputs.tasks if method.stages is Stages.ONE else inputs.tasks[: bare.index]
    kinds = [*(inputs.specs[name].free_text for name in learned), *(entry.free_text for entry in bank.entries.values())]
    if all(kinds):  # nothing could be ranked
        return replace(bare, cells=tuple(cells))
    deciding = choice_cells(inputs, method, list(bare.fingerprints), learned, rows)
    return replace(bare, cells=(*cells, *deciding), chooses=True)


def training_rows(inputs: RunInputs, bank: BankState, task: str) -> dict[str, int | None]:
    """Tasks whose training rows a stage learns from, and how many of each at most.

    Raises:
        UserError: one of them is not a task of the run.
    """
    rows = inputs.method.rows(task, [parent.task for parent in bank.parents], inputs.tasks)
    if missing := sorted(set(rows) - set(inputs.tasks)):
        raise UserError(
            f"tasks: method {inputs.config.method!r} trains on rows of {', '.join(missing)} too, which are in the"
            " parent bank and not in this run's tasks"
        )
    return rows


def stage_work(
    inputs: RunInputs,
    bank: BankState,
    task: str,
    rows: dict[str, int | None],
    fingerprint: str,
    folder: Path | None = None,
) -> StageWork:
    """What workers get of a stage, without cells to score.

    Args:
        inputs: of the run.
        bank: below the stage.
        task: the stage's name.
        rows: of ``training_rows``.
        fingerprint: of training.
        folder: where everything of the stage goes; default: by its fingerprint.
    """
    config, storage = inputs.config, inputs.storage
    split, mixed = config.evaluation.split, inputs.mixed_rows(task, inputs.stage_names)
    digests = {f"{name}/{split}": data.digest(split) for name, data in inputs.data.items()}
    deciding = inputs.tasks if chooses(inputs, inputs.method) else []
    digests |= {f"{name}/train": inputs.data[name].digest("train") for name in (*rows, *mixed, *deciding)}
    digests |= {f"{name}/dev": data.digest("dev") for name, data in inputs.dev.items()}
    return StageWork(
        fingerprint=fingerprint,
        index=len(bank.parents) + 1,
        task=task,
        folder=str(folder or storage / "stages" / fingerprint),
        settings=inputs.stage_settings(),
        base=asdict(inputs.base) | {"path": str(inputs.base.path)},
        tasks={name: spec.to_mapping() for name, spec in inputs.specs.items()},
        data_seed=config.seed,
        data_dir=str(config.data_dir.absolute()) if config.data_dir else None,
        parents=list(bank.parents),
        cells=[],
        deepspeed=config.deepspeed,
        evaluation_batch_size=config.evaluation.batch_size,
        rows=rows,
        mixed=mixed,
        data_digests=digests,
        plain_texts=inputs.plain_texts,
        entries={name: asdict(entry) for name, entry in bank.entries.items()},
        sealed=config.evaluation.sealed,
        cache=str(inputs.cache),
        root=str(storage),
        url=inputs.url,
        apart=bool(inputs.url and config.workers),
    )


def _cells(inputs: RunInputs, plan: StagePlan, earlier: Sequence[StagePlan]) -> list[Cell]:
    """What is scored after a stage: the configured cells, what is untrained, and at the end the oracle."""
    evaluation, method, tasks = inputs.config.evaluation, inputs.method, inputs.tasks
    bank, last = plan.fingerprints, plan.index == len(inputs.stage_names)
    if method.stages is Stages.APART:
        done = [*(one.fingerprint for one in earlier), plan.fingerprint]
        cells = [_cell(inputs, "router", task, (own,)) for task, own in zip(tasks, done, strict=False)]
    else:
        wanted = {"all": len(tasks), "last": plan.index if last else 0, "seen": plan.index}
        upto = wanted.get(evaluation.cells, plan.index + 1)
        upto = upto if inputs.stage_names == tasks else len(tasks)
        # A refit may move any earlier task's row, so that no answer of before is known to hold.
        holds = method.stages is Stages.CHAINED and not method.recipe(len(plan.bank.parents)).memory_rows
        before = earlier[-1].cells if earlier and holds else ()
        known = {cell.task: cell.fingerprint for cell in before if cell.mode == "router"}
        cells = [_cell(inputs, "router", task, bank, known.get(task)) for task in tasks[:upto]]
    routed = {cell.task: cell.fingerprint for cell in cells}
    if last and method.stages is not Stages.APART:
        cells += [_cell(inputs, "router", task, bank) for task in inputs.also]
    if last and inputs.plain_texts and method.stages is not Stages.APART and not inputs.finds_tasks(method):
        cells += [_cell(inputs, "own", task, bank) for task in tasks]
    if evaluation.untrained and (plan.index == 1 or last):
        cells += [_cell(inputs, "untrained", task, bank) for task in tasks]
    if evaluation.oracle and last and method.stages is Stages.CHAINED:
        cells += [_cell(inputs, "oracle", task, bank, routed[task]) for task in tasks]
    if evaluation.knockout and last and method.stages is Stages.CHAINED:
        disabled = [f"{WITHOUT}{n}" for n in range(1, len(bank) + 1)]
        cells += [_cell(inputs, mode, task, bank, routed[task]) for mode in disabled for task in tasks]
    return cells


def _cell(inputs: RunInputs, mode: Mode, task: str, bank: Sequence[str], before: str | None = None) -> Cell:
    return inputs.cell(inputs.method, inputs.storage, mode, task, list(bank), before)
