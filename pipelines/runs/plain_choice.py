"""Which rows decide how a bank without a task posterior answers plain text: held out of training, else of the dev split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from amlora_dist.digests import value_digest
from amlora_dist.errors import FaultsError, UserError
from amlora_dist.methods.kinds import Stages, Trains
from amlora_dist.tasks.sources import TaskData, load_task
from amlora_dist.training.stage_spec import CHOICE, Cell

if TYPE_CHECKING:
    from amlora_dist.methods.base import Method
    from pipelines.runs.inputs import RunInputs

RULE = 1
"""Of what the choice is made by; part of its fingerprints."""


def chooses(inputs: RunInputs, method: Method) -> bool:
    """Whether banks of a run are to choose how they answer plain text: they find no task by themselves, and are asked it."""
    trained = method.trains is not Trains.NOTHING and method.stages is not Stages.APART
    return inputs.plain_texts and trained and not inputs.finds_tasks(method)


def choice_cells(
    inputs: RunInputs, method: Method, bank: list[str], learned: Sequence[str], rows: Mapping[str, int | None]
) -> list[Cell]:
    """Scores of the rows that decide, of each labelled task learned so far that has some.

    Args:
        inputs: of the run.
        method: of the run.
        bank: training fingerprints of its stages.
        learned: tasks of the run that it has learned.
        rows: tasks whose rows the last stage learned from, and how many of each at most.
    """
    cells = []
    for task in learned:
        if inputs.specs[task].free_text:
            continue
        split, places = "train", unseen_places(inputs, method, task, rows.get(task))
        data: TaskData | None = inputs.data[task]
        if not places:
            split, data = "dev", inputs.dev.get(task)
            places = [] if data is None else list(range(len(data.rows["dev"])))
        if not places or data is None:
            continue
        decided_by = {"choice": RULE, "score": inputs.scoring_fingerprint(method, bank, "router", task)}
        fingerprint = value_digest(decided_by | {"split": split, "rows": data.digest(split), "places": places})
        folder = str(inputs.storage / "scores" / fingerprint)
        cells.append(Cell(task, split, CHOICE, fingerprint, folder, places=tuple(places)))
    return cells


def unseen_places(inputs: RunInputs, method: Method, task: str, limit: int | None = None) -> list[int]:
    """Places of a task's training rows that nothing was trained on, rising; none where nothing was held out, or where more
    was looked at than adapters are.

    Args:
        inputs: of the run.
        method: of the run.
        task: that was learned.
        limit: rows of it that stages after its own saw again (``replay``), at most.
    """
    from amlora_dist.training.stage_rows import sampled_places  # takes torch, which what only shows a plan does without
    from amlora_dist.training.stage_statistics import held_out_places

    settings, count = inputs.stage_settings(), len(inputs.data[task].rows["train"])
    share, memory = settings.router.holdout, method.settings.method_settings.memory_rows
    if not share or memory or inputs.config.boundary_mix or inputs.specs[task].chat:
        return []
    if method.stages is Stages.ONE:  # held out of the rows of all tasks together, in this order
        sizes = {name: len(inputs.data[name].rows["train"]) for name in sorted(inputs.tasks)}
        begin = sum(size for name, size in sizes.items() if name < task)
        held = held_out_places(sum(sizes.values()), share, seed=settings.seed, task=inputs.config.method)
        return [place - begin for place in held if begin <= place < begin + count]
    seen = set() if limit is None else set(sampled_places(count, limit, settings.seed, "replay", task))
    return [place for place in held_out_places(count, share, seed=settings.seed, task=task) if place not in seen]


def dev_rows(inputs: RunInputs, method: Method) -> dict[str, TaskData]:
    """Dev rows of the labelled tasks that hold out none; nothing where they are the rows that are scored."""
    config = inputs.config
    if config.evaluation.split == "dev" or not chooses(inputs, method):
        return {}
    found = {}
    *earlier, last = inputs.stage_names
    again = method.rows(last, earlier, inputs.tasks)
    for task in inputs.tasks:
        if inputs.specs[task].free_text or unseen_places(inputs, method, task, again.get(task)):
            continue
        try:
            found[task] = load_task(
                inputs.specs[task], seed=config.seed, data_dir=config.data_dir, splits=("dev",),
                sealed=config.evaluation.sealed,
            )  # fmt: skip
        except FaultsError:
            raise
        except UserError:  # a task without dev rows: none decide
            continue
    return found
