"""What the benchmarks share that ask a finished bank of labelled tasks: their options, and the rows to ask it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from amlora_dist.tasks.sources import Row, load_task
from amlora_dist.tasks.task import TaskDefaults, resolve_task

DEMO = ["helpdesk/email_route", "helpdesk/chat_mood", "helpdesk/call_urgency", "helpdesk/review_topic"]


def bank_parser(doc: str | None, *, rows: int) -> argparse.ArgumentParser:
    """Options that all of them have; ``rows`` of a task are asked at most."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bank", help="models:/NAME@ALIAS, models:/NAME/VERSION or a folder, of labelled tasks")
    parser.add_argument("--tasks", nargs="+", default=DEMO, help="the bank's, in its order, as a run names them")
    parser.add_argument("--data-dir", type=Path, help="rows as <task>/<split>.jsonl; default: packaged tasks and the Hub")
    parser.add_argument("--split", default="dev", choices=["dev", "test"])
    parser.add_argument("--rows", type=int, default=rows, help="of a task at most")
    parser.add_argument("--dtype", default="fp32", help="of the model")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--quick", action="store_true", help="a tiny random bank: ends within a minute, shows nothing")
    return parser


def asked_of(args: argparse.Namespace) -> argparse.Namespace:
    """The options given, of which ``--bank`` or ``--quick`` is one."""
    if args.bank is None and not args.quick:
        raise SystemExit("--bank: which bank? `make demo` leaves models:/demo@champion")
    return args


def task_rows(
    tasks: list[str], data_dir: Path | None, split: str, *, most: int, seed: int
) -> list[tuple[str, list[Row]]]:
    """Of each task its name and its rows.

    Args:
        tasks: as a run names them.
        data_dir: local rows in place of the Hub's.
        split: ``dev`` or ``test``.
        most: rows of a task.
        seed: that drew the rows of the run.
    """
    found = []
    for task in tasks:
        limit: Any = {f"max_{split}": most}
        spec = resolve_task(task, data_dir=data_dir, base_dir=Path(), defaults=TaskDefaults(**limit))
        found.append((spec.name, load_task(spec, data_dir=data_dir, splits=(split,), seed=seed).rows[split]))
    return found


def rows_of(
    tasks: list[str], data_dir: Path | None, split: str, *, most: int, seed: int
) -> list[tuple[int, str, str]]:
    """Of each row the place of its task, its text and its label's words; arguments as ``task_rows``."""
    rows = enumerate(own for _, own in task_rows(tasks, data_dir, split, most=most, seed=seed))
    return [(place, row.text, row.target) for place, own in rows for row in own]
