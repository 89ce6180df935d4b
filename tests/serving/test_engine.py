"""Rows that come and go while others are written: each computes what it would alone."""

from __future__ import annotations

import queue
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from amlora_dist.adapters.settings import LiteralSettings
from amlora_dist.inference.model import AMLoRAModel
from amlora_dist.serving.bank import ServedBank
from amlora_dist.serving.decode_batch import can_join, joined, keep
from amlora_dist.serving.engine import Engine
from amlora_dist.serving.jobs import Began, Ended, Event, Failed, Job, Piece, Sampling, StoppingError
from amlora_dist.serving.settings import ServeSettings
from tests.bank_with_base import TASKS, texts_of, write_working_bank

pytestmark = pytest.mark.integration  # a running engine

TEXTS = [texts_of(task, 3, "engine")[i] for i in range(3) for task in TASKS]


def prefilled(bank: ServedBank, texts: list[str]) -> Any:
    return bank.begin([bank.to_generate(text, new_tokens=8) for text in texts])[0]


@torch.no_grad()
def test_rows_joined_while_they_run_get_the_logits_that_they_get_alone(place: Path) -> None:
    # In fp64: whether they are the same must not hang on how a processor rounds fp32.
    bank = ServedBank(AMLoRAModel.from_bank(place / "llama", device="cpu", dtype=torch.float64), "words")
    groups = [TEXTS[:2], ["red"], TEXTS[2:5]]
    alone = []
    for text in [text for group in groups for text in group]:
        state = prefilled(bank, [text])
        logits = []
        for _ in range(5):
            logits.append(state.logits)
            bank.advance(state, state.logits.argmax(-1, keepdim=True))
        alone.append(torch.cat(logits))
    state = prefilled(bank, groups[0])
    seen: list[list[torch.Tensor]] = [[], []]
    for newcomers in groups[1:]:
        for row, logits in zip(seen, state.logits, strict=True):
            row.append(logits)
        bank.advance(state, state.logits.argmax(-1, keepdim=True))
        fresh = prefilled(bank, newcomers)
        assert can_join(state) and can_join(fresh)
        state = joined(state, fresh)
        seen += [[] for _ in newcomers]
    going = list(range(6))
    while going:
        for place, row in enumerate(going):
            seen[row].append(state.logits[place])
        stay = [place for place, row in enumerate(going) if len(seen[row]) < 5]
        going = [going[place] for place in stay]
        if going:
            keep(state, stay)
            bank.advance(state, state.logits.argmax(-1, keepdim=True))
    for row, expected in zip(seen, alone, strict=True):
        torch.testing.assert_close(torch.stack(row), expected)


@torch.no_grad()
def test_padding_that_nobody_needs_any_more_is_let_go(model: AMLoRAModel) -> None:
    bank = ServedBank(model, "words")
    state = joined(prefilled(bank, [" ".join(["red"] * 20)]), prefilled(bank, ["red"]))
    wide = state.mask.shape[1]
    keep(state, [1])
    assert state.mask.shape[1] == state.cache.get_seq_length() < wide
    assert bool(state.mask.all())


class Client:
    """Somebody who waits for one answer."""

    def __init__(self, bank: ServedBank, text: str, *, new_tokens: int = 6, stream: bool = False, **more: Any) -> None:
        self.events: queue.Queue[Event] = queue.Queue()
        request = bank.to_generate(text, new_tokens=new_tokens, **more)
        sampling = Sampling(new_tokens=new_tokens)
        self.job = Job(bank, request, self.events.put, time.monotonic() + 60, sampling, stream)

    def last(self) -> Event:
        """The event that ends the job."""
        while not isinstance(event := self.events.get(timeout=60), (Ended, Failed)):
            assert isinstance(event, (Began, Piece))
        return event

    def text(self) -> str:
        """The answer."""
        event = self.last()
        assert isinstance(event, Ended), event
        return event.text


@pytest.fixture
def engine() -> Any:
    made = Engine(ServeSettings(batch_rows=4, prefill_tokens=40))
    made.start()
    yield made
    made.stop(10)
    assert made.texts == 0 and not made.alive


def test_more_texts_than_rows_are_all_answered(model: AMLoRAModel, engine: Engine) -> None:
    bank = ServedBank(model, "words")
    clients = [Client(bank, text, new_tokens=2 + number) for number, text in enumerate(TEXTS)]
    for client in clients:
        engine.submit([client.job])
    expected = [model.predict(text, max_new_tokens=2 + number)[0] for number, text in enumerate(TEXTS)]
    assert [client.text() for client in clients] == expected


