"""Rows in and out of ``classify`` and ``generate``: one reader, one writer, and all that can be known before a model is
loaded is reported before. The model here only says that it was loaded."""

from __future__ import annotations

import csv
import io
import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from typer.testing import CliRunner, Result

from amlora_dist.evaluation.requests import Answer, Classification, Route
from amlora_dist.inference.model import AMLoRAModel
from pipelines.cli.main import app
from tests.registry.tiny_banks import tiny_bank
from tests.training.test_torn_files import no_file_above

TASKS = ("colours", "shapes")
ROUTE = Route({"colours": 1.0, "shapes": 0.0}, {"colours": 1.0, "shapes": 0.0}, 0.0)
TEXTS = ["the wall is red", "the paint is blue"]


class FakeModel:
    """Replaces the model, and keeps what it was given."""

    loaded: list[str]
    texts: list[str]

    def __init__(self) -> None:
        self.loaded, self.texts = [], []

    def from_bank(self, bank: Any, **options: Any) -> FakeModel:
        self.loaded.append(str(bank))
        return self

    def classify(self, texts: Sequence[str], labels: Any = None, **call: Any) -> list[Classification]:
        self.texts += texts
        return [Classification("red", "colours", {"red": 1.0}, ROUTE) for _ in texts]

    def answer(self, texts: Sequence[str], **call: Any) -> list[Answer]:
        self.texts += texts
        return [Answer("=red", True, ROUTE) for _ in texts]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeModel:
    tiny_bank(tmp_path / "bank", TASKS)
    model = FakeModel()
    monkeypatch.setattr(AMLoRAModel, "from_bank", model.from_bank)
    monkeypatch.chdir(tmp_path)
    return model


def amlora(*arguments: str | Path, stdin: str | bytes | None = None, command: str = "classify") -> Result:
    return CliRunner().invoke(app, [command, "bank", *map(str, arguments)], input=stdin)


def objects(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.removesuffix("\n").split("\n")]


def refused(fake: FakeModel, *arguments: str | Path, stdin: str | bytes | None = None, loaded: bool = False) -> str:
    """The message of a command that ends before the model is loaded, and writes nothing."""
    before = sorted(Path().rglob("*"))
    done = amlora(*arguments, stdin=stdin)
    assert (done.exit_code, done.stdout) == (2, ""), done.output
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert bool(fake.loaded) == loaded, "the model is loaded after everything was looked at"
    assert sorted(Path().rglob("*")) == before, "nothing is written"
    return done.stderr.removeprefix("error: ")


# ---- in -------------------------------------------------------------------------------------------------------


def test_csv_unquoted_comma_is_refused_with_its_line(fake: FakeModel) -> None:
    Path("in.csv").write_text("id,text\n1,the wall is red\n2,sky, the paint is blue\n")
    assert refused(fake, "in.csv").startswith("in.csv, line 3: found a wrong number of cells, expected as many as")


def test_csv_unclosed_quote_is_refused_with_its_line(fake: FakeModel) -> None:
    Path("in.csv").write_text('id,text\n1,a\n2,"the wall is red\n3,b\n')
    assert refused(fake, "in.csv").startswith("in.csv, line 3: found a quote that is never closed")


def test_json_array_is_rows(fake: FakeModel) -> None:
    Path("in.json").write_text(json.dumps([{"text": text, "n": n} for n, text in enumerate(TEXTS)], indent=1))
    for stdin in (None, Path("in.json").read_text()):
        found = objects(amlora("-" if stdin else "in.json", stdin=stdin).stdout)
        assert [(row["text"], row["n"], row["label"]) for row in found] == [(TEXTS[0], 0, "red"), (TEXTS[1], 1, "red")]
    Path("in.json").write_text('[{"text": "a"}, {"body": "b"}]')
    assert refused(FakeModel(), "in.json").startswith("in.json, row 2: text: found nothing, expected a text")


