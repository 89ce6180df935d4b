"""A bank learned in the model's chat template: what is scored is what is answered, in the library and over HTTP."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pandas
import pytest
from openai import OpenAI

from amlora_dist.config.loading import load_config
from amlora_dist.errors import UserError
from amlora_dist.evaluation.requests import Request
from amlora_dist.evaluation.scoring import read_predictions
from amlora_dist.inference.model import AMLoRAModel
from amlora_dist.registry.card import adapter_readme, input_example, mlmodel, readme
from amlora_dist.registry.pyfunc import BankModel
from amlora_dist.serving.bank import ServedBank
from amlora_dist.tasks.conversations import Turn
from pipelines.cli.main import app
from pipelines.runs.sequence import run_sequence
from tests.recording_progress import Watching
from tests.serving.servers import Running, running
from tests.tiny_chat import write_chat_config

pytestmark = [pytest.mark.integration, pytest.mark.slow]
SYSTEM = {"role": "system", "content": "Repeat it."}
FIRST = {"role": "user", "content": "Which parcel is number 1?"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("chat")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AMLORA_HOME", str(folder / "home"))
        progress = Watching()
        run_sequence(load_config(write_chat_config(folder), ["evaluate=all"]), run_id="chat", progress=progress)
        (folder / "notes").write_text("\n".join(progress.lines))
        yield folder


@pytest.fixture(scope="module")
def model(place: Path) -> AMLoRAModel:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AMLORA_HOME", str(place / "home"))
        return AMLoRAModel.from_bank("models:/chat@current", device="cpu")


@pytest.fixture(scope="module")
def server(model: AMLoRAModel) -> Any:
    with running(ServedBank(model, "chat")) as one:
        yield one


def test_a_run_says_which_columns_it_took_for_a_conversation(place: Path) -> None:
    assert "task 'talk': columns: auto: messages" in (place / "notes").read_text().splitlines()


def test_a_bank_says_that_its_tasks_are_asked_in_turns(model: AMLoRAModel) -> None:
    talk, colours = (model.prompter.entry(task) for task in ("talk", "colours"))
    assert talk.chat and colours.chat and colours.system == "You see." and model.prompter.chat_bank
    assert "chat" in model.bank.manifest.to_mapping()["adapters"][0]["task_spec"]


def test_no_row_differs_between_the_matrix_and_what_is_served(place: Path, model: AMLoRAModel) -> None:
    rows = [json.loads(line)["messages"] for line in (place / "talk" / "test.jsonl").read_text().splitlines()]
    texts = [json.loads(line)["text"] for line in (place / "colours" / "test.jsonl").read_text().splitlines()]
    scores = [json.loads(file.read_text()) | {"file": file} for file in place.glob("home/storage/scores/*/summary.json")]
    plain = [[{"role": "user", "content": text}] for text in texts]
    for task, asked in (("talk", [turns[:-1] for turns in rows]), ("colours", plain)):
        for one in (one for one in scores if (one["task"], one["mode"]) == (task, "router")):
            found = sorted(read_predictions(one["file"].with_name("predictions.jsonl")), key=lambda row: row.row)
            if len(found[0].gates or ()) == 2:
                assert [model.chat(turns).text for turns in asked] == [row.served for row in found]
                break
        else:
            raise AssertionError(f"no score of {task}")


def test_the_prompt_is_the_template_and_the_router_reads_the_last_words(model: AMLoRAModel) -> None:
    turns = (Turn("system", "Repeat it."), Turn("user", "a"), Turn("assistant", "b"), Turn("user", "Which parcel?"))
    (request,) = model.requests("Which parcel?", task="talk")
    request.turns = turns
    model.prompter.read([request])
    model.prompter.ask(request, new_tokens=4)
    assert model.tokenizer.decode(request.tokens) == (
        "<|im_start|>system\nRepeat it.<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nWhich parcel?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert model.tokenizer.decode(request.text_ids) == "Which parcel?"
    plain = Request(0, "Which parcel?")
    assert model.chat([SYSTEM, {"role": "user", "content": "Which parcel?"}]).route == model.route(plain.text)[0]


def test_a_conversation_is_routed_again_or_keeps_its_route(model: AMLoRAModel) -> None:
    turns = [FIRST, {"role": "assistant", "content": "The parcel."}, {"role": "user", "content": "paint wall red the sky"}]
    assert model.chat(turns).route == model.route(turns[2]["content"])[0]
    assert model.chat(turns, route_by="conversation").route == model.route(turns[0]["content"])[0]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([SYSTEM], "no words of role user"),
        ([FIRST, {"role": "assistant", "content": "x"}], "a last turn of role assistant"),
        ([{"role": "oracle", "content": "x"}], "an unknown role 'oracle'|unknown role"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "a part of type 'image_url'"),
    ],
)
def test_what_is_no_conversation_is_refused(model: AMLoRAModel, messages: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        model.chat(messages)


def test_a_conversation_over_http_is_the_librarys_streamed_or_not(server: Running, model: AMLoRAModel) -> None:
    client = OpenAI(base_url=f"{server.url}/v1", api_key="unused")
    turns: list[Any] = [SYSTEM]
    for text in ("Which parcel is number 1?", "paint wall red the sky", "Which camera is it?", "looks a wall blue", "a?"):
        turns.append({"role": "user", "content": text})
        wanted = model.chat(turns)
        reply = client.chat.completions.create(model="chat", messages=turns, extra_body={"routing": True})
        assert reply.choices[0].message.content == wanted.text
        assert reply.choices[0].routing["task"] == wanted.route.task  # type: ignore[attr-defined]
        pieces = client.chat.completions.create(model="chat", messages=turns, stream=True)
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == wanted.text
        kept = server.good("/v1/chat/completions", messages=turns, route_by="conversation", routing=True)
        assert kept["choices"][0]["routing"]["task"] == model.route(FIRST["content"])[0].task
        turns.append({"role": "assistant", "content": wanted.text or "-"})
    turns.append({"role": "tool", "content": "It is red.", "tool_call_id": "call-1"})
    reply = client.chat.completions.create(model="chat", messages=turns, metadata={"ticket": "17"})
    assert reply.choices[0].message.content == model.chat(turns).text, "what a tool says is a turn as in training"


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def amlora(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs `amlora chat` with these lines as its input."""
    monkeypatch.setenv("AMLORA_HOME", str(place / "home"))

    def call(lines: str, *options: str, terminal: bool = False) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", (_Terminal if terminal else io.StringIO)(lines))
        code = int(app(["chat", "models:/chat@current", "--device", "cpu", *options], standalone_mode=False) or 0)
        response = capsys.readouterr()
        return code, response.out, response.err

    return call


