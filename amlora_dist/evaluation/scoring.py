"""Score one task: greedy answers without task identity, and the ranking of the task's own labels next to them.

Batches are formed once from all examples, by length, and dealt out to the ranks: which rows share a forward pass does
not depend on the number of ranks, so neither do the results. Every rank makes the same number of passes (ZeRO-3 hangs
otherwise): where batches run short a rank scores a dummy row, which counts nowhere.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from amlora_dist.adapters.selector_layer import mean_over_prompt
from amlora_dist.errors import UserError
from amlora_dist.evaluation.decoding import Decoder, Forward, check_room
from amlora_dist.evaluation.label_plan import LabelPlan, plan_labels
from amlora_dist.evaluation.ranking import Room, label_scores
from amlora_dist.evaluation.text_metrics import METRICS, NAMES, score_of
from amlora_dist.files import write_bytes
from amlora_dist.tasks.batches import Example, Side, collate_prompts

if TYPE_CHECKING:
    from amlora_dist.adapters.gate_context import Selection
    from amlora_dist.evaluation.plain_choice import Way

ZERO_ROW = -1
"""Stands for no row at all: every adapter gets gate 0 and the model answers as the base model does."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the model answered to one row, and how it counts."""

    row: int
    """1-based number of the row in its source."""
    answer: str
    """The right answer."""
    output: str
    """Greedy output up to the end token, over the whole vocabulary, without task identity."""
    ended: bool
    """Whether the end token came before the limit of new tokens; otherwise the output would have gone on."""
    correct: float
    """The task's metric on ``output``, 0 to 1; a labelled task's output that did not end is wrong."""
    ranked: int | None = None
    """Index of the label with the highest summed log-likelihood; None for free text."""
    ranked_correct: bool | None = None
    loglikelihoods: list[float] | None = None
    """Summed log-likelihood of each label, nats."""
    gates: list[float] | None = None
    """The router's weight of each task; None where the gate was given or there is no router. Of
    selectors the mean weight over layers and the prompt's tokens."""
    zeros: float | None = None
    """Of selectors: share of those weights that is exactly 0."""
    route: str | None = None
    """The task that the text was routed to. This and what follows: of plain texts, scored as they are served."""
    labels: list[str] | None = None
    """Its labels, to which ``loglikelihoods`` belong then."""
    served: str | None = None
    """The served answer, which ``correct`` is about then; ``output`` is what the model writes freely."""
    keys: list[float] | None = None
    """Log posterior of each label by the keys."""
    greedy_correct: float | None = None
    """The task's metric on ``output``."""
    model_correct: float | None = None
    """The task's metric on the answer that the model's evidence alone gives."""
    keys_correct: float | None = None
    """The task's metric on the answer that the keys' evidence alone gives."""
    foreign: float | None = None
    """How much more the text looks like the background than like the bank's tasks, log odds."""
    keys_elsewhere: bool | None = None
    """Whether the label that the keys like best of all is another task's than the routed one's."""
    references: list[str] | None = None
    """Of free text: further right answers; the best counts."""

    @property
    def answers(self) -> tuple[str, ...]:
        """All right answers."""
        return (self.answer, *(self.references or ()))

    @property
    def given(self) -> str:
        """The answer that counts: the served one where the text was asked plainly, else the greedy output."""
        return self.output if self.served is None else self.served


