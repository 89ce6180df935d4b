"""Rows whose text is made of named fields, at every command that reads rows: joined as the task's rows are, never routed by
their names, and one row that its task cannot be asked keeps no other from its answer."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas
import pyarrow
import pyarrow.parquet
import pytest
from typer.testing import CliRunner, Result

from amlora_dist.errors import UserError
from amlora_dist.evaluation.field_columns import FieldColumns
from amlora_dist.evaluation.field_texts import MissingFieldsError, RefusedTextsError
from amlora_dist.evaluation.ranking import finished
from amlora_dist.inference.model import AMLoRAModel
from amlora_dist.inference.rekeying import TaskRows, rekey
from amlora_dist.registry.bank_folder import read_bank
from amlora_dist.registry.pyfunc import BankModel
from amlora_dist.tasks.named_fields import FieldEntry
from amlora_dist.tasks.prompts import BANK_TEMPLATE
from amlora_dist.tasks.sources import Row
from amlora_dist.tasks.task import Columns, Label, PromptSettings, SourceSpec, Splits, TaskSpec, TextField
from amlora_dist.tasks.task_entry import TaskEntry
from amlora_dist.training.stage_statistics import held_out_places
from pipelines.cli import added_task
from pipelines.cli.batch_inference import apart
from pipelines.cli.main import app
from pipelines.cli.row_input import InputRow, opened
from tests.bank_with_base import TASKS, texts_of, write_working_bank
from tests.tiny_config import TOPICS

LABELS = TOPICS["colours"][0]
PAIR = [FieldEntry("first", "a"), FieldEntry("second", "the")]
BY_NAME = TaskEntry(
    kind="words", labels=LABELS, template="{{ text }}\n{{ fields.first }} what\nAnswer:", max_length=24,
    fields=PAIR,
)  # fmt: skip
PLAIN = TaskEntry(kind="words", question="what ?", labels=TOPICS["sizes"][0], template=BANK_TEMPLATE)


def split(text: str) -> dict[str, str]:
    words = text.split()
    return {"first": " ".join(words[:2]), "second": " ".join(words[2:])}


def joined(fields: dict[str, str]) -> str:
    return f"a: {fields['first']}\nthe: {fields['second']}"


def rows_of(task: str) -> list[dict[str, str]]:
    """As a file has the rows of a task: those of colours in two columns."""
    texts = texts_of(task, 40)
    parts = [split(text) if task == "colours" else {"text": text} for text in texts]
    return [part | {"label": text.split()[-1]} for part, text in zip(parts, texts, strict=True)]


def write_lines(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def amlora(*arguments: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(one) for one in arguments], input=stdin)


# ---- what a row says ------------------------------------------------------------------------------------------


OTHER = replace(BY_NAME, fields=[FieldEntry("premise", "one"), FieldEntry("question")])
COLUMNS = FieldColumns({"colours": BY_NAME, "pairs": OTHER, "sizes": PLAIN})


def read(file: Path, columns: FieldColumns = COLUMNS, column: str = "text") -> list[InputRow]:
    with opened(str(file), column) as rows:
        rows.columns = columns
        return list(rows.lines())


def test_fields_come_by_name_or_in_columns_of_every_form_of_file(tmp_path: Path) -> None:
    given = {"first": "wall", "second": "is red"}
    mixed = [given, {"text": "a big house"}, {"premise": "sky", "question": "is it ?"}]
    by_name = write_lines(tmp_path / "a.jsonl", [{"fields": one} if "text" not in one else one for one in mixed])
    in_keys = write_lines(tmp_path / "b.jsonl", mixed)
    names = ["text", "first", "second", "premise", "question"]
    with (tmp_path / "c.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, names, restval="")
        table.writeheader()
        table.writerows(mixed)
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{name: one.get(name) for name in names} for one in mixed]), tmp_path / "d.parquet"
    )
    # A structure of Parquet has all names in every row.
    structs = [{"fields": None if "text" in one else one, "text": one.get("text")} for one in mixed]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(structs), tmp_path / "e.parquet")
    (first, *_) = pyarrow.parquet.read_table(tmp_path / "e.parquet").to_pylist()
    assert first["fields"].keys() == {"first", "second", "premise", "question"}
    for file_name in (by_name, in_keys, *(tmp_path / name for name in ("c.csv", "d.parquet", "e.parquet"))):
        found = read(file_name)
        assert [row.request for row in found] == [given, "a big house", mixed[2]], file_name
        assert [row.text for row in found] == ["a: wall\nthe: is red", "a big house", "one: sky\nis it ?"]
        assert found[2].option("question") is None, "here it is a part of the text"


def test_columns_that_happen_to_have_a_fields_name_change_no_plain_text(tmp_path: Path) -> None:
    rows = [
        {"text": "a", "first": "x"}, {"text": "a", "question": "why ?"}, {"text": "a", "first": "", "second": None},
        {"text": "a", "first": ["x"]}, {"text": "a", "fields": "of wheat"}, {"text": "a", "task": "sizes", "first": "x"},
    ]  # fmt: skip
    found = read(write_lines(tmp_path / "a.jsonl", rows))
    assert [row.request for row in found] == ["a"] * len(rows)
    assert found[1].option("question") == "why ?"
    body = write_lines(tmp_path / "b.jsonl", [{"body": "a", "first": "x", "second": "y"}])
    assert read(body, column="body")[0].request == "a", "the caller named the text"
    named = {"first": "x", "second": "y"}
    (one,) = read(write_lines(tmp_path / "c.jsonl", [named | {"text": "a: x\nthe: y"}]))
    assert one.request == named, "both say the same"
    (one,) = read(write_lines(tmp_path / "d.jsonl", [{"text": " ", "fields": named}]))
    assert one.request == named, "a text without words is none"


@pytest.mark.parametrize(
    "more",
    [
        {"first": "x", "second": "y"}, {"first": ["x"], "second": "y"}, {"first": "x", "second": math.nan},
        {"first": "x", "second": "y", "premise": "z", "question": "q"}, {"fields": {"region": "north"}},
        {"fields": {"first": ["x"], "region": "y"}}, {"fields": ["x"]},
    ],
)  # fmt: skip
def test_a_row_with_a_text_is_that_text_whatever_its_other_columns_mean(tmp_path: Path, more: dict[str, Any]) -> None:
    (one,) = read(write_lines(tmp_path / "a.jsonl", [{"text": "a"} | more]))
    assert (one.request, one.fields) == ("a", {"text": "a"} | more) or math.isnan(one.fields["second"])
    if "fields" in more:
        talk = [{"role": "user", "content": "a"}]
        (one,) = read(write_lines(tmp_path / "b.jsonl", [{"messages": talk} | more]))
        assert one.turns and not one.named


def test_a_bank_whose_prompts_read_no_fields_asks_the_text_as_it_always_did(tmp_path: Path) -> None:
    """Also where the text's column is one of a task's fields, or a row's question has a field's name."""
    parts = [FieldEntry("text"), FieldEntry("title"), FieldEntry("question")]
    columns = FieldColumns({"articles": replace(PLAIN, fields=parts)})
    row = {"text": "a", "title": "b", "question": "why ?"}
    for fields in ({}, {"fields": {"title": "c"}}, {"fields": "d"}):
        file = write_lines(tmp_path / "a.jsonl", [row | fields])
        for column in ("text", "title"):
            (one,) = read(file, columns, column)
            assert (one.request, one.option("question")) == (row[column], "why ?")
    (one,) = read(write_lines(tmp_path / "b.jsonl", [row | {"text": ""}]), columns)
    assert one.text == "b\nwhy ?", "without a text"
    reading = FieldColumns({"articles": replace(PLAIN, fields=parts, template="{{ fields.title }}: {{ text }}")})
    assert read(file, reading)[0].text == "a\nb\nwhy ?", "its prompt could not be asked the text alone"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"fields": {"third": "x"}}, "fields: found third, expected some of a task's (colours: first, second; pairs: "),
        ({"first": "x", "label": "y"}, "fields: found first of those of colours and no second, expected all"),
        ({"text": "a", "fields": {"first": "x"}}, "fields: found some next to a text in 'text', expected one of them"),
        ({"fields": {"first": " ", "second": ""}}, "fields: found no words, expected some in at least one"),
        ({"fields": {}}, "fields: found no words, expected some in at least one"),
        ({"first": "", "second": " "}, "text: found nothing, expected a text (a text, a whole number, true or false, or a"
         " finite number); --column names another key, and a task's fields may be there instead: colours: first, second"),
        ({"fields": {"first": ["x"]}}, "fields: 'first': found a list, expected a text"),
        ({"first": ["x"], "second": "y"}, "fields: 'first': found a list, expected a text"),
        ({"fields": ["x"]}, "fields: found a list, expected texts by name; give an object, or each field in a column"),
        ({"first": "x", "second": "y", "premise": "z", "question": "q"}, "fields: found those of several tasks (colours: "),
        ({"messages": [{"role": "user", "content": "a"}], "fields": {"first": "x"}}, "fields: found some next to a convers"),
        ({"fields": {"first": "x"}, "task": "pairs"}, "fields: found first, expected some of a task's (pairs: premise, qu"),
    ],
)  # fmt: skip
def test_fields_that_cannot_be_meant_are_named_with_their_row(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    file = write_lines(tmp_path / "in.jsonl", [{"text": "a"}, row])
    with pytest.raises(UserError) as caught:
        read(file)
    assert str(caught.value).startswith(f"{file}, line 2: {message}"), str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_task_with_exactly_the_given_fields_says_how_they_are_joined(tmp_path: Path) -> None:
    """As of RTE's two sentences next to WiC's word and two sentences."""
    more = replace(BY_NAME, fields=[FieldEntry("word", "word"), FieldEntry("first"), FieldEntry("second")])
    columns = FieldColumns({"more": more, "colours": BY_NAME})
    given = {"first": "x", "second": "y"}
    for row in (given, {"fields": given}):
        (one,) = read(write_lines(tmp_path / "a.jsonl", [row]), columns)
        assert (one.text, one.request) == ("a: x\nthe: y", given)
    (one,) = read(write_lines(tmp_path / "a.jsonl", [given | {"word": "w"}]), columns)
    assert one.text == "word: w\nx\ny"
    blank = write_lines(tmp_path / "a.jsonl", [given | {"word": ""}])
    with pytest.raises(UserError, match=r"line 1: fields: found those of several tasks \(more: first, second; colours: "):
        read(blank, columns)
    (one,) = read(blank, replace(columns, task="more"))
    assert (one.text, one.request) == ("x\ny", given | {"word": ""})


# ---- a bank that is asked -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank that ``rekey`` made of files; texts of colours have two fields, one of which their prompt shows again."""
    folder = tmp_path_factory.mktemp("fields")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AMLORA_HOME", str(folder / "home"))
        write_working_bank(folder / "before", folder / "base", entries={"colours": BY_NAME})
        files = [write_lines(folder / f"{task}.jsonl", rows_of(task)) for task in TASKS]
        given = [part for task, file in zip(TASKS, files, strict=True) for part in ("--rows", f"{task}={file}")]
        done = amlora("rekey", folder / "before", folder / "bank", *given)
    assert done.exit_code == 0, done.output
    return folder / "bank"


