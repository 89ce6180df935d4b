"""vLLM behind the app: texts are routed in this process, each is answered by its task's row, a LoRA in vLLM.

Two threads. One owns the bank's model and routes what waits, in passes that clients share (half of the base model's depth);
the other runs an event loop in which each text is a request to vLLM, which batches them as it likes. Rows are loaded when a
version comes and unloaded when nothing of it is inside any more; a row that vLLM has lost (it was started again) is loaded
once more for whoever asks for it, so that no request fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from amlora_dist.errors import AmloraError, UserError
from amlora_dist.evaluation.requests import Classification
from amlora_dist.inference.routed_prompts import RoutedPrompt
from amlora_dist.serving.bank import ServedBank
from amlora_dist.serving.jobs import (
    Began,
    Classified,
    Ended,
    EngineAwayError,
    Event,
    Failed,
    Job,
    Piece,
    StoppingError,
    grouped,
)
from amlora_dist.serving.metrics import ServingMetrics
from amlora_dist.serving.queueing import Admission, FairQueue
from amlora_dist.serving.ranking import PASS_FAULTS
from amlora_dist.serving.remote_labels import label_scores
from amlora_dist.serving.row_routing import routed_to_rows
from amlora_dist.serving.settings import ServeSettings
from amlora_dist.serving.token_scores import TokenScore
from amlora_dist.serving.vllm_client import NotLoadedError, ServedModel, VllmClient, VllmModel
from amlora_dist.serving.vllm_rows import RowSet, write_rows
from amlora_dist.serving.vllm_start import check_base, connected
from amlora_dist.serving.writing import AnswerRow

log = logging.getLogger(__name__)
T = TypeVar("T")

LOOK_EVERY_S = 0.25
"""Between two looks at whose time is over."""
HEALTH_EVERY_S = 5.0
"""Between two looks at the server, and at versions that nobody needs any more."""
AWAY_AFTER = 2
"""Looks in a row without an answer after which it is away: a busy machine may miss one."""
LOAD_DEADLINE_S = 600.0
"""For all rows of a version to be loaded."""
ROW_FAULTS = (AmloraError, *PASS_FAULTS, LookupError, TypeError, ArithmeticError)
"""What one text's answer may raise."""


@dataclass(eq=False, slots=True)
class Flight:
    """A text that vLLM is asked for."""

    job: Job
    task: asyncio.Task[None] | None = None
    answering: bool = False
    """Whether vLLM has begun to answer."""