def score_task(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    tokenizer: Any,
    pad_id: int,
    eos_id: int,
    batch_size: int,
    labels: Sequence[Sequence[int]] | None = None,
    metric: str = "accuracy",
    max_new_tokens: int | None = None,
    task_gate_row: int | None = None,
    tasks: int = 0,
    selectors: bool = False,
    encoder_decoder: bool = False,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
    forward: Forward | None = None,
    all_done: Callable[[bool], bool] | None = None,
    on_features: Callable[[int, Tensor], None] | None = None,
    on_rows: Callable[[int], None] | None = None,
) -> list[Prediction]:
    """Score this rank's share of ``examples``; `merge` joins the shares.

    Args:
        labels: token ids of the task's labels without EOS, in the order of ``Example.label``; None for free text.
        metric: a name of `NAMES`.
        max_new_tokens: longest free-text answer, with EOS; labelled tasks decode one token more than their longest
            label, so that every output that could be a label has room to end.
        task_gate_row: give every prompt the row of this task (the oracle), or `ZERO_ROW`, instead of the router's gate.
        tasks: rows of the bank; 0 means a plain transformer, which gets no routing arguments.
        selectors: the layers weigh the adapters themselves: note what they chose.
        forward: called instead of ``model``, with the same keyword arguments (a DeepSpeed engine, or what keeps states).
        all_done: tells whether *all* ranks are done, given whether this one is. Without it a single process stops as
            soon as its rows have ended, and several processes decode a fixed number of tokens.
        on_features: called with the number of each row of this rank's share and the features (d,) that the router read.
        on_rows: called after each batch with the number of its rows.

    Raises:
        UserError: an unknown metric, unusable labels, or prompts without room for an answer.
    """
    if metric not in NAMES:
        raise UserError(f"metric: found {metric!r}, expected one of {', '.join(NAMES)}")
    if labels is None and max_new_tokens is None:
        raise UserError("max_answer_tokens: found nothing, expected a limit for the answers of a free-text task")
    if not examples:
        return []
    plan = plan_labels(labels, eos_id) if labels is not None else None
    steps = max(map(len, labels)) + 1 if labels is not None else int(max_new_tokens or 0)
    longest = max(len(example.prompt) for example in examples)
    decoder = Decoder(model, pad_id=pad_id, eos_id=eos_id, encoder_decoder=encoder_decoder, forward=forward)
    check_room(decoder.config, longest, steps)
    if all_done is None and world == 1:
        all_done = bool
    predictions: list[Prediction] = []
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for indices, counts in deal(examples, batch_size, rank, world):
                batch = [examples[i] for i in indices]
                scored = _score_batch(
                    decoder,
                    batch,
                    plan,
                    steps=steps,
                    room=Room(longest, batch_size),
                    routing=_RoutingArguments(tasks, task_gate_row, selectors),
                    device=device,
                    all_done=all_done,
                )
                if counts:
                    predictions += _predictions(batch, scored, tokenizer, metric)
                    if on_features is not None and scored.features is not None:
                        for example, features_D in zip(batch, scored.features.float().cpu(), strict=True):
                            on_features(example.row, features_D)
                    if on_rows is not None:
                        on_rows(len(batch))
    finally:
        model.train(was_training)
    return sorted(predictions, key=lambda prediction: prediction.row)


def deal(examples: Sequence[Example], batch_size: int, rank: int, world: int) -> list[tuple[list[int], bool]]:
    """This rank's batches, as indices into ``examples`` and whether they count.

    Longest prompts first (what does not fit in memory shows at once); batch i belongs to rank ``i % world``, and the
    last round is filled up with one-row batches that do not count.
    """
    return deal_lengths([len(example.prompt) for example in examples], batch_size, rank, world)


def deal_lengths(lengths: Sequence[int], batch_size: int, rank: int, world: int) -> list[tuple[list[int], bool]]:
    """As ``deal``, of rows of these lengths."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    missing = -len(batches) % world
    dealt = [(batch, True) for batch in batches] + [([order[-1]], False)] * missing
    return dealt[rank::world]


def merge(shares: Iterable[Sequence[Prediction]]) -> list[Prediction]:
    """All ranks' predictions in the order of their rows."""
    return sorted((p for share in shares for p in share), key=lambda prediction: prediction.row)


def summarise(predictions: Sequence[Prediction]) -> dict[str, float | int | None]:
    """Means over rows, 0 to 1; what is undefined (no rows, no labels) is None.

    ``accuracy`` is the task's metric on the served answers (on greedy outputs where each row had its own task's prompt),
    ``ranked_accuracy`` the share of rows whose right label is the likeliest of the task's, and ``rows`` their number. Of
    served answers also ``greedy_accuracy`` (what is written freely), ``model_accuracy`` and ``keys_accuracy`` (one kind of
    evidence), and ``keys_elsewhere`` (rows of which the keys alone would take another task's label).
    """
    ranked = [p.ranked_correct for p in predictions if p.ranked_correct is not None]
    found: dict[str, float | int | None] = {
        "accuracy": math.fsum(p.correct for p in predictions) / len(predictions) if predictions else None,
        "ranked_accuracy": sum(ranked) / len(ranked) if ranked else None,
        "rows": len(predictions),
    }
    if predictions and all(p.served is not None for p in predictions):
        for key in ("greedy_correct", "model_correct", "keys_correct"):
            values = [float(value) for p in predictions if (value := getattr(p, key)) is not None]
            found[key.replace("correct", "accuracy")] = math.fsum(values) / len(values) if values else None
        if any(p.keys_elsewhere is not None for p in predictions):
            found["keys_elsewhere"] = sum(bool(p.keys_elsewhere) for p in predictions)
    return found


def by_label(one: Prediction, labels: Sequence[str], metric: str) -> Prediction:
    """A prediction that counts by the words of the likeliest of ``labels``; what was written is next to it.

    Of free text, without labels, what was written is the answer.
    """
    served = one.output if one.ranked is None else labels[one.ranked]
    correct = one.correct if one.ranked is None else METRICS[metric](served, one.answer)
    return replace(
        one, served=served, correct=correct, model_correct=correct, greedy_correct=one.correct, labels=list(labels) or None
    )


def in_way(one: Prediction, way: Way) -> Prediction:
    """A prediction of ``by_label`` that counts by this way of answering plain text."""
    if way == "ranks" or one.greedy_correct is None:
        return one
    return replace(one, served=one.output, correct=one.greedy_correct)


