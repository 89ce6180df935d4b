"""The scores of one stage on one rank: cell by cell, of each the rows whose answer is not known yet."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from amlora_dist.adapters.adapted_layers import NO_PREFIX, Prefix
from amlora_dist.adapters.adapter import tasks_using
from amlora_dist.adapters.keyed_router import KeyedRouter
from amlora_dist.crash_points import reach
from amlora_dist.evaluation.answering import Answering
from amlora_dist.evaluation.decoding import Decoder, Forward
from amlora_dist.evaluation.plain_texts import plain_examples
from amlora_dist.evaluation.requests import Prompter, mean_rows
from amlora_dist.evaluation.scoring import (
    ZERO_ROW,
    Prediction,
    by_label,
    merge,
    routing_accuracy,
    score_task,
    summarise,
    write_predictions,
)
from amlora_dist.evaluation.served_scoring import PlainRow, ServedScore, rescored
from amlora_dist.evaluation.unchanged import gates_from, read_features, unchanged, write_features
from amlora_dist.methods.kinds import Stages
from amlora_dist.tasks.batches import Example, label_tokens
from amlora_dist.tasks.prompts import BANK_TEMPLATE
from amlora_dist.training.checkpoint import write_text
from amlora_dist.training.failures import memory_watched
from amlora_dist.training.stage_spec import CHOICE, WITHOUT, Cell, StageWork, is_plain

if TYPE_CHECKING:
    from torch import Tensor

    from amlora_dist.adapters.adapter import Adapter
    from amlora_dist.adapters.inject import Mixture
    from amlora_dist.methods.base import Method
    from amlora_dist.tasks.sources import Row
    from amlora_dist.tasks.task import TaskSpec
    from amlora_dist.training.engine import Ranks
    from amlora_dist.training.remote_storage import RemoteStorage

TELL_EVERY_S = 1.0
"""Seconds between two events about the rows of one score."""
LESS_TEXT = "lower evaluation.batch_size, or cut prompts (task_defaults.max_length)"

Report = Callable[[dict[str, Any]], None]
"""Receives JSON-able progress events; called on rank 0 only."""


class Examples(Protocol):
    """Rows of a task's split as the model reads them; ``plain``: without anything in front."""

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
    forward_for: Callable[[Sequence[Example]], Forward]
    """What passes over these rows call in place of ``model``, with the same arguments: it, or what is in front of it."""
    examples: Examples
    plain_rows: Callable[[str, str], list[Row]]
    """Rows of a task's split, as they are in the data."""
    tokenizer: Any
    encoder_decoder: bool
    ranks: Ranks
    device: torch.device
    report: Report
    prefix: Prefix = NO_PREFIX
    """What every input has in front."""

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
                        copies.upload(Path(path))
            reach("scores_written")

    def _bring(self, copies: RemoteStorage) -> None:
        """What other nodes have scored of this stage, and the scores before it that may still hold."""
        for cell in self.work.cells:
            copies.fetch(Path(cell.folder), (Path(cell.folder) / "summary.json").is_file)
            for folder in cell.before:
                copies.fetch(Path(folder), (Path(folder) / "summary.json").is_file)
            if cell.features is not None:
                copies.fetch(Path(cell.features), Path(cell.features).is_file)

    def _score(self, cell: Cell) -> None:
        if self._served(cell):
            self._score_served(cell)
            return
        if self._plain(cell):
            self._score_plain(cell)
            return
        examples = self.examples(cell.task, cell.split, plain=cell.mode == "untrained")
        row = self._row(cell)
        self._set_up(cell, row)
        began = time.monotonic()
        reused = self.ranks.gather(self._reused(cell, examples, row) if self.ranks.rank == 0 else [])[0]
        known = {prediction.row for prediction in reused}
        rest = [example for example in examples if example.row not in known]
        features: dict[int, Tensor] = {}
        on_rows = self._telling(cell, len(rest))
        share = self._answers(cell, rest, row, features if cell.mode == "router" and not reused else None, on_rows)
        found = merge([reused, *self.ranks.gather(share)])
        if self.work.plain_texts and cell.mode != "untrained":
            spec = self.work.spec(cell.task)
            found = [by_label(one, spec.label_texts, str(spec.metric)) for one in found]
        self._write(cell, found, len(reused), features, began)

    def _telling(self, cell: Cell, rows: int) -> Callable[[int], None]:
        """Says that a score of so many rows begins; what it returns says, now and then, how many are done, as far as this
        rank knows: all ranks have about as many."""
        about: dict[str, Any] = {"kind": "scoring", "task": cell.task, "mode": cell.mode, "rows": rows}
        self.report(about | {"done": 0})
        done, told_at = 0, time.monotonic()

        def tell(count: int) -> None:
            nonlocal done, told_at
            done += count
            if (now := time.monotonic()) - told_at >= TELL_EVERY_S:
                told_at = now
                self.report(about | {"done": min(rows, done * self.ranks.world)})

        return tell

    def _write(
        self, cell: Cell, predictions: list[Prediction], reused: int, features: dict[int, Tensor], began: float
    ) -> None:
        """Rank 0 writes the score, with all ranks' ``features`` where they are new."""
        if cell.features is not None:
            shares = self.ranks.gather(features)
            features = {number: vector for one in shares for number, vector in one.items()}
        summary = summarise(predictions)
        if self.mixture is not None and cell.mode != "oracle":
            routed = routing_accuracy(predictions, cell.task, self.mixture.task_names)
            summary |= {} if routed is None else {"routing_accuracy": routed}
        if self.ranks.rank == 0:
            about = {key: value for key, value in asdict(cell).items() if key not in ("before", "features", "places")}
            folder = Path(cell.folder)
            if cell.features is not None and features:
                write_features(Path(cell.features), features)
            write_predictions(folder / "predictions.jsonl", predictions)
            seconds = time.monotonic() - began
            write_text(folder / "summary.json", json.dumps(summary | {"seconds": seconds, "kept": reused} | about))
        metric = str(self.work.spec(cell.task).metric)
        self.report({"kind": "scored", "task": cell.task, "mode": cell.mode, "metric": metric, "kept": reused} | summary)

    # -- plain texts, as they are served ------------------------------------------------------------------------

    def _served(self, cell: Cell) -> bool:
        """Whether a cell is scored by plain texts through the one function that serves them."""
        return (
            self.work.plain_texts
            and self.mixture is not None
            and isinstance(self.mixture.router, KeyedRouter)
            and not self.method.layers.selects
            and cell.mode != "untrained"
        )

    def _plain(self, cell: Cell) -> bool:
        """Whether a cell of a method without keys is scored by plain texts: behind the bank's prompt, nothing named."""
        return (
            self.work.plain_texts
            and self.mixture is not None
            and self.method.stages is not Stages.APART
            and (is_plain(cell.mode) or cell.mode == CHOICE)
        )

    def _score_plain(self, cell: Cell) -> None:
        """Rank the labels of all tasks learned so far, equal words once, and note what is written freely."""
        spec, began = self.work.spec(cell.task), time.monotonic()
        assert self.mixture is not None
        self._set_up(cell, None)
        prompter = self._prompter(self.mixture)
        labels = () if spec.free_text else prompter.all_labels() or tuple(spec.label_texts)
        rows = self._texts(cell)
        examples = plain_examples(prompter, rows, labels, spec.max_answer_tokens)
        on_rows = self._telling(cell, len(rows))
        tokens = prompter.labels(labels, chat=prompter.chat_bank)
        share = self._answers(cell, examples, None, None, on_rows, tokens or None)
        found = [by_label(one, labels, str(spec.metric)) for one in merge(self.ranks.gather(share))]
        self._write(cell, found, 0, {}, began)

    def _texts(self, cell: Cell) -> list[PlainRow]:
        """The cell's rows as they are asked: conversations without their last turn, which is the answer."""
        rows = self.plain_rows(cell.task, cell.split)
        return [
            PlainRow(row.number, row.text, row.target, row.turns[:-1], row.references, row.fields)
            for row in (rows if cell.places is None else [rows[place] for place in cell.places])
        ]

    def _score_served(self, cell: Cell) -> None:
        mixture, spec, began = self.mixture, self.work.spec(cell.task), time.monotonic()
        assert mixture is not None
        self._set_up(cell, None)
        answering = self._answering(mixture)
        scorer = ServedScore(
            answering,
            str(spec.metric),
            None if spec.free_text else tuple(spec.label_texts),
            task=cell.task if cell.mode == "oracle" else None,
            question=spec.prompt.question if ".paraphrase" in cell.task else None,
        )
        rows = self._texts(cell)
        reused = self.ranks.gather(self._rescored(cell, scorer, rows) if self.ranks.rank == 0 else [])[0]
        known = {prediction.row for prediction in reused}
        rest = [row for row in rows if row.number not in known]
        features: dict[int, Tensor] = {}
        on_rows = self._telling(cell, len(rest))
        with memory_watched(f"scoring task {cell.task!r}", LESS_TEXT):
            share = scorer.score(
                rest,
                batch_size=self.work.evaluation_batch_size,
                rank=self.ranks.rank,
                world=self.ranks.world,
                all_done=self._all_done if mixture.routing.whole_passes else bool,
                on_features=features.__setitem__ if cell.features is not None and not reused else None,
                on_rows=on_rows,
            )
        self._write(cell, merge([reused, *self.ranks.gather(share)]), len(reused), features, began)

    def _answering(self, mixture: Mixture) -> Answering:
        """The bank of this stage as it will be served."""
        router = mixture.router
        assert isinstance(router, KeyedRouter)
        answer = self.work.settings.answer
        eos_id, pad_id = int(self.tokenizer.eos_token_id), int(self.tokenizer.pad_token_id)
        return Answering(
            mixture,
            Decoder(self.model, pad_id=pad_id, eos_id=eos_id, encoder_decoder=self.encoder_decoder),
            self._prompter(mixture),
            router,
            kind=answer.evidence,
            beta=None if answer.beta == "calibrated" else float(answer.beta),
            device=self.device,
            rows_TN=mean_rows(self.adapters),
            full_forward=mixture.routing.whole_passes,
            agree=self._largest if mixture.routing.whole_passes else None,
        )

    def _prompter(self, mixture: Mixture) -> Prompter:
        """Of the bank: a row of it may have learned several tasks, in this stage or in one of the bank below."""
        entry = self.work.entry
        learned = dict.fromkeys([*mixture.task_names, *(self.work.rows or {}), *self.work.entries])
        return Prompter(
            {name: entry(name) for name in mixture.task_names},
            BANK_TEMPLATE,
            self.tokenizer,
            encoder_decoder=self.encoder_decoder,
            positions=getattr(self.model.config, "max_position_embeddings", None),
            prompt_format=self.work.settings.prompt_format,
            prefix=self.prefix,
            learned={name: entry(name) for name in learned},
        )

    def _rescored(self, cell: Cell, scorer: ServedScore, rows: Sequence[PlainRow]) -> list[Prediction]:
        """Predictions of earlier scores whose rows have the same gates as then, decided with today's keys."""
        numbers = [row.number for row in rows]
        path = None if cell.features is None else Path(cell.features)
        features = None if path is None or not cell.before else read_features(path, numbers)
        mixture = self.mixture
        if features is None or mixture is None:
            return []
        router = scorer.answering.router
        named = scorer.task is not None
        gates = router.to("cpu").gates(features, len(numbers))
        if scorer.task is not None:
            gates = mixture.one_hot(mixture.task_names.index(scorer.task), len(numbers)).cpu()
        changed = [] if mixture.disabled is None else tasks_using(self.adapters, mixture.disabled)
        before = [Path(folder) for folder in cell.before]
        found = unchanged(before, numbers, gates, noted=not named, changed=changed)
        return rescored(
            scorer, found, dict(zip(numbers, features, strict=True)), {row.number: row.text for row in rows}
        )

    def _largest(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        return int(max(self.ranks.gather(number)))

    # -- rows behind the prompts of their own tasks ---------------------------------------------------------------

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
        self.mixture.disable_adapter(None if out == cell.mode else int(out) - 1)
        if self.method.layers.selects:
            self.mixture.use_selectors(row is None)  # the task's row alone, or none, is what the others mean

    def _reused(self, cell: Cell, examples: Sequence[Example], row: int | None) -> list[Prediction]:
        """Predictions of earlier scores that hold for this cell too."""
        mixture = self.mixture
        if mixture is None or mixture.router is None or not cell.before or self.work.plain_texts:
            return []
        rows = [example.row for example in examples]
        path = None if cell.features is None else Path(cell.features)
        gates = gates_from(mixture.router, path, rows) if row is None else mixture.one_hot(row, len(rows)).cpu()
        changed = [] if mixture.disabled is None else tasks_using(self.adapters, mixture.disabled)
        before = [Path(folder) for folder in cell.before]
        return [] if gates is None else unchanged(before, rows, gates, noted=row is None, changed=changed)

    def _answers(
        self,
        cell: Cell,
        examples: Sequence[Example],
        row: int | None,
        features: dict[int, Tensor] | None,
        on_rows: Callable[[int], None],
        labels: Sequence[Sequence[int]] | None = None,
    ) -> list[Prediction]:
        """This rank's share of the predictions; what the router read of its rows goes into ``features``.

        ``labels``: tokens of those to rank, in place of the task's own.
        """
        spec = self.work.spec(cell.task)
        with memory_watched(f"scoring task {cell.task!r}", LESS_TEXT):
            return score_task(
                self.model,
                examples,
                tokenizer=self.tokenizer,
                pad_id=self.tokenizer.pad_token_id,
                eos_id=self.tokenizer.eos_token_id,
                batch_size=self.work.evaluation_batch_size,
                labels=self._label_tokens(spec) if labels is None else labels,
                metric=str(spec.metric),
                max_new_tokens=spec.max_answer_tokens if spec.free_text else None,
                task_gate_row=row,
                tasks=0 if self.mixture is None else len(self.mixture.task_names),
                selectors=self.method.layers.selects,
                encoder_decoder=self.encoder_decoder,
                rank=self.ranks.rank,
                world=self.ranks.world,
                device=self.device,
                forward=self.forward_for(examples),
                all_done=self._all_done,
                on_features=None if features is None else features.__setitem__,
                on_rows=on_rows,
            )

    def _label_tokens(self, spec: TaskSpec) -> list[tuple[int, ...]] | None:
        if spec.free_text:
            return None
        split = self.work.settings.prompt_format.text_alone
        return label_tokens(spec, self.tokenizer, self.encoder_decoder, split=split)

    def _all_done(self, done: bool) -> bool:
        return float(self.ranks.sum(torch.tensor([float(done)], device=self.device))) == self.ranks.world
