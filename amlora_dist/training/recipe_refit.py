"""Rows of earlier tasks, refitted at the end of a stage on a few of their rows: old tasks gain from what came after them.

A task's recipe is learned while its adapter is, and knows nothing of adapters that come later. With a small memory of rows
(``method_settings.memory_rows``) the weights of a task's row, one per adapted module and *other* adapter, the later ones
among them, take some steps on these rows; its own adapter keeps weight 1, and no adapter changes.

A few rows fit many weights by chance. So the memory is halved, each half fits a row of its own, and the loss of each on the
half that it has not seen decides: only where it is lower than that of the row as it was, by more than a near-tie, the mean
of both becomes the task's row.

Shapes: M adapted modules, N adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from amlora_dist.adapters.adapter import rows as rows_of
from amlora_dist.evaluation.scoring import deal
from amlora_dist.training.batching import target_tokens
from amlora_dist.training.failures import memory_watched
from amlora_dist.training.held_loss import beats
from amlora_dist.training.optimizer import ProximalAdamW

if TYPE_CHECKING:
    from amlora_dist.adapters.adapter import Adapter
    from amlora_dist.adapters.inject import Mixture
    from amlora_dist.tasks.batches import Example
    from amlora_dist.training.batching import LossComputer
    from amlora_dist.training.engine import Ranks
    from amlora_dist.training.settings import TrainingSettings

BATCH = 16
STEPS = 10
"""Of each half; every step sees all of its rows."""
FEWEST_ROWS = 4
"""Of a task; with fewer its row stays as it is."""


@dataclass(frozen=True, slots=True)
class Refitted:
    """What came of one task's row."""

    rows_MN: Tensor
    """Whether or not it won."""
    before: float
    """Loss on the memory under the row as it was, nats per target token."""
    after: float
    """The same under the row of the half that has not seen a memory row."""
    wins: bool


@dataclass(frozen=True, slots=True)
class RecipeRefit:
    """Refits rows on one rank; every rank makes the same calls.

    Args:
        mixture: with all adapters in it; nothing of it trains meanwhile.
        loss: of its model.
        ranks: share each pass's rows.
        device: where the model is.
        settings: of training: ``recipe_learning_rate`` of the weights, ``l1`` on those of other adapters, and ``near_tie``,
            the share by which the loss has to be lower.
        batch: rows of a pass on one rank, at most.
        steps: of each half.
    """

    mixture: Mixture
    loss: LossComputer
    ranks: Ranks
    device: torch.device
    settings: TrainingSettings
    batch: int = BATCH
    steps: int = STEPS

    def earlier(
        self, bank: list[Adapter], memory: Mapping[str, Sequence[Example]], report: Callable[[dict[str, Any]], None]
    ) -> dict[str, Any]:
        """Refit the rows of tasks with a memory, and leave them in the bank's last adapter and in the mixture.

        Returns:
            For the stage's record, under ``memory``: the largest memory of a task, and what came of each; nothing without.
        """
        if not memory:
            return {}
        rows = {path: rows_of(bank, path) for path in self.mixture.modules}
        found: dict[str, Any] = {}
        for task, examples in memory.items():
            if len(examples) < FEWEST_ROWS:
                continue
            place = self.mixture.task_names.index(task)
            with memory_watched(f"refitting the row of task {task!r}", "lower method_settings.memory_rows"):
                one = self.row(place, {path: own[place] for path, own in rows.items()}, examples)
            found[task] = {"rows": len(examples), "before": one.before, "after": one.after, "refitted": one.wins}
            report({"kind": "refit", "task": task, **found[task]})
            if one.wins:
                for path, row in zip(rows, one.rows_MN.cpu(), strict=True):
                    rows[path][place] = row
        bank[-1].refitted = {path: own[:-1].contiguous() for path, own in rows.items()}
        self.mixture.set_rows(rows)
        return {"memory": {"rows": max(map(len, memory.values())), "tasks": found}}

    def row(self, task: int, start: Mapping[str, Tensor], memory: Sequence[Example]) -> Refitted:
        """Refit the row of ``task`` (0-based).

        Args:
            start: the row as it is, (N,) by module path.
            memory: rows of the task, at least two.
        """
        paths = list(start)
        start_MN = torch.stack([start[path].float() for path in paths]).to(self.device)
        halves = [list(memory[0::2]), list(memory[1::2])]
        self.mixture.model.eval()
        try:
            before = sum(self._lost(paths, start_MN, half) for half in halves)
            fits = [self._fit(task, paths, start_MN, half) for half in halves]
            after = sum(self._lost(paths, fit_MN, half) for fit_MN, half in zip(fits, reversed(halves), strict=True))
        finally:
            self.mixture.try_row(None)
        tokens = target_tokens(memory)
        before, after = before / tokens, after / tokens
        return Refitted((fits[0] + fits[1]) / 2, before, after, beats(after, before, self.settings.near_tie))

    def _fit(self, task: int, paths: Sequence[str], start_MN: Tensor, rows: Sequence[Example]) -> Tensor:
        others = torch.tensor([place for place in range(start_MN.shape[1]) if place != task], device=self.device)
        weights_MO = start_MN[:, others].clone().requires_grad_()
        rate, l1 = self.settings.recipe_learning_rate, self.settings.l1 / len(paths)
        optimizer = ProximalAdamW([{"params": [weights_MO], "lr": rate, "weight_decay": 0.0, "l1": l1}])
        tokens = target_tokens(rows)
        for step in range(self.steps):
            optimizer.param_groups[0]["lr"] = rate * (1 - step / self.steps)
            gradient_MO = torch.zeros_like(weights_MO)

            def add(part: Tensor, counts: bool, row_MN: Tensor, total_MO: Tensor = gradient_MO) -> None:
                (gradient_MN,) = torch.autograd.grad(part, row_MN)
                total_MO += gradient_MN[:, others] * counts / tokens

            self._passes(paths, start_MN.index_copy(1, others, weights_MO.detach()), rows, add, learn=True)
            weights_MO.grad = self.ranks.sum(gradient_MO)
            optimizer.step()
        return start_MN.index_copy(1, others, weights_MO.detach())

    def _lost(self, paths: Sequence[str], row_MN: Tensor, rows: Sequence[Example]) -> float:
        """Summed loss, nats."""
        total = torch.zeros(1, dtype=torch.float64, device=self.device)

        def add(part: Tensor, counts: bool, _: Tensor) -> None:
            total.add_(part.double() * counts)

        self._passes(paths, row_MN, rows, add, learn=False)
        return float(self.ranks.sum(total))

    def _passes(
        self, paths: Sequence[str], row_MN: Tensor, rows: Sequence[Example], add: Callable[[Tensor, bool, Tensor], None],
        *, learn: bool,
    ) -> None:  # fmt: skip
        """Every rank makes equally many passes under a row; ``add`` takes each one's summed loss, whether it counts, and
        the row that it is a function of."""
        gate = torch.zeros(len(self.mixture.task_names))
        for indices, counts in deal(rows, min(self.batch, BATCH), self.ranks.rank, self.ranks.world):
            tried_MN = row_MN.detach().requires_grad_(learn)
            self.mixture.try_row(dict(zip(paths, tried_MN, strict=True)))
            with torch.set_grad_enabled(learn):
                add(self.loss(self.mixture.model, [rows[i] for i in indices], gate), counts, tried_MN)
