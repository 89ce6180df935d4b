"""How a bank that finds no task by itself answers plain text: by the best of all labels, or by what it writes freely.

Rows decide that are no test rows, and on which its adapters were not trained. Imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from amlora_dist.errors import UserError

Way = Literal["ranks", "writes"]
"""``ranks``: the labels of all tasks learned so far, equal words once; ``writes``: unrestricted output."""
Share = Annotated[float, Field(ge=0, le=1)]
OWN_PROMPT = "own_prompt"
"""The row of a result that only methods have whose banks find no task by themselves."""
NAMES = {"train": "held-out", "dev": "dev"}
"""What the deciding rows of a split are called."""


@dataclass(config=ConfigDict(extra="forbid", allow_inf_nan=False), frozen=True, kw_only=True)
class PlainChoice:
    """Of one bank; without one (banks and journals of before) labels are ranked."""

    way: Way
    ranks: Share | None = None
    """Mean over tasks of the share of rows that are right by ranking; None without rows."""
    writes: Share | None = None
    """The same of what is written freely."""
    rows: Annotated[int, Field(ge=0)] = 0
    """That decided."""
    of: Annotated[str, Field(max_length=40)] = ""
    """What rows those are: ``held-out``, ``dev``, or both."""
    format: Literal[1] = 1

    @property
    def sentence(self) -> str:
        """All of it, in words."""
        ways = {"ranks": "by ranking the labels of all tasks", "writes": "by what is written freely"}
        answered = f"Plain text of labelled tasks is answered {ways[self.way]}"
        if not self.rows or self.ranks is None or self.writes is None:
            return f"{answered}: no rows to decide on were looked at."
        found = f"{self.ranks:.3f} by ranking, {self.writes:.3f} written freely"
        return f"{answered} (right in {self.rows} {self.of} rows, mean over tasks: {found})."

    def to_mapping(self) -> dict[str, Any]:
        """As JSON values."""
        found: dict[str, Any] = _adapter().dump_python(self, mode="json")
        return found


def decided(scores: Iterable[Mapping[str, Any]], below: PlainChoice | None = None) -> PlainChoice:
    """The choice that scores of deciding rows make: one of each task, with ``accuracy`` (by ranking), ``greedy_accuracy``,
    ``rows`` and ``split``. Ties go to ranking. Without any the bank goes on as that ``below`` it does, or ranks."""
    scores = [score for score in scores if score["rows"]]
    if not scores:
        return PlainChoice(way="ranks") if below is None else below
    ranks, writes = (sum(float(score[key]) for score in scores) / len(scores) for key in ("accuracy", "greedy_accuracy"))
    kinds = sorted({NAMES[score["split"]] for score in scores}, reverse=True)
    return PlainChoice(
        way="writes" if writes > ranks else "ranks", ranks=ranks, writes=writes,
        rows=sum(score["rows"] for score in scores), of=" and ".join(kinds),
    )  # fmt: skip


def read_choice(value: Mapping[str, Any] | None, where: str) -> PlainChoice | None:
    """What ``to_mapping`` gave; None of what was written before there was a choice.

    Raises:
        UserError: of a newer version, or damaged; ``where`` says what was read.
    """
    if value is None:
        return None
    try:
        return _adapter().validate_python(dict(value))
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        raise UserError(
            f"{where}: plain_text.{'.'.join(map(str, fault['loc']))}: found {fault.get('input')!r} ({fault['msg']}),"
            " expected what this version writes (format 1); use the version of amlora-dist that wrote it, or a newer one"
        ) from error


def shown_choice(result: Mapping[str, Any]) -> PlainChoice | None:
    """How the last bank of a run's result answers plain text; None where it finds the task of one, or was asked none."""
    found = read_choice(result.get("plain_text"), f"result of run {result.get('run_id')!r}")
    if found is None and OWN_PROMPT in (result.get("last") or {}) and _ranked(result):  # of before there was a choice
        return PlainChoice(way="ranks")
    return found


def _ranked(result: Mapping[str, Any]) -> bool:
    """Whether the last bank of a run's result had labels to rank; one of free text alone writes, whatever is chosen."""
    matrix = result.get("ranked_accuracy_matrix")
    return not matrix or any(value is not None for value in matrix[-1])


def counted_in(score: Mapping[str, Any], way: Way) -> dict[str, Any]:
    """A score of plain texts with the accuracy of this way of answering; both ways are in it."""
    if way == "ranks" or score.get("greedy_accuracy") is None:
        return dict(score)
    return dict(score) | {"accuracy": score["greedy_accuracy"]}


@cache
def _adapter() -> TypeAdapter[PlainChoice]:
    return TypeAdapter(PlainChoice)
