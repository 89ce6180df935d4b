"""``promote``: an alias moves to a version only if that version passes on rows of one's own, as it is served."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from amlora_dist.errors import NotPromotedError, UserError
from amlora_dist.evaluation.field_columns import FieldColumns
from amlora_dist.evaluation.promotion import DEFAULT_MARGIN, Requirement, check_covered, check_margin, judge
from pipelines.cli.output import stdout_to_stderr
from pipelines.cli.row_input import InputRow, opened
from pipelines.cli.scoring import Rows, predictions, right_answer
from pipelines.cli.tables import console_for

if TYPE_CHECKING:
    from amlora_dist.evaluation.scoring import Prediction
    from amlora_dist.inference.model import AMLoRAModel
    from amlora_dist.registry.manifest import Manifest
    from amlora_dist.registry.store import Store
    from amlora_dist.registry.versions import Version

FOLDER = "promotions"
"""Where, among the artifacts of a version's run, the pages of its promotions go."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Promotion:
    """What is asked for: the options of the same names."""

    name: str
    number: int
    alias: str
    require: Sequence[str] = ()
    sample: Rows
    margin: float = DEFAULT_MARGIN
    batch_size: int = 8


@dataclass(frozen=True, slots=True)
class _VersionScores:
    """One version on the sample."""

    scores: dict[str, dict[str, Any]]
    rows: dict[str, list[Prediction]]

    @property
    def mean(self) -> float:
        return math.fsum(one["accuracy"] for one in self.scores.values()) / len(self.scores)


def promote(asked: Promotion, options: dict[str, Any], *, as_json: bool) -> None:
    """``amlora promote``: score the version and the one that has the alias on the sample, judge, and move the alias.

    The result is a tag of the version and a page, in MLflow and in ``AMLORA_HOME/reports``, whether it passes or not.

    Raises:
        UserError: no such version, an alias that is not for people, rows that cannot tell what is asked.
        NotPromotedError: the version did not pass; the alias was not moved.
    """
    from amlora_dist.config.loading import home
    from amlora_dist.registry.housekeeping import aliases, check_alias
    from amlora_dist.registry.signing import Trust
    from amlora_dist.registry.store import Store
    from pipelines.cli.bank_output import check_stored

    trust = Trust.of(options.get("require_signature"), options.get("expect_digest"))
    requirements, margin = [Requirement.parse(text) for text in asked.require], check_margin(asked.margin)
    check_alias(asked.alias)
    with stdout_to_stderr():
        store = Store.open(home(), options.get("tracking_uri"))
        version = store.resolve(f"models:/{asked.name}/{asked.number}")
        check_stored(store, version, trust)  # what lies here may have been signed for this machine alone
        before = aliases(store, asked.name).get(asked.alias)
        replaced = None if before in (None, asked.number) else store.resolve(f"models:/{asked.name}/{before}")
        result = _examined(store, version, replaced, asked, requirements, margin, options)
        if result["passed"]:
            if (now := aliases(store, asked.name).get(asked.alias)) != before:
                raise UserError(
                    f"models:/{asked.name}@{asked.alias} was moved from version {before or 'none'} to {now or 'none'} while"
                    " the rows were scored; run the command again, against what it means now"
                )
            store.set_alias(asked.name, asked.alias, version)
        page = _recorded(store, version, result, home())
    if as_json:
        print(json.dumps(result))
    else:
        _show(result, page)
    if not result["passed"]:
        raise NotPromotedError(result["verdict"])


