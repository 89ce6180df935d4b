"""``ask``, ``score``, ``diff --sample`` and ``rekey``: what a bank answers to plain texts: shown, counted, compared."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from amlora_dist.errors import UserError
from amlora_dist.evaluation.field_columns import FieldColumns
from amlora_dist.evaluation.field_texts import Entries, RefusedTextsError, joined_text
from amlora_dist.tasks.conversations import joined
from amlora_dist.tasks.texts import is_blank
from pipelines.cli.batch_inference import apart, bank_and_tasks, check_task, entries_of
from pipelines.cli.output import stdout_to_stderr
from pipelines.cli.row_input import InputRow, check_words, opened
from pipelines.cli.tables import console_for
from pipelines.cluster.resources import check_folder

if TYPE_CHECKING:
    from amlora_dist.evaluation.requests import Classification, Query
    from amlora_dist.evaluation.scoring import Prediction
    from amlora_dist.inference.model import AMLoRAModel

SCORED = {"accuracy": "served answers that are right", "exact_match": "served answers that are right"}
NAMED = 20
"""Changed answers that a table lists; JSON has them all."""
SHOWN_TEXT = 60


@dataclass(frozen=True, slots=True)
class Rows:
    """A file of rows: where it is, and the keys or columns of text and right answer."""

    source: str
    column: str = "text"
    label: str = "label"


def ask(bank: str, texts: Sequence[str], fields: Sequence[str], options: dict[str, Any], *, as_json: bool) -> None:
    """``amlora ask``: the answer to each text, the task that it was routed to, and how sure that is.

    Args:
        bank: a version or a folder.
        texts: plain texts.
        fields: ``NAME=TEXT`` of one text that is made of named fields, in place of ``texts``.
        options: of ``AMLoRAModel.from_bank``.
        as_json: write JSON lines.

    Raises:
        UserError: an empty text, both or none of texts and fields, fields of no task, no such bank; after all others are
            shown, texts that their task cannot be asked.
    """
    given: list[str | dict[str, str]] = [*texts]
    if fields:
        if not all(is_blank(text) for text in texts):
            raise UserError("TEXT: found some next to --field, expected one of them; ask for one after the other")
        given = [_named(fields)]
    elif not texts:
        raise UserError("TEXT: found none, expected a text, or its parts: --field NAME=TEXT")
    else:
        check_words("TEXT", *texts)
    with stdout_to_stderr():
        model = bank_model(bank, options)
        asked = [model.prompter.query(one).text for one in given]
        found, refused = apart(model.classify, given)
        plain = model.former.plain
        unlabelled = [place for place, one in found.items() if one.label is None or plain.mixed]
        answers = model.predict([given[place] for place in unlabelled]) if unlabelled else []
        written = dict(zip(unlabelled, answers, strict=True))
    lines: list[dict[str, Any]] = []
    for place, text in enumerate(asked):
        if place in refused:
            lines.append({"text": text, "answer": None, "task": refused[place].task, "confidence": None})
            continue
        one = found[place]
        lines.append({
            "text": text, "answer": written.get(place, one.label),
            "task": one.task if one.route.task is not None else None,
            "confidence": None if place in written else _confidence(one),
        })  # fmt: skip
    any_task = "any: written freely" if plain.writes else "any: all labels"
    _show_answers(lines, any_task if plain.labels else "none: the base model", as_json=as_json)
    if refused:
        raise RefusedTextsError(refused, alone=len(given) == 1)


def _named(fields: Sequence[str]) -> dict[str, str]:
    """Fields of the command line by name."""
    found: dict[str, str] = {}
    for one in fields:
        name, equals, text = one.partition("=")
        if not equals or not name or name in found:
            what = "twice" if name in found else "and no text"
            raise UserError(f"--field: found {name!r} {what}, expected NAME=TEXT, once for each part of the text")
        found[name] = text
    return found


def _show_answers(lines: Sequence[dict[str, Any]], no_task: str, *, as_json: bool) -> None:
    """What ``ask`` found; ``no_task`` stands for no task in a table."""
    if as_json:
        for line in lines:
            print(json.dumps(line, ensure_ascii=False))
        return
    table = Table(box=None, pad_edge=False, show_edge=False)
    for name in ("answer", "task", "confidence", "text"):
        table.add_column(name, justify="right" if name == "confidence" else "left", overflow="fold")
    for line in lines:
        sure = "" if line["confidence"] is None else f"{line['confidence']:.2f}"
        answer = "" if line["answer"] is None else str(line["answer"])
        table.add_row(answer, str(line["task"] or no_task), sure, str(line["text"]))
    console_for().print(table)


def _confidence(one: Classification) -> float | None:
    """Weight of the task times the share of the label; the share alone where labels of all tasks were ranked; None where
    there is no label."""
    if one.label is None:
        return None
    return (1.0 if one.task is None else one.route.tasks[one.task]) * one.scores[one.label]


def score(bank: str, rows: Rows, task: str, batch_size: int, options: dict[str, Any], *, as_json: bool) -> None:
    """``amlora score``: a user's own rows, answered as plain texts and counted as the accuracy matrix counts.

    Raises:
        UserError: no such file, task or column; a row without an answer, or whose answer is no label of the task.
    """
    from amlora_dist.evaluation.scoring import routing_accuracy, summarise
    from amlora_dist.evaluation.text_metrics import METRIC_NAMES

    with stdout_to_stderr():
        folder, _ = bank_and_tasks(bank, options)
        labels = labels_by_task(folder)
        check_task(task, list(labels))
        lines, answers = _labelled(rows, labels[task], FieldColumns(entries_of(folder), task, own=True))
        model = bank_model(bank, options, folder=folder)
        found = predictions(model, lines, answers, task, batch_size)
    routed = routing_accuracy(found, task, model.tasks)
    metric = model.prompter.learned[task].counted_by
    summary = {"bank": model.uri or bank, "task": task, "metric": metric, **summarise(found), "routing_accuracy": routed}
    if as_json:
        print(json.dumps(summary))
        return
    table = Table(box=None, pad_edge=False, show_edge=False, show_header=False)
    shown = {
        "accuracy": SCORED.get(metric, f"{METRIC_NAMES[metric]} of the served answers"),
        "routing_accuracy": "texts routed to this task",
        "model_accuracy": "the model's evidence alone", "keys_accuracy": "the keys' evidence alone",
        "greedy_accuracy": "written freely", "ranked_accuracy": "best of this task's labels",
    }  # fmt: skip
    for key, words in shown.items():
        if summary.get(key) is not None:
            table.add_row(words, f"{summary[key]:.3f}")
    console = console_for()
    console.print(f"{summary['bank']}, {task}: {len(found)} rows as plain text", markup=False, highlight=False)
    console.print(table)


def answer_differences(
    first: str, second: str, sample: Rows, batch_size: int, options: dict[str, Any], *, as_json: bool
) -> None:
    """``amlora diff --sample``: whose answers change between two banks, and to what.

    Raises:
        UserError: no such bank or file, a row without text. One that its task cannot be asked has no answer (null).
    """
    with stdout_to_stderr(), opened(sample.source, sample.column) as rows:
        folders = [bank_and_tasks(bank, options)[0] for bank in (first, second)]
        rows.columns = FieldColumns(entries_of(folders[0]) | entries_of(folders[1]))
        lines = list(rows.lines())
        texts = [line.request for line in lines]
        before, after = (_found(str(folder), texts, batch_size, options) for folder in folders)
    changed = [
        {"row": line.where, "text": line.text, "before": one[0], "after": two[0], "task_before": one[1],
         "task_after": two[1]}
        for line, one, two in zip(lines, before, after, strict=True)
        if one[0] != two[0]
    ]  # fmt: skip
    refused = {"before": sum(one is None for one, _ in before), "after": sum(one is None for one, _ in after)}
    if as_json:
        found = {"rows": len(lines), "changed": len(changed), "refused": refused, "answers": changed}
        print(json.dumps(found, ensure_ascii=False))
        return
    console = console_for()
    console.print(f"{len(changed)} of {len(lines)} answers change: {first} -> {second}", markup=False, highlight=False)
    for one in changed[:NAMED]:
        text = one["text"] if len(str(one["text"])) <= SHOWN_TEXT else f"{str(one['text'])[:SHOWN_TEXT]}..."
        way = "" if one["task_before"] == one["task_after"] else f" ({one['task_before']} -> {one['task_after']})"
        words = ["(refused)" if one[key] is None else str(one[key]) for key in ("before", "after")]
        console.print(f"  {' -> '.join(words)}{way}: {text}", markup=False, highlight=False)
    if len(changed) > NAMED:
        console.print(f"  and {len(changed) - NAMED} more (--json has them)")
    if any(refused.values()):
        console.print(f"rows that lack fields of their task: {refused['before']} before, {refused['after']} after")


def _found(
    bank: str, texts: Sequence[Any], batch_size: int, options: dict[str, Any]
) -> list[tuple[str | None, str | None]]:
    """Answer and task of each text; no answer of those that the task cannot be asked."""
    found, refused = apart(partial(bank_model(bank, options).answer, batch_size=batch_size), texts, 8 * batch_size)
    answers = {place: (one.text, one.route.task) for place, one in found.items()}
    return [answers.get(place) or (None, refused[place].task) for place in range(len(texts))]


def rekey_bank(bank: str, dest: Path, given: Sequence[str], label: str, options: dict[str, Any]) -> str:
    """``amlora rekey``: the bank's adapters with a router made of the texts of rows.

    Args:
        bank: a version or a folder.
        dest: folder to write.
        given: ``TASK=FILE`` for every task.
        label: key or column of the right answers.

    Returns:
        What was written, in words.

    Raises:
        UserError: ``dest`` exists, a task without rows or an unknown one, rows that are none of its.
    """
    with stdout_to_stderr():
        if dest.exists():
            raise UserError(f"{dest} exists; give a folder that does not")
        folder, tasks = bank_and_tasks(bank, options)
        check_folder(dest, "DEST")
        pairs = [one.partition("=")[::2] for one in given]
        files = {task: file for task, file in pairs if file and task in tasks}
        if odd := [task if file else repr(one) for one, (task, file) in zip(given, pairs, strict=True) if task not in files]:
            raise UserError(f"--rows: found {odd[0]}, expected TASK=FILE of each task of the bank: {', '.join(tasks)}")
        if len(files) < len(pairs):
            twice = next(task for place, (task, _) in enumerate(pairs) if task in dict(pairs[:place]))
            raise UserError(f"--rows: found {twice!r} twice, expected one file of each task; put its rows into one file")
        from amlora_dist.inference.rekeying import TaskRows, rekey

        labels, entries = labels_by_task(folder), entries_of(folder)
        rows = {}
        for task, file in files.items():
            lines, answers = _labelled(Rows(file, label=label), labels[task], FieldColumns(entries, task, own=True))
            rows[task] = TaskRows([line.text for line in lines], answers, [_whole(line, entries, task) for line in lines])
        made = rekey(folder, dest, rows, base=options.get("base"))
    return f"{dest}: {len(made.tasks)} tasks, routed and answered by plain text"


def bank_model(
    bank: str, options: dict[str, Any], task: str | None = None, *, folder: Path | None = None
) -> AMLoRAModel:
    """The bank in its base model; a task that it must have is looked for first.

    Args:
        bank: a version or a folder.
        options: of ``AMLoRAModel.from_bank``.
        task: that it must have.
        folder: of the bank, if it is known already.

    Raises:
        UserError: no such bank or task.
    """
    if folder is None:
        folder, tasks = bank_and_tasks(bank, options)
        check_task(task, tasks)
    from amlora_dist.inference.model import AMLoRAModel

    model = AMLoRAModel.from_bank(folder, **options)
    model.uri = bank if bank.startswith("models:") else None
    return model


def labels_by_task(folder: Path) -> dict[str, list[str] | None]:
    """Labels of each task of a bank by its manifest; None of free text and of tasks that it does not describe."""
    from amlora_dist.registry.manifest import read_manifest

    learned = read_manifest(folder).learned.items()
    return {task: None if entry is None else entry.labels for task, entry in learned}


def _asked(model: AMLoRAModel, line: InputRow, task: str) -> Query:
    """A row as the accuracy matrix has the task's rows: what the router reads, with the turns where it is asked in turns,
    and with the fields that its text is made of, where the row has them all."""
    from amlora_dist.evaluation.requests import Query

    if line.turns and not model.prompter.is_chat(task):
        return Query(joined(line.turns).strip())
    return Query(line.text, turns=line.turns, fields=_whole(line, model.prompter.learned, task))


def _whole(line: InputRow, entries: Entries, task: str) -> Mapping[str, str]:
    """The fields of a row of a task as its template reads them; empty where the row has none."""
    return joined_text(line.named, entries, task)[1] if line.named else {}


def _labelled(rows: Rows, labels: list[str] | None, columns: FieldColumns) -> tuple[list[InputRow], list[str]]:
    """The rows of a file with their right answers; ``columns`` of their task."""
    with ExitStack() as stack:
        read = stack.enter_context(opened(rows.source, rows.column))
        read.columns = columns
        lines = list(read.lines())
    if not lines:
        raise UserError(f"{rows.source}: found no rows, expected some with {rows.column!r} and {rows.label!r}")
    return lines, [right_answer(line, rows.label, labels, str(columns.task)) for line in lines]


def right_answer(line: InputRow, label: str, labels: list[str] | None, task: str) -> str:
    """The right answer of a row; of a conversation its last turn, if that is the assistant's.

    Args:
        line: the row.
        label: key or column of the answer.
        labels: of the task; None where its answers are free text.
        task: the row's.

    Raises:
        UserError: the row has none, or one that is no label of the task.
    """
    from amlora_dist.tasks.texts import NoTextError, text_of

    if line.fields.get(label) is None and line.answer is None:
        there = ", ".join(line.fields)
        raise UserError(f"{line.where}: found no {label!r}, the row has {there}; give the right answer's: --label")
    try:
        answer = text_of(line.fields[label] if line.answer is None else line.answer).strip()
    except NoTextError as error:
        raise UserError(f"{line.where}: {label}: found {error}, expected a text") from None
    if labels is not None and answer not in labels:
        raise UserError(f"{line.where}: {label}: found {answer!r}, the labels of {task!r} are {', '.join(labels)}")
    return answer


def predictions(
    model: AMLoRAModel, lines: Sequence[InputRow], answers: Sequence[str], task: str, batch_size: int
) -> list[Prediction]:
    """What a bank answers to rows of a task, without being told the task, and how each counts by the task's metric."""
    from amlora_dist.evaluation.scoring import Prediction
    from amlora_dist.evaluation.served_scoring import PlainRow, ServedScore
    from amlora_dist.evaluation.text_metrics import score_of

    entry = model.prompter.learned.get(task) or model.prompter.entry(task)
    labels, metric = entry.labels, entry.counted_by
    asked = [_asked(model, line, task) for line in lines]
    pairs = enumerate(zip(asked, answers, strict=True), start=1)
    rows = [PlainRow(n, one.text, answer, one.turns, fields=one.fields) for n, (one, answer) in pairs]
    if model.answering is not None:
        scorer = ServedScore(model.answering, metric, None if labels is None else tuple(labels))
        return scorer.score(rows, batch_size=batch_size)
    if model.prompter.format.text_alone:
        return model.former.scored(rows, entry, batch_size)
    found = model.answer([one.turns or one.text for one in asked], batch_size=batch_size)
    return [
        Prediction(
            n, answer, one.text, one.ended, score_of(metric, one.text, [answer], row.text), served=one.text,
            route=one.route.task,
        )
        for n, (one, answer, row) in enumerate(zip(found, answers, asked, strict=True), start=1)
    ]
