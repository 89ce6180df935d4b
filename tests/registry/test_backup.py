"""A backup is one moment of a store in use; restored anywhere, it is a store again."""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner

from amlora_dist.errors import UserError
from amlora_dist.registry import backup as backup_module
from amlora_dist.registry.backup import FILE, backup, restore
from amlora_dist.registry.bank_folder import read_bank
from amlora_dist.registry.store import Store
from pipelines.cli.main import app
from tests.fork_server import Server
from tests.registry.tiny_banks import TASKS, publish_sequence

pytestmark = pytest.mark.integration


@pytest.fixture
def home(tmp_path: Path, empty_home: Path) -> Path:
    home = tmp_path / "first" / "home"
    shutil.copytree(empty_home, home)
    (tmp_path / "work").mkdir()
    publish_sequence(Store.open(home), "banks", tmp_path / "work", tasks=TASKS[:1])
    return home


def digests(home: Path, dest: Path) -> list[str]:
    bank = read_bank(Store.open(home).pull("models:/banks@current", dest))
    return [entry.digest for entry in bank.manifest.adapters]


def test_a_backup_restored_elsewhere_is_the_store_that_it_was(home: Path, tmp_path: Path) -> None:
    before = digests(home, tmp_path / "before")
    made = backup(home, tmp_path / "backup")
    assert made.files > 10 and made.size > 1000
    shutil.rmtree(home.parent)
    other = tmp_path / "another place" / "home"
    restore(tmp_path / "backup", other)
    assert digests(other, tmp_path / "after") == before
    publish_sequence(Store.open(other), "banks", tmp_path / "work", tasks=TASKS[:2])
    assert len(digests(other, tmp_path / "longer")) == 2
    assert not home.exists(), "nothing is written where it was"


def test_whatever_a_backup_names_it_holds_while_versions_are_published(home: Path, tmp_path: Path) -> None:
    """The moment is the journal's: each of the versions in it can be pulled from the restored store."""
    store = Store.open(home)

    def publish() -> None:
        publish_sequence(store, "banks", tmp_path / "work", tasks=TASKS)
        publish_sequence(store, "more", tmp_path / "work", tasks=TASKS)

    writer = threading.Thread(target=publish)
    writer.start()
    number = 0
    while writer.is_alive():
        backup(home, tmp_path / f"backup-{number}")
        number += 1
    writer.join()
    assert number > 0
    seen: set[int] = set()
    for one in range(number):
        restore(tmp_path / f"backup-{one}", tmp_path / f"home-{one}")
        restored = Store.open(tmp_path / f"home-{one}")
        versions = [version for model in restored.registered_models() for version in restored.versions(model)]
        for version in versions:
            read_bank(restored.pull_version(version, tmp_path / f"pulled-{one}" / version.uri.replace("/", "_")))
        seen.add(len(versions))
    assert seen <= set(range(1, 7))