@pytest.fixture(scope="module")
def model(bank: Path) -> AMLoRAModel:
    return AMLoRAModel.from_bank(bank, device="cpu")


def new_rows(count: int = 4) -> list[dict[str, str]]:
    return [split(text) for text in texts_of("colours", count, "new")]


def test_rekey_reads_features_of_the_join_and_likelihoods_behind_the_prompt_with_its_fields(
    bank: Path, model: AMLoRAModel, tmp_path: Path
) -> None:
    rows = {task: rows_of(task) for task in TASKS}
    texts = {task: [joined(split_) if task == "colours" else split_["text"] for split_ in own] for task, own in rows.items()}
    given = {
        task: TaskRows(texts[task], [row["label"] for row in own], own if task == "colours" else None)
        for task, own in rows.items()
    }
    rekey(bank.with_name("before"), tmp_path / "same", given)
    made, same = (read_bank(folder).statistics["colours"] for folder in (bank, tmp_path / "same"))
    assert made.keys() == same.keys() and all(made[name].equal(same[name]) for name in made)
    assert model.answering is not None
    held = held_out_places(40, 0.1, seed=0, task="colours")
    fields = [{name: rows["colours"][place][name] for name in ("first", "second")} for place in held]
    found = finished(model.answering.answering(model.requests(fields, task="colours"), batch_size=16, write=False))
    wanted = next(tensor for name, tensor in made.items() if "loglik" in name)
    for one, row in zip(found, wanted.tolist(), strict=True):
        assert one.weighed is not None and list(one.weighed.model) == pytest.approx(row, abs=1e-3)


