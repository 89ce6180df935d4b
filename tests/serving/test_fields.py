"""Named fields over HTTP: the same answers as from Python; and how foreign a text looks, on the wire as there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from amlora_dist.inference.model import AMLoRAModel
from amlora_dist.serving.bank import ServedBank
from amlora_dist.tasks.named_fields import FieldEntry
from tests.bank_with_base import described, texts_of, write_keyed_bank
from tests.serving.servers import Running, running

pytestmark = pytest.mark.integration  # a running app

PAIR = [FieldEntry("first", "a"), FieldEntry("second", "the")]
WORDS = texts_of("colours", 1, "named")[0].split()
FIELDS = {"first": " ".join(WORDS[:2]), "second": " ".join(WORDS[2:])}
TEXT = f"a: {FIELDS['first']}\nthe: {FIELDS['second']}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> AMLoRAModel:
    """Texts of colours have two fields, one of which their prompt shows again."""
    folder: Path = tmp_path_factory.mktemp("fields")
    write_keyed_bank(folder / "bank", folder / "base")
    made = AMLoRAModel.from_bank(folder / "bank", device="cpu")
    shown = "{{ text }}\n{{ fields.first }} what\nAnswer:"
    described(made, "colours", replace(made.prompter.entry("colours"), template=shown, fields=PAIR))
    return made


@pytest.fixture(scope="module")
def server(model: AMLoRAModel) -> Iterator[Running]:
    with running(ServedBank(model, "words")) as one:
        yield one


def test_fields_are_answered_alike_at_every_door(server: Running, model: AMLoRAModel) -> None:
    (wanted,) = model.classify(FIELDS)
    assert wanted.task == "colours"
    (found,) = server.good("/v1/classifications", fields=FIELDS)["data"]
    assert (found["label"], found["task"]) == (wanted.label, "colours")
    assert found["scores"] == pytest.approx(wanted.scores, abs=1e-5)
    assert server.good("/v1/completions", fields=FIELDS)["choices"][0]["text"] == wanted.label
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    chat = client.chat.completions.create(model="words", messages=[], extra_body={"fields": FIELDS})
    assert chat.choices[0].message.content == wanted.label
    named = server.good("/v1/classifications", fields=FIELDS, model="words:colours")["data"][0]
    assert named["label"] == model.classify(FIELDS, task="colours")[0].label


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/classifications", {"input": TEXT}), ("/v1/completions", {"prompt": TEXT}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": TEXT}]}),
        ("/v1/classifications", {"input": TEXT, "model": "words:colours"}),
    ],
)  # fmt: skip
def test_a_text_without_the_fields_that_its_prompt_reads_is_refused(server: Running, path: str, body: Any) -> None:
    answer = server.post(path, **body)
    assert answer.status_code == 400
    assert "reads the fields first, second" in answer.json()["error"]["message"]


def test_a_text_without_words_next_to_fields_is_none(server: Running, model: AMLoRAModel) -> None:
    (wanted,) = model.classify(FIELDS)
    for empty in ("", " \n", [""], []):
        (found,) = server.good("/v1/classifications", fields=FIELDS, input=empty)["data"]
        assert found["label"] == wanted.label
        assert server.good("/v1/completions", fields=FIELDS, prompt=empty)["choices"][0]["text"] == wanted.label
    for turns in ([], [{"role": "user", "content": ""}]):
        answer = server.good("/v1/chat/completions", fields=FIELDS, messages=turns)
        assert answer["choices"][0]["message"]["content"] == wanted.label
    for path, key, text in (("/v1/classifications", "input", "red"), ("/v1/completions", "prompt", "red"),
                            ("/v1/chat/completions", "messages", [{"role": "user", "content": "red"}])):  # fmt: skip
        assert "expected one of them" in server.post(path, fields=FIELDS, **{key: text}).text
    assert server.post("/v1/completions", prompt="").status_code == 400, "without fields it is still no text"


@pytest.mark.parametrize(("path", "key"), [("/v1/classifications", "input"), ("/v1/completions", "prompt")])
def test_of_several_texts_the_one_that_is_refused_is_named(server: Running, path: str, key: str) -> None:
    texts = [*texts_of("sizes", 2, "named"), TEXT]
    answer = server.post(path, **{key: texts})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("text 3: task 'colours': its prompt reads the fields first, second")
    assert server.post(path, **{key: TEXT}).json()["error"]["message"].startswith("task 'colours': its prompt reads")


def test_one_text_that_is_refused_does_not_keep_others_from_their_answers(server: Running, model: AMLoRAModel) -> None:
    text = texts_of("sizes", 1, "named")[0]
    assert server.good("/v1/classifications", input=text)["data"][0]["label"] == model.classify(text)[0].label
    assert server.post("/v1/completions", fields=FIELDS, raw=True).status_code == 400


def test_a_text_of_no_task_says_how_foreign_it_is(
    server: Running, model: AMLoRAModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering, text = model.answering, texts_of("sizes", 1, "named")[0]
    assert answering is not None
    own = server.good("/v1/classifications", input=text)["data"][0]
    assert own["task"] == "sizes" and own["foreign"] == pytest.approx(model.classify(text)[0].foreign, rel=1e-4)
    known = answering.evidence

    def of_nobody(reading: Any, router: Any = None) -> Any:
        found = known(reading, router)
        return replace(found, gates_BT=torch.zeros_like(found.gates_BT), foreign_B=torch.full_like(found.foreign_B, 2.5))

    monkeypatch.setattr(answering, "evidence", of_nobody)
    wanted = model.classify(text)[0]
    found = server.good("/v1/classifications", input=text)["data"][0]
    assert (found["label"], found["task"], found["foreign"]) == (None, None, 2.5)
    assert (wanted.label, wanted.task, wanted.foreign) == (None, None, 2.5)