def test_stdin_csv_is_rows(fake: FakeModel) -> None:
    found = amlora(stdin="\ufeffid,text\r\n1,the wall is red\r\n2,the paint is blue\r\n")
    assert fake.texts == TEXTS
    assert [row["id"] for row in csv.DictReader(io.StringIO(found.stdout))] == ["1", "2"]


def test_stdin_bom_is_no_part_of_the_first_row(fake: FakeModel) -> None:
    rows = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    assert amlora(stdin="\ufeff" + rows).exit_code == amlora(stdin="\ufeff" + "\n".join(TEXTS)).exit_code == 0
    assert fake.texts == TEXTS * 2
    joined = "".join("\ufeff" * (1 + place) + json.dumps({"text": text}) + "\n" for place, text in enumerate(TEXTS))
    assert amlora(stdin=joined).exit_code == 0
    assert fake.texts == TEXTS * 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("id,body\n1,a\n", "line 1: found 'id,body', which may be the header of a CSV or a text; give --format csv"),
        ("text\nthe wall\n", "line 1: found 'text', which may be the header of a CSV or a text"),
        ("id;text\n1;a\n", "line 1: found cells between semicolons"),
        ("id\ttext\n1\ta\n", "line 1: found cells between tabs"),
        ("id,text,text\n1,a,b\n", "line 1: found the column 'text' twice"),
        ('[{"text": "a"},\n', "line 1: found"),
        ('["a wall", "red"]', "line 1: found '[\"a wall\", \"red\"]', a JSON array of something else than objects"),
        ('["the wall is red",\n', "a JSON array of something else than objects"),
        ("[1, 2]", "or give --format text"),
        (b"PAR1\x15\x04\x15", "not UTF-8 text but Parquet"),
        (b"\xff\xfea\x00", "not UTF-8 text but UTF-16 text"),
    ],
)
def test_stdin_that_cannot_be_recognised_asks_for_its_format(fake: FakeModel, given: str | bytes, message: str) -> None:
    loaded = "twice" in message or given == '[{"text": "a"},\n'  # its rows are read as they come
    error = refused(fake, stdin=given, loaded=loaded)
    assert error.startswith("standard input") and message in error


def test_format_says_what_the_first_line_does_not(fake: FakeModel) -> None:
    assert amlora("--format", "text", stdin="id,body\n{a}\n").exit_code == 0
    assert fake.texts == ["id,body", "{a}"]
    assert amlora("--format", "csv", "--column", "body", stdin="id,body\n1,a\n").exit_code == 0
    assert fake.texts[2:] == ["a"]
    assert "expected one JSON object a line" in amlora("--format", "jsonl", stdin="the wall\n").stderr
    Path("in.data").write_text("a,text\n1,b\n")
    assert "found suffix '.data', expected one of" in amlora("in.data").stderr
    assert amlora("in.data", "--format", "csv").exit_code == 0
    assert fake.texts[3:] == ["b"]


def test_plain_lines_stay_plain_lines(fake: FakeModel) -> None:
    lines = ["[12:30] the wall, is red", "hello, text", "- a, b", "yes"]
    Path("in.txt").write_text("\n".join(lines))
    assert amlora("in.txt").exit_code == 0 and amlora(stdin="\n".join(lines)).exit_code == 0
    assert fake.texts == lines * 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": ["a"]}, "text: found a list, expected a text"),
        ({"text": {"a": "b"}}, "text: found a dictionary, expected a text"),
        ({"text": None}, "text: found nothing, expected a text"),
        ({"text": " \t"}, "text: found ' \\t', expected a text with words"),
        ({"text": float("inf")}, "text: found inf, which is not a finite number"),
        ({"text": "a", "question": ["b"]}, "question: found a list, expected a text"),
        ({"text": "a", "task": "fruit"}, "task: found 'fruit', the bank's tasks are colours, shapes"),
    ],
)
def test_not_text_is_refused_with_its_line(fake: FakeModel, row: dict[str, Any], message: str) -> None:
    Path("in.jsonl").write_text('{"text": "a"}\n' + json.dumps(row) + "\n")
    assert refused(fake, "in.jsonl").startswith(f"in.jsonl, line 2: {message}")


