"""From plain texts to answers: the one way in which a bank answers, whoever asks.

Scoring, ``AMLoRAModel``, the server, MLflow's loader and the commands of the shell all come through here, so that what is
scored is what is served::

    text -> read -> evidence of the keys -> route -> the routed task's own prompt -> labels weighed, or text written

``begin`` reads texts, routes them and prepares their prompts; ``weigh`` gives labels to the rows whose task has some;
what is left decodes on from the same state. A caller may name the task, or give labels or a question; nothing else of a
request decides anything.

For banks whose router is a ``KeyedRouter``; others have no evidence and are answered as before (``inference``).

Shapes in names: B texts, L tokens of texts, R tokens behind them, T tasks, J keys.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from amlora_dist.adapters.keyed_router import Evidence, KeyedRouter
from amlora_dist.adapters.reading import Reading, read_texts, reusable_trunk
from amlora_dist.errors import UserError
from amlora_dist.evaluation.decoding import Decoder, Prefilled, picked
from amlora_dist.evaluation.field_texts import refuse_missing
from amlora_dist.evaluation.ranking import Room, choosing, count_passes, finished, scoring
from amlora_dist.evaluation.requests import Prompter, Request, Route, check_counts, routes

if TYPE_CHECKING:
    from amlora_dist.adapters.inject import Mixture

EvidenceKind = Literal["both", "model", "keys"]
Agree = Callable[[int], int]
"""Gives every rank the largest of the ranks' numbers."""


@dataclass(frozen=True, slots=True)
class Weighed:
    """What is known of the labels of one text."""

    labels: tuple[str, ...]
    model: tuple[float, ...]
    """Summed log-likelihood of each label behind the prompt, nats."""
    keys: tuple[float, ...] | None
    """Log posterior of each label by the keys, given the task; None where its labels have no keys."""
    beta: float = 0.0
    """Weight of the keys' evidence next to the model's."""

    def needs_model(self, kind: EvidenceKind) -> bool:
        """Whether the model has a say in which label wins."""
        return kind != "keys" or self.keys is None

    def score(self, kind: EvidenceKind) -> list[float]:
        """What the evidence says of each label: log p_model + beta log p_keys, or one of them."""
        if kind == "model" or self.keys is None:
            return list(self.model)
        if kind == "keys":
            return list(self.keys)
        return [model + self.beta * keys for model, keys in zip(self.model, self.keys, strict=True)]

    def best(self, kind: EvidenceKind) -> int:
        """The place of the label that wins; of equals the first."""
        score = self.score(kind)
        return score.index(max(score))

    def decided(self, kind: EvidenceKind) -> tuple[str, dict[str, float]]:
        """The label that wins, and the share of each: softmax over what the evidence says."""
        shares = torch.softmax(torch.tensor(self.score(kind), dtype=torch.float64), dim=0).tolist()
        return self.labels[self.best(kind)], dict(zip(self.labels, shares, strict=True))


@dataclass(frozen=True, slots=True)
class Decided:
    """The label that is served, and what was asked for with it."""

    label: str
    shares: dict[str, float] = field(default_factory=dict)
    weighed: Weighed | None = None


@dataclass(slots=True)
class Answered:
    """What a bank answers to one text."""

    request: Request
    text: str
    """The served answer: a label's words where the task has labels, else what was written."""
    ended: bool
    """Whether it came to its end within the limit of new tokens."""
    route: Route
    label: str | None = None
    """None where there are no labels to choose from."""
    shares: dict[str, float] = field(default_factory=dict)
    """Of each label: softmax over what the evidence says; empty where only the best one was asked for."""
    weighed: Weighed | None = None
    foreign: float | None = None
    """How much more the text looks like the background than like the bank's tasks, log odds."""
    written: tuple[str, bool] | None = None
    """What was written freely, and whether it ended; None where nothing was."""


@dataclass(slots=True)
class Prepared:
    """Texts that were read and routed, each with the prompt of its task: what an engine elsewhere needs."""

    requests: list[Request]
    gate_BT: Tensor
    evidence: Evidence
    routes: list[Route]

    @property
    def foreign(self) -> list[float | None]:
        """How foreign each text looks; None without a background."""
        return [None if score == -torch.inf else score for score in self.evidence.foreign_B.tolist()]


