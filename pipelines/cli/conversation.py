"""``amlora chat``: a conversation with a bank, line by line, with the route of every turn."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TextIO

from rich.text import Text

from amlora_dist.errors import UserError, visible
from amlora_dist.tasks.texts import is_blank
from pipelines.cli.output import stdout_to_stderr
from pipelines.cli.row_input import check_words
from pipelines.cli.scoring import bank_model
from pipelines.cli.tables import console_for

if TYPE_CHECKING:
    from amlora_dist.evaluation.requests import Answer, RouteBy

NEW, QUIT = "/new", "/quit"
HELP = f"A line is a turn. {NEW} begins again, {QUIT} or the end of the input leaves."


def converse(
    bank: str,
    options: dict[str, Any],
    *,
    system: str | None,
    task: str | None,
    route_by: RouteBy,
    max_new_tokens: int | None,
    as_json: bool,
) -> None:
    """Answer the lines of standard input as turns of one conversation, until it ends.

    Answers go to standard output; routes too with ``--json`` or on a terminal, else to standard error.

    Raises:
        UserError: no such bank or task; not on a terminal, a turn without room for its answer, and what is not text.
    """
    check_words("--system", system)
    with stdout_to_stderr():
        model = bank_model(bank, options, task)
    opening = [] if system is None else [{"role": "system", "content": system}]
    turns = list(opening)
    for line in _lines(sys.stdin):
        if line == NEW:
            turns = list(opening)
            continue
        turns.append({"role": "user", "content": line})
        try:
            found = model.chat(turns, task=task, route_by=route_by, max_new_tokens=max_new_tokens)
        except UserError as error:
            if not sys.stdin.isatty():
                raise
            print(f"{visible(str(error))} (not sent)", file=sys.stderr, flush=True)
            del turns[-1]
            continue
        _show(found, as_json=as_json)
        if found.text.strip():
            turns.append({"role": "assistant", "content": found.text})
        else:  # a turn without words is none
            del turns[-1]


def _lines(source: TextIO) -> Iterator[str]:
    """What the user says; asked for on a terminal."""
    asking = source.isatty()
    if asking:
        print(HELP, file=sys.stderr)
    for number in itertools.count(1):
        if asking:
            print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = source.readline().removeprefix("\ufeff" if number == 1 else "").encode().decode()
        except UnicodeError:
            raise UserError(f"standard input, line {number}: not UTF-8 text; write it as UTF-8") from None
        if not line or line.strip() == QUIT:
            return
        if not is_blank(line):
            yield line.strip()


def _show(found: Answer, *, as_json: bool) -> None:
    route = found.route
    if as_json:
        line = {"answer": found.text, "ended": found.ended, "route": route.to_mapping()}
        print(json.dumps(line, ensure_ascii=False), flush=True)
        return
    weight = 0.0 if route.task is None else route.tasks[route.task]
    where = "none: the base model" if route.task is None else f"{route.task} {weight:.2f}"
    console = console_for() if sys.stdout.isatty() else None
    if console is None:
        print(f"[{where}]", file=sys.stderr, flush=True)
        print(found.text, flush=True)
    else:
        console.print(Text(f"[{where}]", style="dim"))
        console.print(found.text, markup=False, highlight=False, soft_wrap=True)