class VllmEngine:
    """See the module, and ``AnswerEngine``.

    Args:
        settings: limits.
        metrics: count what happens.
        url: of the server.
        home: ``AMLORA_HOME``, where rows are written for the server to read.
        rank: its ``--max-lora-rank``.

    Raises:
        UserError: the server is not there, or is no vLLM.
    """

    def __init__(self, settings: ServeSettings, metrics: ServingMetrics, *, url: str, home: Path, rank: int) -> None:
        self._settings, self._metrics, self._home, self._rank = settings, metrics, home, rank
        self._wake = threading.Condition()
        self._queue = FairQueue()
        self._inside = Admission(settings)
        self._flights: set[Flight] = set()
        self._rows: weakref.WeakKeyDictionary[ServedBank, RowSet] = weakref.WeakKeyDictionary()
        self._current: ServedBank | None = None
        self._retired: set[ServedBank] = set()
        self._stopping = False
        self._up = True
        self._loop = asyncio.new_event_loop()
        self._loop_thread = threading.Thread(target=self._loop.run_forever, name="amlora-vllm", daemon=True)
        self._router = threading.Thread(target=self._route_all, name="amlora-router", daemon=True)
        self._loading: dict[str, asyncio.Lock] = {}
        self._watchers: list[asyncio.Task[None]] = []
        self._loop_thread.start()
        try:
            self._client, self._heavy, found = self._wait(self._open(url), LOAD_DEADLINE_S)
        except AmloraError:
            self._loop.call_soon_threadsafe(self._loop.stop)
            raise
        self._base, self._positions = found.name, found.positions

    # ---- AnswerEngine -----------------------------------------------------------------------------------------

    def load(self, bank: ServedBank) -> None:
        """Write and load the rows of a version; see ``AnswerEngine``."""
        rows = write_rows(bank.model.bank, bank.name, bank.version, self._home, self._rank)
        if self._current is None:
            self._wait(check_base(self._client, self._base, bank.model), LOAD_DEADLINE_S)
        self._wait(self._load(rows), LOAD_DEADLINE_S)
        with self._wake:
            self._rows[bank], self._current = rows, bank

    def retire(self, bank: ServedBank) -> None:
        """See ``AnswerEngine``: its rows are unloaded at a later look."""
        with self._wake:
            self._retired.add(bank)

    def start(self) -> None:
        """Begin to work."""
        self._wait(self._watch(), LOAD_DEADLINE_S)
        self._router.start()

    def stop(self, deadline_s: float) -> None:
        """See ``AnswerEngine``; its rows are unloaded, other servers load them again when they need them."""
        give_up_at = time.monotonic() + deadline_s
        with self._wake:
            self._stopping = True
            while self._inside and time.monotonic() < give_up_at:
                self._wake.wait(LOOK_EVERY_S)
            self._wake.notify_all()
        for job in self._inside:
            self._end(job, Failed(StoppingError("the server stopped before the answer was there")))
        if self._loop_thread.is_alive():
            with contextlib.suppress(AmloraError):
                self._wait(self._close(), LOAD_DEADLINE_S)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._loop_thread.join(LOOK_EVERY_S * 40)

    def check_room(self, texts: int, *, heavy: bool) -> None:
        """See ``AnswerEngine``."""
        if self._stopping or not self._router.is_alive():
            raise StoppingError("the server is shutting down")
        if not self._up:
            raise EngineAwayError(f"vLLM at {self._client.url} does not answer; try again later")
        self._inside.check(texts, heavy=heavy)

    def submit(self, jobs: Sequence[Job]) -> None:
        """See ``AnswerEngine``."""
        if not jobs:
            return
        with self._wake:
            self.check_room(len(jobs), heavy=jobs[0].heavy)
            self._inside.add(jobs)
            self._queue.add(jobs)
            self._wake.notify_all()

    @property
    def alive(self) -> bool:
        """Whether both of its threads are there."""
        return self._router.is_alive() and self._loop_thread.is_alive()

    @property
    def ready(self) -> bool:
        """Whether vLLM answered when it was last asked how it is."""
        return self._up

    @property
    def texts(self) -> int:
        """Texts inside, waiting or at work."""
        return len(self._inside)

    @property
    def waiting(self) -> int:
        """Texts that are not routed yet."""
        return len(self._queue)

    # ---- the router's thread ----------------------------------------------------------------------------------

    def _route_all(self) -> None:
        try:
            with torch.no_grad():
                while jobs := self._next():
                    for group in grouped(jobs, lambda job: (job.sampling is None, job.request.raw)):
                        self._route(group)
        finally:
            # A fault of this program may have ended it: nobody must wait for ever.
            if not self._stopping:
                for job in self._inside:
                    self._end(job, Failed(StoppingError("the server stopped before the answer was there")))

    def _next(self) -> list[Job]:
        """Texts to route in one pass, when there are some; none when there is nothing more to do."""
        with self._wake:
            while not (self._queue or (self._stopping and not self._inside)):
                self._wake.wait(timeout=60)
            return self._queue.taken(self._settings.batch_rows, self._settings.prefill_tokens)

    def _route(self, jobs: list[Job]) -> None:
        """Route texts that share a pass and send them on; where that fails, each gets a pass of its own."""
        going = []
        for job in jobs:
            if (error := job.over()) is not None:
                self._end(job, Failed(error))
            else:
                going.append(job)
        if not going:
            return
        start = time.perf_counter()
        try:
            found = routed_to_rows(
                going[0].bank, [job.request for job in going], to_classify=going[0].sampling is None
            )
        except (AmloraError, *PASS_FAULTS) as error:
            if not isinstance(error, AmloraError):
                log.exception("a pass over %d texts failed", len(going))
            if len(going) == 1:
                self._end(going[0], Failed(error))
            else:
                for job in going:
                    self._route([job])
            return
        self._metrics.passed("route", len(going), time.perf_counter() - start)
        for job, asked in zip(going, found, strict=True):
            self._loop.call_soon_threadsafe(self._send, job, asked)

    # ---- the event loop's thread ------------------------------------------------------------------------------

    def _send(self, job: Job, asked: RoutedPrompt) -> None:
        flight = Flight(job)
        self._flights.add(flight)
        flight.task = self._loop.create_task(self._fly(flight, asked))

    async def _fly(self, flight: Flight, asked: RoutedPrompt) -> None:
        """Answer one text, whatever happens."""
        try:
            if asked.between:
                self._metrics.strongest_row()
            answer = self._classified if flight.job.sampling is None else self._written
            await self._with_row(flight.job.bank, asked.row, lambda model: answer(flight, asked, model))
        except EngineAwayError as error:
            self._metrics.engine_failed()
            self._end(flight.job, Failed(error))
        except ROW_FAULTS as error:
            if not isinstance(error, AmloraError):
                log.exception("a text could not be answered")
            self._end(flight.job, Failed(error))
        finally:
            self._flights.discard(flight)

    async def _with_row(self, bank: ServedBank, task: str | None, call: Callable[[str], Awaitable[None]]) -> None:
        """Call with the model that answers for a task; once more after loading it again, if vLLM has lost it."""
        rows = self._rows[bank]
        model = self._base if task is None else rows.names[task]
        try:
            await call(model)
        except NotLoadedError:
            if task is None:
                raise
            log.warning("vLLM at %s has no row %s any more; it is loaded again", self._client.url, model)
            try:
                await self._load(RowSet({task: model}, {model: rows.folders[model]}))
            except UserError as error:  # of whoever runs the server, not of this client
                raise EngineAwayError(str(error)) from error
            if bank is not self._current:
                self.retire(bank)
            await call(model)

    async def _classified(self, flight: Flight, asked: RoutedPrompt, model: str) -> None:
        job, request = flight.job, asked.request
        label, shares = None, dict[str, float]()
        if request.labels:
            label, shares, _ = await self._decided(flight, asked, model)
        found = Classification(label, request.task, shares, asked.route, asked.foreign)
        self._end(job, Classified(found))

    async def _written(self, flight: Flight, asked: RoutedPrompt, model: str) -> None:
        job, request = flight.job, asked.request
        assert job.sampling is not None
        if request.echo:
            raise UserError("echo: found true with logprobs, expected false: vLLM cannot score a prompt with its LoRAs")
        if request.labels:
            await self._labelled(flight, asked, model)
            return
        await self._streamed(flight, asked, model)

    async def _labelled(self, flight: Flight, asked: RoutedPrompt, model: str) -> None:
        """Answer with the words of a label."""
        job, request = flight.job, asked.request
        label, _, logprobs = await self._decided(flight, asked, model)
        prompter = job.bank.model.prompter
        (ids,) = prompter.labels([label], chat=prompter.is_chat(request.task))
        scores: tuple[TokenScore, ...] = ()
        if (top := request.top) is not None:
            prompts = [(*request.tokens, *ids[:cut]) for cut in range(len(ids))]
            best = await asyncio.gather(*(self._client.likeliest(model, prompt, top) for prompt in prompts))
            scores = tuple(TokenScore(*one) for one in zip(ids, logprobs, map(tuple, best), strict=False))
        job.tell(Began(asked.route))
        if job.stream:
            job.tell(Piece(label, scores))
        self._end(job, Ended(label, "stop", len(ids), scores))

    async def _streamed(self, flight: Flight, asked: RoutedPrompt, model: str) -> None:
        """Tell the answer as it comes."""
        job, row = flight.job, AnswerRow.of(flight.job)
        assert job.sampling is not None
        self._check_positions(asked.request.tokens, row.limit)
        sampling = replace(job.sampling, new_tokens=row.limit)
        chunks = self._client.write(model, asked.request.tokens, sampling, eos_id=job.bank.eos_id, top=asked.request.top)
        async with contextlib.aclosing(chunks):
            async for chunk in chunks:
                if not flight.answering:
                    flight.answering = True
                    job.tell(Began(asked.route))
                for place, token in enumerate(chunk.tokens):
                    row.scores += chunk.scores[place : place + 1]
                    if (event := row.take(token)) is not None:
                        self._end(job, event)
                        return
        raise EngineAwayError(f"vLLM at {self._client.url} ended an answer before its end")

    async def _decided(
        self, flight: Flight, asked: RoutedPrompt, model: str
    ) -> tuple[str, dict[str, float], tuple[float, ...]]:
        """The label that wins by the keys here and the row there, the share of each, and what its tokens have."""
        plan = asked.plan
        assert plan is not None and asked.request.labels is not None
        self._check_positions(asked.request.tokens, plan.longest + 1)
        async with self._heavy if flight.job.heavy else contextlib.nullcontext():
            scores = await label_scores(VllmModel(self._client, model), asked.request.tokens, plan)
        flight.answering = True
        label, shares = asked.weighed([sum(one) for one in scores]).decided(asked.kind)
        return label, shares, scores[asked.request.labels.index(label)]

    def _check_positions(self, tokens: Sequence[int], new_tokens: int) -> None:
        if self._positions is not None and len(tokens) + new_tokens > self._positions:
            raise UserError(
                f"the prompt has {len(tokens)} tokens; with {new_tokens} new ones vLLM has room for {self._positions} "
                "(--max-model-len)"
            )

    async def _load(self, rows: RowSet) -> None:
        for name, folder in rows.folders.items():
            async with self._loading.setdefault(name, asyncio.Lock()):
                await self._client.load(name, str(folder))

    async def _watch(self) -> None:
        self._watchers = [asyncio.create_task(one) for one in (self._watch_deadlines(), self._watch_server())]

    async def _watch_deadlines(self) -> None:
        """End texts whose time is over or whose client has gone."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            for flight in list(self._flights):
                if (error := flight.job.over()) is None:
                    continue
                if not (flight.answering or flight.job.cancelled):
                    self._metrics.engine_failed()
                    error = EngineAwayError(f"vLLM at {self._client.url} did not begin to answer in the time of the request")
                self._end(flight.job, Failed(error))
                if flight.task is not None:
                    flight.task.cancel()

    async def _watch_server(self) -> None:
        """See how vLLM is, and unload the rows of versions that nothing inside needs any more."""
        before: set[ServedBank] = set()
        misses = 0
        while True:
            await asyncio.sleep(HEALTH_EVERY_S)
            try:
                await self._client.healthy()
                if not self._up:
                    log.warning("vLLM at %s answers again", self._client.url)
                self._up, misses = True, 0
                idle = {bank for bank in self._retired if not any(job.bank is bank for job in self._inside)}
                for bank in idle & before:  # at two looks: who began before the swap may come in just now
                    await self._let_go(bank)
                before = idle
            except EngineAwayError as error:
                misses += 1
                if self._up and misses == AWAY_AFTER:
                    log.warning("%s", error)
                    self._up = False
            except AmloraError as error:  # a row that vLLM will not let go of: asked again at the next look
                log.warning("%s", error)

    async def _let_go(self, bank: ServedBank) -> None:
        with self._wake:
            served = self._rows[self._current].names if self._current is not None else {}
        await self._unload(set(self._rows[bank].names.values()) - set(served.values()))
        with self._wake:
            self._retired.discard(bank)  # not before: what could not be unloaded is tried again
        log.info("the rows of %s were unloaded", bank.version)

    async def _unload(self, names: set[str]) -> None:
        for name in sorted(names):
            await self._client.unload(name)

    # ---- inside -----------------------------------------------------------------------------------------------

    def _end(self, job: Job, event: Event) -> None:
        with self._wake:
            first = self._inside.remove(job)
            self._wake.notify_all()
        if first:
            job.tell(event)

    def _wait(self, work: Coroutine[Any, Any, T], seconds: float) -> T:
        """The result of work in the loop."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(seconds)
        except (TimeoutError, asyncio.TimeoutError) as error:
            future.cancel()
            raise EngineAwayError(f"vLLM did not do what it was asked for within {seconds:.0f} s") from error

    @staticmethod
    async def _open(url: str) -> tuple[VllmClient, asyncio.Semaphore, ServedModel]:
        client = VllmClient(url)
        return client, asyncio.Semaphore(1), await connected(client)

    async def _close(self) -> None:
        tasks = [*self._watchers, *(flight.task for flight in self._flights if flight.task is not None)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        with contextlib.suppress(EngineAwayError):
            await self._unload({name for rows in list(self._rows.values()) for name in rows.names.values()})
        await self._client.close()