def test_numbers_are_texts(fake: FakeModel) -> None:
    assert amlora(stdin='{"text": 7}\n{"text": 1.5, "question": 3}\n').exit_code == 0
    assert fake.texts == ["7", "1.5"]


def test_surrogate_in_a_text_is_refused_and_elsewhere_is_passed_on(fake: FakeModel) -> None:
    Path("in.jsonl").write_text('{"text": "the \\ud83d wall"}\n')
    assert refused(fake, "in.jsonl").startswith("in.jsonl, line 1: text: found half of a character (\\ud83d, at")
    Path("in.jsonl").write_text('{"text": "a", "note": "\\ud83d"}\n')
    assert refused(fake, "in.jsonl", "-o", "out.csv").startswith("in.jsonl, line 1: column 'note': found half of")
    assert amlora("in.jsonl", "-o", "out.jsonl").exit_code == 0
    assert objects(Path("out.jsonl").read_text())[0]["note"] == "\ud83d"


def test_parquet_torn_or_bad_is_refused_with_its_column(fake: FakeModel) -> None:
    far = pyarrow.array([10**17], pyarrow.timestamp("ms"))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "when": far}), "in.parquet")
    assert refused(fake, "in.parquet").startswith("in.parquet: column 'when' cannot be read (")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "image": [b"\x00"]}), "in.parquet")
    assert refused(fake, "in.parquet").startswith("in.parquet, row 1: column 'image': found bytes")


def test_save_to_disk_folder_and_parquet_are_rows(fake: FakeModel) -> None:
    rows = [{"text": text, "n": n} for n, text in enumerate(TEXTS)]
    datasets.Dataset.from_list(rows).save_to_disk("saved")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "in.parquet")
    for source in ("saved", "in.parquet"):
        assert [row["n"] for row in objects(amlora(source).stdout)] == [0, 1]
    Path("empty").mkdir()
    assert "empty: found a folder that Dataset.save_to_disk did not write" in amlora("empty").stderr


def test_a_pipe_is_read_once_and_as_it_says(fake: FakeModel) -> None:
    os.mkfifo("pipe")
    feeding = threading.Thread(target=Path("pipe").write_text, args=("id,text\n1,the wall is red\n",), daemon=True)
    feeding.start()
    assert amlora("pipe").exit_code == 0
    assert fake.texts == TEXTS[:1]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
@pytest.mark.parametrize("name", ["in.txt", "in.csv", "in.jsonl"])
def test_utf_16_without_a_mark_is_no_text(fake: FakeModel, encoding: str, name: str) -> None:
    text = {"in.txt": "the wall is red\n", "in.csv": "id,text\n1,red\n", "in.jsonl": '{"text": "red"}\n'}[name]
    Path(name).write_bytes(text.encode(encoding))
    assert f"{name}, line 1: not text but a zero byte" in refused(fake, name)
    assert "standard input, line 1: not text but a zero byte" in refused(fake, stdin=text.encode(encoding))


def test_the_end_of_a_file_that_a_loss_of_power_cut_off_is_reported_with_its_line(fake: FakeModel) -> None:
    Path("in.jsonl").write_bytes(b'{"text": "the wall"}\n' + bytes(100))
    assert "in.jsonl, line 2: not text but a zero byte (byte 1 of it)" in refused(fake, "in.jsonl")


@pytest.mark.parametrize("text", ["\u200b", "\ufeff", "\u200d\u2060 ", "\u202e", "\u0000", "\u00a0\u3000"])
def test_a_text_of_which_nothing_can_be_read_is_empty(fake: FakeModel, text: str) -> None:
    Path("in.jsonl").write_text(json.dumps({"text": text}) + "\n")
    assert "expected a text with words" in refused(fake, "in.jsonl")


def test_names_in_messages_do_not_move_the_cursor_or_turn_the_line(fake: FakeModel) -> None:
    Path("in.csv").write_text("id,\x1b[2Jbody\u202e\n1,a\n")
    assert r"it has id, \x1b[2Jbody\u202e;" in refused(fake, "in.csv")