def test_a_damaged_backup_makes_no_home(home: Path, tmp_path: Path) -> None:
    backup(home, tmp_path / "backup")
    listed = json.loads((tmp_path / "backup" / FILE).read_text(encoding="utf-8"))
    router = next(name for name in listed["files"] if name.endswith("router.safetensors"))
    kept = (tmp_path / "backup" / router).read_bytes()

    (tmp_path / "backup" / router).write_bytes(b"x" * len(kept))
    with pytest.raises(UserError, match=r"router.safetensors: found \d+ bytes, sha256 .* the backup is damaged"):
        restore(tmp_path / "backup", tmp_path / "new")
    (tmp_path / "backup" / router).unlink()
    with pytest.raises(UserError, match=r"router.safetensors: missing"):
        restore(tmp_path / "backup", tmp_path / "new")
    (tmp_path / "backup" / router).write_bytes(kept)

    for change, message in (
        ({"format": 2}, "format: found 2, expected 1"),
        ({"files": {"../../x": {"size": 1, "sha256": ""}}}, "expected files of this folder alone"),
        ({"files": {"../backup/backup.json": {"size": 1, "sha256": ""}}}, "expected files of this folder alone"),
        ({"files": {str(tmp_path / "backup" / FILE): {"size": 1, "sha256": ""}}}, "expected files of this folder alone"),
        ({"files": {"artifacts/a\0b": {"size": 1, "sha256": ""}}}, "missing; the backup is damaged"),
        ({"files": {f"artifacts/{'n' * 300}": {"size": 1, "sha256": ""}}}, "missing; the backup is damaged"),
        ({"files": {"mlflow.db": {"size": float("inf"), "sha256": ""}}}, "not what"),
        ({"files": []}, r"not listed|not what"),
        ({"files": {"mlflow.db": {}}}, "not what"),
    ):
        (tmp_path / "backup" / FILE).write_text(json.dumps(listed | change), encoding="utf-8")
        with pytest.raises(UserError, match=message):
            restore(tmp_path / "backup", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_folder_that_is_there_and_empty_is_filled_where_it_is(home: Path, tmp_path: Path) -> None:
    """A disk that is mounted there can be neither removed nor renamed over: a volume of a cluster, say, with what every new
    disk holds."""
    for name in ("backup", "home"):
        (tmp_path / name / "lost+found").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "behind")
    number = {name: (tmp_path / name).stat().st_ino for name in ("backup", "home")}
    backup(home, tmp_path / "backup")
    restore(tmp_path / "backup", tmp_path / "home")
    restore(tmp_path / "backup", tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    for name in ("home", "link"):
        assert len(digests(tmp_path / name, tmp_path / f"pulled-{name}")) == 1
    assert number == {name: (tmp_path / name).stat().st_ino for name in ("backup", "home")}
    assert {path.name for path in (tmp_path / "backup").iterdir()} == {"lost+found", "mlflow.db", "artifacts", "backup.json"}


@pytest.mark.parametrize("name", ["artifacts/of", "mlflow.db"])
def test_what_somebody_else_makes_in_the_home_meanwhile_stays_theirs(
    name: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup(home, tmp_path / "backup")
    (tmp_path / "home").mkdir()
    theirs, inner = tmp_path / "home" / name, backup_module.sync_tree

    def syncing(path: Path) -> None:
        theirs.parent.mkdir(exist_ok=True)
        theirs.write_text("theirs")
        inner(path)

    monkeypatch.setattr(backup_module, "sync_tree", syncing)
    with pytest.raises(UserError, match=f"{Path(name).parts[0]}: somebody else has made it meanwhile"):
        restore(tmp_path / "backup", tmp_path / "home")
    assert theirs.read_text() == "theirs"
    assert [path.name for path in (tmp_path / "home").iterdir()] == [Path(name).parts[0]]


def test_what_was_moved_to_another_disk_behind_a_link_is_in_the_backup(home: Path, tmp_path: Path) -> None:
    for name in ("artifacts/banks", "artifacts"):
        away = tmp_path / f"disk-{name.replace('/', '-')}"
        shutil.move(home / name, away)
        (home / name).symlink_to(away)
    (home / "artifacts" / "circle").symlink_to(home / "artifacts")
    (home / "artifacts" / "nothing").symlink_to(tmp_path / "nothing")
    backup(home, tmp_path / "backup")
    restore(tmp_path / "backup", tmp_path / "new")
    assert len(digests(tmp_path / "new", tmp_path / "pulled")) == 1
    assert not any(path.is_symlink() for path in (tmp_path / "new").rglob("*"))


def test_a_backup_that_lists_what_no_backup_holds_makes_no_home(home: Path, tmp_path: Path) -> None:
    """Caches of a home are believed: a digest that is there would be taken for a model's."""
    backup(home, tmp_path / "backup")
    listed = json.loads((tmp_path / "backup" / FILE).read_text(encoding="utf-8"))

    def given(name: str, content: bytes) -> None:
        file = tmp_path / "backup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        entry = {name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
        (tmp_path / "backup" / FILE).write_text(json.dumps(listed | {"files": listed["files"] | entry}), encoding="utf-8")

    for name in ("cache/model-digests/x.txt", "banks/a/manifest.json", "mlflow.db-wal", "bases"):
        given(name, b"x")
        with pytest.raises(UserError, match=rf"found '{name}', expected mlflow\.db and files in artifacts, bases, storage"):
            restore(tmp_path / "backup", tmp_path / "new")
    listed["files"] = {name: one for name, one in listed["files"].items() if name == "mlflow.db"}
    for content in (b"no database", b""):
        given("mlflow.db", content)
        with pytest.raises(UserError, match=r"mlflow\.db: damaged"):
            restore(tmp_path / "backup", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_home_in_which_no_store_can_lie_is_not_made(home: Path, tmp_path: Path) -> None:
    backup(home, tmp_path / "backup")
    with pytest.raises(UserError, match=r"AMLORA_HOME: .*50% holds one of"):
        restore(tmp_path / "backup", tmp_path / "50%")
    assert not (tmp_path / "50%").exists()


def test_a_full_disk_is_called_so_and_nothing_is_left_on_it(
    home: Path, tmp_path: Path, forking: Server
) -> None:
    backup(home, tmp_path / "backup")
    for where, arguments in (("dest", ["backup", str(tmp_path / "dest")]), ("new", ["restore", str(tmp_path / "backup")])):
        place = home if where == "dest" else tmp_path / where
        found = forking.start(tmp_path / f"told-{where}", *arguments, AMLORA_HOME=str(place), max_file=100_000)
        assert found.wait() == 2, found.stderr
        assert "make room" in found.stderr and len(found.stderr.splitlines()) == 1, found.stderr
        assert not (tmp_path / where).exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_store_that_commands_use_is_not_taken_for_another(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AMLORA_HOME", str(home))
    for uri, fine in (("http://me:secret@host:5000", False), (f"sqlite:///{home / 'mlflow.db'}", True)):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        done = CliRunner().invoke(app, ["backup", str(tmp_path / "backup")])
        assert (done.exit_code == 0) == fine and (tmp_path / "backup").exists() == fine, done.stderr
        assert fine or ("MLFLOW_TRACKING_URI: found http" in done.stderr and "secret" not in done.stderr)


def test_places_that_hold_something_are_left_as_they_are(home: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lies in AMLORA_HOME"):
        backup(home, home / "backups" / "one")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"DEST: found .* with 'thesis.txt' in it"):
        backup(home, tmp_path / "full")
    backup(home, tmp_path / "backup")
    with pytest.raises(UserError, match=r"AMLORA_HOME: found .* in it, expected no such folder"):
        restore(tmp_path / "backup", home)
    with pytest.raises(UserError, match="holds no store"):
        backup(tmp_path / "full", tmp_path / "another")
    with pytest.raises(UserError, match=r"no backup\.json"):
        restore(tmp_path / "full", tmp_path / "another")
    with sqlite3.connect(tmp_path / "backup" / "mlflow.db") as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