def routing_accuracy(predictions: Sequence[Prediction], task: str, tasks: Sequence[str]) -> float | None:
    """Share of plain texts that were routed to their own task; None where the bank does not have it, or nothing was."""
    if task not in tasks or not predictions or all(p.route is None for p in predictions):
        return None
    return sum(p.route == task for p in predictions) / len(predictions)


def write_predictions(path: Path, predictions: Sequence[Prediction]) -> None:
    """One JSON object a line; the file appears whole or not at all."""
    write_bytes(path, "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in predictions).encode())


def read_predictions(path: Path) -> list[Prediction]:
    """What `write_predictions` wrote.

    Raises:
        UserError: a line is not a prediction; the message names the file and the line.
    """
    predictions = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            predictions.append(Prediction(**json.loads(line)))
        except (json.JSONDecodeError, TypeError) as error:
            raise UserError(f"{path}, line {number}: not a prediction ({error})") from error
    return predictions


@dataclass(slots=True)
class _RoutingArguments:
    """The routing arguments of a forward call, and what the router answered."""

    tasks: int
    row: int | None
    selectors: bool = False
    gates: Tensor | None = None
    """(B, T), once the router has been asked."""
    features: Tensor | None = None
    """(B, d) that it read, if it reads any."""
    selected: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Of each layer with a selector: its mean weights (B, T), and the share of each that is 0."""

    def arguments(self, prompt_mask: Tensor) -> dict[str, Any]:
        if not self.tasks:
            return {}
        if self.row is None:
            select = {"on_select": partial(self._select, prompt_mask)} if self.selectors else {}
            return {"prompt_mask": prompt_mask, "on_route": self._note, **select}
        gate = torch.zeros(prompt_mask.shape[0], self.tasks, device=prompt_mask.device)
        if self.row != ZERO_ROW:
            gate[:, self.row] = 1.0
        return {"prompt_mask": prompt_mask, "task_gate": gate}

    def _note(self, features_BD: Tensor | None, gate_BT: Tensor | None) -> None:
        self.features, self.gates = features_BD, gate_BT

    def _select(self, mask_BS: Tensor, _path: str, selection: Selection) -> None:
        weights = selection.weights
        zeros = (weights == 0).to(weights)
        self.selected.append((mean_over_prompt(weights, mask_BS), mean_over_prompt(zeros, mask_BS)))

    def answers(self) -> tuple[list[list[float]] | None, list[float] | None]:
        """Gates of each row, and of selectors the share of zeros."""
        if not self.selected:
            return None if self.gates is None else self.gates.float().tolist(), None
        means, zeros = (torch.stack(found).float().mean(dim=0) for found in zip(*self.selected, strict=True))
        return means.tolist(), zeros.mean(dim=1).tolist()


@dataclass(slots=True)
class _Scored:
    """Raw results of one batch."""

    outputs: list[tuple[list[int], bool]]
    scores: list[list[float]] | None
    gates: list[list[float]] | None
    zeros: list[float] | None
    features: Tensor | None


def _score_batch(
    decoder: Decoder,
    batch: Sequence[Example],
    plan: LabelPlan | None,
    *,
    steps: int,
    room: Room,
    routing: _RoutingArguments,
    device: torch.device | str,
    all_done: Callable[[bool], bool] | None,
) -> _Scored:
    # Causal answers follow the last column; encoders with absolute positions count from the first.
    side: Side = "right" if decoder.encoder_decoder else "left"
    tensors = {k: t.to(device) for k, t in collate_prompts(batch, pad_id=decoder.pad_id, side=side).items()}
    state = decoder.prefill(tensors["input_ids"], tensors["attention_mask"], **routing.arguments(tensors["prompt_mask"]))
    gates, zeros = routing.answers()
    scores = None
    if plan is not None:
        scores = label_scores(decoder, state, plan, room).tolist()
    outputs = decoder.greedy(state, steps, all_done)
    return _Scored(outputs, scores, gates, zeros, routing.features)


def _predictions(batch: Sequence[Example], scored: _Scored, tokenizer: Any, metric: str) -> list[Prediction]:
    texts = [
        tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
        for tokens, _ in scored.outputs
    ]
    made = []
    for index, (example, text) in enumerate(zip(batch, texts, strict=True)):
        ended = scored.outputs[index][1]
        scores = scored.scores[index] if scored.scores else None
        ranked = scores.index(max(scores)) if scores else None
        counts = ended or scores is None
        made.append(
            Prediction(
                row=example.row,
                answer=example.answer,
                output=text,
                ended=ended,
                correct=score_of(metric, text, example.answers, example.source) if counts else 0.0,
                ranked=ranked,
                ranked_correct=None if ranked is None else ranked == example.label,
                loglikelihoods=scores,
                gates=scored.gates[index] if scored.gates else None,
                zeros=scored.zeros[index] if scored.zeros else None,
                references=list(example.references) or None,
            )
        )
    return made