def test_numbers_that_json_has_no_word_for_are_written_as_null(fake: FakeModel) -> None:
    Path("in.jsonl").write_text('{"text": "a", "n": NaN, "m": [1e999, {"k": -Infinity}], "o": 1.5}\n')
    done = amlora("in.jsonl").stdout
    row = json.loads(done, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert (row["n"], row["m"], row["o"]) == (None, [None, {"k": None}], 1.5)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "n": [float("nan")]}), "in.parquet")
    assert '"n": null' in amlora("in.parquet").stdout
    assert amlora("in.jsonl", "-o", "out.csv").exit_code == 0
    assert next(csv.DictReader(io.StringIO(Path("out.csv").read_text())))["n"] == ""


def test_unknown_task_and_column_are_reported_before_the_model_is_loaded(fake: FakeModel) -> None:
    Path("in.csv").write_text("id,body\n1,a\n")
    assert "no column 'text', it has id, body; name the one with the text: --column" in refused(fake, "in.csv")
    assert refused(fake, "in.csv", "--column", "body", "--task", "fruit").startswith("--task: found 'fruit'")
    assert "no such file" in refused(fake, "nothing.csv")
    assert amlora("in.csv", "--column", "body").exit_code == 0


# ---- out ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("folder", "--output: found the folder folder, expected a file"),
        ("nowhere/out.jsonl", "--output: found nowhere/out.jsonl, expected a file in a folder that is there"),
        ("in.jsonl", "--output: found in.jsonl, which is the input"),
        ("linked.jsonl", "--output: found linked.jsonl, which is the input"),
        ("out.parquet", "--output: found suffix '.parquet' of out.parquet, expected .jsonl or .csv"),
        ("out.xlsx", "--output: found suffix '.xlsx'"),
    ],
)
def test_output_is_looked_at_before_the_model_is_loaded(fake: FakeModel, output: str, message: str) -> None:
    Path("folder").mkdir()
    Path("in.jsonl").write_text('{"text": "a"}\n')
    Path("linked.jsonl").symlink_to("in.jsonl")
    assert refused(fake, "in.jsonl", "-o", output).startswith(message)
    if "the input" not in message:
        assert refused(fake, "-o", output, stdin="a\n").startswith(message)


def test_links_in_a_circle_and_names_without_a_user_are_one_line(fake: FakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("circle.jsonl").symlink_to("circle.jsonl")
    assert refused(fake, "-o", "circle.jsonl", stdin="a\n").startswith("--output: found circle.jsonl, expected a file")
    monkeypatch.setattr("sys.argv", ["amlora", "classify", "bank", "~nobody-here/in.csv"])
    message = "found ~nobody-here/in.csv, expected the name of a user of this machine behind ~; write the whole path"
    assert refused(fake, "~nobody-here/in.csv").strip() == message


def test_the_longest_name_that_a_file_can_have_is_written(fake: FakeModel) -> None:
    name = f"{'x' * 251}.csv"
    assert amlora("-o", name, stdin="a\n").exit_code == 0
    assert Path(name).is_file() and len(list(Path().iterdir())) == 2


def test_no_column_is_lost_whatever_it_is_called(fake: FakeModel) -> None:
    Path("in.jsonl").write_text('{"text": "a", "label": "gold", "input_label": "older", "input_input_label": "oldest"}\n')
    (row,) = objects(amlora("in.jsonl").stdout)
    assert row["label"] == "red"
    assert {row[name] for name in row if "input_" in name} == {"gold", "older", "oldest"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--question", "\udcff?"], "command line: --question: found half of a character"),
        (["--label", " ", "--label", "x"], "--label: found ' ', expected a text with words"),
        (["--column", ""], "--column: found '', expected the key or column of the text"),
        (["--format", "parquet"], "--format: found parquet for standard input, expected the form of a stream; give a file"),
    ],
)
def test_words_of_the_command_line_are_looked_at_before_the_model_is_loaded(
    fake: FakeModel, options: list[str], message: str
) -> None:
    assert message in refused(fake, *options, stdin="a\n")


