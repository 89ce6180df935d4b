"""TensorBoard and Weights & Biases as well as MLflow: what a finished stage has to show, through their own libraries.

MLflow stays the journal; nothing is read back from here. A stage is written once it is published, and a tag of its run says
to whom, so that a start that goes on writes what an earlier one did not come to. A tracker that fails is warned about, and
the run goes on.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from amlora_dist.registry import tags

if TYPE_CHECKING:
    from amlora_dist.registry.store import Store

log = logging.getLogger(__name__)

FOLDERS = {"tensorboard": "tensorboard", "wandb": "wandb"}
"""Below ``AMLORA_HOME``, what each writes on this machine."""


@dataclass(frozen=True, slots=True)
class StageFigures:
    """What of a stage is shown."""

    index: int
    task: str
    losses: Sequence[float]
    """Of each optimizer step, from 1."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """``accuracy/TASK`` and the like, by name, after the stage."""


class TrackerError(Exception):
    """A tracker's library refused."""


class _Sink(Protocol):
    """An open tracker."""

    def loss(self, figures: StageFigures) -> None: ...

    def score(self, name: str, value: float, stage: int) -> None: ...


def write_stage(
    names: Sequence[str], store: Store, stage_run: str, home: Path, config: Mapping[str, Any], figures: StageFigures
) -> None:
    """Write a stage to the trackers that do not have it yet.

    Args:
        names: of the trackers.
        store: with the stage's run.
        stage_run: MLflow's id of it; its tag says what the trackers call the run.
        home: ``AMLORA_HOME``.
        config: of the run, as it may be seen.
        figures: of the stage.
    """
    if not names:
        return
    stage = store.run_tags(stage_run)
    run_id, done = stage[tags.RUN_ID], stage.get(tags.TRACKED, "").split(",")
    for name in names:
        if name in done:
            continue
        try:
            with _OPEN[name](run_id, home / FOLDERS[name], config) as sink:
                sink.loss(figures)
                for key, value in figures.scores.items():
                    sink.score(key, value, figures.index)
        except (TrackerError, OSError, ValueError) as error:
            log.warning("tracking: %s: stage %d was not written (%s)", name, figures.index, str(error).partition("\n")[0])
            continue
        done.append(name)
        store.set_tags(stage_run, {tags.TRACKED: ",".join(filter(None, done))})


class _TensorBoard:
    """``tensorboard --logdir AMLORA_HOME/tensorboard`` shows it: a curve of the loss for each stage, scores over stages."""

    def __init__(self, writer: Any) -> None:
        self._writer, self._now = writer, time.time()

    def loss(self, figures: StageFigures) -> None:
        for step, loss in enumerate(figures.losses, start=1):
            self._writer.add_scalar(f"loss/{figures.index}-{figures.task}", loss, step, self._now)

    def score(self, name: str, value: float, stage: int) -> None:
        self._writer.add_scalar(name, value, stage, self._now)


@contextlib.contextmanager
def _tensorboard(run_id: str, folder: Path, config: Mapping[str, Any]) -> Iterator[_Sink]:
    from tensorboardX import SummaryWriter

    with SummaryWriter(logdir=str(folder / run_id)) as writer:
        yield _TensorBoard(writer)


class _WandB:
    """Its steps only rise, so each figure has an axis of its own: optimizer steps of a stage, and stages."""

    def __init__(self, run: Any) -> None:
        self._run = run
        run.define_metric("accuracy/*", step_metric="stage")

    def loss(self, figures: StageFigures) -> None:
        key, axis = f"loss/{figures.index}-{figures.task}", f"step of stage {figures.index}"
        self._run.define_metric(key, step_metric=axis)
        for step, loss in enumerate(figures.losses, start=1):
            self._run.log({key: loss, axis: step})

    def score(self, name: str, value: float, stage: int) -> None:
        self._run.log({name: value, "stage": stage})


@contextlib.contextmanager
def _wandb(run_id: str, folder: Path, config: Mapping[str, Any]) -> Iterator[_Sink]:
    """As wandb's own settings say (``WANDB_PROJECT``, ``WANDB_MODE``, its login); the project's default is ``amlora``."""
    import os

    import wandb

    folder.mkdir(parents=True, exist_ok=True)
    try:
        with wandb.init(
            project=os.environ.get("WANDB_PROJECT", "amlora"), id=_wandb_id(run_id), name=run_id, resume="allow",
            dir=str(folder), config=dict(config),
        ) as run:  # fmt: skip
            yield _WandB(run)
    except wandb.Error as error:
        raise TrackerError(str(error)) from error


def _wandb_id(run_id: str) -> str:
    return "".join("-" if sign in "/\\#?%: " else sign for sign in run_id)[:64]


_OPEN: dict[str, Any] = {"tensorboard": _tensorboard, "wandb": _wandb}
