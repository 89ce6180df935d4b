"""The engine: one thread that owns the model and answers the texts of all clients together.

Continuous batching. In each turn newcomers are read in one pass, whichever adapters they are routed to (a gate per
row), join the rows that are being written, and every row gets one more token in one pass; rows that are done leave.
So nobody waits for somebody else's answer, and at most one bounded pass over new prompts (``prefill_tokens``) or one
batch of classifications lies between two tokens of a stream. Rows of another version of the bank, or of models whose
caches cannot be joined, run side by side in groups of their own. A turn's work is bounded, and what fails in it fails
for whose fault it is: sampling and words are each row's own, and a pass that fails is repeated row by row.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from amlora_dist.errors import AmloraError
from amlora_dist.evaluation.decoding import Prefilled
from amlora_dist.serving.bank import ServedBank
from amlora_dist.serving.decode_batch import can_join, joined, keep
from amlora_dist.serving.jobs import Began, Ended, Event, Failed, Job, Piece, StoppingError, by_pass, grouped
from amlora_dist.serving.queueing import Admission, FairQueue
from amlora_dist.serving.ranking import PASS_FAULTS, Ranker
from amlora_dist.serving.sampling import drawn
from amlora_dist.serving.settings import ServeSettings
from amlora_dist.serving.token_scores import scored
from amlora_dist.serving.writing import AnswerRow

log = logging.getLogger(__name__)

ROW_FAULTS = (AmloraError, RuntimeError, ValueError, ArithmeticError, LookupError, TypeError)
"""What drawing one row's token or putting it into words may raise, its tokenizer's and torch's errors among them."""
SIDE_BY_SIDE = 2
"""Groups that cannot be joined, at once: newcomers wait and share the next pass instead of having one each."""
LOOK_EVERY_S = 0.25
"""Between two looks at whose time is over among those who wait."""
DEAD_AFTER_S = 300.0
"""A turn that takes longer than this hangs."""

Observe = Callable[[str, int, float], None]
"""Receives the kind of a pass (``prefill``, ``decode``, ``classify``), its rows and its seconds."""


@dataclass(eq=False, slots=True)
class Group:
    """Rows that share their passes."""

    bank: ServedBank
    key: Hashable
    state: Prefilled
    rows: list[AnswerRow] = field(default_factory=list)