def test_output_that_is_no_plain_file_is_written_to_and_not_replaced(fake: FakeModel) -> None:
    assert amlora("-o", "/dev/null", stdin="a\n").exit_code == 0
    assert Path("/dev/null").is_char_device()
    Path("real.jsonl").write_text("old")
    Path("link.jsonl").symlink_to("real.jsonl")
    assert amlora("-o", "link.jsonl", stdin="a\n").exit_code == 0
    assert Path("link.jsonl").is_symlink() and objects(Path("real.jsonl").read_text())[0]["text"] == "a"
    assert objects(amlora("-o", "-", stdin="a\n").stdout)[0]["text"] == "a"


def test_csv_output_has_the_keys_of_later_rows(fake: FakeModel) -> None:
    Path("in.jsonl").write_text('{"text": "a"}\n{"text": "b", "id": 2}\n{"id": [3], "text": "c", "label": "gold"}\n')
    assert amlora("in.jsonl", "-o", "out.csv", "--batch-size", "1").exit_code == 0
    rows = list(csv.DictReader(io.StringIO(Path("out.csv").read_text())))
    assert [row["id"] for row in rows] == ["", "2", "[3]"]
    assert [row["input_label"] for row in rows] == ["", "", "gold"]
    assert sorted(path.name for path in Path().glob(".out*")) == []


def test_csv_output_comes_back_as_it_went_out(fake: FakeModel) -> None:
    odd = ['a"b', "a,b", "a\nb", "a\rb", "a\r\nb", " a ", "\u2028", "\U0001f600"]
    Path("in.jsonl").write_text("".join(json.dumps({"text": f"x{text}", "odd": text}) + "\n" for text in odd))
    assert amlora("in.jsonl", "-o", "out.csv").exit_code == 0
    assert amlora("out.csv", "-o", "again.jsonl").exit_code == 0
    assert [row["odd"] for row in objects(Path("again.jsonl").read_text())] == odd