def test_rekey_names_the_row_that_lacks_fields(bank: Path, tmp_path: Path) -> None:
    folder = bank.parent
    for name, row in (("text", {"text": "a red wall"}), ("part", {"first": "wall"})):
        file = write_lines(tmp_path / f"{name}.jsonl", [*rows_of("colours"), *[row | {"label": "red"}] * 40])
        given = [f"{task}={folder / task}.jsonl" for task in TASKS if task != "colours"]
        options = [part for one in (f"colours={file}", *given) for part in ("--rows", one)]
        done = amlora("rekey", folder / "before", tmp_path / "made", *options)
        assert done.exit_code == 2 and not (tmp_path / "made").exists()
        where = {"text": r"rekey: row \d+ of 80: task 'colours': its prompt", "part": "part.jsonl, line 41: fields: "}[name]
        assert re.search(where, done.stderr), done.stderr


def test_fields_of_files_are_routed_to_the_bit_as_their_join_and_answered_as_in_python(
    bank: Path, model: AMLoRAModel, tmp_path: Path
) -> None:
    asked = new_rows()
    wanted = model.classify(asked)
    routes = model.route([joined(one) for one in asked])
    assert [one.route for one in wanted] == routes
    by_name = write_lines(tmp_path / "a.jsonl", [{"fields": one, "id": n} for n, one in enumerate(asked)])
    (tmp_path / "b.csv").write_text("first,second\n" + "".join(f"{one['first']},{one['second']}\n" for one in asked))
    for file in (by_name, tmp_path / "b.csv"):
        out = tmp_path / f"{file.stem}-out.jsonl"
        done = amlora("classify", bank, file, "--device", "cpu", "-o", out)
        assert done.exit_code == 0, done.output
        found = [json.loads(line) for line in out.read_text().splitlines()]
        assert [row["label"] for row in found] == [one.label for one in wanted]
        assert [row["routed_to"] for row in found] == [one.task for one in wanted] and found[0]["error"] is None
        for row, route in zip(found, routes, strict=True):
            assert row["route"] == {task: round(weight, 6) for task, weight in route.tasks.items() if weight}
    written = amlora("generate", bank, by_name, "--device", "cpu", "--task", "colours")
    assert [json.loads(line)["answer"] for line in written.stdout.splitlines()] == model.predict(asked, task="colours")


