"""What a run says of one of its stages."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from amlora_dist.adapters.adapter import recipe_zeros
from amlora_dist.evaluation.plain_choice import PlainChoice, Way, counted_in, decided
from amlora_dist.registry import tags
from amlora_dist.training.stage_spec import CHOICE, is_plain

if TYPE_CHECKING:
    from amlora_dist.registry.leases import Lease
    from amlora_dist.registry.versions import Version
    from amlora_dist.training.result import Result
    from amlora_dist.training.stage_spec import Cell


@dataclass(slots=True)
class StageRecord:
    """Filled in as a stage goes on."""

    index: int
    task: str
    fingerprint: str
    adapter_fingerprint: str | None = None
    began: float = field(default_factory=time.monotonic)
    claim: Lease | None = None
    """To make the stage: held until its version is published, or it has failed."""
    run: str = ""
    """MLflow's id of the stage's run."""
    original: Version | None = None
    """The version that the stage is taken over from: of another run, or of an earlier start of this one."""
    resumed: bool = False
    """``original`` is this run's own: an earlier start has published it and noted its seconds."""
    adapter_from: Version | None = None
    """The version of another run whose adapter the stage takes, with statistics made again."""
    reused: bool = False
    """Nothing was trained."""
    published: Version | None = None
    """The version; None before it is published, and of a method that publishes none."""
    known: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Scores that were there, by scoring fingerprint."""
    scored_now: bool = False
    """Some of its scores were not."""
    train_seconds: float = 0.0
    score_seconds: float = 0.0
    other_seconds: float = 0.0
    tokens: int = 0
    recipe_zeros: float | None = None
    """Share of the recipe's weights that are exactly 0; None without a recipe that was learned."""
    scores: list[dict[str, Any]] = field(default_factory=list)
    training: dict[str, Any] = field(default_factory=dict)
    plain_text: PlainChoice | None = None
    """How its bank answers plain text, where it finds no task by itself; of a version that is there, as it was published."""

    @property
    def version(self) -> int | None:
        """Number of the version."""
        return None if self.published is None else self.published.number

    @property
    def source(self) -> Version | None:
        """The version that the adapter is taken over from."""
        return self.adapter_from if self.original is None else self.original

    @property
    def reused_from(self) -> str | None:
        """The version of another run that it was taken over from."""
        if self.source is None:
            return None
        return self.source.tags.get(tags.REUSED_FROM) if self.resumed else self.source.uri

    @property
    def adapter_of(self) -> str | None:
        """Fingerprint of the stage whose adapter alone was taken over, at this start or an earlier one."""
        if self.adapter_from is not None:
            return self.adapter_from.tags.get(tags.ADAPTER_OF, self.adapter_from.training_fingerprint)
        return self.original.tags.get(tags.ADAPTER_OF) if self.resumed and self.original is not None else None

    def open_cells(self, cells: Sequence[Cell]) -> list[Cell]:
        """Those that nobody has scored; how a version that is there answers was settled with it."""
        settled = [cell for cell in cells if not (self.resumed and cell.mode == CHOICE)]
        return [cell for cell in settled if cell.fingerprint not in self.known and not cell.done]

    def take(self, result: Result, *, learns_recipe: bool) -> None:
        """Fill in what training gave; ``learns_recipe``: the stage's recipe was learned, and is no constant."""
        self.training = result.training
        self.recipe_zeros = recipe_zeros(result.adapter) if learns_recipe else None
        self.train_seconds, self.tokens = result.training["seconds"], result.training["tokens"]

    def score(self, cells: Sequence[Cell], *, chooses: bool = False, below: PlainChoice | None = None) -> None:
        """Fill in what scoring gave; ``chooses``: and how the bank answers plain text, unless that is settled; ``below``:
        how the one does that it extends."""
        for cell in cells:
            score = self.known.get(cell.fingerprint)
            if score is None:
                score = cell.summary() or {}
                score.pop("folder", None)
            if cell.mode == CHOICE and self.resumed and not score:
                continue  # of a version that was published before there was a choice
            self.scores.append(score | {"mode": cell.mode, "task": cell.task})
            self.score_seconds += score["seconds"]
        if chooses and not self.resumed:
            self.plain_text = decided((score for score in self.scores if score["mode"] == CHOICE), below)
        self.scores = [counted_in(one, self.way) if is_plain(one["mode"]) else one for one in self.scores]

    @property
    def way(self) -> Way:
        """In which its bank answers plain text of labelled tasks, if it finds no task by itself."""
        return "ranks" if self.plain_text is None else self.plain_text.way

    def release(self) -> None:
        """Let go of the claim, if it is still held: the stage is published, or will not be."""
        claim, self.claim = self.claim, None
        if claim is not None:
            claim.release(forget=True)

    def end(self) -> None:
        """Note the seconds that are neither training nor scoring, so far: those for which the next stage had to wait."""
        spent = time.monotonic() - self.began
        self.other_seconds = max(0.0, spent - (0.0 if self.reused else self.train_seconds) - self.score_seconds)

    def public(self) -> dict[str, Any]:
        """The stage's entry in the result."""
        rate = self.tokens / self.train_seconds if self.train_seconds else None
        return {
            "task": self.task,
            "fingerprint": self.fingerprint,
            "reused": self.reused,
            "reused_from": self.reused_from,
            "adapter_of": self.adapter_of,
            "version": self.version,
            "train_seconds": self.train_seconds,
            "score_seconds": self.score_seconds,
            "other_seconds": self.other_seconds,
            "tokens": self.tokens,
            "tokens_per_second": rate,
            "recipe_from": self.training.get("recipe_from"),
            "race": self.training.get("race"),
            "recipe_zeros": self.recipe_zeros,
            "kept_step": self.training.get("kept_step"),
            "held_seconds": self.training.get("held_seconds"),
        }


def how_made(stage: Mapping[str, Any]) -> str:
    """How a stage came about, in words, from its entry in the result."""
    if stage.get("adapter_of"):
        return "adapter reused, statistics made again"
    return "reused" if stage["reused"] else f"trained in {stage['train_seconds']:.0f} s"