def test_rows_that_name_their_task_share_a_pass_with_routed_ones(model: AMLoRAModel, engine: Engine) -> None:
    bank = ServedBank(model, "words")
    clients = [Client(bank, text, task="shapes" if number % 2 else None) for number, text in enumerate(TEXTS[:4])]
    engine.submit([client.job for client in clients])
    expected = [
        model.predict(text, task="shapes" if number % 2 else None, max_new_tokens=6)[0]
        for number, text in enumerate(TEXTS[:4])
    ]
    assert [client.text() for client in clients] == expected


def test_models_whose_caches_cannot_be_joined_are_served_side_by_side(place: Path, engine: Engine) -> None:
    t5 = AMLoRAModel.from_bank(place / "t5", device="cpu")
    bank = ServedBank(t5, "t5")
    assert not can_join(prefilled(bank, ["red"]))
    clients = [Client(bank, text, new_tokens=3) for text in TEXTS]
    for client in clients:
        engine.submit([client.job])
    assert [client.text() for client in clients] == t5.predict(TEXTS, max_new_tokens=3)


@pytest.mark.parametrize("granularity", ["token", "sequence"])
def test_a_literal_bank_is_served_too(place: Path, tmp_path: Path, engine: Engine, granularity: Any) -> None:
    write_working_bank(tmp_path / "bank", place / "base-llama", literal=LiteralSettings(granularity=granularity))
    literal = AMLoRAModel.from_bank(tmp_path / "bank", device="cpu")
    bank = ServedBank(literal, "literal")
    clients = [Client(bank, text, task="sizes" if number == 2 else None) for number, text in enumerate(TEXTS[:6])]
    engine.submit([client.job for client in clients])
    expected = [
        literal.predict(text, task="sizes" if number == 2 else None, max_new_tokens=6)[0]
        for number, text in enumerate(TEXTS[:6])
    ]
    assert [client.text() for client in clients] == expected


def test_a_cancelled_job_leaves_and_the_others_stay(model: AMLoRAModel, engine: Engine) -> None:
    bank = ServedBank(model, "words")
    gone, stays = Client(bank, TEXTS[0], new_tokens=30), Client(bank, TEXTS[1], new_tokens=5)
    gone.job.cancelled = True
    engine.submit([gone.job, stays.job])
    assert stays.text() == model.predict(TEXTS[1], max_new_tokens=5)[0]
    assert isinstance(gone.last(), Failed)


@pytest.mark.parametrize("broken", ["a text", "any two"])
def test_a_pass_of_decoding_that_fails_ends_only_the_text_whose_fault_it_is(
    model: AMLoRAModel, engine: Engine, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    bank, advance, passes = ServedBank(model, "words"), model.decoder.advance, []

    def picky(state: Any, tokens_BK: torch.Tensor) -> torch.Tensor:
        passes.append(len(tokens_BK))
        logits = advance(state, tokens_BK)  # the cache holds the pass when it fails
        if len(tokens_BK) > 1 if broken == "any two" else bool((state.position > 30).any()):
            raise RuntimeError("out of memory")
        return logits

    texts = [" ".join(TEXTS)[:200], *TEXTS[:3]]
    expected = [AMLoRAModel.predict(model, text, max_new_tokens=9)[0] for text in texts]
    monkeypatch.setattr(model.decoder, "advance", picky)
    with engine._wake:  # all are read in one pass
        clients = [Client(bank, text, new_tokens=9) for text in texts]
        for client in clients:
            engine.submit([client.job])
    assert max(passes, default=0) == 0
    first = clients[0].last()
    assert [client.text() for client in clients[1:]] == expected[1:]
    assert max(passes) > 1, "they were written together until one of their passes failed"
    assert isinstance(first, Failed) if broken == "a text" else isinstance(first, Ended) and first.text == expected[0]


def test_an_engine_that_dies_lets_nobody_wait(model: AMLoRAModel, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = ServedBank(model, "words")

    def fault(_requests: Any) -> Any:
        raise KeyError("a fault of this program")

    monkeypatch.setattr(bank, "begin", fault)
    monkeypatch.setattr("threading.excepthook", lambda _args: None)
    engine = Engine(ServeSettings())
    engine.start()
    client = Client(bank, TEXTS[0])
    engine.submit([client.job])
    last = client.last()
    assert isinstance(last, Failed) and isinstance(last.error, StoppingError)
    engine.stop(1)
    assert not engine.alive
    with pytest.raises(StoppingError):
        engine.submit([Client(ServedBank(model, "words"), TEXTS[0]).job])
