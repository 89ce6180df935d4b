"""Whose turn it is: a request of much work gives way, one of many texts does not delay one of a single text."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from itertools import islice, product
from typing import Any

import pytest

from amlora_dist.evaluation.requests import Request
from amlora_dist.inference.model import AMLoRAModel
from amlora_dist.serving.bank import ServedBank
from amlora_dist.serving.engine import Engine
from amlora_dist.serving.jobs import BusyError, Classified, Event, Failed, Job
from amlora_dist.serving.queueing import GAP_S, HEAVY_SHARE, FairQueue, Share
from amlora_dist.serving.service import Service, is_heavy
from amlora_dist.serving.settings import ServeSettings
from tests.bank_with_base import TASKS, texts_of
from tests.tiny_config import TOPICS

TEXTS = [texts_of(task, 3, "fair")[i] for i in range(3) for task in TASKS]
KNOWN = sorted({word for task in TASKS for word in TOPICS[task][1]})
WORDS = [" ".join(words) for words in islice(product(KNOWN, repeat=3), 300)]
"""Labels of several tokens."""


class Text:
    """A job that only waits."""

    bank: Any = None

    def __init__(self, name: str, tokens: int = 1) -> None:
        self.name, self.prompt_tokens = name, tokens


def names(jobs: Any) -> str:
    return " ".join(job.name for job in jobs)


def test_the_second_text_of_a_request_waits_behind_the_first_of_all() -> None:
    waiting = FairQueue()
    waiting.add([Text(f"a{n}") for n in range(5)])  # type: ignore[misc]
    assert names(waiting.taken(2, 100)) == "a0 a1"
    waiting.add([Text("b0"), Text("b1")])  # type: ignore[list-item]
    waiting.add([Text("c0")])  # type: ignore[list-item]
    assert names(waiting.taken(2, 100)) == "b0 c0", "they came later, and a has had two"
    assert names(waiting.taken(9, 100)) == "a2 b1 a3 a4" and len(waiting) == 0


def test_a_pass_takes_no_more_than_its_tokens_but_always_one() -> None:
    waiting = FairQueue()
    waiting.add([Text("a", 50), Text("b", 10), Text("c", 90), Text("d", 1)])  # type: ignore[list-item]
    assert names(waiting.taken(9, 100)) == "a b" and names(waiting.taken(9, 20)) == "c"
    waiting.without(lambda job: True)
    assert waiting.taken(9, 100) == []


def test_heavy_work_gets_its_share_next_to_other_work_and_all_of_the_time_alone() -> None:
    now = 0.0
    share = Share(lambda: now)
    assert share.wait_s() == 0, "nobody else is there"
    heavy = 0.0
    for _ in range(10_000):
        now += 0.01
        share.other(0.01)
        if share.wait_s() == 0:
            share.heavy(0.1)
            heavy += 0.1
    assert heavy == pytest.approx(HEAVY_SHARE * 100, rel=0.1)
    share.heavy(5)
    assert 0 < share.wait_s() <= GAP_S
    now += 2 * GAP_S
    assert share.wait_s() == 0, "nobody else is there any more"


def test_heavy_work_that_comes_after_a_quiet_while_does_not_take_what_it_has_missed_at_once() -> None:
    share = Share(lambda: 0.0)
    for _ in range(1000):
        share.other(0.1)
    heavy = 0.0
    while share.wait_s() == 0:
        share.heavy(0.02)
        heavy += 0.02
    assert heavy <= 0.15, "of the 15 s that its share would be"


@pytest.mark.parametrize(
    ("texts", "labels", "heavy"),
    [(1, ["red"] * 256, False), (32, ["red"] * 8, False), (1, ["red"] * 257, True), (64, ["red"] * 5, True),
     (1, ["x" * 30_000], True), (1, ["x" * 100] * 20, False), (64, (), False)],
)  # fmt: skip
def test_work_is_texts_times_labels_long_ones_count_more(texts: int, labels: list[str], heavy: bool) -> None:
    assert is_heavy(texts, labels) is heavy


class Labelled:
    """Somebody who waits for one label."""

    def __init__(self, bank: ServedBank, text: str, labels: list[str] | None = None, *, heavy: bool = False) -> None:
        self.events: queue.Queue[Event] = queue.Queue()
        request = bank.to_classify(text, labels=labels)
        self.at = 0.0
        self.job = Job(bank, request, self._hear, time.monotonic() + 60, heavy=heavy)

    def _hear(self, event: Event) -> None:
        self.at = time.monotonic()
        self.events.put(event)

    def last(self) -> Event:
        """What became of it."""
        return self.events.get(timeout=60)


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine(ServeSettings(batch_rows=4))
    made.start()
    yield made
    made.stop(20)


@pytest.mark.integration
def test_classify_hog_lets_others_pass_and_both_get_what_they_get_alone(model: AMLoRAModel, engine: Engine) -> None:
    bank = ServedBank(model, "words")
    hogs = [Labelled(bank, text, WORDS, heavy=True) for text in TEXTS[:2]]
    others = [Labelled(bank, text) for text in TEXTS]
    with engine._wake:  # nothing is begun before all are there
        engine.submit([hog.job for hog in hogs])
        for other in others:
            engine.submit([other.job])
    found = [other.last() for other in others]
    assert all(hog.events.empty() for hog in hogs), "they came first and are not done"
    assert [one.found.label for one in found if isinstance(one, Classified)] == [o.label for o in model.classify(TEXTS)]
    for hog, expected in zip(hogs, model.classify(TEXTS[:2], labels=WORDS), strict=True):
        event = hog.last()
        assert isinstance(event, Classified) and event.found.label == expected.label
        assert event.found.scores == pytest.approx(expected.scores, rel=1e-3, abs=1e-6)


@pytest.mark.integration
def test_classify_hog_has_its_deadline_seen_between_passes(
    model: AMLoRAModel, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = ServedBank(model, "words")
    hog = Labelled(bank, TEXTS[0], WORDS, heavy=True)
    passes, classify = 0, bank.classify

    def counting(requests: Any) -> Any:
        nonlocal passes
        for tokens in classify(requests):
            passes += 1
            if passes == 2:
                hog.job.deadline = 0.0
            yield tokens

    monkeypatch.setattr(bank, "classify", counting)
    engine.submit([hog.job])
    assert isinstance(hog.last(), Failed) and passes == 2
    assert engine.texts == 0


@pytest.mark.integration
def test_classify_hog_has_its_labels_planned_once(model: AMLoRAModel, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = ServedBank(model, "words")
    labels, tokenised = WORDS[:290], 0
    answer_tokens = model.prompter.labels

    def counting(texts: Any, **more: Any) -> Any:
        nonlocal tokenised
        tokenised += len(texts) if set(labels) <= set(texts) else 0
        return answer_tokens(texts, **more)

    monkeypatch.setattr(model.prompter, "labels", counting)
    requests = [bank.to_classify(text, labels=labels) for text in TEXTS]
    for _ in bank.classify(requests):
        pass
    assert tokenised == len(labels)


@pytest.mark.integration
def test_heavy_requests_fill_half_of_the_room_and_are_refused_before_any_work(model: AMLoRAModel) -> None:
    service = Service(ServedBank(model, "words"), ServeSettings(max_concurrency=8))
    engine, bank = service.engine, service.bank
    service.start()
    try:
        with engine._wake:  # nothing is begun meanwhile
            engine.submit([Labelled(bank, text, WORDS, heavy=True).job for text in TEXTS[:4]])
            with pytest.raises(BusyError, match="with many labels"):
                service.check_texts(TEXTS[:1], None, WORDS)
            service.check_texts(TEXTS[:4], None, ["red", "blue"])
            with pytest.raises(BusyError, match="try again later"):
                service.check_texts(TEXTS[:5], None, ["red", "blue"])
    finally:
        service.stop()
    assert engine.texts == 0


def test_labels_of_another_client_cut_no_text(model: AMLoRAModel) -> None:
    bank = ServedBank(model, "words")
    long = " ".join(TEXTS)  # longer than the model has room for

    def asked(text: str, labels: list[str]) -> Request:
        return bank.to_classify(text, labels=labels)

    mine = asked(long, ["red", "blue"])
    model.classified([mine], 1)
    long_job, other = asked(long, ["red", "blue"]), asked(TEXTS[0], ["red", " ".join(["wall"] * 30)])
    long_job.place, other.place = 0, 1
    model.classified([long_job, other], 2)
    assert long_job.tokens == mine.tokens
