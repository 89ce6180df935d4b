"""Banks whose router has no keys for plain text: those before 0.2, and methods without a posterior.

A text behind the bank's own prompt is routed in the same pass that reads it. A plain text of which nothing is told is
answered as it was scored (``evaluation.plain_texts``): by the best of the labels of all tasks, where all have some, or
freely where that was chosen for the bank. What else is asked of such a bank, and all that is asked of one of before 0.2, is
answered as it always was: a named task's or question's answer is written, and only ``classify`` looks for the labels and the
prompt of the task that was found.

Shapes in names: B prompts, S tokens, T tasks, N adapters, L labels.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from amlora_dist.adapters.router_override import OverridableRouter, PartlyGivenRouter, routed_by
from amlora_dist.adapters.selector_layer import mean_over_prompt
from amlora_dist.evaluation.decoding import Decoder, Prefilled, picked
from amlora_dist.evaluation.plain_texts import PlainLabels, fill_to_rank, plain_examples
from amlora_dist.evaluation.ranking import Room, choosing, finished, scoring
from amlora_dist.evaluation.requests import (
    Answer,
    Classification,
    Prompter,
    Request,
    Route,
    batches,
    check_counts,
    routes,
    tensors,
)
from amlora_dist.evaluation.scoring import Prediction, by_label, in_way, score_task
from amlora_dist.training.batching import prompt_positions

if TYPE_CHECKING:
    from amlora_dist.adapters.inject import Mixture
    from amlora_dist.adapters.router import Router
    from amlora_dist.evaluation.served_scoring import PlainRow
    from amlora_dist.tasks.task_entry import TaskEntry


class PromptAnswering:
    """A bank in its base model, which routes whole prompts. Every call takes the router in place of the bank's own, if any.

    Args:
        mixture: of the model.
        decoder: of the model.
        prompter: of the bank.
        rows_TN: how much each task uses each adapter.
        plain: what is chosen from for a plain text of which nothing is told.
    """

    def __init__(
        self, mixture: Mixture, decoder: Decoder, prompter: Prompter, rows_TN: Tensor, plain: PlainLabels
    ) -> None:
        self.mixture, self.decoder, self.prompter, self.rows_TN = mixture, decoder, prompter, rows_TN
        self.tasks, self.plain = mixture.task_names, plain

    def over(self, tasks: Sequence[str]) -> PromptAnswering:
        """The same over some of the tasks, as if the bank held no other."""
        plain = PlainLabels.of(self.prompter, tasks, self.plain.way) if self.plain.labels else self.plain
        return PromptAnswering(self.mixture, self.decoder, self.prompter, self.rows_TN, plain)

    def ranks(self, request: Request, *, to_classify: bool = False) -> bool:
        """Whether a text is answered by the best of all labels: its caller says nothing of it."""
        told = (request.labels, request.task, request.question, request.gate)
        if request.raw or request.free or any(one is not None for one in told):
            return False
        return bool(self.plain.labels) and (to_classify or not self.plain.writes)

    def prepare(self, requests: Sequence[Request]) -> None:
        """Put the prompts around texts, with room for the answers that are written, and give those their labels that are
        answered by the best one."""
        ranked: list[Request] = []
        sizes: dict[int, list[Request]] = {}
        for request in requests:
            group = ranked if self.ranks(request) else sizes.setdefault(self.prompter.limit_of(request), [])
            group.append(request)
        if ranked:
            fill_to_rank(self.prompter, ranked, self.plain.labels)
        for limit, group in sizes.items():
            self.prompter.fill(group, new_tokens=limit)

    def routed(self, requests: Sequence[Request], batch_size: int, router: Router | None) -> list[Route]:
        """How the router weighs texts behind the bank's prompt."""
        self.prompter.fill(requests, new_tokens=0)
        return routes(self.gates(requests, batch_size, router), self.tasks, self.rows_TN)

    def answered(self, requests: Sequence[Request], batch_size: int, router: Router | None) -> list[Answer]:
        """The best label of all tasks for the texts that ``ranks``; greedy answers to the others, each within its limit."""
        check_counts(batch_size)
        kinds: dict[bool, list[Request]] = {True: [], False: []}
        for request in requests:
            kinds[self.ranks(request)].append(request)
        self.prepare(requests)
        made: dict[int, Answer] = {}
        for batch in batches(kinds[True], batch_size):
            state, gate_BT = self.prefill(batch, router)
            labels, ways = self.chosen(state, batch, router), routes(gate_BT, self.tasks, self.rows_TN)
            for request, label, route in zip(batch, labels, ways, strict=True):
                made[request.place] = Answer(label or "", True, route)
        for batch in batches(kinds[False], batch_size):
            state, gate_BT = self.prefill(batch, router)
            with torch.no_grad(), routed_by(router):
                limits = [self.prompter.limit_of(request) for request in batch]
                outputs = self.decoder.greedy(state, max(limits), bool, limits)
            ways = routes(gate_BT, self.tasks, self.rows_TN)
            for request, (tokens, ended), route in zip(batch, outputs, ways, strict=True):
                made[request.place] = Answer(self.prompter.decode(tokens), ended, route)
        return [made[place] for place in range(len(requests))]

    @torch.no_grad()
    def chosen(self, state: Prefilled, batch: Sequence[Request], router: Router | None) -> list[str | None]:
        """The best label of each prompt that has some, None for the others; leaves ``state`` as it is."""
        found: list[str | None] = [None] * len(batch)
        longest = max(len(request.tokens) for request in batch)
        for (names, _), rows in self._sets(batch).items():
            plan = self.prompter.plan(names, batch[rows[0]].task)
            part = state if len(rows) == len(batch) else picked(state, rows)
            with routed_by(router):
                best = finished(choosing(self.decoder, part, plan, Room(longest, len(batch))))
            for row, label in zip(rows, best, strict=True):
                found[row] = names[label]
        return found

    def scored(self, rows: Sequence[PlainRow], entry: TaskEntry, batch_size: int) -> list[Prediction]:
        """What the bank answers to rows of a task, counted as the accuracy matrix counts them: in the way that was
        chosen for the bank, also by one that writes where it does not know that a label is wanted.

        Args:
            rows: of the task.
            entry: of the task.
            batch_size: rows of one pass.

        Raises:
            UserError: an empty text, or no room for a prompt.
        """
        labels = () if entry.free_text else self.prompter.all_labels()
        found = score_task(
            self.mixture.model,
            plain_examples(self.prompter, rows, labels, entry.max_answer_tokens),
            tokenizer=self.prompter.tokenizer,
            pad_id=self.decoder.pad_id,
            eos_id=self.decoder.eos_id,
            batch_size=batch_size,
            labels=self.prompter.labels(labels, chat=self.prompter.chat_bank) or None,
            metric=entry.counted_by,
            max_new_tokens=entry.max_answer_tokens if entry.free_text else None,
            tasks=len(self.tasks),
            selectors=self.mixture.routing.select,
            encoder_decoder=self.decoder.encoder_decoder,
            device=self.mixture.device,
        )
        return [in_way(by_label(one, labels, entry.counted_by), self.plain.way) for one in found]

    def next_token_logits(self, requests: Sequence[Request], batch_size: int, router: Router | None) -> Tensor:
        """Scores of the first token of each answer, (B, vocabulary) fp32 on the CPU."""
        self.prompter.fill(requests, new_tokens=1)
        found: dict[int, Tensor] = {}
        for batch in batches(requests, batch_size):
            state, _ = self.prefill(batch, router)
            found |= {request.place: row for request, row in zip(batch, state.logits.float().cpu(), strict=True)}
        return torch.stack([found[place] for place in range(len(requests))])

    def classifying(
        self, requests: Sequence[Request], batch_size: int, router: Router | None
    ) -> Generator[int, None, list[Classification]]:
        """Labels, with a stop after each pass."""
        ranked = self.with_labels(requests, batch_size, router)
        made: dict[int, Classification] = {}
        for request in requests:
            if not request.labels and request.gate is not None:
                route = routes(request.gate[None], self.tasks, self.rows_TN)[0]
                made[request.place] = Classification(None, request.task, {}, route)
        for batch in batches(ranked, batch_size):
            made |= yield from self._ranking(batch, batch_size, router)
        return [made[place] for place in range(len(requests))]

    def with_labels(self, requests: Sequence[Request], batch_size: int, router: Router | None) -> list[Request]:
        """Give every request labels and the prompt in front of them; returns those that have labels."""
        for request in requests:
            if self.ranks(request, to_classify=True):
                request.labels = self.plain.labels
        self._choose_labels([request for request in requests if request.labels is None], batch_size, router)
        ranked = [request for request in requests if request.labels]
        # Room for each one's own labels: those of another caller must not cut this one's text.
        sizes: dict[int, list[Request]] = {}
        for request in ranked:
            sizes.setdefault(self.prompter.plan(request.labels or (), request.task).longest, []).append(request)
        for longest, group in sizes.items():
            self.prompter.fill(group, new_tokens=longest + 1)
        return ranked

    def _choose_labels(self, requests: Sequence[Request], batch_size: int, router: Router | None) -> None:
        """Give every request the labels of its task; of the task that the router chooses, where none is named."""
        for task in {request.task for request in requests if request.task is not None}:
            self.prompter.labels_of(task)
        routed = [request for request in requests if request.task is None]
        if routed:
            self.prompter.fill(routed, new_tokens=0)
            gate_BT = self.gates(routed, batch_size, router)
            found = routes(gate_BT, self.tasks, self.rows_TN)
            for request, gate_T, route in zip(routed, gate_BT, found, strict=True):
                request.gate, request.task = gate_T, route.task
        for request in requests:
            labels = None if request.task is None else self.prompter.entry(request.task).labels
            request.labels = None if labels is None else tuple(labels)

    @torch.no_grad()
    def gates(self, requests: Sequence[Request], batch_size: int, chosen: Router | None) -> Tensor:
        """The router's gates (B, T), on the model's device, by a partial pass; requests of several callers may share it,
        whose places mean nothing here."""
        router = chosen or self.mixture.router
        made: dict[int, Tensor] = {}
        for batch in batches(requests, batch_size):
            if router is None:
                gate_BT = self.prefill(batch, chosen)[1].to(self.mixture.device)
            elif router.needs_features:
                inputs = tensors(batch, **self._collation)
                positions = prompt_positions(
                    self.mixture.model, inputs["attention_mask"], encoder_decoder=self.decoder.encoder_decoder
                )
                features = self.mixture.routing_features(**(inputs | positions))  # type: ignore[arg-type]
                gate_BT = router.gates(features, len(batch))
            else:
                gate_BT = router.gates(None, len(batch))
            made |= {id(request): row for request, row in zip(batch, gate_BT, strict=True)}
        return torch.stack([made[id(request)] for request in requests])

    @torch.no_grad()
    def prefill(
        self, batch: Sequence[Request], router: Router | None, on_logits: Callable[[Tensor], None] | None = None
    ) -> tuple[Prefilled, Tensor]:
        """One pass over the prompts of a batch: what decoding goes on from, and the gate (B, T) that was used; ``on_logits``
        sees the scores of every place, (B, S, V)."""
        inputs = tensors(batch, **self._collation)
        routing: dict[str, Any] = {"prompt_mask": inputs["prompt_mask"]}
        noted: list[Tensor] = []
        selected: list[Tensor] = []
        given = [request.gate for request in batch]
        if all(gate is not None for gate in given):
            routing["task_gate"] = torch.stack([gate for gate in given if gate is not None])
            noted.append(routing["task_gate"])
        elif self.mixture.router is not None:
            routing["on_route"] = lambda _features, gate_BT: noted.append(gate_BT)
            if any(gate is not None for gate in given):
                bank_router = self.mixture.router
                inner = bank_router.inner if isinstance(bank_router, OverridableRouter) else bank_router
                router = PartlyGivenRouter(router or inner, given)
        else:
            mask_BS = inputs["prompt_mask"]
            routing["on_select"] = lambda _path, selection: selected.append(mean_over_prompt(selection.weights, mask_BS))
        with routed_by(router):
            state = self.decoder.prefill(
                inputs["input_ids"], inputs["attention_mask"], on_logits=on_logits, **routing
            )
        return state, noted[0] if noted else torch.stack(selected).mean(dim=0)

    def _ranking(
        self, batch: Sequence[Request], batch_size: int, router: Router | None
    ) -> Generator[int, None, dict[int, Classification]]:
        """One pass over all prompts; then the labels of each set behind the rows that have it."""
        state, gate_BT = self.prefill(batch, router)
        found = routes(gate_BT, self.tasks, self.rows_TN)
        longest = max(len(request.tokens) for request in batch)
        made: dict[int, Classification] = {}
        yield longest * len(batch)
        for (names, _), rows in self._sets(batch).items():
            plan = self.prompter.plan(names, batch[rows[0]].task)
            part = state if len(rows) == len(batch) else picked(state, rows)
            work = scoring(self.decoder, part, plan, Room(longest, batch_size))
            while True:
                try:
                    with routed_by(router):  # only while it computes: others run at the stops, by theirs
                        tokens = next(work)
                except StopIteration as end:
                    scores_BL: Tensor = end.value
                    break
                yield tokens
            shares, best = torch.softmax(scores_BL, dim=-1).tolist(), scores_BL.argmax(dim=-1).tolist()
            for row, share, winner in zip(rows, shares, best, strict=True):
                scores = dict(zip(names, share, strict=True))
                made[batch[row].place] = Classification(names[winner], batch[row].task, scores, found[row])
        return made

    def _sets(self, batch: Sequence[Request]) -> dict[tuple[tuple[str, ...], bool], list[int]]:
        """Rows that have the same labels behind prompts of the same format, by both."""
        sets: dict[tuple[tuple[str, ...], bool], list[int]] = {}
        for row, request in enumerate(batch):
            if request.labels:
                sets.setdefault((request.labels, self.prompter.is_chat(request.task)), []).append(row)
        return sets

    @property
    def _collation(self) -> dict[str, Any]:
        return {
            "pad_id": self.decoder.pad_id, "encoder_decoder": self.decoder.encoder_decoder, "device": self.mixture.device
        }  # fmt: skip
