"""How much a whole run is, how much of it is done, and how long the rest will take.

A run is counted in rows that pass through the model: rows trained (each as often as there are epochs) and rows scored. How
long one takes is measured, for each of the two apart, as are the seconds that a stage takes besides them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from amlora_dist.methods.kinds import Trains
from amlora_dist.training.stage_spec import Parent
from pipelines.runs.plan import StagePlan, plan_stage

if TYPE_CHECKING:
    from amlora_dist.training.stage_spec import Cell
    from pipelines.runs.inputs import RunInputs
    from pipelines.runs.plan import BankState

Work = Literal["train", "score", "other"]
ALMOST = 0.99
"""Share that is shown as done as long as the run has not ended."""


@dataclass(frozen=True, slots=True)
class StageSize:
    """How much one stage is, as far as that can be known before it begins."""

    task: str
    trained: int
    """Rows that pass through training, over all epochs."""
    scored: int
    """Rows that are scored after it."""

    @property
    def rows(self) -> int:
        return self.trained + self.scored


def stage_sizes(inputs: RunInputs, bank: BankState) -> list[StageSize]:
    """The size of each stage of a run that begins with ``bank``.

    What is held out of training, taken over from another run, or answered as before is counted too: a stage that turns out
    to be smaller ends sooner.
    """
    sizes: list[StageSize] = []
    plans: list[StagePlan] = []
    known: set[str] = set()
    split, training = inputs.config.evaluation.split, inputs.config.training
    for task in inputs.stage_names:
        plan = plan_stage(inputs, bank, task, plans)
        plans.append(plan)
        cells = [cell for cell in plan.cells if cell.fingerprint not in known]
        known |= {cell.fingerprint for cell in cells}
        trained = 0
        if plan.trains:
            bank = plan.bank.grown(Parent(task, plan.fingerprint, ""), plan.fingerprint, "")
            if inputs.method.trains is Trains.ADAPTER:
                memory = inputs.method.recipe(len(plan.bank.parents)).memory_rows
                learned = {n: limit for n, limit in plan.rows.items() if limit is None or not memory}
                counts = [(len(inputs.data[name].rows["train"]), limit) for name, limit in learned.items()]
                trained = sum(min(count, count if limit is None else limit) for count, limit in counts) * training.epochs
        sizes.append(StageSize(task, trained, sum(_size(inputs, cell, split) for cell in cells)))
    return sizes


def _size(inputs: RunInputs, cell: Cell, split: str) -> int:
    return len(inputs.data[cell.task].rows[split]) if cell.places is None else len(cell.places)


@dataclass(slots=True)
class _Rate:
    """Seconds that something took, and how much of it there was."""

    seconds: float = 0.0
    count: float = 0.0

    @property
    def each(self) -> float | None:
        return self.seconds / self.count if self.count else None


@dataclass(slots=True)
class Outlook:
    """What of a run is done, and how long the rest will take; it gets every event as it happens.

    Attributes:
        clock: seconds.
    """

    clock: Callable[[], float] = time.monotonic
    _stages: Sequence[StageSize] = ()
    _index: int = 0
    """1-based; 0 before the first stage."""
    _trained: float = 0.0
    """Rows of this stage."""
    _cells: dict[tuple[str, str], int] = field(default_factory=dict)
    """Rows of each of its scores, by task and mode: one that begins again after a restart counts once."""
    _rates: dict[Work, _Rate] = field(default_factory=lambda: {"train": _Rate(), "score": _Rate(), "other": _Rate()})
    _work: Work = "other"
    _since: float | None = None
    _last_share: float = 0.0

    def outline(self, stages: Sequence[StageSize]) -> None:
        """A run of these stages begins (none: it is not known yet which); what earlier ones took is still known."""
        self._stages, self._index, self._last_share = list(stages), 0, 0.0
        self._trained, self._cells = 0.0, {}

    def stage(self, index: int) -> None:
        """Stage ``index`` (from 1) begins: those before it are done."""
        self._spend("other")
        if index > 1 and self._rates["train"].count + self._rates["score"].count:
            self._rates["other"].count += 1
        if index == 1:
            self._since = None  # what comes now, until the stage's first event, comes once: workers start
        self._index, self._trained, self._cells = index, 0.0, {}

    def other(self) -> None:
        """Something between training and scoring begins."""
        self._spend("other")

    def step(self, done: int, total: int) -> None:
        """``done`` of ``total`` steps of the stage are done."""
        if total <= 0 or (size := self._size) is None:
            return
        rows = size.trained * done / total
        if self._work == "train":  # nobody knows when the first one began
            self._rates["train"].count += max(0.0, rows - self._trained)
            self._spend("train")
        else:
            self._spend("other")
            self._work = "train"
        self._trained = rows

    def rows(self, task: str, mode: str, done: int) -> None:
        """``done`` rows of one score are done."""
        self._spend("score" if self._work == "score" else "other")
        self._work = "score"
        self._count(task, mode, done)

    def scored(self, task: str, mode: str, rows: int) -> None:
        """All ``rows`` of a score are done, those among them that were answered before too."""
        self._spend("score" if self._work == "score" else "other")
        self._count(task, mode, rows)

    @property
    def share(self) -> float | None:
        """Of the whole run that is done, 0 to ``ALMOST``; never less than before. None where its size is not known."""
        whole = sum(size.rows for size in self._stages)
        if not whole:
            return None
        done = float(sum(size.rows for size in self._stages[: max(0, self._index - 1)]))
        if (size := self._size) is not None:
            done += min(self._trained, size.trained) + min(self._scored, size.scored)
        self._last_share = max(self._last_share, min(ALMOST, done / whole))
        return self._last_share

    @property
    def left_s(self) -> float | None:
        """Seconds until the run's end, about; None as long as too little is known."""
        size, train, score = self._size, self._rates["train"].each, self._rates["score"].each
        if size is None or (train is None and score is None):
            return None
        later = self._stages[self._index :]
        trained = sum(one.trained for one in later) + max(0.0, size.trained - self._trained) * (not self._scored)
        scored = sum(one.scored for one in later) + max(0.0, size.scored - self._scored)
        # Before anything was scored: a row that is read once costs about as much as one that is learned from once.
        row_trained = train if train is not None else score
        row_scored = score if score is not None else train
        assert row_trained is not None and row_scored is not None
        other = self._rates["other"]
        other_s = other.each if other.count else other.seconds
        return trained * row_trained + scored * row_scored + len(later) * (other_s or 0.0)

    @property
    def _scored(self) -> int:
        """Rows of this stage."""
        return sum(self._cells.values())

    @property
    def _size(self) -> StageSize | None:
        return self._stages[self._index - 1] if 0 < self._index <= len(self._stages) else None

    def _count(self, task: str, mode: str, done: int) -> None:
        before = self._cells.get((task, mode), 0)
        self._cells[task, mode] = max(before, done)
        self._rates["score"].count += max(0, done - before)

    def _spend(self, work: Work) -> None:
        """The time since the last call went into ``work``."""
        now = self.clock()
        if self._since is not None and self._index:
            self._rates[work].seconds += now - self._since
        self._since, self._work = now, work


def clock_text(seconds: float) -> str:
    """Minutes and seconds, with hours where there are any."""
    minutes, rest = divmod(math.floor(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
