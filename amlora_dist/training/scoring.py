"""The scores of one stage on one rank: cell by cell, of each the rows whose answer is not known yet."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from amlora_dist.adapters.bank import tasks_using
from amlora_dist.crash_points import reach
from amlora_dist.evaluation.scoring import ZERO_ROW, Prediction, merge, score_task, summarise, write_predictions
from amlora_dist.evaluation.unchanged import gates_from, unchanged, write_features
from amlora_dist.tasks.batches import Example, label_tokens
from amlora_dist.training.checkpoint import write_text
from amlora_dist.training.failures import memory_watched
from amlora_dist.training.work import WITHOUT, Cell, StageWork

if TYPE_CHECKING:
    from torch import Tensor

    from amlora_dist.adapters.bank import Adapter
    from amlora_dist.adapters.inject import Mixture
    from amlora_dist.methods.base import Method
    from amlora_dist.training.mirror import Copies
    from amlora_dist.training.trunk_cache import TrunkCache
    from amlora_dist.training.zero import Ranks

Report = Callable[[dict[str, Any]], None]
"""Receives JSON-able progress events; called on rank 0 only."""


class Examples(Protocol):
    """Rows of a task's split as the model reads them; ``plain``: without the places of learned prompts."""

    def __call__(self, task: str, split: str, *, plain: bool = False) -> list[Example]: ...


@dataclass
class Scoring:
    """Scores the cells of ``work`` that are not done, with a model that nothing will train any more.

    ``mixture`` is what injected the bank of ``adapters`` into the model, None for the bare base model.
    """

    work: StageWork
    method: Method
    model: Any
    mixture: Mixture | None
    adapters: list[Adapter]
    trunk: TrunkCache | None
    examples: Examples
    tokenizer: Any
    encoder_decoder: bool
    ranks: Ranks
    device: torch.device
    report: Report

    def run(self) -> None:
        """Score them all; which are open is rank 0's word."""
        copies = self.work.copies
        if copies is not None and self.ranks.rank == 0:
            self._bring(copies)
        done = self.ranks.gather([cell.done for cell in self.work.cells])[0]
        for cell in (cell for cell, known in zip(self.work.cells, done, strict=True) if not known):
            self._score(cell)
            if copies is not None and self.ranks.rank == 0:
                for path in (cell.folder, cell.features):
                    if path is not None and Path(path).exists():
                        copies.send(Path(path))
            reach("scores_written")

    def _bring(self, copies: Copies) -> None:
        """What other nodes have scored of this stage, and the scores before it that may still hold."""
        for cell in self.work.cells:
            copies.bring(Path(cell.folder), (Path(cell.folder) / "summary.json").is_file)
            for folder in cell.before:
                copies.bring(Path(folder), (Path(folder) / "summary.json").is_file)
            if cell.features is not None:
                copies.bring(Path(cell.features), Path(cell.features).is_file)

    def _score(self, cell: Cell) -> None:
        examples = self.examples(cell.task, cell.split, plain=cell.mode == "untrained")
        row = self._row(cell)
        self._set_up(cell, row)
        began = time.monotonic()
        kept = self.ranks.gather(self._kept(cell, examples, row) if self.ranks.rank == 0 else [])[0]
        known = {prediction.row for prediction in kept}
        rest = [example for example in examples if example.row not in known]
        features: dict[int, Tensor] = {}
        self.report({"kind": "scoring", "task": cell.task, "mode": cell.mode, "rows": len(rest)})
        share = self._answers(cell, rest, row, features if cell.mode == "router" and not kept else None)
        predictions = merge([kept, *self.ranks.gather(share)])
        if cell.features is not None:
            shares = self.ranks.gather(features)
            features = {number: vector for one in shares for number, vector in one.items()}
        if self.ranks.rank == 0:
            about = {key: value for key, value in asdict(cell).items() if key not in ("before", "features")}
            summary = summarise(predictions) | {"seconds": time.monotonic() - began, "kept": len(kept)} | about
            folder = Path(cell.folder)
            if cell.features is not None and features:
                write_features(Path(cell.features), features)
            write_predictions(folder / "predictions.jsonl", predictions)
            write_text(folder / "summary.json", json.dumps(summary))
        done = {"kind": "scored", "task": cell.task, "mode": cell.mode, "kept": len(kept)}
        self.report(done | summarise(predictions))

    def _row(self, cell: Cell) -> int | None:
        """The row of the bank that every input gets, or None for what the router gives it."""
        if cell.mode == "untrained":
            return ZERO_ROW
        if cell.mode == "oracle" and self.mixture is not None:
            return self.mixture.task_names.index(cell.task)
        return None

    def _set_up(self, cell: Cell, row: int | None) -> None:
        if self.mixture is None:
            return
        out = cell.mode.removeprefix(WITHOUT)
        self.mixture.silence(None if out == cell.mode else int(out) - 1)
        if self.method.uses_selectors:
            self.mixture.use_selectors(row is None)  # the task's row alone, or none, is what the others mean

    def _kept(self, cell: Cell, examples: Sequence[Example], row: int | None) -> list[Prediction]:
        """Predictions of earlier scores that hold for this cell too."""
        mixture = self.mixture
        if mixture is None or mixture.router is None or not cell.before:
            return []
        rows = [example.row for example in examples]
        path = None if cell.features is None else Path(cell.features)
        gates = gates_from(mixture.router, path, rows) if row is None else mixture.one_hot(row, len(rows)).cpu()
        changed = [] if mixture.silent is None else tasks_using(self.adapters, mixture.silent)
        before = [Path(folder) for folder in cell.before]
        return [] if gates is None else unchanged(before, rows, gates, noted=row is None, changed=changed)

    def _answers(
        self, cell: Cell, examples: Sequence[Example], row: int | None, features: dict[int, Tensor] | None
    ) -> list[Prediction]:
        """This rank's share of the predictions; what the router read of its rows goes into ``features``."""
        spec, trunk = self.work.spec(cell.task), self.trunk
        mend = "lower evaluation.batch_size, or cut prompts (task_defaults.max_length)"
        with memory_watched(f"scoring task {cell.task!r}", mend):
            return score_task(
                self.model,
                examples,
                tokenizer=self.tokenizer,
                pad_id=self.tokenizer.pad_token_id,
                eos_id=self.tokenizer.eos_token_id,
                batch_size=self.work.evaluation_batch_size,
                labels=None if spec.free_text else label_tokens(spec, self.tokenizer, self.encoder_decoder),
                metric=str(spec.metric),
                max_new_tokens=spec.max_answer_tokens if spec.free_text else None,
                task_gate_row=row,
                tasks=0 if self.mixture is None else len(self.mixture.task_names),
                selectors=self.method.uses_selectors,
                encoder_decoder=self.encoder_decoder,
                rank=self.ranks.rank,
                world=self.ranks.world,
                device=self.device,
                all_done=self._all_done,
                trunk=trunk if trunk is not None and trunk.holds(example.prompt for example in examples) else None,
                on_features=None if features is None else features.__setitem__,
            )

    def _all_done(self, done: bool) -> bool:
        return float(self.ranks.sum(torch.tensor([float(done)], device=self.device))) == self.ranks.world
