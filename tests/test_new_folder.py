"""A folder that is made next to its place takes it whole or not at all, whoever else writes there, and leaves nothing."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from amlora_dist import files
from amlora_dist.errors import UserError
from amlora_dist.files import new_folder, write_bytes
from amlora_dist.reporting.page import Page, write_page


def make(folder: Path, text: str, *, replace: bool = False) -> None:
    with new_folder(folder, replace=replace) as part:
        (part / "file").write_text(text)


def left(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_what_was_there_is_replaced_only_by_what_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "one", "before")
    there: list[bool] = []
    inner = files.sync_tree

    def syncing(path: Path) -> None:
        there.append((tmp_path / "one" / "file").is_file())
        inner(path)

    monkeypatch.setattr(files, "sync_tree", syncing)
    make(tmp_path / "one", "after", replace=True)
    assert there == [True] and (tmp_path / "one" / "file").read_text() == "after" and not left(tmp_path)


def test_what_cannot_take_its_place_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "one", "before")

    def failing(source: Path, target: Path) -> None:
        raise OSError("no")

    monkeypatch.setattr(files, "_rename", failing)
    with pytest.raises(OSError, match="no"):
        make(tmp_path / "one", "after", replace=True)
    assert (tmp_path / "one" / "file").read_text() == "before" and not left(tmp_path)


def test_what_cannot_be_put_back_either_is_not_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "one", "before")

    def failing(source: Path, target: Path) -> None:
        raise OSError("no")

    monkeypatch.setattr(files, "_rename", failing)
    inner = Path.replace
    monkeypatch.setattr(Path, "replace", lambda path, to: failing(path, to) if path.suffix == ".old" else inner(path, to))
    with pytest.raises(OSError, match="no"):
        make(tmp_path / "one", "after", replace=True)
    (kept,) = left(tmp_path)
    assert (tmp_path / kept / "file").read_text() == "before"


def test_who_comes_late_to_a_place_is_told_and_the_first_stays(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="not empty"), new_folder(tmp_path / "one") as part:
        (part / "file").write_text("late")
        make(tmp_path / "one", "first")
    assert (tmp_path / "one" / "file").read_text() == "first" and not left(tmp_path)


def test_what_is_behind_a_link_is_replaced_and_the_link_stays(tmp_path: Path) -> None:
    make(tmp_path / "real" / "one", "before")
    (tmp_path / "link").symlink_to(tmp_path / "real" / "one")
    make(tmp_path / "link", "after", replace=True)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "one" / "file").read_text() == "after"
    (tmp_path / "later").symlink_to(tmp_path / "real" / "two")
    make(tmp_path / "later", "new")
    assert (tmp_path / "real" / "two" / "file").read_text() == "new"
    with pytest.raises(OSError, match="not empty"):
        make(tmp_path / "link", "again")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "link" / "file").read_text() == "after"
    assert not left(tmp_path) and not left(tmp_path / "real")


def test_a_file_in_the_place_is_replaced_too(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("a file")
    make(tmp_path / "one", "after", replace=True)
    assert (tmp_path / "one" / "file").read_text() == "after" and os.listdir(tmp_path) == ["one"]


def test_a_pipe_is_written_to_and_stays_one(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(pipe.read_bytes()))
    reader.start()
    write_bytes(pipe, b"a page")
    reader.join(30)
    assert found == [b"a page"] and pipe.is_fifo() and list(tmp_path.iterdir()) == [pipe]


def test_the_longest_name_that_a_file_can_have_is_written(tmp_path: Path) -> None:
    file = tmp_path / ("x" * 250 + ".html")
    write_bytes(file, b"a page")
    assert list(tmp_path.iterdir()) == [file]


def test_a_page_behind_a_link_is_written_where_the_link_points(tmp_path: Path) -> None:
    (tmp_path / "link.html").symlink_to("real.html")
    write_page(Page("title", "", (), None, ()), tmp_path / "link.html")
    assert (tmp_path / "link.html").is_symlink() and (tmp_path / "real.html").is_file()
    (tmp_path / "circle.html").symlink_to("circle.html")
    with pytest.raises(UserError, match="give another --output"):
        write_page(Page("title", "", (), None, ()), tmp_path / "circle.html")
