"""What ``.gitignore`` files exclude is what git excludes, pattern by pattern."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from pipelines.cluster.working_dir import collect

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="compared with git, which is not installed")

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
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    for name in FILES:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("x")
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def git(folder: Path) -> list[str]:
    """What git would add, below ``folder``."""
    command = ["git", "-C", str(folder), "ls-files", "-z", "--others", "--exclude-per-directory=.gitignore"]
    environment = os.environ | {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    return sorted(filter(None, output.split("\0")))


@pytest.mark.parametrize("text", CASES)
def test_a_file_says_what_it_says_to_git(tmp_path: Path, text: str) -> None:
    write(tmp_path, {".gitignore": text})
    assert list(collect(tmp_path).files) == git(tmp_path)


def test_the_innermost_file_is_right_and_those_above_the_shipped_folder_count(tmp_path: Path) -> None:
    write(tmp_path, {".gitignore": "*.py\n/sub/build\ndeep/", "sub/.gitignore": "!a.py\n"})
    assert list(collect(tmp_path).files) == git(tmp_path)
    assert list(collect(tmp_path / "sub").files) == git(tmp_path / "sub") == [".gitignore", "a.py"]


def test_lines_put_together_at_random_say_the_same(tmp_path: Path) -> None:
    draw = random.Random(0)
    parts = ["*", "**", "a", "data", "sub", "deep", "keep.py", "*.py", "?", "[a-x]*", "b", "x*"]
    write(tmp_path, {})
    for _ in range(60):
        lines = [
            "!" * (draw.random() < 0.3) + "/" * (draw.random() < 0.2) + "/".join(draw.choices(parts, k=draw.randint(1, 3)))
            + "/" * (draw.random() < 0.2)
            for _ in range(draw.randint(1, 5))
        ]  # fmt: skip
        (tmp_path / ".gitignore").write_text("\n".join(lines))
        assert list(collect(tmp_path).files) == git(tmp_path), lines


def test_what_a_link_points_to_is_shipped_and_a_circle_ends(tmp_path: Path) -> None:
    (tmp_path / "else" / "rows").mkdir(parents=True)
    (tmp_path / "else" / "rows" / "train.jsonl").write_text("{}")
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "data").symlink_to(tmp_path / "else")
    (folder / "self").symlink_to(folder)
    (folder / "nowhere").symlink_to(tmp_path / "gone")
    assert list(collect(folder).files) == ["data/rows/train.jsonl"]
    (folder / ".gitignore").write_text("data/\n")
    assert list(collect(folder).files) == [".gitignore"]
