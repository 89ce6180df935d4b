"""Files that people have and templates that people write: rows, or one message; never a row that nobody wrote."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from amlora_dist.config.checks import resolve_tasks
from amlora_dist.config.loading import load_config
from amlora_dist.errors import FaultsError, UserError
from amlora_dist.tasks import tables
from amlora_dist.tasks.files import lines_of
from amlora_dist.tasks.sources import load_task
from amlora_dist.tasks.task import TaskDefaults, resolve_task
from pipelines.cli.row_input import opened
from tests.tiny_config import write_config


def _rows(source: str) -> list[tuple[str, dict[str, Any]]]:
    with opened(source, "text") as rows:
        return [(line.text, line.fields) for line in rows.lines()]


@pytest.mark.parametrize(
    "header", ["[id],text", "{id},text", '"[""id""]",text', "text,a;b", "[text],text"],
    ids=["list", "set", "json", "signs", "own"],
)
def test_a_columns_name_may_begin_as_other_files_do(tmp_path: Path, header: str) -> None:
    (tmp_path / "rows.csv").write_text(f"{header}\na,a\n")
    assert [text for text, _ in _rows(str(tmp_path / "rows.csv"))] == ["a"]


@pytest.mark.parametrize("first", ["ORCHIDS need light", "PAR1 is a station", "BZh\tis no word", "SQLite format 3 is old"])
def test_a_text_may_begin_as_other_files_do(first: str) -> None:
    assert [line for _, line in lines_of(io.BytesIO(f"{first}\nb\n".encode()), "rows")] == [f"{first}\n", "b\n"]


def test_a_headers_open_quote_is_reported_in_a_file_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "CELL_BYTES", 50)
    (tmp_path / "rows.csv").write_text('"text,label\n' + "the wall,red\n" * 20)
    with pytest.raises(UserError, match=r"rows\.csv, line 1: found a quote that is never closed"):
        _rows(str(tmp_path / "rows.csv"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("two.csv", b"text,label\na,b\n\xef\xbb\xbftext,label\nc,d\n", "line 3: found the header again.*take the line away"),
        ("excel.csv", b"sep=,\ntext,label\na,b\n", "line 1: found 'sep=,', expected the names of the columns"),
        ("quoted.csv", b'"text";"label"\n"a";"b"\n', "line 1: found cells between semicolons, expected commas"),
        ("comma.csv", b"text;label, kind\na;b, c\n", "line 1: found cells between semicolons, expected commas"),
        ("lines.csv", b'{"text": "a", "label": "b"}\n', "line 1: found JSON, expected the names of the columns"),
        ("utf32.jsonl", '{"text":"a"}\n'.encode("utf-32"), "not UTF-8 text but UTF-32 text"),
        ("old.csv", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1\0\0", "not UTF-8 text but a spreadsheet or document of old"),
        ("paper.csv", b"%PDF-1.4\n", "not UTF-8 text but a PDF"),
        ("packed.jsonl", b"\xfd7zXZ\0\0", "not UTF-8 text but an xz archive"),
        ("table.jsonl", b"ORC\x11\x08\0\0", "not UTF-8 text but an ORC file"),
        ("packed.csv", b"BZh91AY&SY\xa3\x1c\x02\xe6", "not UTF-8 text but a bzip2 archive"),
        ("base.csv", b"SQLite format 3\0\x10", "not UTF-8 text but an SQLite database"),
    ],
)
def test_a_file_that_is_something_else_is_reported(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}.*{message}"):
        _rows(str(tmp_path / name))


@pytest.mark.parametrize("first", ['"text"', "customer id,message body", "customer-id,Message"])
def test_a_header_on_standard_input_is_never_a_row(monkeypatch: pytest.MonkeyPatch, first: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{first}\n1,a\n"))
    with pytest.raises(UserError, match="may be the header of a CSV or a text; give --format"):
        _rows("-")
    monkeypatch.setattr(sys, "stdin", io.StringIO("well, it is broken\nno, it is not\n"))
    assert [text for text, _ in _rows("-")] == ["well, it is broken", "no, it is not"]


def test_a_table_of_a_hundred_thousand_columns_is_read_at_once_and_not_listed(tmp_path: Path) -> None:
    names = [f"c{n}" for n in range(100_000)]
    (tmp_path / "wide.csv").write_text(",".join(["text", *names]) + "\na" + "," * len(names) + "\n")
    assert _rows(str(tmp_path / "wide.csv"))[0][0] == "a"
    (tmp_path / "wide.csv").write_text(",".join(names) + "\n" + "," * (len(names) - 1) + "\n")
    with pytest.raises(UserError, match=r"no column 'text'.* and 99980 more") as error:
        _rows(str(tmp_path / "wide.csv"))
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b"])
def test_a_name_that_no_file_can_have_is_reported_in_one_line(name: str) -> None:
    with pytest.raises(UserError, match="give a file, or - for standard input") as error:
        _rows(name)
    assert len(str(error.value)) < 400


def _task(folder: Path, **more: Any) -> Path:
    rows = [{"text": "a", "label": "x", "day": None}, {"text": "b", "label": "y", "day": [1]}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec: dict[str, Any] = {
        "name": "odd", "version": 1, "kind": "x", "source": {"kind": "files"}, "labels": ["x", "y"],
        "splits": dict.fromkeys(("train", "test"), "rows.jsonl"), "columns": {"text": "text", "label": "label"},
    }  # fmt: skip
    (folder / "odd.yaml").write_text(yaml.safe_dump(spec | more))
    return folder / "odd.yaml"


TEMPLATES: list[tuple[dict[str, Any], str]] = [
    ({"prompt": {"template": "hello\nAnswer:"}}, "prompt.template: found no text of a row in .*expected {{ text }}"),
    ({"prompt": {"template": "{{ txet }} {{ text }}"}}, "prompt.template: found the variable 'txet'.*did you mean 'text'"),
    ({"prompt": {"template": "{{ text"}}, r"prompt.template: found '{{ text', expected Jinja \([^()]*\)$"),
    ({"columns": {"text": {"value": "text ~ day"}, "label": "label"}},
     r"columns.text\[0\].value: found 'text ~ day', expected a template that reads a column \(put .* {{ text ~ day }}"),
    ({"columns": {"text": {"value": "{{ text | urlize }}"}, "label": "label"}}, r"\.value: .*expected Jinja"),
    ({"columns": {"text": {"value": "{{ 9 ** 9 }}"}, "label": "label"}}, "expected a template that reads a column"),
]  # fmt: skip


@pytest.mark.parametrize(("more", "message"), TEMPLATES)
def test_a_template_that_shows_no_row_is_refused(tmp_path: Path, more: dict[str, Any], message: str) -> None:
    spec = resolve_task(str(_task(tmp_path, **more)), base_dir=tmp_path, defaults=TaskDefaults())
    with pytest.raises(FaultsError, match=message):
        load_task(spec)


def test_validate_finds_the_templates_of_all_tasks_at_once(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path))
    paths = []
    for number, (more, _) in enumerate(TEMPLATES[:4]):
        folder = tmp_path / f"odd{number}"
        folder.mkdir()
        paths.append(str(_task(folder, name=f"odd{number}", **more)))
    config.tasks = list(paths)
    faults = resolve_tasks(config)[1]
    assert len(faults) == 4 and {path[1] for path in faults} == {0, 1, 2, 3}


def test_parts_that_are_the_same_in_every_row_may_be_next_to_one_that_is_not(tmp_path: Path) -> None:
    columns = {"text": [{"value": "Of a customer:"}, "text"], "label": "label"}
    spec = resolve_task(
        str(_task(tmp_path, columns=columns, on_bad_row="skip")), base_dir=tmp_path, defaults=TaskDefaults()
    )
    rows = load_task(spec, splits=("test",)).rows["test"]
    assert {row.text for row in rows} == {"Of a customer:\na", "Of a customer:\nb"}


def test_a_split_of_which_nothing_is_left_says_why(tmp_path: Path) -> None:
    columns = {"text": "day", "label": "label"}
    spec = resolve_task(
        str(_task(tmp_path, columns=columns, on_bad_row="skip")), base_dir=tmp_path, defaults=TaskDefaults()
    )
    with pytest.raises(UserError, match=r"no usable row.*an empty text.*a list in column 'day'"):
        load_task(spec, splits=("test",))
