"""Where the weights on earlier adapters begin: at zero, or at an old row that has shown that it helps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amlora_dist.adapters.adapter import Adapter, rows
from amlora_dist.adapters.reading import reusable_trunk
from amlora_dist.evaluation.scoring import deal
from amlora_dist.tasks.batches import Example
from amlora_dist.training.batching import LossComputer
from amlora_dist.training.checkpoint import StageProgress
from amlora_dist.training.failures import LESS_MEMORY, memory_watched
from amlora_dist.training.held_loss import HeldLoss, pass_rows
from amlora_dist.training.loop import Learner
from amlora_dist.training.race import Candidate, race_steps, run_race
from amlora_dist.training.settings import StageSettings


@dataclass(frozen=True, slots=True)
class RecipeStart:
    """Finds the start on one rank; every rank makes the same calls.

    Args:
        settings: of the stage.
        adapters: the bank below, in order.
        learner: fresh, with its engine.
        loss: of the model.
        examples: what the stage trains on, its own rows first.
        held: the loss on rows that it does not train on; None where there are none.
        report: takes events.
        shares_lower: passes that differ in their gates run the layers below the adapters once; not where something in front
            of the model has kept what these layers make of a row.
    """

    settings: StageSettings
    adapters: Sequence[Adapter]
    learner: Learner
    loss: LossComputer
    examples: Sequence[Example]
    held: HeldLoss | None
    report: Callable[[dict[str, Any]], None]
    shares_lower: bool = True

    def begin(self, fresh: StageProgress) -> StageProgress:
        """Put the start into the engine; the stage's progress: at step 0, or, after a race, where its winner is."""
        how = self.settings.recipe.start
        if how == "never":
            return fresh
        if how == "always":
            return self._from(self._best(), fresh)
        if how == "race" and self.held is not None:
            for rivals in (min(len(self.adapters), 2), 1):
                steps = race_steps(self.learner.schedule.steps, rivals + 1, self.settings.recipe.race_steps)
                if steps:
                    candidates = [Candidate(None, {}), *map(self._candidate, self._likeliest(rivals))]
                    return self._race(self.held, candidates, steps, fresh)
        losses, nothing = self._probe()
        best = losses.index(min(losses))
        return fresh if losses[best] >= nothing else self._from(best, fresh)

    def _from(self, place: int, fresh: StageProgress) -> StageProgress:
        """Put an old row into the engine."""
        start, engine = self._candidate(place), self.learner.engine
        engine.import_state(engine.export_state() | dict(start.state), 0)
        fresh.recipe_from = start.name
        return fresh

    def _likeliest(self, count: int) -> list[int]:
        """The old rows under which some training rows are likeliest, best first; where they are all, no pass says so."""
        if count == len(self.adapters) == 1:
            return [0]
        losses, _ = self._probe()
        return sorted(range(len(losses)), key=losses.__getitem__)[:count]

    def _best(self) -> int:
        """The old row under which some training rows are likeliest; the only one needs no pass."""
        count = len(self.adapters)
        if count == 1:
            return 0
        losses = self._mean_losses(list(torch.eye(count + 1)[:count]))
        self._report_probe(losses, None)
        return losses.index(min(losses))

    def _race(self, held: HeldLoss, candidates: list[Candidate], steps: int, fresh: StageProgress) -> StageProgress:
        began = time.monotonic()
        near_tie = self.settings.training.near_tie
        winner, progress, losses = run_race(self.learner, held, candidates, steps, near_tie, fresh)
        progress.recipe_from = winner.name
        seconds = time.monotonic() - began - progress.seconds
        progress.race = {"steps": steps, "losses": losses, "losers_seconds": seconds}
        self.report({"kind": "race", "steps": steps, "losses": losses, "winner": winner.name})
        self.learner.commit(progress)
        return progress

    def _candidate(self, place: int) -> Candidate:
        adapters = list(self.adapters)
        state = {f"master.recipe.{module}": rows(adapters, module)[place].clone() for module in adapters[0].a}
        return Candidate(adapters[place].task, state)

    def _probe(self) -> tuple[list[float], float]:
        """Mean loss over some training rows, nats per row, under every old row and under the base model alone."""
        count = len(self.adapters)
        *losses, nothing = self._mean_losses([*torch.eye(count + 1)[:count], torch.zeros(count + 1)])
        self._report_probe(losses, nothing)
        return losses, nothing

    def _report_probe(self, losses: Sequence[float], base: float | None) -> None:
        names = [adapter.task for adapter in self.adapters]
        finite = [loss if math.isfinite(loss) else None for loss in losses]
        base = base if base is not None and math.isfinite(base) else None
        self.report({"kind": "probe", "losses": dict(zip(names, finite, strict=True)), "base": base})

    def _mean_losses(self, gates: Sequence[Tensor]) -> list[float]:
        """Under each of the gates, infinite where it is not finite. What lies below them is computed once."""
        engine = self.learner.engine
        trunk = reusable_trunk(self.learner.mixture) if self.shares_lower else None
        probe = self.examples[: self.settings.training.probe_rows]
        ranks, totals = engine.ranks, torch.zeros(len(gates), device=engine.device)
        fits = pass_rows(self.settings.training.micro_batch_size)
        most = min(fits, math.ceil(len(probe) / ranks.world))  # few rows too are work for every rank
        with memory_watched("the loss under earlier tasks' rows", LESS_MEMORY), torch.no_grad():
            for indices, counts in deal(probe, most, ranks.rank, ranks.world):
                batch = [probe[i] for i in indices]
                states_BLD = self.loss.lower_states(trunk, batch)
                for place, gate in enumerate(gates):
                    part = self.loss(engine.model, batch, gate, states_BLD)
                    totals[place] += part if counts else 0.0 * part
        means = [total / len(probe) for total in ranks.sum(totals).tolist()]
        return [mean if math.isfinite(mean) else math.inf for mean in means]
