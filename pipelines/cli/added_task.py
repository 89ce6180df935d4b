"""``amlora add``: one more task for a bank, and what that changed for the tasks before."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from rich.table import Table

from amlora_dist.evaluation.text_metrics import METRIC_NAMES, score_of
from amlora_dist.tasks.named_fields import fields_read
from amlora_dist.tasks.sources import Row, load_task, sample
from pipelines.cli.batch_inference import apart
from pipelines.cli.output import stdout_to_stderr
from pipelines.cli.scoring import bank_model
from pipelines.cli.tables import console_for
from pipelines.runs.api import RunResult
from pipelines.runs.api import Sequence as Run
from pipelines.runs.extension import Extension, plan_extension

if TYPE_CHECKING:
    from amlora_dist.inference.model import AMLoRAModel
    from amlora_dist.tasks.task import TaskSpec

NAMED = 5
SHOWN_TEXT = 70


@dataclass(frozen=True, slots=True)
class _SampleAnswers:
    """Some test rows of a task, and what the banks before and after answered."""

    spec: TaskSpec
    rows: list[Row]
    before: list[str]
    after: list[str]

    def score(self, answers: Sequence[str]) -> float:
        metric = str(self.spec.metric)
        pairs = zip(self.rows, answers, strict=True)
        return sum(score_of(metric, text, (row.target, *row.references), row.text) for row, text in pairs) / len(self.rows)

    @property
    def changed(self) -> list[tuple[str, str, str]]:
        """Text, answer before, answer after, where they differ."""
        triples = zip(self.rows, self.before, self.after, strict=True)
        return [(row.text, before, after) for row, before, after in triples if before != after]


def add_task(
    bank: str,
    task: str,
    overrides: Sequence[str],
    *,
    run_id: str | None,
    check: Sequence[str],
    rows: int,
    tracking_uri: str | None,
    verbose: bool,
) -> None:
    """Train the stage, print scores before and after and what changed, and the command to try next.

    Raises:
        UserError: as ``plan_extension``; and what a run raises.
    """
    with stdout_to_stderr():
        plan = plan_extension(bank, task, overrides, run_id=run_id, check=check, tracking_uri=tracking_uri)
        chosen = _chosen(plan, rows) if rows else []
        result = Run(plan.config, run_id=plan.run_id).run(verbose=verbose)
        asked = _compared(plan, result, chosen, tracking_uri) if rows else []
    console = console_for()
    console.print(f"{plan.parent} -> {result.bank}: {plan.task.name} learned", markup=False, highlight=False)
    if asked:
        console.print(_table(asked, plan.task.name))
        _print_changes(asked[:-1])
    if plan.absent and rows:
        console.print(f"not asked, their rows are not at hand (--check TASK.yaml): {', '.join(plan.absent)}", soft_wrap=True)
    model = result.mapping["registered_model"]
    given = _typed(asked[-1].spec, asked[-1].rows[0]) if asked else "..."
    console.print(f"try it: amlora ask models:/{model}@champion {given}", markup=False, soft_wrap=True)


def _typed(spec: TaskSpec, row: Row) -> str:
    """A row as it is given to ``amlora ask``: by its fields where the task's prompt reads them."""
    if len(row.fields) > 1 and spec.prompt.template is not None and fields_read(spec.prompt.template) is not None:
        parts = (f"{name}={' '.join(words.split())}" for name, words in row.fields.items() if words)
        return " ".join(f"--field {shlex.quote(part)}" for part in parts)
    return shlex.quote(" ".join(row.text.split()))


def _chosen(plan: Extension, count: int) -> list[tuple[TaskSpec, list[Row]]]:
    """Test rows of the bank's tasks, the new one's last; read before anything trains."""
    found = []
    for spec in [*plan.known, plan.task]:
        data = load_task(
            spec, defaults=plan.config.task_defaults, seed=plan.config.seed, data_dir=plan.config.data_dir, splits=("test",)
        )
        found.append((data.spec, sample(data.rows["test"], count, seed=plan.config.seed)))
    return found


def _compared(
    plan: Extension, result: RunResult, chosen: Sequence[tuple[TaskSpec, list[Row]]], tracking_uri: str | None
) -> list[_SampleAnswers]:
    """Answers of both banks to the test rows that were chosen."""
    count = sum(len(rows) for _, rows in chosen)
    answers = []
    for number, uri in enumerate((plan.parent, str(result.bank)), start=1):
        print(f"asking {uri} {count} test rows ({number} of 2)", file=sys.stderr, flush=True)
        model = bank_model(uri, {"tracking_uri": tracking_uri})
        asked = [_asked(model, spec, row) for spec, rows in chosen for row in rows]
        # A row of another task that is routed to one whose fields it lacks has no answer, which is wrong.
        found, _ = apart(partial(model.answer, batch_size=8), asked, 8)
        answers.append([found[place].text if place in found else "" for place in range(count)])
        del model  # one base model in memory at a time
    made, start = [], 0
    for spec, rows in chosen:
        here = slice(start, start + len(rows))
        made.append(_SampleAnswers(spec, rows, answers[0][here], answers[1][here]))
        start += len(rows)
    return made


def _asked(model: AMLoRAModel, spec: TaskSpec, row: Row) -> str | dict[str, str]:
    """A row as its user would ask it: by its fields where the bank knows these."""
    entry = model.prompter.learned.get(spec.name)
    return row.text if entry is None or entry.fields is None else row.fields


def _table(asked: Sequence[_SampleAnswers], new: str) -> Table:
    table = Table(box=None, pad_edge=False, show_edge=False)
    for name in ("task", "rows", "score", "before", "after", "answers changed"):
        table.add_column(name, justify="left" if name in ("task", "score") else "right", no_wrap=True)
    for one in asked:
        name = f"{one.spec.name} (new)" if one.spec.name == new else one.spec.name
        before, after = (f"{one.score(answers):.3f}" for answers in (one.before, one.after))
        table.add_row(
            name, str(len(one.rows)), METRIC_NAMES[str(one.spec.metric)], before, after,
            f"{len(one.changed)} of {len(one.rows)}",
        )  # fmt: skip
    return table


def _print_changes(asked: Sequence[_SampleAnswers]) -> None:
    """The first answers of earlier tasks that changed, as ``amlora diff --sample`` tells them."""
    changed = [(one.spec.name, *change) for one in asked for change in one.changed]
    total = sum(len(one.rows) for one in asked)
    console = console_for()
    if total:
        console.print(f"{len(changed)} of {total} answers of earlier tasks changed", markup=False, highlight=False)
    for task, text, before, after in changed[:NAMED]:
        shown = text if len(text) <= SHOWN_TEXT else f"{text[:SHOWN_TEXT]}..."
        console.print(f"  {task}: {before} -> {after}: {shown}", markup=False, highlight=False, soft_wrap=True)
    if len(changed) > NAMED:
        console.print(f"  and {len(changed) - NAMED} more")
