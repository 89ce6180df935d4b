"""``amlora validate --rows``: what a run would read, counted; the bad rows of all tasks at once."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from pipelines.cli.main import app


def task_of(folder: Path, name: str, train: str, test: str) -> str:
    """A task of two files with these lines, and its path."""
    for split, lines in {"train": train, "test": test}.items():
        (folder / f"{name}-{split}.csv").write_text(f"text,label\n{lines}\n", encoding="utf-8")
    splits = f"splits: {{train: {name}-train.csv, test: {name}-test.csv}}"
    columns = "columns: {text: text, label: label}\nprompt: {question: 'Which is it?'}\nlabels: [red, blue]\n"
    text = f"name: {name}\nversion: 1\nkind: colours\nsource: {{kind: files}}\n{splits}\n{columns}"
    (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return str(folder / f"{name}.yaml")


def test_validate_reads_the_rows_of_every_task_without_a_model(tmp_path: Path) -> None:
    good = task_of(tmp_path, "good", "a wall,red\na sea,blue\na brick,red\nice,blue\nfire,red", "a rose,red\nthe sky,blue")
    config = tmp_path / "run.yaml"
    config.write_text(f"name: rows\nmodel: {{source: some/model}}\ntasks: [{good}]\n", encoding="utf-8")
    done = CliRunner().invoke(app, ["validate", str(config), "--rows"])
    assert done.exit_code == 0, done.output
    assert "    good: 4 train, 2 test\n" in done.stdout
    assert "      test  red 1, blue 1\n" in done.stdout
    checked = json.loads(CliRunner().invoke(app, ["validate", str(config), "--rows", "--json"]).stdout)
    assert checked["rows"][0]["rows"] == {"train": 4, "test": 2}
    assert checked["rows"][0]["labels"]["test"] == {"red": 1, "blue": 1}
    assert checked["name"] == "rows"


def test_validate_says_which_columns_were_recognised(tmp_path: Path) -> None:
    for split in ("train", "test"):
        rows = [{"instruction": f"{split} {n}?", "input": "", "output": "yes", "id": n} for n in range(5)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = "name: talk\nversion: 1\nkind: chat\nsource: {kind: files}\nsplits: {train: train.jsonl, test: test.jsonl}\n"
    (tmp_path / "talk.yaml").write_text(f"{task}columns: auto\n", encoding="utf-8")
    config = tmp_path / "run.yaml"
    config.write_text(f"name: rows\nmodel: {{source: some/model}}\ntasks: [{tmp_path}/talk.yaml]\n", encoding="utf-8")
    done = CliRunner().invoke(app, ["validate", str(config), "--rows"])
    assert "      columns: auto: instruction, output, input\n" in done.stdout, done.output
    checked = json.loads(CliRunner().invoke(app, ["validate", str(config), "--rows", "--json"]).stdout)
    assert checked["rows"][0]["columns"] == "instruction, output, input"


def test_validate_names_the_bad_rows_of_all_tasks_at_once(tmp_path: Path) -> None:
    one = task_of(tmp_path, "one", "a wall,red\na sea,green\nice,blue", "a rose,red")
    two = task_of(tmp_path, "two", "a wall,red\nice,blue", "a rose,red\nan owl,")
    config = tmp_path / "run.yaml"
    config.write_text(f"name: rows\nmodel: {{source: some/model}}\ntasks: [{one}, {two}]\n", encoding="utf-8")
    assert CliRunner().invoke(app, ["validate", str(config)]).exit_code == 0
    done = CliRunner().invoke(app, ["validate", str(config), "--rows"])
    assert done.exit_code == 2
    assert done.stdout == ""
    assert f"{config}: 2 faults" in done.stderr
    assert "task 'one': train" in done.stderr and "row 2: found an unknown label ('green')" in done.stderr
    assert "task 'two': test" in done.stderr and "row 2: found no label, expected a label in column 'label'" in done.stderr
    skipped = CliRunner().invoke(app, ["validate", str(config), "--rows", "task_defaults.on_bad_row=skip"])
    assert skipped.exit_code == 0, skipped.output
    assert "task 'one': left out 1 row: 1 of train (an unknown label ('green'))" in skipped.stdout