def test_a_row_that_its_task_refuses_is_named_and_keeps_no_other_from_its_answer(
    bank: Path, model: AMLoRAModel, tmp_path: Path
) -> None:
    plain = [joined(one) for one in new_rows(12)]
    refused = [text for text, route in zip(plain, model.route(plain), strict=True) if route.task == "colours"][:2]
    others = texts_of("sizes", 3, "new")
    rows = [{"text": text} for text in (others[0], refused[0], others[1], refused[1], others[2])]
    file, out = write_lines(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    for size in (1, 2, 8):
        done = amlora("classify", bank, file, "--device", "cpu", "-o", out, "--batch-size", size)
        assert done.exit_code == 2 and done.stderr.count("error: ") == 1
        assert f"error: {file}, line 2: task 'colours': its prompt reads the fields first, second" in done.stderr
        assert "give `fields` in place of the text" in done.stderr and "rows without an answer: 2" in done.stderr
        found = [json.loads(line) for line in out.read_text().splitlines()]
        assert [row["text"] for row in found] == [row["text"] for row in rows]
        assert [row["label"] for row in found[::2]] == [one.label for one in model.classify(others)]
        for row in found[1::2]:
            assert (row["label"], row["routed_to"]) == (None, "colours") and "reads the fields first, second" in row["error"]
    table_in = f'text\n"{refused[0]}"\n{others[0]}\n'
    streamed = amlora("classify", bank, "--device", "cpu", "--format", "csv", stdin=table_in)
    assert streamed.exit_code == 2
    table = list(csv.DictReader(io.StringIO(streamed.stdout)))
    assert [row["label"] for row in table] == ["", model.classify(others[0])[0].label] and table[1]["error"] == ""
    assert "standard input, line 2: task 'colours'" in streamed.stderr
    with pytest.raises(UserError, match=r"^text [24]: task 'colours': its prompt reads the fields first, second"):
        model.answer([row["text"] for row in rows], batch_size=2)


def test_a_row_without_the_fields_of_the_task_that_it_names_is_refused_before_anything_is_written(
    bank: Path, tmp_path: Path
) -> None:
    others = texts_of("sizes", 1, "new")
    given = write_lines(tmp_path / "in.jsonl", [{"text": others[0]}, {"text": others[0], "task": "colours"}])
    for options, line in (([], 2), (["--task", "colours"], 1)):
        done = amlora("classify", bank, given, "-o", tmp_path / "out.jsonl", "--device", "cpu", *options)
        assert done.exit_code == 2 and f"error: {given}, line {line}: task 'colours': its prompt" in done.stderr
        assert not (tmp_path / "out.jsonl").exists()


def test_rows_that_lack_fields_end_no_comparison_and_a_header_in_other_letters_is_told_the_fields(
    bank: Path, model: AMLoRAModel, tmp_path: Path
) -> None:
    plain = [joined(one) for one in new_rows(12)]
    refused = [text for text, route in zip(plain, model.route(plain), strict=True) if route.task == "colours"][:2]
    texts = [*texts_of("sizes", 2, "new"), *refused]
    file = write_lines(tmp_path / "in.jsonl", [{"text": text} for text in texts])
    done = amlora("diff", bank, bank.with_name("before"), "--sample", file, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["rows"] == 4 and json.loads(done.stdout)["refused"]["before"] == 2
    same = amlora("diff", bank, bank, "--sample", file)
    assert same.exit_code == 0 and "0 of 4 answers change" in same.stdout, same.output
    assert "rows that lack fields of their task: 2 before, 2 after" in same.stdout
    asked: list[int] = []

    def answers(given: list[str]) -> list[str]:
        asked.append(len(given))
        if missing := {n: MissingFieldsError("no", "colours") for n, text in enumerate(given) if text in refused}:
            raise RefusedTextsError(missing, alone=False)
        return given

    found, why = apart(answers, texts, 2)
    assert (found, list(why), asked) == ({0: texts[0], 1: texts[1]}, [2, 3], [2, 2]), "no batch is asked for another's sake"
    (tmp_path / "in.csv").write_text("First,Second\nwall,is red\n")
    done = amlora("classify", bank, tmp_path / "in.csv")
    assert done.exit_code == 2 and "it has First, Second" in done.stderr and "colours: first, second" in done.stderr


def test_ask_takes_the_parts_of_a_text(bank: Path, model: AMLoRAModel) -> None:
    (fields,) = new_rows(1)
    given = [part for name, words in fields.items() for part in ("--field", f"{name}={words}")]
    done = amlora("ask", bank, *given, "--device", "cpu", "--json")
    assert done.exit_code == 0, done.output
    found, (wanted,) = json.loads(done.stdout), model.classify(fields)
    assert (found["text"], found["answer"], found["task"]) == (joined(fields), wanted.label, wanted.task)
    assert amlora("ask", bank, "", *given, "--device", "cpu", "--json").stdout == done.stdout, "a text without words is none"
    other = texts_of("sizes", 1, "new")[0]
    mixed = amlora("ask", bank, joined(fields), other, "--device", "cpu", "--json")
    if model.route(joined(fields))[0].task == "colours":
        assert mixed.exit_code == 2 and "error: text 1: task 'colours': its prompt reads" in mixed.stderr
        assert json.loads(mixed.stdout.splitlines()[1])["answer"] == model.classify(other)[0].label
    for wrong, message in (
        ([other, *given], "TEXT: found some next to --field"), ([], "TEXT: found none"),
        (["--field", "first"], "--field: found 'first' and no text, expected NAME=TEXT"),
        (["--field", "first=x", "--field", "first=y"], "--field: found 'first' twice"),
        (["--field", "third=x"], "fields: found third, expected some of a task's (colours: first, second)"),
    ):  # fmt: skip
        refused = amlora("ask", bank, *wrong, "--device", "cpu")
        assert refused.exit_code == 2 and message in refused.stderr and refused.stdout == "", refused.output


def test_a_frame_may_have_fields_and_its_signature_says_so(bank: Path, model: AMLoRAModel) -> None:
    import mlflow

    asked = new_rows(3)
    texts = texts_of("sizes", 2, "new")
    wanted = model.predict([*asked, *texts])
    served = BankModel(model)
    columns = pandas.DataFrame([*asked, *({"text": text} for text in texts)])
    assert any(isinstance(one, float) and math.isnan(one) for one in columns["first"]), "rows of both kinds"
    by_name = pandas.DataFrame({"fields": [*asked, None, None], "text": [None, "", None, *texts]})
    loaded = mlflow.pyfunc.load_model(str(bank))
    assert {"text", "fields", "first", "second", "question", "task"} == set(loaded.metadata.get_input_schema().input_names())
    for frame in (columns, by_name):
        assert served.predict(frame) == wanted
        assert list(loaded.predict(frame)) == wanted
    assert list(loaded.predict(pandas.DataFrame(asked))) == wanted[:3]
    lists = {"first": [["x"], ["y"]], "second": [1.5, math.nan]}
    for other in ({"first": [5, 6]}, {"fields": ["of wheat", "of rye"]}, lists):
        assert list(loaded.predict(pandas.DataFrame({"text": texts} | other))) == wanted[3:], "columns of another meaning"
    numbers = [{"first": "3", "second": "x"}]
    assert list(loaded.predict(pandas.DataFrame({"first": [3], "second": ["x"]}))) == model.predict(numbers)
    refused = joined(asked[0])
    for frame, message in (
        (pandas.DataFrame({"frist": ["x"], "second": ["y"]}), "row 0 of 1: fields: found second of those of colours and no"),
        (pandas.DataFrame({"body": ["x"]}), r"or a task's fields \(colours: first, second\)"),
        (pandas.DataFrame({"fields": [{"third": "x"}]}), "row 0 of 1: fields: found third, expected some of a task's"),
        (pandas.DataFrame({"text": ["a"], "fields": [{"first": "x"}]}), "row 0 of 1: fields: found some next to a text"),
        (pandas.DataFrame({"text": ["a", None], "first": [None, None], "second": None}), "row 1 of 2 has no text, nor the"),
        (pandas.DataFrame({"text": [texts[0], refused], "task": [None, "colours"]}), "row 1 of 2: task 'colours': its"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"^predict: .*{message}"):
            served.predict(frame)


def test_rows_that_are_scored_bring_fields_as_they_do_where_they_are_answered(
    bank: Path, tmp_path: Path, model: AMLoRAModel
) -> None:
    rows, texts = new_rows(6), texts_of("colours", 6, "new")
    labels = [text.split()[-1] for text in texts]
    right = sum(found == label for found, label in zip(model.predict(rows), labels, strict=True))
    columns = [row | {"label": label} for row, label in zip(rows, labels, strict=True)]
    by_name = [{"fields": row, "label": label} for row, label in zip(rows, labels, strict=True)]
    for given in (columns, by_name):
        file = write_lines(tmp_path / "rows.jsonl", given)
        done = amlora("score", bank, file, "--task", "colours", "--device", "cpu", "--json")
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["accuracy"] == right / 6


def test_a_task_that_was_added_is_asked_by_its_fields_and_shows_how(
    bank: Path, model: AMLoRAModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = TaskSpec(
        name="colours", version=1, kind="words", source=SourceSpec(kind="builtin"), splits=Splits(train="a", test="b"),
        columns=Columns(
            text=[TextField(column=part.name, marker=part.label, neutral=True) for part in PAIR], label="label"
        ),
        prompt=PromptSettings(template=BY_NAME.template), labels=[Label(value=text, text=text) for text in LABELS],
    )  # fmt: skip
    asked = new_rows(3)
    rows = [Row(n, fields, joined(fields), "red", "red") for n, fields in enumerate(asked)]
    monkeypatch.setattr(added_task, "bank_model", lambda uri, options: model)
    chosen = [(spec, rows), (replace(spec, name="elsewhere"), rows)]
    plan, result = SimpleNamespace(parent="one"), SimpleNamespace(bank="two")
    known, unknown = added_task._compared(plan, result, chosen, None)  # type: ignore[arg-type]
    assert known.before == known.after == model.predict(asked)
    routed = [route.task for route in model.route([row.text for row in rows])]
    assert [answer == "" for answer in unknown.after] == [task == "colours" for task in routed]
    words = " ".join(f"--field '{name}={text}'" for name, text in asked[0].items())
    assert added_task._typed(spec, rows[0]) == words


def test_the_input_example_of_a_bank_of_pairs_is_a_pair_and_goes_over_http(tmp_path: Path) -> None:
    import mlflow
    from mlflow.pyfunc.scoring_server import infer_and_parse_data

    write_working_bank(tmp_path / "bank", tmp_path / "base", tasks=("colours",), entries={"colours": BY_NAME})
    loaded = mlflow.pyfunc.load_model(str(tmp_path / "bank"))
    (fields,) = loaded.input_example["fields"]
    assert fields.keys() == {"first", "second"}
    wanted = AMLoRAModel.from_bank(tmp_path / "bank", device="cpu").predict([fields])
    schema = loaded.metadata.get_input_schema()
    for record in ({"fields": fields}, fields):
        assert list(loaded.predict(infer_and_parse_data({"dataframe_records": [record]}, schema))) == wanted