def _examined(
    store: Store, version: Version, replaced: Version | None, asked: Promotion, requirements: Sequence[Requirement],
    margin: float, options: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """The result: scores of both versions on the sample, the checks, and which rows get worse."""
    from amlora_dist.digests import file_digest
    from amlora_dist.inference.model import AMLoRAModel
    from amlora_dist.registry.pulling import manifest_of

    manifests = [manifest_of(store, one) for one in (version, replaced) if one is not None]
    known = manifests[0].tasks
    columns = FieldColumns({task: entry for one in manifests for task, entry in one.learned.items()}, own=True)
    lines = _by_task(asked.sample, known, columns)
    earlier = [task for manifest in manifests[1:] for task in manifest.tasks]
    if missing := [task for task in earlier if task not in known]:
        raise UserError(f"{version.uri} lacks {', '.join(missing)}, which {replaced.uri if replaced else ''} serves")
    check_covered(requirements, list(lines), earlier)
    if not requirements and replaced is None:
        raise UserError(f"nothing to check: no other version is {asked.alias}; say what is required of this one: --require")
    answers = _right_answers(lines, manifests, asked.sample.label)
    model = AMLoRAModel.from_bank(version.uri, **options)
    new = _scored(model, lines, answers, asked)
    old = None
    if replaced is not None:
        plain = {key: value for key, value in options.items() if key not in ("require_signature", "expect_digest")}
        other = AMLoRAModel.from_bank(replaced.uri, **plain, share_base_with=model)
        old = _scored(other, {task: rows for task, rows in lines.items() if task in earlier}, answers, asked)
    checks = judge(requirements, margin, new.scores, None if old is None else old.scores)
    passed = all(one.passed for one in checks)
    failed = [str(one) for one in checks if not one.passed]
    words = f"{len(checks)} of {len(checks)} checks" if passed else "; ".join(failed)
    worse, better = _changed(lines, old, new)
    return {
        "version": version.uri, "alias": asked.alias, "replaced": None if replaced is None else replaced.uri,
        "passed": passed, "verdict": f"{version.uri} {'passes' if passed else 'does not pass'} for {asked.alias}: {words}",
        "margin": margin, "checks": [asdict(one) for one in checks], "scores": new.scores,
        "replaced_scores": None if old is None else old.scores, "mean_accuracy": new.mean,
        "replaced_mean_accuracy": None if old is None else old.mean, "worse_rows": worse, "better_rows": better,
        "sample": {"name": Path(asked.sample.source).name, "sha256": file_digest(Path(asked.sample.source).expanduser())},
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip


def _by_task(sample: Rows, tasks: Sequence[str], columns: FieldColumns) -> dict[str, list[InputRow]]:
    """The sample's rows by their key ``task``, which a bank of one task does not need."""
    if not Path(sample.source).expanduser().is_file():
        raise UserError(f"--sample: found {sample.source!r}, expected a file of rows")
    found: dict[str, list[InputRow]] = {}
    with opened(sample.source, sample.column) as rows:
        rows.columns = columns if len(tasks) > 1 else replace(columns, task=tasks[0])
        for line in rows.lines():
            task = line.option("task") or (tasks[0] if len(tasks) == 1 else None)
            if task is None or task not in tasks:
                has = "no 'task'" if task is None else f"task {task!r}"
                raise UserError(f"{line.where}: found {has}, expected the row's own: one of {', '.join(tasks)}")
            found.setdefault(task, []).append(line)
    if not found:
        raise UserError(f"{sample.source}: found no rows, expected some of {', '.join(tasks)}")
    return found


def _right_answers(
    lines: dict[str, list[InputRow]], manifests: Sequence[Manifest], label: str
) -> dict[str, list[str]]:
    """Right answers of the rows by task, which each version must have among its task's labels."""
    found: dict[str, list[str]] = {}
    for manifest in manifests:
        entries = {line.task: line.task_spec for line in manifest.adapters if line.task in lines}
        for task, entry in entries.items():
            labels = None if entry is None else entry.labels
            found[task] = [right_answer(line, label, labels, task) for line in lines[task]]
    return found


def _scored(
    model: AMLoRAModel, lines: dict[str, list[InputRow]], answers: dict[str, list[str]], asked: Promotion
) -> _VersionScores:
    from amlora_dist.evaluation.scoring import routing_accuracy, summarise

    scores: dict[str, dict[str, Any]] = {}
    rows: dict[str, list[Prediction]] = {}
    for task, own in lines.items():
        rows[task] = predictions(model, own, answers[task], task, asked.batch_size)
        summary = summarise(rows[task])
        routed = routing_accuracy(rows[task], task, model.tasks)
        metric = model.prompter.entry(task).counted_by
        scores[task] = {
            "rows": len(own), "metric": metric, "accuracy": summary["accuracy"], "routing_accuracy": routed,
        }  # fmt: skip
    return _VersionScores(scores, rows)


def _changed(
    lines: dict[str, list[InputRow]], old: _VersionScores | None, new: _VersionScores
) -> tuple[list[dict[str, Any]], int]:
    """Rows that were answered better before, by place and answers; and how many are answered better now."""
    worse, better = [], 0
    for task, before in ({} if old is None else old.rows).items():
        for line, one, other in zip(lines[task], before, new.rows[task], strict=True):
            better += other.correct > one.correct
            if other.correct < one.correct:
                file, _, place = line.where.rpartition(",")
                worse.append({"row": f"{Path(file).name},{place}", "task": task, "answer": one.answer,
                              "before": one.served, "now": other.served})  # fmt: skip
    return worse, better


def _recorded(store: Store, version: Version, result: dict[str, Any], home: Path) -> Path:
    """Put the result into MLflow, as a tag of the version and a page, and the page into the reports; says where."""
    from amlora_dist.registry import tags
    from amlora_dist.reporting.page import file_name, write_page
    from amlora_dist.reporting.promotion_page import promotion_page

    page = promotion_page(result)
    name = file_name(f"promotion-{version.registered_model}-{version.number}-{result['alias']}")
    written = write_page(page, home / "reports" / f"{name}.html")
    with tempfile.TemporaryDirectory() as tmp:
        write_page(page, Path(tmp) / f"{name}.html")
        store.log_artifacts(version.run, Path(tmp), FOLDER)
    store.log_json(version.run, f"{FOLDER}/{name}.json", result)
    store.tag_version(version, {tags.PROMOTION: f"{result['verdict']} ({result['time']})"[:4900]})
    return written


def _show(result: dict[str, Any], page: Path) -> None:
    table = Table(box=None, pad_edge=False, show_edge=False)
    for heading in ("check", "found", "replaced", "result"):
        table.add_column(heading, justify="left" if heading in ("check", "result") else "right")
    for one in result["checks"]:
        before = "" if one["replaced"] is None else f"{one['replaced']:.3f}"
        table.add_row(one["what"], f"{one['found']:.3f}", before, "passed" if one["passed"] else "FAILED")
    console = console_for()
    console.print(table, markup=False)
    if result["passed"]:
        was = f" (before: {result['replaced']})" if result["replaced"] else ""
        name = result["version"].removeprefix("models:/").rpartition("/")[0]
        console.print(f"models:/{name}@{result['alias']} is {result['version']}{was}", markup=False, highlight=False)
    console.print(f"page     {page}", markup=False, highlight=False)