def test_spreadsheet_keeps_cells_from_being_formulas(fake: FakeModel) -> None:
    unseen = ["\u200b=1", "\ufeff=1", "\0=1"]
    formulas = ["=1+1", "+1 now", "-a", "@SUM(1)", "\t=1", " =1", "\uff1d1", "\ufe661", *unseen]
    cells = [*formulas, "-5", "+3.5e1", "\u200bok", "a=b", ""]
    Path("in.jsonl").write_text("".join(json.dumps({"text": "a", "=cell": cell}) + "\n" for cell in cells))
    assert amlora("in.jsonl", "-o", "out.csv", "--spreadsheet", command="generate").exit_code == 0
    with Path("out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    quoted = [*(f"'{cell}" for cell in formulas), *cells[len(formulas) :]]
    assert [row["'=cell"] for row in rows] == quoted
    assert {row["answer"] for row in rows} == {"'=red"}
    parted = {"text": "a;=1", "tab": "b\t=2", "bar": "c|=3", "count": 4}
    Path("parted.jsonl").write_text(json.dumps(parted) + "\n")
    assert amlora("parted.jsonl", "-o", "parted.csv", "--spreadsheet", command="generate").exit_code == 0
    made = Path("parted.csv").read_text()
    assert all(f'"{one}"' in made for one in ("a;=1", "b\t=2", "c|=3")), "other signs part nothing"
    assert amlora("in.jsonl", "-o", "plain.csv", command="generate").exit_code == 0
    assert "\n=red" not in Path("plain.csv").read_text() and ",=red," in Path("plain.csv").read_text()
    assert "expected CSV; give -o FILE.csv" in refused(FakeModel(), "in.jsonl", "--spreadsheet")


def test_a_failure_leaves_the_old_output_as_it_was(fake: FakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("out.csv").write_text("old")
    done = amlora("-o", "out.csv", "--batch-size", "1", stdin='{"text": "a"}\n{"text": []}\n')
    assert done.exit_code == 2 and "standard input, line 2: text: found a list" in done.stderr
    assert Path("out.csv").read_text() == "old" and not list(Path().glob(".out*"))


@pytest.mark.parametrize(
    ("command", "size"),
    [
        (["classify", "bank", "in.jsonl", "-o", "out.jsonl"], 100),
        (["classify", "bank", "in.jsonl", "-o", "out.csv"], 100),
        (["export", "bank", "dest"], 200),
        (["init", "in.jsonl", "-o", "drafted"], 100),
    ],
)
def test_a_full_disk_is_reported_in_one_line_and_nothing_half_written_is_left(
    fake: FakeModel, command: list[str], size: int
) -> None:
    rows = [{"text": f"the wall {n} is {label}", "label": label} for n in range(30) for label in ("red", "blue")]
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = sorted(path for path in Path().rglob("*") if path.is_file())
    with no_file_above(size):
        done = CliRunner().invoke(app, command)
    assert done.exit_code == 2, done.output
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and "make room" in line
    assert sorted(path for path in Path().rglob("*") if path.is_file()) == before


# ---- samples --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("s.json", '[{"body": "a"}]', "s.json, row 1: text: found nothing"),
        ("s.csv", "id,text\n1,a,b\n", "s.csv, line 2: found a wrong number of cells"),
        ("s.jsonl", '{"text": ["a"]}\n', "s.jsonl, line 1: text: found a list"),
        ("s.txt", "", "s.txt: found no text"),
    ],
)
def test_sample_of_import_and_export_is_read_the_same_way(fake: FakeModel, name: str, content: str, message: str) -> None:
    Path(name).write_text(content)
    imported = ["import-peft", "adapter", "dest", "--task", "colours", "--sample", name]
    for command in (imported, ["export", "bank", "dest", "--format", "top1", "--sample", name]):
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 2 and message in done.stderr, done.output
        assert not Path("dest").exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["export", "bank", "file/dest"], "DEST: found file/dest, expected a folder that can be written"),
        (["import-peft", "a", "file", "--task", "t", "--sample", "s.txt"], "DEST: found file, expected a folder"),
        (["import-peft", "a", "dest", "--task", "t", "--sample", "s.txt"], "give the folder of a PEFT adapter"),
        (
            ["export", "bank", "dest", "--format", "vllm", "--bucket", "s3://me:secret@bucket/x"],
            "--bucket: found s3://bucket/x with a password or a query, which would be written into DEST",
        ),
        (["rekey", "bank", "file/dest", "--rows", "colours=s.txt"], "DEST: found file/dest, expected a folder that can be"),
        (["report", "run", "-o", "folder"], "--output: found the folder folder, expected a file"),
        (["report", "run", "-o", "file/page.html"], "expected a folder that can be written"),
        (["pull", "models:/a/1", "file"], "DEST: found file, expected a folder that can be written"),
        (
            ["export", "bank", "dest", "--format", "merged", "--weights", "fruit=1", "--sample", "s.txt"],
            "--weights: found task 'fruit', the bank's tasks are colours, shapes",
        ),
        (
            ["export", "bank", "dest", "--format", "merged", "--weights", "colours=nan", "--sample", "s.txt"],
            "--weights: found 'colours=nan', expected TASK=WEIGHT",
        ),
        (
            ["export", "bank", "dest", "--format", "merged", "--weights", "colours=1e308", "--sample", "s.txt"],
            "--weights: found 'colours=1e308', expected TASK=WEIGHT, such as helpdesk/email_route=0.5, of at most 100",
        ),
        (
            ["export", "bank", "dest", "--format", "merged", *("--weights", "colours=1") * 2, "--sample", "s.txt"],
            "--weights: found 'colours' twice, expected each task once",
        ),
    ],
)
def test_places_and_options_of_other_commands_are_looked_at_first(fake: FakeModel, command: list[str], message: str) -> None:
    Path("file").write_text("x")
    Path("folder").mkdir()
    Path("s.txt").write_text("the wall is red\n")
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2 and message in done.stderr, done.output
    assert not fake.loaded and not Path("dest").exists() and Path("file").read_text() == "x"
