"""How long a free-text answer may be is its task's word, whoever shares its passes and whatever door it came through."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from amlora_dist.evaluation.answering import Answering
from amlora_dist.evaluation.ranking import finished
from amlora_dist.inference.model import AMLoRAModel
from amlora_dist.serving.bank import ServedBank
from amlora_dist.tasks.prompts import BANK_TEMPLATE
from amlora_dist.tasks.task_entry import TaskEntry
from tests.bank_with_base import TASKS, texts_of, write_keyed_bank
from tests.serving.servers import Running, events, running

pytestmark = pytest.mark.integration  # a running app

LIMITS = {"colours": 2, "shapes": 7}
TEXTS = [texts_of(task, 3, "limits")[i] for i in range(3) for task in TASKS]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> AMLoRAModel:
    """Two tasks of free text, which may be of 2 and of 7 tokens, and one of labels."""
    folder: Path = tmp_path_factory.mktemp("limits")
    written = {
        task: TaskEntry(kind="words", template=BANK_TEMPLATE, max_length=24, max_answer_tokens=limit)
        for task, limit in LIMITS.items()
    }
    write_keyed_bank(folder / "bank", folder / "base", entries=written)
    return AMLoRAModel.from_bank(folder / "bank", device="cpu")


@pytest.fixture(scope="module")
def server(model: AMLoRAModel) -> Iterator[Running]:
    with running(ServedBank(model, "words")) as one:
        yield one


@pytest.fixture(scope="module")
def alone(model: AMLoRAModel) -> list[tuple[str, bool]]:
    """Each text's answer, and whether it ended, where nobody shares its passes."""
    found = [model.answer(text)[0] for text in TEXTS]
    assert {one.route.task for one in found} == set(TASKS)
    for one in found:
        if not one.ended:  # some of its tokens may be special ones, which are no words
            assert len(one.text.split()) <= LIMITS[str(one.route.task)]
    assert {one.route.task for one in found if not one.ended} == set(LIMITS), "some of each task are cut at its limit"
    assert max(len(one.text.split()) for one in found) > LIMITS["colours"]
    return [(one.text, one.ended) for one in found]


def test_answers_of_one_pass_have_their_own_limits(model: AMLoRAModel, alone: list[tuple[str, bool]]) -> None:
    assert [(one.text, one.ended) for one in model.answer(TEXTS, batch_size=len(TEXTS))] == alone
    assert [(one.text, one.ended) for one in (model.chat([{"role": "user", "content": t}]) for t in TEXTS)] == alone
    longer = model.answer(TEXTS, max_new_tokens=9, batch_size=len(TEXTS))
    assert max(len(one.text.split()) for one in longer) > LIMITS["shapes"], "the caller's own limit wins"
    named = model.answer(TEXTS, task=["colours", "shapes", None] * 3, batch_size=len(TEXTS))
    assert max(len(one.text.split()) for one in named[::3]) <= LIMITS["colours"]


def test_the_server_cuts_where_the_model_cuts(server: Running, alone: list[tuple[str, bool]]) -> None:
    wanted = [(text, "stop" if ended else "length") for text, ended in alone]
    together = server.good("/v1/completions", prompt=TEXTS)["choices"]
    assert [(one["text"], one["finish_reason"]) for one in together] == wanted
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    for text, answer in zip(TEXTS, wanted, strict=True):
        choice = client.chat.completions.create(model="words", messages=[{"role": "user", "content": text}]).choices[0]
        assert (choice.message.content, choice.finish_reason) == answer
    longer = server.good("/v1/completions", prompt=TEXTS, max_tokens=9)["choices"]
    assert max(len(one["text"].split()) for one in longer) > LIMITS["shapes"]


def test_a_stream_ends_where_the_whole_answer_ends(server: Running, alone: list[tuple[str, bool]]) -> None:
    pieces, reasons = dict.fromkeys(range(len(TEXTS)), ""), dict.fromkeys(range(len(TEXTS)), "")
    for event in events(server.post("/v1/completions", prompt=TEXTS, stream=True))[:-1]:
        for choice in json.loads(event)["choices"]:
            pieces[choice["index"]] += choice["text"]
            reasons[choice["index"]] = choice["finish_reason"] or reasons[choice["index"]]
    found = [(pieces[place], reasons[place]) for place in range(len(TEXTS))]
    assert found == [(text, "stop" if ended else "length") for text, ended in alone]


def test_rows_are_cut_where_all_ranks_make_equally_many_passes(model: AMLoRAModel, alone: list[tuple[str, bool]]) -> None:
    one = model.answering
    assert one is not None
    whole = Answering(
        model.mixture, model.decoder, model.prompter, one.router, kind=one.kind, device=model.device, rows_TN=one.rows_TN,
        full_forward=True,
    )  # fmt: skip
    found = finished(whole.answering(model.requests(TEXTS), batch_size=len(TEXTS), all_done=lambda _done: False))
    assert [(answered.text, answered.ended) for answered in found] == alone
