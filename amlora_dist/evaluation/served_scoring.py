"""Score plain texts as they are served: the text alone is given, and every answer comes through ``answering``.

A row counts by the words of its served answer. With it come the answers of the model alone and of the keys alone to
the same rows, what the model writes if nothing limits it, and the best of the true task's labels.

Rows whose gates are what they were at an earlier score of the same bank, or of its beginnings, keep what the model gave for
them (``unchanged``); the decision is made again with today's keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from amlora_dist.evaluation.answering import Answered, Answering, Begun, EvidenceKind, Weighed
from amlora_dist.evaluation.ranking import finished
from amlora_dist.evaluation.requests import Request
from amlora_dist.evaluation.scoring import Prediction, deal_lengths
from amlora_dist.evaluation.text_metrics import score_of
from amlora_dist.tasks.conversations import Turn

KINDS: tuple[EvidenceKind, ...] = ("both", "model", "keys")


@dataclass(frozen=True, slots=True)
class PlainRow:
    """A row of a test set: its number in the source, its text, and the right answer."""

    number: int
    text: str
    answer: str
    turns: tuple[Turn, ...] = ()
    """Of a conversation: all of it up to the answer."""
    references: tuple[str, ...] = ()
    """Of free text: further right answers."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """That its text was put together of, for templates that read them."""


@dataclass(slots=True)
class ServedScore:
    """Scores one task's rows by one bank.

    Args:
        answering: the bank.
        metric: of the task.
        labels: the task's; None for free text.
        task: named to the bank (the oracle); None: the text alone is given.
        question: asked of every text, in place of the routed task's own.
    """

    answering: Answering
    metric: str
    labels: tuple[str, ...] | None
    task: str | None = None
    question: str | None = None

    def score(
        self,
        rows: Sequence[PlainRow],
        *,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        all_done: Callable[[bool], bool] = bool,
        on_features: Callable[[int, Tensor], None] | None = None,
        on_rows: Callable[[int], None] | None = None,
    ) -> list[Prediction]:
        """This rank's share of the predictions, in the order of their rows; which rows share a pass does not depend on
        the number of ranks. ``on_rows`` is called after each batch with the number of its rows."""
        if not rows:
            return []
        requests = [self._request(place, row) for place, row in enumerate(rows)]
        self.answering.prompter.read(requests)
        made: list[Prediction] = []
        for places, counts in deal_lengths([len(r.text_ids) for r in requests], batch_size, rank, world):
            batch = [self._request(place, rows[place]) for place in places]
            ranked: dict[int, Weighed] = {}
            begun: list[Begun] = []

            def on_batch(
                one: Begun, ranked: dict[int, Weighed] = ranked, begun: list[Begun] = begun
            ) -> None:
                begun.append(one)
                ranked |= self._of_true_labels(one)

            work = self.answering.answering(
                batch, batch_size=len(batch), write_all=True, all_done=all_done, on_batch=on_batch
            )
            found = finished(work)
            if not counts:
                continue
            row_of = {id(request): row for row, request in enumerate(begun[0].requests)}
            for place, one in zip(places, found, strict=True):
                row = row_of[id(one.request)]
                made.append(self._prediction(rows[place], one, begun[0], row, ranked.get(row)))
                if on_features is not None:
                    on_features(rows[place].number, begun[0].features_BF[row].float().cpu())
            if on_rows is not None:
                on_rows(len(places))
        return sorted(made, key=lambda prediction: prediction.row)

    def _request(self, place: int, row: PlainRow) -> Request:
        gate = None
        if self.task is not None:
            mixture = self.answering.mixture
            gate = mixture.one_hot(mixture.task_names.index(self.task), 1)[0]
        unasked = False if self.task is None else None  # a task's own rows that cannot be asked are a fault of the task
        return Request(
            place, row.text, self.question, self.task, gate=gate, turns=row.turns, fields=row.fields, unasked=unasked
        )

    def _of_true_labels(self, begun: Begun) -> dict[int, Weighed]:
        """What the model says of the true task's labels, where the routed task has others."""
        if self.labels is None:
            return {}
        wanted = [None if request.labels == self.labels else self.labels for request in begun.requests]
        found = self.answering.weigh(begun, wanted)
        return {row: weighed for row, weighed in enumerate(found) if weighed is not None}

    def _prediction(
        self, row: PlainRow, one: Answered, begun: Begun, place: int, ranked: Weighed | None
    ) -> Prediction:
        if one.request.unasked:  # a server refuses it
            one, ranked = replace(one, weighed=None, written=None), None
        written, ended = one.written or ("", False)
        true = ranked if ranked is not None else one.weighed
        gates = begun.gate_BT[place].float().tolist() if self.task is None else None
        bare = Prediction(
            row=row.number, answer=row.answer, output=written, ended=ended, correct=0.0, gates=gates,
            loglikelihoods=None if one.weighed is None else list(one.weighed.model),
            route=one.request.task, labels=None if one.weighed is None else list(one.weighed.labels),
            references=list(row.references) or None,
        )  # fmt: skip
        if self.labels is not None and true is not None:
            best = true.best("model")
            bare = replace(bare, ranked=best, ranked_correct=self.labels[best] == row.answer)
        return self.decided(bare, row.text, one.weighed, one.foreign, begun.best_by_keys[place])

    def decided(
        self, before: Prediction, asked: str, weighed: Weighed | None, foreign: float | None, by_keys: str | None
    ) -> Prediction:
        """A prediction with the served answer, and those of each kind of evidence, from what the model gave for a row
        (``asked``: its text)."""
        kind = self.answering.kind
        if weighed is None:
            answers = dict.fromkeys(KINDS, before.output)
        else:
            answers = {one: weighed.labels[weighed.best(one)] for one in KINDS}
        counts = {one: self._correct(text, before, asked, written=weighed is None) for one, text in answers.items()}
        return replace(
            before, served=answers[kind], correct=counts[kind],
            greedy_correct=self._correct(before.output, before, asked, written=True),
            model_correct=counts["model"], keys_correct=counts["keys"],
            keys=None if weighed is None or weighed.keys is None else list(weighed.keys),
            foreign=foreign, keys_elsewhere=None if by_keys is None else by_keys != before.route,
        )  # fmt: skip

    def _correct(self, text: str, of: Prediction, asked: str, *, written: bool) -> float:
        """The task's metric; a labelled task's answer that was written and did not end is wrong."""
        if written and self.labels is not None and not of.ended:
            return 0.0
        return score_of(self.metric, text, of.answers, asked)


def rescored(
    scorer: ServedScore, before: Sequence[Prediction], features: Mapping[int, Tensor], texts: Mapping[int, str]
) -> list[Prediction]:
    """Predictions of an earlier score whose gates still hold, decided again with today's keys.

    Args:
        scorer: of the cell.
        before: of ``unchanged``; their gates are today's.
        features: of each row (d,).
        texts: of each row.
    """
    answering = scorer.answering
    if not before:
        return []
    evidence = answering.router.evidence(torch.stack([features[one.row] for one in before]).to(answering.device))
    by_keys = answering.by_keys(evidence)
    made = []
    for place, one in enumerate(before):
        weighed = None
        if one.loglikelihoods is not None and one.labels is not None and one.route is not None:
            keys = answering.router.of_labels(
                evidence.labels_BJ[place : place + 1], answering.router.tasks.index(one.route)
            )
            weighed = Weighed(
                tuple(one.labels), tuple(one.loglikelihoods), None if keys is None else tuple(keys[0].tolist()),
                answering.beta_of(one.route),
            )
        score = float(evidence.foreign_B[place])
        foreign = None if score == -torch.inf else score
        made.append(scorer.decided(one, texts[one.row], weighed, foreign, by_keys[place]))
    return made
