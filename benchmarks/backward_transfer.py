"""Backward transfer as served: what became of the answers to earlier tasks, stage by stage, and of which texts.

Every version that a run published up to ``--bank`` is asked the test rows of the tasks that it holds, as a user sends them:
the text alone. A line for each stage and earlier task compares with the version before; the line of all earlier tasks is
the backward transfer (BWT) of the sequence so far, each task against its own stage. Intervals (95%) are paired over rows.
``worse`` was right before and is wrong after; ``rerouted`` are those of them that go to another task than before, which is
what new look-alikes do. A report has the same of what a run has scored; this scores what it has not
(``evaluation.cells=last``), or other rows.

Rows are named by their number in the data. Their texts are the data's own: ``--texts N`` prints so many of each stage.

    python benchmarks/backward_transfer.py --bank models:/demo@champion
    python benchmarks/backward_transfer.py --bank models:/BANK/4 --tasks dbpedia amazon yahoo agnews --data-dir ROWS \\
        --dtype bf16
    python benchmarks/backward_transfer.py --quick         # a tiny run of its own: shows that it runs, no figure
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from finished_bank import asked_of, bank_parser, task_rows
from sweeps import LEAST, show, write_json

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from amlora_dist.config.loading import home
from amlora_dist.errors import AmloraError, UserError
from amlora_dist.evaluation.intervals import cell_means
from amlora_dist.evaluation.scoring import Prediction
from amlora_dist.evaluation.stage_changes import StageChange, stage_changes
from amlora_dist.evaluation.text_metrics import score_of
from amlora_dist.inference.model import AMLoRAModel
from amlora_dist.registry.store import Store
from amlora_dist.reporting.backward import change_line
from amlora_dist.tasks.sources import Row
from pipelines.cluster.library_output import set_up

BATCH = 8


def main() -> None:
    parser = bank_parser(__doc__, rows=200)
    parser.set_defaults(split="test")
    parser.add_argument("--seed", type=int, default=0, help="that drew the rows of the run")
    parser.add_argument("--texts", type=int, default=0, metavar="N", help="changed texts to print of each stage")
    args = asked_of(parser.parse_args())
    set_up(verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        if args.quick:
            _quick(args, Path(folder))
        try:
            rows = task_rows(args.tasks, args.data_dir, args.split, most=args.rows, seed=args.seed)
            answers = answers_of(args, rows)
        except AmloraError as error:
            parser.error(str(error))
    tasks = [task for task, _ in rows]
    matrix = [[None] * len(tasks), *cell_means([[_scores(found) for found in line] for line in answers])]
    changes = stage_changes(tasks, matrix, answers, seed=args.seed)
    table = [change_line(one) for one in changes]
    accuracy = [{"after": task, **dict(zip(tasks, line, strict=True))} for task, line in zip(tasks, matrix[1:], strict=True)]
    show(f"as served, {args.split} rows", accuracy, ("after", *tasks))
    show("what each stage did to the tasks before it", table, tuple(table[0]) if table else ())
    texts = {(task, row.number): row.text for task, own in rows for row in own}
    _show_texts(changes, tasks, texts, args.texts)
    write_json(
        args.json,
        {"bank": args.bank, "split": args.split, "seed": args.seed, "accuracy": matrix[1:], "table": table,
         "changed": _listed(changes)},
    )  # fmt: skip


def _quick(args: argparse.Namespace, folder: Path) -> None:
    """A tiny run of three tasks in a home that is thrown away; its bank and tasks become those of ``args``."""
    from pipelines import Sequence
    from tests.tiny_config import write_config

    os.environ["AMLORA_HOME"] = str(folder / "home")
    training = {"epochs": 1, "batch_size": 6, "learning_rate": 3e-2, "warmup_steps": 2, "probe_rows": 8}
    config = write_config(folder, training=training)
    result = Sequence(config, [*LEAST, "evaluation.oracle=false"], run_id="quick").run()
    args.bank, args.tasks = result.bank, [str(folder / "tasks" / f"{task}.yaml") for task in result.tasks]


def versions_of(bank: str) -> list[str]:
    """The versions of the run that published ``bank``, one a stage, up to it.

    Raises:
        UserError: no such version, or one of an earlier stage is missing.
    """
    store = Store.open(home(), reads=True)
    last = store.resolve(bank)
    kept = [one for one in store.counted_versions(last.registered_model) if one.run_id == last.run_id]
    found = {one.stage: one.uri for one in kept if 0 < one.stage <= last.stage}
    if not found or len(found) != last.stage:
        raise UserError(f"--bank: found stages {sorted(found)} of {last.uri}, expected every one from 1 to {last.stage}")
    return [found[stage] for stage in sorted(found)]


def answers_of(args: argparse.Namespace, rows: list[tuple[str, list[Row]]]) -> list[list[list[Prediction] | None]]:
    """What each version answers to the rows of its tasks; None for tasks that it does not hold.

    Raises:
        UserError: no such bank, a task without labels, or other tasks than the bank's.
    """
    found: list[list[list[Prediction] | None]] = []
    names = [task for task, _ in rows]
    model: AMLoRAModel | None = None
    for uri in versions_of(args.bank):
        model = AMLoRAModel.from_bank(uri, dtype=args.dtype, share_base_with=model)
        learned = len(found) + 1
        if model.tasks != names[:learned] or not all(model.labels(task) for task in model.tasks):
            raise UserError(f"--tasks: {uri} holds {model.tasks}, expected {names[:learned]}, all with labels")
        begun = time.perf_counter()
        found.append([_answered(model, task, own) if task in model.tasks else None for task, own in rows])
        asked = sum(len(own) for _, own in rows[:learned])
        print(f"{uri}: {asked} rows in {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
    if len(found) != len(names):
        raise UserError(f"--tasks: found {len(names)}, the bank has {len(found)}")
    return found


def _answered(model: AMLoRAModel, task: str, rows: list[Row]) -> list[Prediction]:
    """Plain texts in, nothing else; counted by the task's metric."""
    metric = model.prompter.entry(task).counted_by
    answers = model.answer([row.text for row in rows], batch_size=BATCH)
    return [
        Prediction(
            row.number, row.target, one.text, one.ended, score_of(metric, one.text, [row.target], row.text),
            served=one.text, route=one.route.task,
        )
        for row, one in zip(rows, answers, strict=True)
    ]  # fmt: skip


