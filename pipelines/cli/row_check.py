"""``amlora validate --rows``: the rows that a run would use, read and counted without a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from amlora_dist.errors import Fault, FaultsError, UserError
from amlora_dist.tasks.prompts import template_for
from amlora_dist.tasks.sources import load_task
from amlora_dist.tasks.task import resolve_task

if TYPE_CHECKING:
    from amlora_dist.config.loading import RunConfig
    from amlora_dist.tasks.sources import TaskData

SHOWN_LABELS = 12


@dataclass(frozen=True, slots=True)
class TaskRowCounts:
    """What a run would read of one task."""

    task: str
    rows: dict[str, int]
    """By split, after limits and without what was left out."""
    labels: dict[str, dict[str, int]]
    """Rows of each label, by split; empty for free text. A label of the task that no row has is there with 0."""
    left_out: str
    """How many rows were left out and why; empty where none was."""
    columns: str = ""
    """Of ``columns: auto``: those that were recognised."""

    def lines(self) -> Iterator[str]:
        """For the terminal: the counts, the labels, what was left out."""
        yield f"{self.task}: {', '.join(f'{count} {split}' for split, count in self.rows.items())}"
        for split, counts in self.labels.items():
            shown = ", ".join(f"{label} {count}" for label, count in list(counts.items())[:SHOWN_LABELS])
            more = f" and {len(counts) - SHOWN_LABELS} more labels" if len(counts) > SHOWN_LABELS else ""
            yield f"  {split:5} {shown}{more}"
        if self.columns:
            yield f"  columns: auto: {self.columns}"
        if self.left_out:
            yield f"  {self.left_out}"


def check_rows(config: RunConfig, file: Path) -> list[TaskRowCounts]:
    """Read the rows of every task of a valid configuration as its run would; what the tokenizer decides is not looked at.

    Raises:
        FaultsError: the bad rows of all tasks at once, and tasks that cannot be read.
    """
    found: list[TaskRowCounts] = []
    faults: list[Fault] = []
    for number, ref in enumerate([*config.tasks, *config.evaluation.also]):
        spec = resolve_task(ref, data_dir=config.data_dir, base_dir=Path.cwd(), defaults=config.task_defaults)
        scored = config.evaluation.split
        splits = ("train", scored) if number < len(config.tasks) else (scored,)
        try:
            template_for(spec, spec.prompt_style)
            data = load_task(
                spec, seed=config.seed, data_dir=config.data_dir, splits=splits, sealed=config.evaluation.sealed
            )
        except FaultsError as error:
            faults += [Fault(f"{error.file}: {one.where}", one.found, one.expected, one.hint) for one in error.faults]
        except UserError as error:
            faults.append(Fault(f"task {spec.name!r}", "rows that cannot be read", "rows for a run", str(error)))
        else:
            found.append(_counted(data))
    if faults:
        raise FaultsError(str(file), faults)
    return found


def _counted(data: TaskData) -> TaskRowCounts:
    spec, labels = data.spec, {}
    if not spec.free_text:
        for split, rows in data.rows.items():
            counts = Counter(row.target for row in rows)
            labels[split] = {text: counts[text] for text in spec.label_texts}
    return TaskRowCounts(spec.name, {split: len(rows) for split, rows in data.rows.items()}, labels, data.remarks, data.took)
