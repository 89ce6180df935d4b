"""``training.learning_rate: auto``: each candidate takes the first stage's own first steps, and the one that loses least on
its held-out rows wins; near-ties go to the lower rate.

The winner's steps are the stage's own: its checkpoint is where that stage begins. So only the losers cost, together at
most 15% of the stage's steps (50% where it has fewer than 100, as in ``race``). Where that leaves fewer than 8 steps for
each, where no rows are held out, and for methods whose selectors learn apart, there is no race and the rate is
``DEFAULT_RATE``.
"""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from amlora_dist.errors import TrainingError
from amlora_dist.training.checkpoint import write_text
from amlora_dist.training.failures import NonFiniteLossError
from amlora_dist.training.held_loss import beats
from amlora_dist.training.race import race_steps
from amlora_dist.training.stage_spec import RateRace, StageWork

RATES = (1e-3, 3e-3, 1e-2)
"""Candidates, rising: for adapters of LoRA, rates ten times those of whole models."""
DEFAULT_RATE = 3e-3
"""Without a race: the rate of this project's measurements."""
MOST_STEPS = 60
"""Of each candidate, however long the stage."""


def steps_of_race(steps: int) -> int:
    """Steps of each candidate in a stage of ``steps``; 0: no race."""
    return race_steps(steps, len(RATES), MOST_STEPS)


def best_rate(losses: Mapping[float, float | None], near_tie: float) -> float:
    """The rate that wins.

    Args:
        losses: held-out loss by rate; None where the loss was not finite.
        near_tie: share by which the loss of a higher rate has to be lower.

    Raises:
        TrainingError: every one of them diverged.
    """
    best: tuple[float, float] | None = None
    for rate in sorted(losses):
        loss = losses[rate]
        if loss is not None and (best is None or beats(loss, best[1], near_tie)):
            best = rate, loss
    if best is None:
        tried = ", ".join(f"{rate:g}" for rate in sorted(losses))
        raise TrainingError(f"training.learning_rate auto: the loss is not finite at any of {tried}; give a smaller number")
    return best[0]


def at_rate(work: StageWork, race: RateRace, rate: float) -> StageWork:
    """The beginning of the stage at one rate, in a folder of its own; it is stopped where the race is."""
    training = replace(work.settings.training, learning_rate=rate)
    return replace(
        work, fingerprint=race.fingerprints[f"{rate:g}"], folder=str(candidate_folder(work.path, rate)), race=None,
        settings=replace(work.settings, training=training), stop_in=work.folder, url=None,
    )  # fmt: skip


def candidate_folder(race: Path, rate: float) -> Path:
    """Where a candidate's checkpoints lie, below the race's folder."""
    return race / f"rate-{rate:g}"


def run_rate_race(work: StageWork, race: RateRace, begin: Callable[[StageWork, int], float], *, writes: bool) -> None:
    """Let every candidate take its steps, and note what it lost. Safe to call again after any interruption: a candidate
    that is done goes on from its checkpoint and takes no step.

    Args:
        work: of the race.
        begin: takes the first steps of a stage and gives the loss on its held-out rows; the same number on every rank.
        writes: whether this is the rank that writes.

    Raises:
        StoppedError: asked to stop.
    """
    losses: dict[str, float | None] = {}
    for rate in sorted(map(float, race.fingerprints)):
        one = at_rate(work, race, rate)
        if work.apart:  # nodes that share no folder cannot be sure of each other's checkpoints
            shutil.rmtree(one.path, ignore_errors=True)
        try:
            losses[f"{rate:g}"] = begin(one, race.steps)
        except NonFiniteLossError:
            losses[f"{rate:g}"] = None
        gc.collect()  # engines are held in circles
    if writes:
        write_text(work.race_file, json.dumps({"steps": race.steps, "losses": losses}))
        if work.copies is not None:
            work.copies.upload(work.race_file)
