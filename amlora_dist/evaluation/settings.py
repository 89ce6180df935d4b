"""Settings of scoring. Imports nothing heavy."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from amlora_dist.config.schema import CHANGES_NO_RESULT


@dataclass(config=ConfigDict(extra="forbid"), kw_only=True, slots=True)
class AnswerSettings:
    """How the answer of a task with labels is found. Read by scoring and serving only, never by training."""

    evidence: Literal["both", "model", "keys"] = "both"
    """log p_model(label) + beta log p_keys(label), or one of them alone."""
    beta: Literal["calibrated"] | Annotated[float, Field(ge=0)] = "calibrated"
    """Weight of the keys' evidence; ``calibrated``: the one that held-out rows prefer."""


@dataclass(config=ConfigDict(extra="forbid"), kw_only=True, slots=True)
class EvaluationSettings:
    """Which cells of the accuracy matrix are scored, and how."""

    cells: Literal["seen+next", "seen", "all", "last"] = "seen+next"
    """Tasks that are scored after a stage: those learned so far (``seen``), and the one that comes next; all of them; or
    (``last``) only once, after the last stage."""
    split: Literal["test", "dev"] = "test"
    """Rows that are scored; searches use ``dev``."""
    prompts: Literal["served", "own"] = "served"
    """``served``: a row's text and nothing else, as a user sends it. ``own``: each row behind its own task's prompt, which
    names the task to whoever can read; reports flag it."""
    batch_size: Annotated[int, CHANGES_NO_RESULT] = Field(default=16, ge=1)
    """Prompts per forward pass of one worker."""
    untrained: bool = True
    """Score the base model before stage 1 (row R[0,i]; forward transfer needs it)."""
    also: list[str | dict[str, Any]] = Field(default_factory=list)
    """Further test sets, given like ``tasks`` and learned by no stage: scored after the last one (shifted text, say)."""
    paraphrases: int = Field(default=0, ge=0, le=9)
    """Score every task once more after the last stage with so many paraphrases of its question, which no stage saw."""
    oracle: bool = True
    """Score the last bank once more with the true task's row, as the upper bound of routing."""
    knockout: bool = False
    """Score the last bank once more for each adapter, with that adapter disabled wherever gates or recipes use it: as many
    passes over all tasks as there are adapters."""

    reuse: bool = True
    """A row whose gate is what it was at an earlier score of the same bank or of its beginnings keeps its prediction; false
    puts every row of every cell through the model. What a prediction depends on is the same; low precision may round it
    otherwise."""

    @property
    def sealed(self) -> tuple[str, ...]:
        """Splits that the run must not open: who chooses by the dev split has no business with test rows."""
        return ("test",) if self.split == "dev" else ()
