"""The optimizer loop of one stage: steps, losses, checkpoints, and a clean end when asked to stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from amlora_dist.adapters.dropout import DropoutKeys, row_keys
from amlora_dist.crash_points import reach
from amlora_dist.errors import TrainingError
from amlora_dist.tasks.batches import Example
from amlora_dist.training.batching import Layout, LossComputer, Schedule, all_tokens, micro_batches, target_tokens
from amlora_dist.training.best_checkpoint import BestKeeper, best_of, exhausted
from amlora_dist.training.checkpoint import StageProgress, checkpoint_name, newest_checkpoint, save_checkpoint
from amlora_dist.training.engine import TrainingEngine
from amlora_dist.training.failures import LESS_MEMORY, SLOWER, NonFiniteLossError, StoppedError, batch_text, memory_watched
from amlora_dist.training.micro_batch import MicroBatch
from amlora_dist.training.optimizer import rate_factor
from amlora_dist.training.settings import TrainingSettings

if TYPE_CHECKING:
    from amlora_dist.adapters.inject import Mixture
    from amlora_dist.training.remote_storage import RemoteCheckpoints

STOP_FILE = "STOP"
"""When this file appears in the stage's folder, training checkpoints at the end of the step and stops."""


class Learner:
    """Runs the steps of one stage on one rank."""

    def __init__(
        self,
        engine: TrainingEngine,
        loss: LossComputer,
        examples: Sequence[Example],
        settings: TrainingSettings,
        *,
        layout: Layout,
        seed: int,
        stage: str,
        folder: Path,
        fingerprint: str,
        mixture: Mixture,
        objective: Callable[[MicroBatch], Tensor],
        dropout: bool = False,
        two_phases: bool = False,
        report: Callable[[dict[str, Any]], None],
        remote: RemoteCheckpoints | None = None,
        keeper: Callable[[int], BestKeeper] | None = None,
        stop_in: Path | None = None,
        refit: float = 0.0,
    ) -> None:
        """``objective``: ``Method.loss``. ``two_phases``: the layers' selectors learn alone, in the second half of the
        steps, after the adapter. ``remote``: where checkpoints are copied to, and fetched from where the folder has none as
        new. ``keeper``, made for so many steps, holds the adapter that is best on held-out rows: that one is the result, in
        place of the last. ``stop_in``: folder of the stop file; default: ``folder``. ``refit``: share of the steps, the
        last ones, in which a recipe learns on its support."""
        self.engine, self.loss, self.examples, self.settings = engine, loss, examples, settings
        self.layout, self.stage, self.folder, self.fingerprint = layout, stage, folder, fingerprint
        self.mixture, self.objective, self.report = mixture, objective, report
        self.seed, self.dropout, self.two_phases = seed, dropout, two_phases
        self.remote = remote
        self.stop_file = (folder if stop_in is None else stop_in) / STOP_FILE
        self.schedule = Schedule(
            len(examples), batch_size=settings.batch_size, epochs=settings.epochs, seed=seed, stage=stage
        )
        self._refit_from = self.schedule.steps - round(refit * self.schedule.steps)
        self.keeper = None if keeper is None else keeper(self.schedule.steps)

    def resume(self) -> StageProgress | None:
        """Take up the newest checkpoint of this stage, if there is one. The same one on every rank, by rank 0's word."""
        folder, ranks, shapes = self.folder / "checkpoints", self.engine.ranks, self.engine.state_shapes()
        if self.remote is not None:
            self.remote.fetch_newest(folder)
        found = newest_checkpoint(folder, self.fingerprint, shapes)
        steps = ranks.gather(-1 if found is None else found[1].step)
        if self.remote is not None and len(set(steps)) != 1:  # a node has one that was not copied any more
            name = checkpoint_name(steps[0])
            if ranks.rank == 0 and found is not None:
                self.remote.upload(folder / name)
            ranks.gather(None)  # nobody looks for it before it is there
            if ranks.rank != 0:
                self.remote.fetch(name, folder)
            found = newest_checkpoint(folder, self.fingerprint, shapes, at=steps[0])
            steps = ranks.gather(-1 if found is None else found[1].step)
        if len(set(steps)) != 1:
            raise TrainingError(
                f"ranks see different checkpoints (steps {steps}); `storage` must be one folder that all nodes mount, or a"
                " URL that all nodes can read and write"
            )
        if found is None:
            return None
        state, progress = found
        self.engine.import_state(state, progress.step)
        if self.keeper is not None:
            self.keeper.take_up(state)
        self.report({"kind": "resumed", "step": progress.step})
        return progress

    def run(self, progress: StageProgress, until: int | None = None) -> StageProgress:
        """Train from ``progress`` to the end, or to a checkpoint after ``until`` steps.

        Raises:
            StoppedError: the stop file appeared; a checkpoint is written.
            NonFiniteLossError: at the first step whose loss is not finite.
            DeviceMemoryError: at the first step that does not fit in memory.
        """
        began, before = time.monotonic(), progress.seconds
        end = self.schedule.steps if until is None else min(until, self.schedule.steps)
        for step in range(progress.step, end):
            if self._ended(progress):
                break
            stop = self._step(progress, step)
            looked = self._look(progress)
            progress.seconds = before + time.monotonic() - began
            self.report(
                {
                    "kind": "step",
                    "step": progress.step,
                    "steps": self.schedule.steps,
                    "loss": progress.losses[-1],
                    "tokens": progress.tokens,
                    "seconds": progress.seconds,
                    "next_rows": self._rows(step + 1),
                }
            )
            reach("step_done")
            if looked:
                step_at, loss = progress.held_losses[-1]
                self.report({"kind": "held_out", "step": step_at, "loss": loss})
            last = progress.step == end or self._ended(progress)
            if stop or last or progress.step % self.settings.checkpoint_every == 0:
                self._checkpoint(progress)
            if stop and not last:
                raise StoppedError(f"stage {self.stage!r} stopped after step {progress.step}; a checkpoint is written")
        if self.keeper is not None and until is None:
            best = best_of(progress.held_losses, self.settings.near_tie)
            progress.kept_step = None if best is None else int(progress.held_losses[best][0])
            if progress.kept_step != progress.step:
                self.keeper.restore(progress.step)
        return progress

    def warm(self, progress: StageProgress, steps: int) -> StageProgress:
        """Take the first ``steps`` steps without checkpoints: one start of several (``race``). Errors as in ``run``."""
        began = time.monotonic()
        for step in range(steps):
            if self._step(progress, step):
                raise StoppedError(f"stage {self.stage!r} stopped while its starts raced; the race begins again")
            self.report(
                {"kind": "racing", "step": progress.step, "steps": self.schedule.steps, "loss": progress.losses[-1]}
            )
        progress.seconds += time.monotonic() - began
        return progress

    def commit(self, progress: StageProgress) -> None:
        """Write a checkpoint of the present state."""
        self._checkpoint(progress)

    def _look(self, progress: StageProgress) -> bool:
        """Look at the held-out rows where it is time to; whether it did."""
        if self.keeper is None:
            return False
        began = time.monotonic()
        looked = self.keeper.look(progress.step, progress.held_losses)
        progress.held_seconds += time.monotonic() - began if looked else 0.0
        return looked

    def _ended(self, progress: StageProgress) -> bool:
        """Whether held-out rows say that it gets no better."""
        return self.keeper is not None and exhausted(progress.held_losses, self.settings)

    def _rows(self, step: int) -> list[int]:
        """Row numbers of a step's global batch, as the source counts them; none after the last step."""
        return [self.examples[i].row for i in self.schedule.rows(step)] if step < self.schedule.steps else []

    def _step(self, progress: StageProgress, number: int) -> bool:
        """One optimizer step, noted in ``progress``; whether any rank has to stop.

        The loss that is noted (nats per target token of the global batch) is the rows' cross-entropy, smoothed if so
        configured, without what the method adds. No step is taken where any part of it is not finite.

        Raises:
            NonFiniteLossError, DeviceMemoryError: name the step and its rows.
        """
        ranks, place = self.engine.ranks, batch_text(number + 1, self._rows(number))
        batch = [self.examples[i] for i in self.schedule.rows(number)]
        tokens, places = target_tokens(batch), {id(row): at for at, row in enumerate(batch)}
        with memory_watched(place, LESS_MEMORY, number + 1):
            phase, step, steps = self._phase(number)
            total = torch.zeros(3, device=self.engine.device)
            for part, counts in micro_batches(batch, ranks.rank, self.layout):
                keys = self._dropout_keys(number, [places[id(row)] for row in part]) if self.dropout else None
                rows = MicroBatch(
                    self.loss, self.engine, self.mixture, part, counts=counts, tokens=tokens, share=len(part) / len(batch),
                    parts=ranks.world * self.layout.accumulation, smoothing=self.settings.label_smoothing, phase=phase,
                    dropout_keys=keys,
                )  # fmt: skip
                loss = self.objective(rows)
                total[0] += rows.reported
                total[2] += loss.detach()
                self.engine.backward(loss)
            if ranks.rank == 0 and self.stop_file.exists():
                total[1] = 1.0
            reported, stop, whole = ranks.sum(total).tolist()
            if math.isfinite(reported) and math.isfinite(whole):
                self.engine.step(rate_factor(step, steps, self.settings), phase, refit=number >= self._refit_from)
        if not (math.isfinite(reported) and math.isfinite(whole)):
            raise NonFiniteLossError(
                f"{place}: the loss is not finite; {SLOWER}", number + 1
            )
        progress.step = number + 1
        progress.losses.append(reported)
        progress.tokens += all_tokens(batch)
        return bool(stop > 0)

    def _phase(self, step: int) -> tuple[int, int, int]:
        """Phase of a step, which of the phase's steps it is, and how many these are."""
        if not self.two_phases:
            return 1, step, self.schedule.steps
        half = self.schedule.steps // 2
        self.mixture.use_selectors(step >= half)
        return (1, step, half) if step < half else (2, step - half, self.schedule.steps - half)

    def _dropout_keys(self, step: int, places: list[int]) -> DropoutKeys:
        """For rows by their places in the step's global batch: the same whichever rank computes them."""
        return row_keys(
            self.seed, self.stage, step, places, from_right=not self.loss.encoder_decoder, device=self.engine.device
        )

    def _checkpoint(self, progress: StageProgress) -> None:
        state = self.engine.export_state()
        if self.keeper is not None:
            state |= self.keeper.state()
        if self.engine.ranks.rank == 0:
            saved = save_checkpoint(self.folder / "checkpoints", state, progress)
            if self.remote is not None:
                self.remote.upload(saved)