def _scores(found: list[Prediction] | None) -> list[float] | None:
    return None if found is None else [one.correct for one in found]


def _listed(changes: list[StageChange]) -> list[dict[str, Any]]:
    """Every answer that a stage changed, without its text."""
    return [
        {"stage": change.stage, "task": one.task, "row": one.before.row, "right": one.before.answer,
         "before": one.before.given, "after": one.after.given,
         "route_before": one.before.route, "route_after": one.after.route}
        for change in changes if change.task is not None for one in change.answers or ()
    ]  # fmt: skip


def _show_texts(changes: list[StageChange], tasks: list[str], texts: dict[tuple[str, int], str], most: int) -> None:
    """Up to ``most`` texts of each stage whose answers changed, those that became wrong first."""
    for stage in range(2, len(tasks) + 1) if most else ():
        answers = [one for change in changes if change.stage == stage and change.task for one in change.answers or ()]
        answers.sort(key=lambda one: (not one.worse, not one.better))
        print(f"\nstage {stage}, {tasks[stage - 1]}; answers changed: {len(answers)}")
        for one in answers[:most]:
            verdict = "worse" if one.worse else "better" if one.better else "wrong before and after"
            route = f"{one.before.route} -> {one.after.route}" if one.rerouted else f"{one.after.route} as before"
            print(f"  {one.task} {one.before.row}: {one.before.given} -> {one.after.given} ({verdict}; {route})")
            print(f"    {texts[one.task, one.before.row]}")


if __name__ == "__main__":
    main()
