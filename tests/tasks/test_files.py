"""Files of rows: read as they are, or refused with the file and the line, row or column."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from amlora_dist.errors import FaultsError, UserError
from amlora_dist.tasks.files import LONGEST_LINE, Fixes, RawRow, form_of, read_file
from amlora_dist.tasks.sources import load_task
from amlora_dist.tasks.task import TaskDefaults, TaskSpec, read_mapping

FIX = Fixes("name another column", "give the format")
GOOD = [{"text": f"the wall {number} is {colour}", "label": colour} for number, colour in enumerate(["red", "blue"] * 5)]


def read(path: Path, content: str | bytes, needed: list[str] | None = None) -> list[RawRow]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    form = form_of(path)
    assert form is not None
    return list(read_file(path, form, needed or ["text"], None, FIX))


def refusal(path: Path, content: str | bytes) -> str:
    with pytest.raises(UserError) as error:
        read(path, content)
    message = str(error.value)
    assert message.startswith(str(path)) and "\n" not in message
    return message.removeprefix(str(path))


def task(folder: Path, train: str, **changes: Any) -> TaskSpec:
    """A task of colours whose training rows are in ``train``."""
    (folder / "test.jsonl").write_text("".join(json.dumps(row | {"text": f"{row['text']}!"}) + "\n" for row in GOOD))
    mapping: dict[str, Any] = {
        "name": "colours",
        "version": 1,
        "kind": "colour",
        "source": {"kind": "files"},
        "splits": {"train": train, "test": "test.jsonl"},
        "columns": {"text": "text", "label": "label"},
        "labels": ["red", "blue"],
    }
    return read_mapping({**mapping, **changes}, origin=folder / "colours.yaml")


# ---- CSV ------------------------------------------------------------------------------------------------------


def test_csv_unquoted_comma_is_a_fault_of_its_line(tmp_path: Path) -> None:
    rows = read(tmp_path / "a.csv", 'id,text\n1,"red, wall"\n2,sky, blue\n\n3,green\n4\n')
    assert [row.fault for row in rows] == [None, "a wrong number of cells", None, "a wrong number of cells"]
    assert [(row.number, row.line) for row in rows] == [(1, 2), (2, 3), (3, 5), (4, 6)]
    assert rows[0].values == {"id": "1", "text": "red, wall"}


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('id,text\n1,"the wall\n2,blue\n3,green\n', 2),
        ('id,text\n1,"a ""quoted"" wall"\n2,"two\nlines"\n3,"open ""\n4,x\n', 5),
        ('id,text\n1,5" wall\n2,"a\n"\n"3,x\n', 5),
        ('id,"text\n1,a\n', 1),
    ],
)
def test_csv_unclosed_quote_is_reported_with_its_line(tmp_path: Path, content: str, line: int) -> None:
    assert refusal(tmp_path / "a.csv", content).startswith(f", line {line}: found a quote that is never closed")


def test_csv_of_other_programs_is_read(tmp_path: Path) -> None:
    expected = [{"id": "1", "text": "red"}, {"id": "2", "text": "a\nb"}]
    for content in (
        '\ufeffid,text\r\n1,red\r\n2,"a\nb"\r\n', 'id,text\r1,red\r2,"a\nb"\r', '"id","text"\n"1","red"\n2,"a\nb"'
    ):  # fmt: skip
        assert [row.values for row in read(tmp_path / "a.csv", content)] == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,id,text\na,1,b\n", ", line 1: found the column 'text' twice"),
        ("id;text\n1;red\n", ", line 1: found cells between semicolons, expected commas"),
        ("id\ttext\n1\tred\n", ", line 1: found cells between tabs, expected commas"),
        ("id,body\n1,red\n", ": found no column 'text', it has id, body; name another column"),
        ("id, text\n1,red\n", ": found no column 'text' (did you mean ' text'?)"),
        ("", ": found no header"),
        ('text\n"red" wall\n', ", line 2: not CSV"),
        (b"text\nred\n\xff\n", ": not UTF-8 text (line 3, byte 1 of it"),
        ("text\nred\n".encode("utf-16"), ": not UTF-8 text but UTF-16 text"),
        (b"PK\x03\x04abc", ": not UTF-8 text but a zip archive (or a spreadsheet)"),
    ],
)
def test_what_is_no_csv_of_that_column_is_reported(tmp_path: Path, content: str | bytes, message: str) -> None:
    assert refusal(tmp_path / "a.csv", content).startswith(message)


# ---- JSON -----------------------------------------------------------------------------------------------------


def test_json_array_is_read_as_rows(tmp_path: Path) -> None:
    for content in (json.dumps(GOOD), json.dumps(GOOD, indent=2), "\ufeff\n" + json.dumps(GOOD)):
        rows = read(tmp_path / "a.json", content)
        assert [row.values for row in rows] == GOOD
        assert rows[2].where == f"{tmp_path / 'a.json'}, row 3"
    assert read(tmp_path / "a.json", "[]") == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n["b"]\n', ", line 2: found list, expected one JSON object a line"),
        ('[{"text": "a"}, ["b"]]', ", row 2: found list, expected a JSON object"),
        ('[{"text": "a"},\n{"text": "b"\n', ", line 1: found"),
        ('{"text": "a"}\n{"text": "a", "text": "b"}\n', ", line 2: found the key 'text' twice in one object"),
        ('{\n"text": "a"\n}\n', ", line 1: found '{', expected one JSON object a line (Expecting property name"),
        ('{"text": "a", "n": ' + "9" * 5000 + "}", ", line 1: found a number that is too long"),
        ('{"text": ' + "[" * 100_000 + "}", ", line 1: found brackets too deep in each other"),
        ("the wall is red\n", ", line 1: found 'the wall is red', expected one JSON object a line"),
        ('"the wall is red"\n', ", line 1: found str, expected one JSON object"),
        (b'{"text": "a"}\n{"text": "\xe9"}\n', ": not UTF-8 text (line 2, byte 11 of it"),
        (b"\x1f\x8b\x08rest", ": not UTF-8 text but a gzip archive"),
        (b"x" * (LONGEST_LINE + 9), ", line 1: longer than 64 MiB"),
    ],
    ids=range(12),
)
def test_what_is_no_json_is_reported_with_its_line(tmp_path: Path, content: str | bytes, message: str) -> None:
    assert refusal(tmp_path / "a.jsonl", content).startswith(message)


def test_json_lines_keep_line_separators_of_other_kinds(tmp_path: Path) -> None:
    rows = read(tmp_path / "a.ndjson", '{"text": "a\u2028b\x85c"}\r\n\n{"text": "d"}')
    assert [(row.values["text"], row.line) for row in rows] == [("a\u2028b\x85c", 1), ("d", 3)]


# ---- what is no text ------------------------------------------------------------------------------------------


def test_not_text_is_a_fault_of_file_row_and_column(tmp_path: Path) -> None:
    wrong: list[Any] = [
        {"text": ["red"], "label": "red"},
        {"text": {"a": "red"}, "label": "red"},
        {"text": "red wall", "label": ["red"]},
        {"text": float("nan"), "label": "red"},
        {"text": 7, "label": "red"},
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*wrong, *GOOD]))
    with pytest.raises(FaultsError) as error:
        load_task(task(tmp_path, "train.jsonl"))
    assert [(fault.where, fault.found) for fault in error.value.faults] == [
        (f"train ({tmp_path / 'train.jsonl'}), row 1", "a list in column 'text'"),
        (f"train ({tmp_path / 'train.jsonl'}), row 2", "a dictionary in column 'text'"),
        (f"train ({tmp_path / 'train.jsonl'}), row 3", "a list in column 'label'"),
        (f"train ({tmp_path / 'train.jsonl'}), row 4", "nan, which is not a finite number in column 'text'"),
    ]
    left = load_task(task(tmp_path, "train.jsonl"), defaults=TaskDefaults(on_bad_row="skip"))
    assert len(left.rows["train"]) + len(left.rows["dev"]) == len(GOOD) + 1, "a number is a text"


def test_not_text_as_a_free_answer_or_out_of_a_template_is_a_fault_too(tmp_path: Path) -> None:
    row = {"text": "where?", "label": {"text": ["here"], "answer_start": [12]}}
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row | {"text": f"where {n}?"}) + "\n" for n in range(3)))
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": "where?", "label": "there"}) + "\n")
    free: dict[str, Any] = {"labels": None, "columns": {"text": "text", "answer": "label"}}
    spec = task(tmp_path, "train.jsonl", **free)
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": "where?", "label": "there"}) + "\n")
    with pytest.raises(FaultsError, match="rows 1, 2, 3: found a dictionary in column 'label'"):
        load_task(spec)
    shown = task(tmp_path, "train.jsonl", columns={"text": {"value": "{{ text }} {{ label }}"}, "label": "label"})
    with pytest.raises(FaultsError, match="rows 1, 2, 3: found a dictionary from "):
        load_task(shown)


def test_surrogate_is_a_fault_of_its_row(tmp_path: Path) -> None:
    lines = ['{"text": "the \\ud83d wall", "label": "red"}', '{"text": "the wall", "label": "\\udc00"}']
    (tmp_path / "train.jsonl").write_text("\n".join([*lines, *map(json.dumps, GOOD)]))
    with pytest.raises(FaultsError) as error:
        load_task(task(tmp_path, "train.jsonl"))
    assert [fault.found for fault in error.value.faults] == [
        r"half of a character (\ud83d, at character 5) in column 'text'",
        r"half of a character (\udc00, at character 1) in column 'label'",
    ]


def test_a_template_of_columns_that_fails_names_the_row(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in GOOD))
    spec = task(tmp_path, "train.jsonl", columns={"text": {"value": "{{ text * 10**9 }}"}, "label": "label"})
    with pytest.raises(UserError, match=r"test\.jsonl, line 1: .*columns\.text: it takes too many steps"):
        load_task(spec, splits=("test",))


# ---- Parquet and saved data sets ------------------------------------------------------------------------------


def not_utf8(count: int) -> pyarrow.Array:
    offsets = pyarrow.py_buffer(b"".join((2 * n).to_bytes(4, "little") for n in range(count + 1)))
    return pyarrow.Array.from_buffers(pyarrow.string(), count, [None, offsets, pyarrow.py_buffer(b"\xff\xfe" * count)])


def write_torn(path: Path, columns: dict[str, Any], torn: str) -> None:
    """Parquet with a page header of one column overwritten."""
    table = pyarrow.table(columns)
    pyarrow.parquet.write_table(table, path, use_dictionary=False, compression="none")
    chunk = pyarrow.parquet.ParquetFile(path).metadata.row_group(0).column(table.column_names.index(torn))
    content = bytearray(path.read_bytes())
    content[chunk.data_page_offset : chunk.data_page_offset + 16] = b"\xff" * 16
    path.write_bytes(content)


def spoilt(path: Path, kind: str, column: str) -> None:
    columns: dict[str, Any] = {name: [row[name] for row in GOOD] for name in ("text", "label")}
    columns.setdefault(column, [str(n) for n in range(len(GOOD))])
    if kind == "a torn page":
        write_torn(path, columns, column)
        return
    far = pyarrow.array([10**17] * len(GOOD), pyarrow.timestamp("ms"))
    columns[column] = far if kind == "a far timestamp" else not_utf8(len(GOOD))
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


KINDS = ("a torn page", "text that is not UTF-8", "a far timestamp")


@pytest.mark.parametrize("kind", KINDS)
def test_parquet_torn_in_a_column_that_nobody_asked_for_is_not_looked_at(tmp_path: Path, kind: str) -> None:
    spoilt(tmp_path / "train.parquet", kind, "other")
    data = load_task(task(tmp_path, "train.parquet"))
    assert len(data.rows["train"]) + len(data.rows["dev"]) == len(GOOD)


@pytest.mark.parametrize("kind", KINDS)
def test_parquet_torn_in_a_column_that_is_read_names_file_and_column(tmp_path: Path, kind: str) -> None:
    spoilt(tmp_path / "train.parquet", kind, "text")
    with pytest.raises(UserError) as error:
        load_task(task(tmp_path, "train.parquet"))
    assert str(error.value).startswith(f"{tmp_path / 'train.parquet'}: column 'text' cannot be read (")
    assert "\n" not in str(error.value)


def test_parquet_columns_inside_templates_are_read_too(tmp_path: Path) -> None:
    rows = [{"a": row["text"], "b": n, "label": row["label"], "other": None} for n, row in enumerate(GOOD)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row | {"b": "!"}) + "\n" for row in rows))
    columns = {"text": {"value": "{{ a }} {{ b }}"}, "label": "label"}
    splits = {"train": "train.parquet", "test": "own.jsonl"}
    data = load_task(task(tmp_path, "train.parquet", columns=columns, splits=splits))
    assert {row.text for rows in data.rows.values() for row in rows} >= {"the wall 0 is red 0", "the wall 0 is red !"}


def test_parquet_values_that_are_no_text_are_faults(tmp_path: Path) -> None:
    rows = [{"text": value, "label": "red"} for value in (datetime.datetime(2026, 1, 1), datetime.datetime(2026, 1, 2))]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    with pytest.raises(FaultsError, match="rows 1, 2: found a date in column 'text'"):
        load_task(task(tmp_path, "train.parquet"))


def test_save_to_disk_folder_is_read_as_a_split(tmp_path: Path) -> None:
    datasets.Dataset.from_list(GOOD).save_to_disk(str(tmp_path / "train"))
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in GOOD))
    saved, lines = (load_task(task(tmp_path, name)) for name in ("train", "train.jsonl"))
    assert [saved.digest(split) for split in saved.rows] == [lines.digest(split) for split in lines.rows]


def test_save_to_disk_folder_of_all_splits_says_what_it_is(tmp_path: Path) -> None:
    whole = datasets.DatasetDict({"train": datasets.Dataset.from_list(GOOD), "test": datasets.Dataset.from_list(GOOD)})
    whole.save_to_disk(str(tmp_path / "all"))
    with pytest.raises(UserError, match=r"all: found a folder of DatasetDict.* with the splits test, train; name one"):
        load_task(task(tmp_path, "all"))
    splits = {"train": "all/train", "test": "test.jsonl"}
    assert load_task(task(tmp_path, "", splits=splits)).rows["train"]
    (tmp_path / "plain").mkdir()
    with pytest.raises(UserError, match=r"plain: found a folder that Dataset.save_to_disk did not write"):
        load_task(task(tmp_path, "plain"))


def test_save_to_disk_folder_that_is_damaged_is_reported(tmp_path: Path) -> None:
    datasets.Dataset.from_list(GOOD).save_to_disk(str(tmp_path / "train"))
    next((tmp_path / "train").glob("*.arrow")).write_bytes(b"torn")
    with pytest.raises(UserError, match=r"train: cannot be read as a saved data set"):
        load_task(task(tmp_path, "train"))
    columns = {"text": not_utf8(len(GOOD)), "label": pyarrow.array([row["label"] for row in GOOD])}
    datasets.Dataset(datasets.table.InMemoryTable(pyarrow.table(columns))).save_to_disk(str(tmp_path / "bad"))
    with pytest.raises(UserError, match=r"bad: column 'text' cannot be read"):
        load_task(task(tmp_path, "bad"))
