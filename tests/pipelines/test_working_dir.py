"""What a job takes with it: what git would, at most 100 MB, and the same bytes for the same files."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import pytest

from amlora_dist.errors import UserError
from pipelines.cluster import working_dir
from pipelines.cluster.jobs import TOKEN_FILE, find_token
from pipelines.cluster.submit import environment_from, runtime_env_from
from pipelines.runs.run_ids import checked_run_id


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        file = folder / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


@pytest.mark.skipif(shutil.which("git") is None, reason="git reads ignore files, and is not installed")
@pytest.mark.usefixtures("nobodys_own_git")
def test_ignore_files_are_obeyed_as_git_obeys_them(tmp_path: Path) -> None:
    write(
        tmp_path, **{
            ".gitignore": "*.log\n/data/\n!keep.log\nbuild\n", "a.py": "x", "b.log": "x", "keep.log": "x",
            "data/rows.jsonl": "x", "sub/data/rows.jsonl": "x", "sub/build/out": "x", ".git/config": "x",
            "sub/.gitignore": "!special.log\n*.tmp\n", "sub/special.log": "x", "sub/x.tmp": "x", "x.tmp": "x",
            "__pycache__/a.pyc": "x",
        }
    )  # fmt: skip
    assert list(working_dir.collect(tmp_path).files) == [
        ".gitignore", "a.py", "keep.log", "sub/.gitignore", "sub/data/rows.jsonl", "sub/special.log", "x.tmp",
    ]  # fmt: skip


def test_too_much_is_refused_with_the_largest_files_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(working_dir, "MOST_BYTES", 1000)
    for number in range(8):
        (tmp_path / f"file{number}").write_bytes(b"x" * 100 * (number + 1))
    with pytest.raises(UserError, match=r"the largest are file7 .*file6 .*file3 .*Name in \.gitignore") as caught:
        working_dir.collect(tmp_path)
    assert "file2" not in str(caught.value)
    with pytest.raises(UserError, match="no folder"):
        working_dir.collect(tmp_path / "nowhere")


def test_what_this_machines_own_runs_have_written_is_not_shipped(tmp_path: Path) -> None:
    write(tmp_path, **{".amlora/mlflow.db": "x", "a.py": "x", "sub/.amlora/models/weights": "x"})
    (tmp_path / "sub" / "__pycache__").mkdir()
    (tmp_path / "sub" / "__pycache__" / "a.pyc").write_text("x")
    assert list(working_dir.collect(tmp_path).files) == ["a.py"]


def test_equal_files_make_an_equal_archive(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one", a="1", sub__b="2"), write(tmp_path / "two", sub__b="2", a="1")
    for folder in (one, two):
        working_dir.pack(working_dir.collect(folder), folder.with_suffix(".zip"))
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "one.zip") as archive:
        assert archive.namelist() == ["a", "sub/b"] and archive.read("sub/b") == b"2"


def test_the_token_is_found_where_ray_looks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_token() == (None, None)
    write(tmp_path, **{".ray/auth_token": "from home\n"})
    assert find_token() == ("from home", str(TOKEN_FILE.expanduser()))
    write(tmp_path, named="from path")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "named"))
    assert find_token()[0] == "from path"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "given")
    assert find_token() == ("given", "RAY_AUTH_TOKEN")
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"RAY_AUTH_TOKEN_PATH: cannot read .*nowhere"):
        find_token()


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    assert environment_from(["A=1", "B=x=y"]) == {"A": "1", "B": "x=y"}
    with pytest.raises(UserError, match="--env: found 'A', expected KEY=VALUE"):
        environment_from(["A"])
    assert runtime_env_from(None) == {}
    wrong = {
        "[1]": "expected a mapping", "working_dir: x": "given by --working-dir", "a: [": "cannot read",
        "env_vars: [1]": "expected a mapping", "env_vars: {A: 1}": "env_vars.A: found 1, expected a string: quote it",
        "a: !!timestamp 2001-99-99": "cannot read", "a: " + "[" * 5000: "cannot read", "a: \0": "cannot read",
        "pip: [a]\npip: [b]": "pip: found the key twice",
    }  # fmt: skip
    for text, message in wrong.items():
        file = tmp_path / "env.yaml"
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            runtime_env_from(file)
    for name in ("", "a b", "-x", "../x", "x" * 101):
        with pytest.raises(UserError, match="--run-id"):
            checked_run_id(name)
