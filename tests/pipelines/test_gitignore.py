"""What is shipped is what git keeps or would add, in a repository and in a folder of none."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from amlora_dist.errors import UserError
from pipelines.cluster.working_dir import collect

pytestmark = [
    pytest.mark.skipif(shutil.which("git") is None, reason="compared with git, which is not installed"),
    pytest.mark.usefixtures("nobodys_own_git"),
]

CASES = [
    "*.log\n/data/\n!keep.log\nbuild",
    "*\n!*/\n!*.py",
    "data/**\n!data/keep.py",
    "data/*\n!data/keep.py",
    "build/\n!build/keep.py",
    "a/**/b\n**/data/keep.py\n**/deep",
    "\\#x\n\\!y\n#x",
    "x[ab].py\ny[!ab].py\nz[]-]\nw[a-c",
    "foo\\ \nbar  \nx?y",
    "data\n!data/",
    "/**/b\nsub/",
    "s*b/*/k*.py\n!**/deep/**",
    "[[:digit:]]*\n*[^[:alpha:].]",
    "/\n!\n\n   \n\\",
]
FILES = [
    "a.py", "keep.log", "b.log", "build/out", "build/keep.py", "data/keep.py", "data/rows", "data/deep/x", "sub/a.py",
    "sub/data/keep.py", "sub/build", "sub/deep/keep.py", "a/b", "a/c/b", "a/c/d/b", "#x", "!y", "xa.py", "xc.py", "yc.py",
    "z]", "z-", "wa", "foo ", "foo", "bar", "x.y", "1x", "x1", "\\",
]  # fmt: skip


def write(folder: Path, files: dict[str, str]) -> Path:
    folder.mkdir(exist_ok=True)
    git(folder, "init", "-q")
    for name in FILES:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("x")
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def git(folder: Path, *command: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "protocol.file.allow=always")
    return subprocess.run(["git", "-C", str(folder), *who, *command], check=True, capture_output=True, text=True).stdout


def others(folder: Path) -> list[str]:
    """What git would add, below ``folder``."""
    output = git(folder, "ls-files", "-z", "--others", "--exclude-per-directory=.gitignore")
    return sorted(filter(None, output.split("\0")))


def shipped(folder: Path) -> list[str]:
    return list(collect(folder).files)


@pytest.mark.parametrize("text", CASES)
def test_a_file_says_what_it_says_to_git_in_a_repository_and_in_none(tmp_path: Path, text: str) -> None:
    write(tmp_path, {".gitignore": text})
    expected = others(tmp_path)
    assert shipped(tmp_path) == expected
    shutil.rmtree(tmp_path / ".git")
    assert shipped(tmp_path) == expected


def test_the_innermost_file_is_right_and_those_above_the_shipped_folder_count(tmp_path: Path) -> None:
    write(tmp_path, {".gitignore": "*.py\n/sub/build\ndeep/", "sub/.gitignore": "!a.py\n"})
    assert shipped(tmp_path) == others(tmp_path)
    assert shipped(tmp_path / "sub") == others(tmp_path / "sub") == [".gitignore", "a.py"]


def test_what_is_in_the_index_is_shipped_though_a_rule_names_it_and_what_is_gone_is_not(tmp_path: Path) -> None:
    write(tmp_path, {".gitignore": "*\n!/sub/\n", ".git/info/exclude": "sub/build\n"})
    git(tmp_path, "add", "--force", "keep.log", "b.log", "data/rows")
    (tmp_path / "b.log").unlink()
    assert shipped(tmp_path) == ["data/rows", "keep.log"]


def test_repositories_inside_are_shipped_each_by_its_own_rules(tmp_path: Path) -> None:
    part, whole = tmp_path / "part", tmp_path / "whole"
    for folder in (part, whole, whole / "nested"):
        folder.mkdir()
        git(folder, "init", "-q")
        (folder / "a.py").write_text("x")
        (folder / "a.log").write_text("x")
        (folder / ".gitignore").write_text("*.log\n")
        git(folder, "add", ".")
        git(folder, "commit", "-qm", "one")
    git(whole, "submodule", "--quiet", "add", str(part), "module")
    (whole / "nested" / ".gitignore").write_text("*.py\n")
    git(whole / "nested", "rm", "-q", "--cached", "a.py")
    assert shipped(whole) == [
        ".gitignore", ".gitmodules", "a.py", "module/.gitignore", "module/a.py", "nested/.gitignore", "nested/a.log",
    ]  # fmt: skip


def test_an_ignored_folder_that_is_named_itself_is_shipped(tmp_path: Path) -> None:
    write(tmp_path, {".gitignore": "/data/\n", "data/.gitignore": "deep\n"})
    assert shipped(tmp_path / "data") == [".gitignore", "keep.py", "rows"]
    git(tmp_path, "add", "--force", "data/deep/x")
    assert shipped(tmp_path / "data") == [".gitignore", "deep/x", "keep.py", "rows"], "with what was added all the same"


def test_a_hook_that_runs_it_does_not_change_whose_files_are_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "another", {})
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "a.py").write_text("x")
    for name, value in {"GIT_DIR": ".git", "GIT_WORK_TREE": ".", "GIT_INDEX_FILE": ".git/index"}.items():
        monkeypatch.setenv(name, str(tmp_path / "another" / value))
    assert shipped(tmp_path / "here") == ["a.py"]


def test_without_git_all_is_shipped_but_rules_that_nobody_can_read_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "here"
    (folder / "__pycache__").mkdir(parents=True)
    for name in ("a.py", "b.log", "__pycache__/a.pyc"):
        (folder / name).write_text("x")
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "rows").write_text("x")
    (folder / "data").symlink_to(tmp_path / "else")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shipped(folder) == ["a.py", "b.log", "data/rows"]
    (folder / ".gitignore").write_text("*.log\n")
    with pytest.raises(UserError, match=r"here/\.gitignore says what is not shipped, and git.* is not installed"):
        collect(folder)


def test_what_a_link_points_to_is_shipped_and_a_circle_ends(tmp_path: Path) -> None:
    (tmp_path / "else" / "rows").mkdir(parents=True)
    (tmp_path / "else" / "rows" / "train.jsonl").write_text("{}")
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "data").symlink_to(tmp_path / "else")
    (folder / "self").symlink_to(folder)
    (folder / "nowhere").symlink_to(tmp_path / "gone")
    (tmp_path / "else" / "back").symlink_to(folder)
    assert shipped(folder) == ["data/rows/train.jsonl"]
    (folder / ".gitignore").write_text("data/\n")
    assert shipped(folder) == [".gitignore"]
    (folder / ".gitignore").write_text("/data\n!data/\n")
    assert shipped(folder) == [".gitignore"], "a link is no folder to git, and the first line names it"
    git(folder, "init", "-q")
    (folder / ".gitignore").write_text("data/\n")
    assert shipped(folder) == [".gitignore"], "to us it is"