@dataclass(slots=True)
class Begun(Prepared):
    """Prepared texts whose prompts were read here: the rows of ``state`` are those of ``requests``."""

    state: Prefilled
    features_BF: Tensor
    best_by_keys: list[str | None]
    """The task of the label that the keys like best among all of the bank's; None without evidence."""


class Answering:
    """A bank in its base model, ready to answer. Safe for several threads, but for ``full_forward``.

    Args:
        mixture: of the model.
        decoder: of the model.
        prompter: of the bank.
        router: of the bank.
        kind: which evidence decides between the labels of a task.
        beta: weight of the keys' evidence; None: the one that the router has fitted for each task.
        device: where the model is.
        full_forward: never end a pass early (ZeRO-3).
        agree: makes every rank do as many passes as the others (ZeRO-3).
    """

    def __init__(
        self,
        mixture: Mixture,
        decoder: Decoder,
        prompter: Prompter,
        router: KeyedRouter,
        *,
        kind: EvidenceKind = "both",
        beta: float | None = None,
        device: torch.device,
        rows_TN: Tensor,
        full_forward: bool = False,
        agree: Agree | None = None,
    ) -> None:
        self.mixture, self.decoder, self.prompter, self.device = mixture, decoder, prompter, device
        self.router = router.to(device)
        self.kind: EvidenceKind = kind
        self._beta = beta
        self.rows_TN = rows_TN
        self._whole = full_forward
        self._agree = agree or (lambda number: number)
        self._trunk = None if full_forward else reusable_trunk(mixture)

    def beta_of(self, task: str | None) -> float:
        """Weight of the keys' evidence for the labels of a task."""
        if self._beta is not None:
            return self._beta
        return self.router.betas[self.router.tasks.index(task)] if task in self.router.tasks else self.router.beta

    # ---- the steps --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def read(self, requests: Sequence[Request]) -> Reading:
        """One pass over the texts alone."""
        self.prompter.read([request for request in requests if not request.text_ids])
        ends = self.prompter.ends
        ids = [request.text_ids for request in requests]
        inner = [len(one) - len(ends.before) - len(ends.after) for one in ids]
        text = [(0,) * len(ends.before) + (1,) * count + (0,) * len(ends.after) for count in inner]
        left = not self.decoder.encoder_decoder
        ids_BL, mask_BL = self._padded(ids, left, self.decoder.pad_id), self._padded([(1,) * len(o) for o in ids], left, 0)
        text_BL = self._padded(text, left, 0)
        positions = self.decoder.positions(mask_BL)
        return read_texts(self.mixture, self._trunk, ids_BL, mask_BL, text_BL, positions, full_forward=self._whole)

    def evidence(self, reading: Reading, router: KeyedRouter | None = None) -> Evidence:
        """What the keys say of texts that were read; ``router`` in place of the bank's own."""
        return (router or self.router).evidence(reading.features_BF)

    def route(self, requests: Sequence[Request], evidence: Evidence) -> Tensor:
        """Give each request its gate and its task, unless its caller did; returns the gates (B, T).

        A text that belongs to no task has a gate of zeros and no task: the base model answers it.
        """
        best = evidence.gates_BT.argmax(dim=1).tolist()
        none = (evidence.gates_BT.sum(dim=1) == 0).tolist()
        for place, request in enumerate(requests):
            if request.gate is None:
                request.gate = evidence.gates_BT[place]
            if request.task is None and not none[place]:
                request.task = self.mixture.task_names[best[place]]
        return torch.stack([request.gate for request in requests if request.gate is not None])

    def begin(
        self, requests: Sequence[Request], *, router: KeyedRouter | None = None, reading: Reading | None = None
    ) -> Begun:
        """Read texts, route them, and read their prompts.

        Args:
            requests: of one batch; their ``task``, ``gate``, ``tokens`` and ``labels`` are filled in.
            router: in place of the bank's own.
            reading: of these requests, if they were read before.

        Raises:
            UserError: an empty text, no room for a prompt.
            RefusedTextsError: prompts that read fields which their texts have not.
        """
        requests = list(requests)
        reading = self.read(requests) if reading is None else reading
        known = self.prepare(requests, reading, router=router)
        with torch.no_grad():
            state = self._prefilled(requests, reading, known.gate_BT)
        best = self.by_keys(known.evidence)
        return Begun(requests, known.gate_BT, known.evidence, known.routes, state, reading.features_BF, best)

    @torch.no_grad()
    def prepare(self, requests: list[Request], reading: Reading, *, router: KeyedRouter | None = None) -> Prepared:
        """Route texts that were read, and put the prompts of their tasks around them; see ``begin``."""
        evidence = self.evidence(reading, router)
        gate_BT = self.route(requests, evidence)
        refuse_missing([request for request in requests if request.unasked is None], self.prompter.entries)
        for request in requests:
            if request.labels is None and request.task is not None and not request.free:
                entry = self.prompter.entries.get(request.task)
                request.labels = None if entry is None or entry.labels is None else tuple(entry.labels)
            limit = self.prompter.answer_limit(request.task) if request.labels else self.prompter.limit_of(request)
            try:
                self.prompter.ask(request, new_tokens=limit)
            except UserError:  # the task it was routed to wants fields, or more room, than the text has
                if request.unasked is None:
                    raise
                request.unasked = True
                task, request.task = request.task, None
                self.prompter.ask(request, new_tokens=limit)
                request.task = task
        return Prepared(requests, gate_BT, evidence, routes(gate_BT, self.mixture.task_names, self.rows_TN))

    def by_keys(self, evidence: Evidence) -> list[str | None]:
        """The task of the label that the keys like best among all of the bank's, for each text."""
        best = self.router.keys.best_task(evidence.scores_BJ).tolist()
        return [self.router.tasks[task] for task in best]

    def weigh(self, begun: Begun, labels: Sequence[tuple[str, ...] | None] | None = None) -> list[Weighed | None]:
        """What is known of each row's labels; None for rows without. Leaves the state as it is.

        Args:
            begun: of ``begin``.
            labels: of each row, in place of its request's.
        """
        return finished(self.weighing(begun, labels))

    @torch.no_grad()
    def weighing(
        self, begun: Begun, labels: Sequence[tuple[str, ...] | None] | None = None
    ) -> Generator[int, None, list[Weighed | None]]:
        """``weigh`` with a stop after each pass, which yields the tokens that went through: others may run there."""
        found: list[Weighed | None] = [None] * len(begun.requests)
        room, passes = self._room(begun), 0
        for (names, _), rows in self._sets(begun, labels).items():
            plan = self.prompter.plan(names, begun.requests[rows[0]].task)
            part = begun.state if len(rows) == len(begun.requests) else picked(begun.state, rows)
            passes += count_passes(self.decoder, part, plan, room)
            scores_BL = (yield from scoring(self.decoder, part, plan, room)).tolist()
            for row, scores in zip(rows, scores_BL, strict=True):
                found[row] = self.weighed(begun, row, names, scores)
        for _ in range(self._agree(passes) - passes):  # under ZeRO-3 every rank makes equally many passes
            self.decoder.advance(picked(begun.state, [0]), torch.full((1, 1), self.decoder.pad_id, device=self.device))
        return found

    def weighed(self, known: Prepared, row: int, names: tuple[str, ...], model: Sequence[float]) -> Weighed:
        """What is known of the labels of one text: by the keys, and by a model, here or elsewhere.

        Args:
            known: the text is its row ``row``.
            names: the labels.
            model: summed log-likelihood of each label behind the text's prompt, nats.
        """
        task = known.requests[row].task
        return Weighed(names, tuple(model), self._of_keys(known, row, names), self.beta_of(task))

    def choose(self, begun: Begun) -> list[str | None]:
        """The label of each row that ``decide`` would serve, without the likelihoods of all the others; None for rows
        without labels. Leaves the state as it is."""
        return finished(self.choosing(begun))

    @torch.no_grad()
    def choosing(self, begun: Begun) -> Generator[int, None, list[str | None]]:
        """``choose`` with a stop after each pass, which yields the tokens that went through."""
        found: list[str | None] = [None] * len(begun.requests)
        if self._whole:  # how many passes it takes must not depend on the rows
            for row, one in enumerate((yield from self.weighing(begun))):
                found[row] = None if one is None else self.decide(one)[0]
            return found
        for (names, _), rows in self._sets(begun).items():
            keys = [self._of_keys(begun, row, names) for row in rows]
            more_BL = torch.zeros(len(rows), len(names))
            undecided = list(range(len(rows)))
            for place, known in enumerate(keys):
                if known is not None and self.kind == "keys":
                    found[rows[place]] = names[known.index(max(known))]
                    undecided.remove(place)
                elif known is not None and self.kind == "both":
                    more_BL[place] = self.beta_of(begun.requests[rows[place]].task) * torch.tensor(known)
            if not undecided:
                continue
            left = [rows[place] for place in undecided]
            part = begun.state if len(left) == len(begun.requests) else picked(begun.state, left)
            plan, room = self.prompter.plan(names, begun.requests[rows[0]].task), self._room(begun)
            best = yield from choosing(self.decoder, part, plan, room, more_BL[undecided])
            for row, label in zip(left, best, strict=True):
                found[row] = names[label]
        return found

    def _sets(
        self, begun: Begun, labels: Sequence[tuple[str, ...] | None] | None = None
    ) -> dict[tuple[tuple[str, ...], bool], list[int]]:
        """Rows that have the same labels behind prompts of the same format, by both: their tokens are the same."""
        sets: dict[tuple[tuple[str, ...], bool], list[int]] = {}
        chosen = [request.labels for request in begun.requests] if labels is None else labels
        for row, names in enumerate(chosen):
            if names:
                sets.setdefault((names, self.prompter.is_chat(begun.requests[row].task)), []).append(row)
        return sets

    def decide(self, weighed: Weighed) -> tuple[str, dict[str, float]]:
        """The label that is served, and the share of each."""
        return weighed.decided(self.kind)

    @torch.no_grad()
    def answering(
        self,
        requests: Sequence[Request],
        *,
        batch_size: int,
        router: KeyedRouter | None = None,
        write: bool = True,
        write_all: bool = False,
        shares: bool = True,
        all_done: Callable[[bool], bool] = bool,
        on_batch: Callable[[Begun], None] | None = None,
    ) -> Generator[int, None, list[Answered]]:
        """From texts to answers, in their order, with a stop after each pass of the labels.

        Args:
            requests: plain texts, with the options of their callers.
            batch_size: texts of one pass.
            router: in place of the bank's own.
            write: write answers where there are no labels.
            write_all: also write freely where a label is served.
            shares: find out how likely every label is; the best one alone takes less.
            all_done: whether all ranks are done, given whether this one is.
            on_batch: sees every batch after its labels were weighed and before anything is written.
        """
        check_counts(batch_size)
        requests = list(requests)
        self.prompter.read(requests)
        order = sorted(range(len(requests)), key=lambda place: (-len(requests[place].text_ids), place))
        made: dict[int, Answered] = {}
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            begun = self.begin([requests[place] for place in places], router=router)
            yield sum(len(request.tokens) for request in begun.requests)
            decided: list[Decided | None]
            if shares:
                weighed = yield from self.weighing(begun)
                decided = [None if one is None else Decided(*self.decide(one), one) for one in weighed]
            else:
                labels = yield from self.choosing(begun)
                decided = [None if label is None else Decided(label) for label in labels]
            if on_batch is not None:
                on_batch(begun)
            free = [row for row, one in enumerate(decided) if write_all or (write and one is None)]
            written = self.written(begun, free, all_done)
            for row, (place, one) in enumerate(zip(places, decided, strict=True)):
                made[place] = self._answered(begun, row, one, written.get(row))
        return [made[place] for place in range(len(requests))]

    def routed(
        self, requests: Sequence[Request], *, batch_size: int, router: KeyedRouter | None = None
    ) -> list[Route]:
        """Which tasks and adapters texts would use, in their order."""
        check_counts(batch_size)
        found: list[Route] = []
        for start in range(0, len(requests), batch_size):
            batch = list(requests[start : start + batch_size])
            gate_BT = self.route(batch, self.evidence(self.read(batch), router))
            found += routes(gate_BT, self.mixture.task_names, self.rows_TN)
        return found

    def next_token_logits(
        self, requests: Sequence[Request], *, batch_size: int, router: KeyedRouter | None = None
    ) -> Tensor:
        """Scores of the first token of each answer behind the routed task's prompt, (B, vocabulary) fp32 on the CPU."""
        found = []
        for start in range(0, len(requests), batch_size):
            begun = self.begin(list(requests[start : start + batch_size]), router=router)
            found.append(begun.state.logits.float().cpu())
        return torch.cat(found)

    def written(
        self, begun: Begun, rows: Sequence[int], all_done: Callable[[bool], bool] = bool
    ) -> dict[int, tuple[str, bool]]:
        """What the model writes after some rows, greedily, and whether it ended within the row's own limit, whoever shares
        its passes; consumes the state."""
        if not rows:
            return {}
        limits = [self.prompter.limit_of(begun.requests[row]) for row in rows]
        # Under ZeRO-3 other ranks have rows of other tasks, and must make as many passes.
        others = map(self.prompter.answer_limit, (None, *self.prompter.entries)) if self._whole else ()
        steps = max([*limits, *others])
        state = begun.state if len(rows) == len(begun.requests) else picked(begun.state, rows)
        with torch.no_grad():
            outputs = self.decoder.greedy(state, steps, all_done, limits)
        return {row: (self.prompter.decode(ids), ended) for row, (ids, ended) in zip(rows, outputs, strict=True)}

    def _answered(
        self, begun: Begun, row: int, decided: Decided | None, written: tuple[str, bool] | None
    ) -> Answered:
        request, route, foreign = begun.requests[row], begun.routes[row], begun.foreign[row]
        if decided is not None:
            label = decided.label
            return Answered(request, label, True, route, label, decided.shares, decided.weighed, foreign, written)
        text, ended = written or ("", False)
        return Answered(request, text, ended, route, foreign=foreign, written=written)

    # ---- inside -----------------------------------------------------------------------------------------------

    @staticmethod
    def _room(begun: Begun) -> Room:
        return Room(max(len(request.tokens) for request in begun.requests), len(begun.requests))

    def _of_keys(self, known: Prepared, row: int, names: tuple[str, ...]) -> tuple[float, ...] | None:
        task = known.requests[row].task
        entry = None if task is None else self.prompter.entries.get(task)
        own = [] if entry is None else list(entry.labels or ())
        if task is None or not own or sorted(own) != sorted(names):
            return None
        place = self.router.tasks.index(task)
        found = self.router.of_labels(known.evidence.labels_BJ[row : row + 1], place)
        if found is None:
            return None
        shares = dict(zip(own, found[0].tolist(), strict=True))
        return tuple(shares[name] for name in names)

    def _prefilled(self, requests: list[Request], reading: Reading, gate_BT: Tensor) -> Prefilled:
        """The prompts' pass: the text's lower half as it was read where that can be, else everything."""
        if reading.cached is None or any(request.reused is None for request in requests):
            left = not self.decoder.encoder_decoder
            ids = self._padded([request.tokens for request in requests], left, self.decoder.pad_id)
            mask = self._padded([(1,) * len(request.tokens) for request in requests], left, 0)
            return self.decoder.prefill(ids, mask, task_gate=gate_BT)
        reused = torch.tensor([[request.reused] for request in requests], device=self.device)
        reused_BL = reading.mask_BL * (reading.mask_BL.cumsum(dim=1) <= reused)
        rest = [request.tokens[request.reused :] for request in requests]
        rest_BR = self._padded(rest, True, self.decoder.pad_id)
        rest_mask_BR = self._padded([(1,) * len(one) for one in rest], True, 0)
        return self.decoder.resume(reading, reused_BL, rest_BR, rest_mask_BR, task_gate=gate_BT)

    def _padded(self, rows: Sequence[tuple[int, ...]], left: bool, fill: int) -> Tensor:
        width = max(map(len, rows))
        made = [((fill,) * (width - len(row)) + row) if left else (row + (fill,) * (width - len(row))) for row in rows]
        return torch.tensor(made, dtype=torch.long, device=self.device)