def test_lines_are_turns_with_their_routes(amlora: Any, model: AMLoRAModel) -> None:
    lines = f"{FIRST['content']}\n\nred wall\n/new\nred wall\n/quit\nnever\n"
    code, out, _ = amlora(lines, "--json", "--system", "Repeat it.")
    found = [json.loads(line) for line in out.splitlines()]
    first = model.chat([SYSTEM, FIRST])
    turns = [SYSTEM, FIRST, {"role": "assistant", "content": first.text}] if first.text else [SYSTEM]
    second = model.chat([*turns, {"role": "user", "content": "red wall"}])
    third = model.chat([SYSTEM, {"role": "user", "content": "red wall"}])
    assert code == 0 and [line["answer"] for line in found] == [first.text, second.text, third.text]
    assert [line["route"]["task"] for line in found] == [first.route.task, second.route.task, third.route.task]


def test_in_a_pipe_answers_are_output_and_routes_are_not(amlora: Any, model: AMLoRAModel) -> None:
    code, out, err = amlora("red wall\n", "--task", "colours")
    assert code == 0 and out == model.chat([{"role": "user", "content": "red wall"}], task="colours").text + "\n"
    assert "[colours 1.00]" in err
    code, _, err = amlora("red wall\n", "--task", "nothing")
    assert code == 2 and "the bank's tasks are talk, colours" in err


def test_lines_are_read_as_files_are(amlora: Any, model: AMLoRAModel) -> None:
    code, out, err = amlora("\ufeffred wall\n\u200b\nred \udcfc\nnever\n")
    assert out == model.chat([{"role": "user", "content": "red wall"}]).text + "\n", "the mark is no part of the message"
    assert code == 2 and "standard input, line 3: not UTF-8 text; write it as UTF-8" in err


