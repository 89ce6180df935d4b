"""``amlora init``: from rows that nobody has described to a task and a run that validate, or one line that says why not."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from typer.testing import CliRunner

from amlora_dist.config.loading import validate_config
from amlora_dist.errors import UserError
from amlora_dist.tasks.sources import TaskData, load_task
from amlora_dist.tasks.task import TaskDefaults, resolve_task
from pipelines.cli.main import app
from pipelines.cli.new_task import Draft, Drafted, draft_task
from tests.tiny_config import write_model

QUEUES = ["fin_ance", "it", "legal"]
ROWS = [
    {"id": n, "body": f"Ticket number {n} about something long", "queue": QUEUES[n % 3], "on": f"2025-01-{n % 28 + 1:02}"}
    for n in range(60)
]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write_csv(file: str, rows: list[dict[str, Any]] = ROWS, delimiter: str = ",") -> str:
    with Path(file).open("w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return file


def write_json(file: str, content: Any) -> str:
    Path(file).write_text(json.dumps(content), encoding="utf-8")
    return file


def draft(source: str, **options: Any) -> tuple[Drafted, TaskData]:
    made = draft_task(Draft(source=source, **options))
    spec = resolve_task(str(made.task), base_dir=Path.cwd(), defaults=TaskDefaults())
    return made, load_task(spec)


def texts(data: TaskData) -> dict[str, set[str]]:
    return {split: {row.text for row in rows} for split, rows in data.rows.items()}


def test_one_csv_becomes_a_task_and_a_run_that_validate(tmp_path: Path) -> None:
    write_model(tmp_path / "model", "llama")
    write_csv("Tickets 2025.csv", [*ROWS, ROWS[0], {**ROWS[1], "queue": ""}])
    made = CliRunner().invoke(app, ["init", "Tickets 2025.csv", "--model", "model"])
    assert made.exit_code == 0, made.output
    folder = Path("tickets-2025")
    task = yaml.safe_load((folder / "task.yaml").read_text())
    assert task["columns"] == {"text": "body", "label": "queue"} and task["labels"] == "auto"
    assert task["prompt"]["question"] == "Which queue does this text belong to?"
    assert "column 'queue', such as 'fin_ance'" in made.output
    assert "labels       3: fin_ance 21, it 20, legal 20" in made.output
    assert "42 train, 6 dev, 12 test (split by content, seed 0)" in made.output
    assert "left out     1 without a text or an answer, 1 whose text was there before" in made.output
    assert "Which queue does this text belong to?\nAnswer:[ " in made.output, "the first prompt, as the model sees it"
    assert "next: amlora run tickets-2025/run.yaml --run-id tickets-2025" in made.output
    _, specs = validate_config(folder / "run.yaml")
    data = load_task(specs[0])
    assert data.spec.label_texts == ["fin ance", "it", "legal"]
    assert {split: Counter(row.target for row in rows)["it"] for split, rows in data.rows.items()} == {
        "train": 14, "dev": 2, "test": 4,
    }  # fmt: skip
    again = CliRunner().invoke(app, ["init", "Tickets 2025.csv"])
    assert again.exit_code == 2
    assert again.stderr.strip() == (
        "error: tickets-2025/data/train.jsonl exists; give another folder with -o, or --force to write over it"
    )
    assert CliRunner().invoke(app, ["init", "Tickets 2025.csv", "--force"]).exit_code == 0


def test_a_prompt_for_the_models_chat_template_is_shown_as_turns() -> None:
    made = CliRunner().invoke(app, ["init", write_csv("chat.csv"), "--chat"])
    assert made.exit_code == 0, made.output
    shown = made.output.partition("prompt, style question:\n")[2].splitlines()
    assert shown[0].startswith("user: ") and shown[1] == "Which queue does this text belong to?"
    assert shown[2].startswith("assistant: ") and "Answer:" not in made.output
    task = CliRunner().invoke(app, ["tasks", "chat/task.yaml"])
    assert task.exit_code == 0 and "\nabout" not in task.output, "a line that says nothing is left out"


def test_the_split_depends_on_seed_and_texts_and_not_on_their_order() -> None:
    _, first = draft(write_csv("a.csv"), name="one")
    _, second = draft(write_csv("b.csv", ROWS[::-1]), name="two")
    _, other = draft("a.csv", name="three", seed=1)
    assert texts(first) == texts(second) != texts(other)
    assert not texts(first)["train"] & (texts(first)["test"] | texts(first)["dev"])


def test_rows_may_be_inside_json_in_parquet_with_numbers_or_be_conversations() -> None:
    _, inside = draft(write_json("inside.json", {"version": 1, "data": {"items": ROWS}}))
    _, plain = draft(write_json("array.json", ROWS))
    assert texts(inside) == texts(plain)
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{"sentence": f"sentence {n}", "label": n % 2} for n in range(40)]), "stars.parquet"
    )
    made, numbers = draft("stars.parquet")
    assert [(label.value, label.text) for label in numbers.spec.known_labels] == [("0", "0"), ("1", "1")]
    assert any("they are numbers" in line for line in made.notes)
    turns = [[{"role": "user", "content": f"hi {n}"}, {"role": "assistant", "content": "ho ho ho"}] for n in range(20)]
    _, talk = draft(write_json("talk.json", [{"messages": one} for one in turns]), chat=True)
    assert talk.spec.columns.messages == "messages" and talk.spec.chat and talk.spec.metric == "rouge_l"
    asked = [{"question": f"How many is {n}?", "answers": [str(n), f"it is {n}"]} for n in range(20)]
    _, free = draft(write_json("asked.json", asked))
    assert free.spec.free_text and free.spec.metric == "exact_match" and free.spec.prompt.question is None
    assert all(len(row.references) == 1 for row in free.rows["test"])


def test_a_folder_of_splits_is_named_where_it_lies() -> None:
    Path("rows").mkdir()
    for split, part in (("train", ROWS[:40]), ("validation", ROWS[40:50]), ("test", ROWS[50:])):
        write_csv(f"rows/{split}.csv", part)
    made, data = draft("rows", folder=Path("out/mine"))
    assert {split: len(rows) for split, rows in data.rows.items()} == {"train": 40, "dev": 10, "test": 10}
    assert yaml.safe_load(made.task.read_text())["splits"]["train"] == "../../rows/train.csv"
    assert sorted(file.name for file in made.task.parent.iterdir()) == ["run.yaml", "task.yaml"]


def test_a_hub_data_set_is_pinned_and_its_numbers_have_names(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no_way", "yes"])})
    rows = [{"text": f"some text {n}", "label": n % 2} for n in range(40)]
    whole = datasets.DatasetDict({
        split: datasets.Dataset.from_list(part, features=features)
        for split, part in (("train", rows[:30]), ("validation", rows[30:35]), ("test", rows[35:]))
    })  # fmt: skip
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: whole)
    info = type("Info", (), {"sha": "abc123"})
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name: info)
    made = draft_task(Draft(source="someone/answers"))
    task = yaml.safe_load(made.task.read_text())
    assert task["source"] == {"kind": "hub", "repository": "someone/answers", "revision": "abc123"}
    assert task["splits"] == {"train": "train", "dev": "validation", "test": "test"}
    assert task["labels"] == [{"value": "0", "text": "no way"}, {"value": "1", "text": "yes"}]


def test_what_cannot_be_drafted_is_one_line_and_writes_nothing(tmp_path: Path) -> None:
    write_csv("semicolons.csv", delimiter=";")
    write_csv("few.csv", ROWS[:6])
    write_csv("empty.csv", [{**row, "queue": "" if n % 3 else row["queue"]} for n, row in enumerate(ROWS)])
    write_csv("numbers.csv", [{"a": n, "b": n % 3} for n in range(30)])
    Path("many").mkdir()
    write_csv("many/a.csv")
    write_csv("many/b.csv")
    Path("notes.txt").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"source": "nowhere.csv"}, "nowhere.csv: no such file or folder"),
        ({"source": "semicolons.csv"}, "semicolons.csv, line 1: found cells between semicolons"),
        ({"source": "few.csv", "label": "queue"}, "few.csv: found 6 different rows"),
        ({"source": "empty.csv", "label": "queue"}, "empty.csv: found 40 of 60 rows without body or queue"),
        ({"source": "numbers.csv"}, "numbers.csv: found the columns a, b, none of which looks like a text"),
        ({"source": "many"}, "many: found a.csv, b.csv, expected one file, or train and test"),
        ({"source": "notes.txt"}, "notes.txt: found suffix '.txt'"),
        ({"source": "few.csv", "label": "que"}, r"few.csv: found no column 'que' (did you mean 'queue'?)"),
        ({"source": "few.csv", "name": "Mine!"}, "--name: found 'Mine!'"),
    ]
    for options, message in cases:
        with pytest.raises(UserError) as caught:
            draft_task(Draft(**options))
        assert message in str(caught.value) and "\n" not in str(caught.value)
        assert ";" in str(caught.value) or "expected" in str(caught.value), "with the fix"
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dev_split_that_is_the_test_split_again_is_left_out_with_a_note(tmp_path: Path) -> None:
    Path("set").mkdir()
    write_csv("set/train.csv", ROWS[:40])
    write_csv("set/validation.csv", ROWS[40:50])
    write_csv("set/test.csv", ROWS[40:])
    made, data = draft("set")
    notes = "\n".join(made.notes)
    assert "validation.csv is left out: every text of it is in the test split" in notes
    assert "dev" not in yaml.safe_load(made.task.read_text(encoding="utf-8"))["splits"]
    assert {split: len(rows) for split, rows in data.rows.items()} == {"train": 32, "dev": 8, "test": 20}


@pytest.mark.parametrize("labels", ["²³", ["--5", "5"], ["9" * 5000, "5"]], ids=["superscripts", "signs", "digits"])
def test_labels_that_only_look_like_numbers_are_words(labels: Sequence[str]) -> None:
    rows = [{"text": f"some text number {n}", "label": labels[n % 2]} for n in range(40)]
    made, data = draft(write_csv("odd.csv", rows), label="label")
    assert yaml.safe_load(made.task.read_text())["labels"] == "auto"
    assert {label.value for label in data.spec.known_labels} == set(labels)


def said(text: str, role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": text}, {"role": "assistant", "content": "ho"}]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (said("half \ud800"), "talk.jsonl, row 13: found half of a character"),
        (said("hi", "bot"), "talk.jsonl, row 13: found an unknown role ('bot')"),
        ({**said("hi"), "messages": [*said("hi")["messages"], {"role": "user", "content": "\x1b"}]}, "row 13: found"),
    ],
)
def test_a_conversation_that_cannot_be_learned_is_named_by_its_own_row(row: dict[str, Any], message: str) -> None:
    rows = [said(f"hi {n}") for n in range(20)]
    Path("talk.jsonl").write_text("".join(json.dumps(one) + "\n" for one in [*rows[:12], row, *rows[12:]]))
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        draft_task(Draft(source="talk.jsonl"))
    assert "amlora-init" not in str(caught.value) and not Path("talk").exists()


def test_texts_that_show_nothing_are_left_out() -> None:
    made, data = draft(write_csv("seen.csv", [*ROWS, {**ROWS[0], "body": "\u200b"}]))
    assert sum(len(rows) for rows in data.rows.values()) == len(ROWS)
    assert any("1 without a text or an answer" in note for note in made.notes)


def test_rows_inside_an_object_with_a_mark_in_front_are_found() -> None:
    Path("marked.json").write_text("\ufeff" + json.dumps({"data": ROWS}), encoding="utf-8")
    _, data = draft("marked.json")
    assert sum(len(rows) for rows in data.rows.values()) == len(ROWS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label": "queue", "answer": "on"}, "--answer: found 'on' next to --label 'queue', expected one of them"),
        ({"text": "queue", "label": "queue"}, "--text: found 'queue', which --label names too"),
        ({"folder": Path("rows.csv")}, "--output: found rows.csv, expected a folder that can be written"),
        ({"folder": Path("rows.csv/below")}, "--output: found rows.csv/below, expected a folder that can be written"),
    ],
)
def test_options_that_contradict_each_other_are_named(options: dict[str, Any], message: str) -> None:
    write_csv("rows.csv")
    with pytest.raises(UserError, match=re.escape(message)):
        draft_task(Draft(source="rows.csv", name="mine", **options))
    assert sorted(path.name for path in Path().iterdir()) == ["rows.csv"]
