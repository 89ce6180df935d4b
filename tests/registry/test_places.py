"""A home that was moved or copied works where it lies, and touches nothing elsewhere."""

from __future__ import annotations

import os
import shutil
import sqlite3
from pathlib import Path

import pytest

from amlora_dist.registry.bank_folder import read_bank
from amlora_dist.registry.places import own_place, settle
from amlora_dist.registry.store import Store
from tests.registry.tiny_banks import TASKS, publish_sequence

pytestmark = pytest.mark.integration


@pytest.fixture
def home(tmp_path: Path, empty_home: Path) -> Path:
    """A home of one run with one version; the space in its name is on purpose."""
    home = tmp_path / "old home"
    shutil.copytree(empty_home, home)
    (tmp_path / "work").mkdir()
    publish_sequence(Store.open(home), "banks", tmp_path / "work", tasks=TASKS[:1])
    return home


def files_below(folder: Path) -> dict[str, int]:
    """Everything but the database, with the times at which it was written."""
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if not path.name.startswith("mlflow.db")
    }


def places_named(home: Path) -> list[str]:
    with sqlite3.connect(home / "mlflow.db") as connection:
        found = connection.execute("SELECT artifact_location FROM experiments WHERE name = 'banks'").fetchall()
        found += connection.execute("SELECT artifact_uri FROM runs").fetchall()
    return [place for (place,) in found]


def test_home_moved(home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    moved = tmp_path / "elsewhere" / "new home"
    moved.parent.mkdir()
    home.rename(moved)
    store = Store.open(moved)
    assert f"{moved}: this home was in {home} before" in caplog.text, "it is logged"
    assert len(read_bank(store.pull("models:/banks@current", tmp_path / "pulled")).adapters) == 1
    caplog.clear()
    Store.open(moved)
    assert not caplog.text, "logged once"
    publish_sequence(store, "banks", tmp_path / "work", tasks=TASKS[:2])
    assert len(read_bank(store.pull("models:/banks@current", tmp_path / "pulled-2")).adapters) == 2
    assert not home.exists(), "nothing is written where it was"


def test_a_copied_home_reads_and_writes_its_own_files_alone(home: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(home, copy)
    before = files_below(home)
    hidden = home / "artifacts" / "banks"
    for path in sorted(hidden.rglob("*"), reverse=True):
        path.chmod(0o000 if path.is_file() else 0o555)
    try:
        store = Store.open(copy)
        publish_sequence(store, "banks", tmp_path / "work", tasks=TASKS[:2])
        pulled = read_bank(store.pull("models:/banks/latest", tmp_path / "pulled"))
        assert pulled.manifest.tasks == list(TASKS[:2])
    finally:
        for path in sorted(hidden.rglob("*")):
            path.chmod(0o755)
    assert files_below(home) == before
    assert all(place.startswith(f"{copy}/artifacts/") for place in places_named(copy))
    assert all(place.startswith(f"{home}/artifacts/") for place in places_named(home))
    assert [version.number for version in Store.open(home).versions("banks")] == [1], "and the other has what it had"


def test_a_home_opened_by_its_address_lies_where_its_file_does(home: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    home.rename(moved)
    (tmp_path / "another").mkdir()
    store = Store.open(tmp_path / "another", f"sqlite:///{moved / 'mlflow.db'}")
    publish_sequence(store, "banks", tmp_path / "work", tasks=TASKS[:2])
    publish_sequence(store, "more", tmp_path / "work", tasks=TASKS[:1])
    assert not list((tmp_path / "another").iterdir())
    assert (moved / "artifacts" / "more").is_dir()


def test_a_home_behind_a_link_is_no_other_home(home: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(home)
    Store.open(tmp_path / "link")
    assert all(place.startswith(f"{home}/artifacts/") for place in places_named(home))


def test_places_of_others_in_the_same_store_stay_as_they_are(home: Path) -> None:
    with sqlite3.connect(home / "mlflow.db") as connection:
        connection.execute(
            "INSERT INTO experiments (experiment_id, name, artifact_location, lifecycle_stage) VALUES"
            " (77, 'theirs', 's3://bucket/artifacts/99', 'active'), (78, 'old', 'file:///x/artifacts/old', 'active')"
        )
    assert settle(home / "mlflow.db", home) == ["file:///x/artifacts"]
    with sqlite3.connect(home / "mlflow.db") as connection:
        rows = connection.execute("SELECT artifact_location FROM experiments WHERE experiment_id > 70").fetchall()
    assert rows == [("s3://bucket/artifacts/99",), (f"{home}/artifacts/old",)]
    assert os.path.isabs(rows[1][0])


def test_an_experiment_of_somebody_in_a_folder_of_that_name_stays_where_it_is(home: Path, tmp_path: Path) -> None:
    own = tmp_path / "nas" / "artifacts" / "mine"
    own.mkdir(parents=True)
    with sqlite3.connect(home / "mlflow.db") as connection:
        columns = "experiment_id, name, artifact_location, lifecycle_stage"
        connection.execute(f"INSERT INTO experiments ({columns}) VALUES (77, 'mine', ?, 'active')", (str(own),))
    assert settle(home / "mlflow.db", home) == []


def test_who_opens_a_home_by_another_path_moves_nothing_of_who_writes_by_this_one(home: Path, tmp_path: Path) -> None:
    """A container that has it mounted elsewhere sets the places in the store to its own; a run goes on meanwhile."""
    store = Store.open(home)
    with sqlite3.connect(home / "mlflow.db") as connection:
        for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
            connection.execute(
                f"UPDATE {table} SET {column} = replace({column}, ?, ?)", (f"{home}/", f"{tmp_path / 'mounted'}/")
            )
    publish_sequence(store, "banks", tmp_path / "work", tasks=TASKS[:2])
    assert len(read_bank(store.pull("models:/banks@current", tmp_path / "pulled")).adapters) == 2
    assert not (tmp_path / "mounted").exists(), "nothing is written outside"
    assert len(read_bank(Store.open(home).pull("models:/banks@current", tmp_path / "again")).adapters) == 2


def test_a_place_in_an_object_store_is_no_home_that_was_moved(tmp_path: Path) -> None:
    place = "s3://bucket/artifacts/of/0123/artifacts"
    assert own_place(place, tmp_path) == place
    assert own_place("/old/artifacts/of/0123/artifacts", tmp_path) == str(tmp_path / "artifacts/of/0123/artifacts")
    assert own_place("file:///old/artifacts/of/0123/artifacts", tmp_path) == str(tmp_path / "artifacts/of/0123/artifacts")