def test_on_a_terminal_a_turn_that_cannot_be_answered_is_reported_and_the_conversation_goes_on(
    amlora: Any, model: AMLoRAModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = AMLoRAModel.chat

    def picky(self: AMLoRAModel, turns: Any, **options: Any) -> Any:
        if turns[-1]["content"] == "too much":
            raise UserError("no room for it")
        return chat(self, turns, **options)

    monkeypatch.setattr(AMLoRAModel, "chat", picky)
    code, out, err = amlora("too much\nred wall\n/quit\n", "--json", terminal=True)
    assert code == 0 and json.loads(out)["answer"] == model.chat([{"role": "user", "content": "red wall"}]).text
    assert "no room for it (not sent)" in err
    code, out, err = amlora("too much\nred wall\n")
    assert code == 2 and not out and "no room for it" in err


def test_a_label_that_answers_has_the_log_probabilities_of_its_words(server: Running, model: AMLoRAModel) -> None:
    turns = [{"role": "user", "content": "paint wall red the sky"}]
    response = server.good("/v1/chat/completions", model="chat:colours", messages=turns, logprobs=True, top_logprobs=2)
    found = response["choices"][0]["logprobs"]["content"]
    answer = response["choices"][0]["message"]["content"]
    assert "".join(token["token"] for token in found) == answer == model.chat(turns, task="colours").text
    (request,) = model.requests(turns[0]["content"], task="colours")
    assert model.answering is not None
    begun = model.answering.begin([request])
    (weighed,) = model.answering.weigh(begun)
    assert weighed is not None
    assert sum(token["logprob"] for token in found) == pytest.approx(weighed.model[weighed.labels.index(answer)], abs=1e-4)


# ---- rows of conversations, wherever a bank is given rows ---------------------------------------------------------


@pytest.fixture
def command(place: Path, model: AMLoRAModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command on the bank and gives what it writes, as JSON lines; a failure's message."""
    monkeypatch.setenv("AMLORA_HOME", str(place / "home"))

    def call(name: str, *given: str | Path) -> Any:
        options = [str(one) for one in given]
        code = app([name, "models:/chat@current", *options, "--device", "cpu"], standalone_mode=False)
        response = capsys.readouterr()
        return response.err if code else [json.loads(line) for line in response.out.splitlines()]

    return call


def _test_rows(place: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (place / "talk" / "test.jsonl").read_text().splitlines()]


def _write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def _forms(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The same conversations in every form that can hold them; the last is without the right answers."""
    speakers = {"system": "system", "user": "human", "assistant": "gpt"}
    shared = [[{"from": speakers[t["role"]], "value": t["content"]} for t in row["messages"]] for row in rows]
    return {
        "messages": rows,
        "conversations": [{"conversations": turns} for turns in shared],
        "prompt": [{"prompt": row["messages"][:-1], "completion": row["messages"][-1]["content"]} for row in rows],
        "open": [{"messages": row["messages"][:-1]} for row in rows],
    }


@pytest.mark.parametrize("form", ["messages", "conversations", "prompt", "open"])
def test_generate_answers_conversations_as_chat_does(
    place: Path, model: AMLoRAModel, command: Any, tmp_path: Path, form: str
) -> None:
    rows = _test_rows(place)
    wanted = [model.chat(row["messages"][:-1]) for row in rows]
    found = command("generate", _write(tmp_path / "rows.jsonl", _forms(rows)[form]))
    assert [(one["answer"], one["routed_to"]) for one in found] == [(one.text, one.route.task) for one in wanted]
    assert found[0].keys() >= _forms(rows)[form][0].keys()
    labelled = command("classify", tmp_path / "rows.jsonl", "--task", "colours")
    asked = [model.classify([row["messages"][:-1]], task="colours")[0].label for row in rows]
    assert [one["label"] for one in labelled] == asked


def test_score_counts_rows_of_conversations_as_the_matrix_did(place: Path, command: Any, tmp_path: Path) -> None:
    matrix = next(
        score for file in place.glob("home/storage/scores/*/summary.json")
        if (score := json.loads(file.read_text())) and (score["task"], score["mode"]) == ("talk", "router")
        and len(read_predictions(file.with_name("predictions.jsonl"))[0].gates or ()) == 2
    )  # fmt: skip
    forms = _forms(_test_rows(place))
    for form in ("messages", "conversations", "prompt"):
        (found,) = command("score", _write(tmp_path / "rows.jsonl", forms[form]), "--task", "talk", "--json")
        assert found["metric"] == "rouge_l" and found["accuracy"] == pytest.approx(matrix["accuracy"], abs=1e-12)
        assert found["routing_accuracy"] == matrix["routing_accuracy"]
    open_rows = _write(tmp_path / "open.jsonl", forms["open"])
    assert "open.jsonl, line 1: found no 'label'" in command("score", open_rows, "--task", "talk", "--json")


def test_a_labelled_task_is_scored_on_plain_texts_and_on_turns_alike(place: Path, command: Any, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (place / "colours" / "test.jsonl").read_text().splitlines()]
    turns = [
        {"messages": [{"role": "user", "content": r["text"]}, {"role": "assistant", "content": r["label"]}]} for r in rows
    ]
    (plain,) = command("score", place / "colours" / "test.jsonl", "--task", "colours", "--json")
    (response,) = command("score", _write(tmp_path / "rows.jsonl", turns), "--task", "colours", "--json")
    assert plain == response and plain["metric"] == "accuracy"


def test_columns_are_named_or_found_and_what_is_no_conversation_is_refused(
    place: Path, command: Any, tmp_path: Path
) -> None:
    rows = [{"talk": row["messages"]} for row in _test_rows(place)]
    assert len(command("generate", _write(tmp_path / "named.jsonl", rows), "--column", "talk")) == len(rows)
    frame = pandas.DataFrame({"prompt": ["Which parcel is number 1?"], "completion": ["x"]})
    frame.to_parquet(tmp_path / "rows.parquet")
    frame.to_csv(tmp_path / "rows.csv", index=False)
    assert len(command("generate", tmp_path / "rows.parquet")) == 1
    assert command("generate", tmp_path / "rows.csv", "-o", tmp_path / "out.jsonl") == []
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 1
    for row, message in (
        ({"messages": [SYSTEM]}, "line 1: found no user turn before its answer"),
        ({"messages": [{"role": "oracle", "content": "x"}]}, "an unknown role ('oracle') in turn 1 of 'messages'"),
        ({"messages": "x"}, "line 1: found a value of type str in column 'messages', expected a list of turns"),
        ({"other": "x"}, "line 1: text: found nothing"),
    ):
        assert message in command("generate", _write(tmp_path / "bad.jsonl", [row]))


def test_ask_writes_what_chat_writes(model: AMLoRAModel, command: Any) -> None:
    for text in ("Which parcel is number 1?", "paint wall red the sky"):
        (found,) = command("ask", text, "--json")
        assert found["answer"] == model.chat([{"role": "user", "content": text}]).text


def test_mlflow_takes_conversations_and_answers_as_chat_does(place: Path, model: AMLoRAModel) -> None:
    rows = [row["messages"][:-1] for row in _test_rows(place)]
    wanted = [model.chat(turns).text for turns in rows]
    wrapped = BankModel(model)
    assert wrapped.predict(pandas.DataFrame({"messages": rows})) == wanted
    mixed = pandas.DataFrame({"messages": [*rows, None], "text": [*[None] * len(rows), "red wall"]})
    assert wrapped.predict(mixed) == [*wanted, model.predict(["red wall"])[0]]
    single = pandas.DataFrame({"prompt": ["Which parcel?"], "task": ["talk"]})
    assert wrapped.predict(single) == [model.chat([{"role": "user", "content": "Which parcel?"}], task="talk").text]
    with pytest.raises(UserError, match="row 1 of 2: found no user turn"):
        wrapped.predict(pandas.DataFrame({"messages": [rows[0], [SYSTEM]]}))
    with pytest.raises(UserError, match="row 1 of 2 has no text"):
        wrapped.predict(pandas.DataFrame({"messages": [rows[0], None]}))


def test_mlflow_loads_the_version_and_takes_its_own_example(place: Path, model: AMLoRAModel) -> None:
    import mlflow

    from amlora_dist.registry.store import Store

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AMLORA_HOME", str(place / "home"))
        before = mlflow.get_tracking_uri()
        mlflow.set_tracking_uri(Store.open(place / "home").connection.uri)
        try:
            loaded = mlflow.pyfunc.load_model("models:/chat@current", model_config={"device": "cpu"})
        finally:
            mlflow.set_tracking_uri(before)
    rows = [row["messages"][:-1] for row in _test_rows(place)]
    assert list(loaded.predict(pandas.DataFrame({"messages": rows}))) == [model.chat(turns).text for turns in rows]
    assert list(loaded.predict(pandas.DataFrame({"text": ["red wall"]}))) == model.predict(["red wall"])
    assert loaded.input_example is not None and len(loaded.predict(loaded.input_example)) == 1


def test_the_cards_say_how_a_bank_of_conversations_is_asked(model: AMLoRAModel) -> None:
    manifest = model.bank.manifest
    assert '"name": "messages"' in mlmodel(manifest) and json.loads(input_example(manifest))["columns"] == ["messages"]
    card = readme(manifest)
    assert "model.chat([" in card and "`talk` by rouge_l" in card and "type: rouge_l" in card
    own = adapter_readme(manifest, "colours", 4)
    assert "What the user says last, in the base model's chat template (Jinja)" in own and "System: You see." in own
    assert "free text" in adapter_readme(manifest, "talk", 4)
