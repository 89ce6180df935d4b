"""``training.learning_rate: auto``: each candidate takes the first stage's own first steps, and the one that loses least on
its held-out rows wins; near-ties go to the lower rate.

The winner's steps are the stage's own: its checkpoint is where that stage begins. So only the losers cost, together at
most 15% of the stage's steps (50% where it has fewer than 100, as in ``race``). Where that leaves fewer than 8 steps for
each, where no rows are held out, and for methods whose selectors learn apart, there is no race and the rate is
``DEFAULT_RATE``.
"""

from __future__ import annotations

import contextlib
import gc
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from amlora_dist.errors import TrainingError
from amlora_dist.training.checkpoint import write_text
from amlora_dist.training.failures import NonFiniteLossError
from amlora_dist.training.held_loss import first_lowest
from amlora_dist.training.race import race_steps
from amlora_dist.training.remote_storage import RemoteStorage
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
    """The rate that wins: the lowest of those that are near-ties with the lowest loss.

    Args:
        losses: held-out loss by rate; None where the loss was not finite.
        near_tie: share by which the lowest loss has to be lower than that of a lower rate.

    Raises:
        TrainingError: every one of them diverged.
    """
    rates = sorted(losses)
    best = first_lowest([losses[rate] for rate in rates], near_tie)
    if best is None:
        tried = ", ".join(f"{rate:g}" for rate in rates)
        raise TrainingError(f"training.learning_rate auto: the loss is not finite at any of {tried}; give a smaller number")
    return rates[best]


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


@dataclass(frozen=True, slots=True)
class Raced:
    """What came of one candidate."""

    loss: float | None
    """On the held-out rows, nats per target token; None where it is not finite."""
    seconds: float
    """That it took, in all attempts that counted."""


def run_rate_race(work: StageWork, race: RateRace, begin: Callable[[StageWork, int], Raced], *, writes: bool) -> None:
    """Let every candidate take its steps, and note what it lost. Safe to call again after any interruption: a candidate
    that is done goes on from its checkpoint and takes no step.

    Args:
        work: of the race.
        begin: takes the first steps of a stage; every rank gets the same loss.
        writes: whether this is the rank that writes.

    Raises:
        StoppedError: asked to stop.
    """
    losses: dict[float, float | None] = {}
    seconds: dict[float, float] = {}
    for rate in sorted(map(float, race.fingerprints)):
        one, began = at_rate(work, race, rate), time.monotonic()
        if work.apart:  # nodes that share no folder cannot be sure of each other's checkpoints
            shutil.rmtree(one.path, ignore_errors=True)
        try:
            raced = begin(one, race.steps)
            losses[rate], seconds[rate] = raced.loss, raced.seconds
        except NonFiniteLossError:
            losses[rate], seconds[rate] = None, time.monotonic() - began
        gc.collect()  # engines are held in circles
    if work.apart:
        _hand_on(work, race, losses, writes=writes)
    if writes:
        found: dict[str, Mapping[float, float | None]] = {"losses": losses, "seconds": seconds}
        named = {key: {f"{rate:g}": value for rate, value in of.items()} for key, of in found.items()}
        write_text(work.race_file, json.dumps({"steps": race.steps, **named}))
        if work.copies is not None:
            work.copies.upload(work.race_file)


def _hand_on(work: StageWork, race: RateRace, losses: Mapping[float, float | None], *, writes: bool) -> None:
    """Put the winner's checkpoint where its stage will look for it, on whatever node that is, and leave no candidate behind:
    what the driver does where all see its folder."""
    rates = sorted(losses)
    best = first_lowest([losses[rate] for rate in rates], work.settings.training.near_tie)
    name = "" if best is None else f"{rates[best]:g}"
    if best is not None and name not in race.published:
        begun = Path(work.root) / "stages" / race.fingerprints[name]
        begun.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):  # another rank of this node was quicker, or this node has none
            if not begun.exists():
                candidate_folder(work.path, rates[best]).rename(begun)
        if writes and work.url is not None:
            copies = RemoteStorage(work.url, Path(work.root)).checkpoints(begun)
            for newest in sorted(begun.glob("checkpoints/step-*"))[-1:]:
                copies.upload(newest)
    for rate in rates:
        shutil.rmtree(candidate_folder(work.path, rate), ignore_errors=True)