class Engine:
    """See the module. ``start`` it, ``submit`` jobs from any thread, ``stop`` it.

    Args:
        settings: limits.
        observe: called after every pass, in the engine's thread.
    """

    def __init__(self, settings: ServeSettings, observe: Observe | None = None) -> None:
        self._settings = settings
        self._observe: Observe = observe or (lambda kind, rows, seconds: None)
        self._wake = threading.Condition()
        self._to_write = FairQueue()
        self._ranker = Ranker(settings, self._observe, self._end)
        self._look_at = 0.0
        self._groups: list[Group] = []
        self._inside = Admission(settings)
        self._stopping = False
        self._give_up_at = float("inf")
        self._turn_began: float | None = None
        self._thread = threading.Thread(target=self._run, name="amlora-engine", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def load(self, bank: ServedBank) -> None:
        """Nothing: a bank comes with its model."""

    def retire(self, bank: ServedBank) -> None:
        """Nothing: what the last row of it lets go is gone."""

    def stop(self, deadline_s: float) -> None:
        """Take nothing more, finish what is inside, and end; what is not done by then fails."""
        with self._wake:
            self._stopping = True
            self._give_up_at = time.monotonic() + deadline_s
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(deadline_s + DEAD_AFTER_S)

    @property
    def ready(self) -> bool:
        """Always: nothing else is needed."""
        return True

    @property
    def alive(self) -> bool:
        """Whether it works: its thread is there and not stuck in a pass."""
        began = self._turn_began
        return self._thread.is_alive() and (began is None or time.monotonic() - began < DEAD_AFTER_S)

    @property
    def texts(self) -> int:
        """Texts inside, waiting or at work."""
        return len(self._inside)

    @property
    def waiting(self) -> int:
        """Texts that wait for their first pass."""
        return len(self._to_write) + self._ranker.waiting

    def check_room(self, texts: int, *, heavy: bool) -> None:
        """Refuse what there is no room for, before any work goes into it; see ``AnswerEngine``."""
        if self._stopping or not self._thread.is_alive():
            raise StoppingError("the server is shutting down")
        self._inside.check(texts, heavy=heavy)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Take all of these jobs, the texts of one request, or none. Raises as ``check_room``."""
        if not jobs:
            return
        with self._wake:
            self.check_room(len(jobs), heavy=jobs[0].heavy)
            self._inside.add(jobs)
            if jobs[0].sampling is None:
                self._ranker.add(jobs)
            else:
                self._to_write.add(jobs)
            self._wake.notify()

    # ---- the thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with torch.no_grad():
                while self._turn():
                    self._turn_began = None
        finally:
            # A fault of this program may have ended it: nobody must wait for ever.
            with self._wake:
                self._stopping = True
            for job in list(self._inside):
                self._end(job, Failed(StoppingError("the server stopped before the answer was there")))

    def _turn(self) -> bool:
        with self._wake:
            while not (self._inside or self._stopping):
                self._wake.wait(timeout=60)
            if not self._inside or time.monotonic() > self._give_up_at:
                return False
            self._turn_began = time.monotonic()
            self._let_go(self._turn_began)
            self._ranker.take()
            to_write = self._to_write.taken(self._room(), self._settings.prefill_tokens)
        start = time.perf_counter()
        worked = self._ranker.work() | bool(to_write or self._groups)
        if to_write:
            self._together(to_write, self._read)
        for group in list(self._groups):
            self._guarded([row.job for row in group.rows], partial(self._write, group), group)
        if worked:
            self._ranker.share.other(time.perf_counter() - start)
        if self._ranker.has_heavy:
            wait_s = self._ranker.share.wait_s()
            if wait_s == 0:
                self._ranker.work_slowly()
            elif not worked:
                with self._wake:
                    self._wake.wait(wait_s)
        return True

    def _let_go(self, now: float) -> None:
        """End waiting texts whose time is over or whose client has gone."""
        if now < self._look_at:
            return
        self._look_at = now + LOOK_EVERY_S

        def is_over(job: Job) -> bool:
            if (error := job.over()) is not None:
                self._end(job, Failed(error))
            return error is not None

        self._to_write.without(is_over)
        self._ranker.without(is_over)

    def _room(self) -> int:
        """Rows that may begin to be written in this turn."""
        if sum(not can_join(group.state) for group in self._groups) >= SIDE_BY_SIDE:
            return 0
        return self._settings.batch_rows - sum(len(group.rows) for group in self._groups)

    def _together(self, jobs: list[Job], work: Callable[[list[Job]], None]) -> None:
        """Do ``work`` for jobs that can share passes at once."""
        for group in grouped(jobs, by_pass):
            self._guarded(group, work)

    def _guarded(self, jobs: list[Job], work: Callable[[list[Job]], None], group: Group | None = None) -> None:
        """Do ``work``; what goes wrong with a request is reported to its client and no other."""
        try:
            work(jobs)
        except AmloraError as error:
            self._apart(jobs, work, error, group)
        except PASS_FAULTS as error:
            log.exception("a pass over %d texts failed", len(jobs))
            self._apart(jobs, work, error, group)

    def _apart(
        self, jobs: list[Job], work: Callable[[list[Job]], None], error: Exception, group: Group | None
    ) -> None:
        """After a pass that failed, each of its jobs gets one of its own; only whose fault it is fails."""
        if len(jobs) == 1 or group is not None:
            self._fail(jobs, error, group)
            return
        for job in jobs:
            if job in self._inside:
                self._guarded([job], work)

    def _fail(self, jobs: Sequence[Job], error: Exception, group: Group | None) -> None:
        if group is not None:
            self._groups.remove(group)
        for job in jobs:
            if job in self._inside:
                self._end(job, Failed(error))

    def _end(self, job: Job, event: Event) -> None:
        with self._wake:
            self._inside.remove(job)
        job.tell(event)

    # ---- the passes -------------------------------------------------------------------------------------------

    def _read(self, jobs: list[Job]) -> None:
        """One pass over the prompts; rows whose answer is one of their task's labels are done with it, the others then
        go next to those that are being written."""
        start, bank = time.perf_counter(), jobs[0].bank
        state, routes, answers, scores = bank.begin([job.request for job in jobs])
        self._observe("prefill", len(jobs), time.perf_counter() - start)
        rows = []
        going: list[int] = []
        for place, (job, route, answer, own) in enumerate(zip(jobs, routes, answers, scores, strict=True)):
            assert job.sampling is not None
            job.tell(Began(route, tuple(own)))
            if answer is not None:
                if job.stream:
                    job.tell(Piece(answer.text, tuple(answer.scores)))
                self._end(job, Ended(answer.text, "stop", answer.tokens, tuple(answer.scores)))
                continue
            going.append(place)
            generator = None
            if job.sampling.draws:
                generator = torch.Generator()
                if job.sampling.seed is None:
                    generator.seed()
                else:
                    generator.manual_seed(job.sampling.seed)
            row = AnswerRow.of(job)
            row.generator = generator
            rows.append(row)
        if not going:
            return
        if len(going) < len(jobs):
            keep(state, going)
        key = bank.group(jobs[0].request)
        if can_join(state):
            for group in self._groups:
                if group.bank is bank and group.key == key:
                    group.state = joined(group.state, state)
                    group.rows += rows
                    return
        self._groups.append(Group(bank, key, state, rows))

    def _write(self, group: Group, _jobs: list[Job]) -> None:
        """The next token of every row; rows that it ends leave, the others are read on."""
        tokens: list[int] = group.state.logits.argmax(dim=-1).tolist()
        going: list[int] = []
        for place, row in enumerate(group.rows):
            event: Event | None
            try:
                if row.generator is not None:
                    assert row.job.sampling is not None
                    tokens[place] = drawn(group.state.logits[place], row.job.sampling, row.generator)
                if row.job.request.top is not None:
                    logits_1V = group.state.logits[place : place + 1]
                    row.scores += scored(logits_1V, tokens[place : place + 1], row.job.request.top)
                event = row.take(tokens[place])
            except ROW_FAULTS as error:  # its own sampling, its own text: no other row may suffer for it
                log.exception("a row of %d could not be written on", len(group.rows))
                event = Failed(error)
            if event is None:
                going.append(place)
            else:
                self._end(row.job, event)
        if not going:
            self._groups.remove(group)
            return
        if len(going) < len(group.rows):
            group.rows = [group.rows[place] for place in going]
            keep(group.state, going)
        start = time.perf_counter()
        next_B1 = torch.tensor([[tokens[place]] for place in going], device=group.state.logits.device)
        try:
            group.bank.advance(group.state, next_B1)
        except (AmloraError, *PASS_FAULTS) as error:
            log.exception("a pass that wrote %d texts on failed", len(group.rows))
            self._rows_apart(group, error)
            return
        self._observe("decode", len(going), time.perf_counter() - start)

    def _rows_apart(self, group: Group, error: Exception) -> None:
        """After a pass that failed each row is read again with what it has written, and goes on by itself: the cache that
        all shared may hold half of the pass. Only a row that fails alone is lost."""
        self._groups.remove(group)
        rows = group.rows if len(group.rows) > 1 else []
        self._fail([row.job for row in group.rows if row not in rows], error, None)
        for row in rows:
            try:
                state = group.bank.begin([row.job.request]).state
                group.bank.advance(state, torch.tensor([row.detokenizer.tokens], device=state.logits.device))
            except (AmloraError, *PASS_FAULTS) as own:
                log.exception("a text that was written on by itself failed")
                self._fail([row.job], own, None)
            else:
                self._groups.append(Group(group.bank, group.key, state, [row]))
