"""Commands that only look at a store import no MLflow, and see what MLflow's own client sees."""

from __future__ import annotations

import json
import math
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from amlora_dist.errors import UserError
from amlora_dist.registry import tags
from amlora_dist.registry.connection import connect
from amlora_dist.registry.housekeeping import aliases
from amlora_dist.registry.reading import Filter, ReadingClient, UnknownError, checked_path, parsed_filter
from amlora_dist.registry.store import Store
from tests.registry.tiny_banks import publish_sequence

REPOSITORY = Path(__file__).resolve().parents[2]
HEAVY = (
    "alembic", "datasets", "deepspeed", "fastapi", "matplotlib", "mlflow", "numpy", "pandas", "pyarrow", "ray", "scipy",
    "sklearn", "sqlalchemy", "torch", "transformers",
)  # fmt: skip


def reading(store: Store, home: Path) -> Store:
    """The same store, opened to be read."""
    uri = store.connection.uri
    found = Store.open(Path(uri.removeprefix("sqlite:///")).parent if uri.startswith("sqlite:") else home, uri, reads=True)
    assert isinstance(found.connection.client, ReadingClient)
    return found


def asks_mlflow(store: Store) -> bool:
    client = store.connection.client
    assert isinstance(client, ReadingClient)
    return client._mlflow is not None


def a_run(store: Store, name: str) -> str:
    run = store.parent_run(name, name, {"seed": 0})
    store.log_json(run, "result.json", {"run_id": name, "tasks": []})
    store.log_json(run, "deep/er/one.json", [1])
    store.log_metrics_batch(run, [("loss", 1.0, 0, 10), ("loss", 0.5, 1, 20), ("odd", math.nan, 0, 10)])
    return run


@pytest.mark.integration
def test_what_is_read_is_what_mlflow_answers(store: Store, name: str, tmp_path: Path) -> None:
    publish_sequence(store, name, tmp_path)
    run = a_run(store, name)
    thin = reading(store, tmp_path)
    assert thin.versions(name) == store.versions(name) and len(store.versions(name)) == 3
    assert thin.counted_versions(name) == store.counted_versions(name)
    assert thin.registered_models() == store.registered_models()
    assert aliases(thin, name) == aliases(store, name) == {tags.CURRENT: 3}
    last = store.versions(name)[-1]
    assert thin.find_stage(last.training_fingerprint) == store.find_stage(last.training_fingerprint) == [last]
    for uri in (f"models:/{name}@current", f"models:/{name}/2", f"models:/{name}/latest"):
        assert thin.resolve(uri) == store.resolve(uri)
    wanted = {tags.KIND: "sequence", tags.RUN_ID: name}
    for where in (None, name):
        found = [[(r.run, r.name, r.status, r.tags) for r in one.find_runs(wanted, registered_model=where)]
                 for one in (thin, store)]  # fmt: skip
        assert found[0] == found[1] and len(found[0]) == 1
    metrics = thin.find_runs(wanted)[0].metrics
    assert metrics["loss"] == 0.5 and math.isnan(metrics["odd"])
    assert thin.run_tags(run) == store.run_tags(run)
    assert thin.page_of(run) == store.page_of(run)
    assert thin.metric_history(run, "loss") == store.metric_history(run, "loss") == [(0, 1.0, 10), (1, 0.5, 20)]
    assert thin.load_json(run, "deep/er/one.json") == [1]
    assert thin.load_json(run, "not_there.json") is store.load_json(run, "not_there.json") is None
    for path in ("", last.artifact_path):
        assert thin.artifact_sizes(last.run, path) == store.artifact_sizes(last.run, path) != {}
    assert thin.has_artifact(run, "deep/er/one.json") and not thin.has_artifact(run, "deep/er/two.json")
    thin.pull(last.uri, tmp_path / "thin")
    store.pull(last.uri, tmp_path / "whole")
    files = {
        folder: {file.relative_to(tmp_path / folder): file.read_bytes() for file in (tmp_path / folder).rglob("*.*")}
        for folder in ("thin", "whole")
    }
    assert files["thin"] == files["whole"] != {}
    assert not asks_mlflow(thin)


@pytest.mark.integration
def test_what_is_not_there_has_mlflows_own_message(store: Store, name: str, tmp_path: Path) -> None:
    messages = []
    for one in (reading(store, tmp_path), store):
        for ask in (lambda s: aliases(s, "no-such-model"), lambda s: s.resolve("models:/no-such-model/1")):
            with pytest.raises(UserError) as caught:
                ask(one)
            messages.append(str(caught.value))
    assert messages[:2] == messages[2:]


@pytest.mark.integration
def test_a_write_goes_to_mlflow_and_everything_after_it_too(store: Store, name: str, tmp_path: Path) -> None:
    publish_sequence(store, name, tmp_path)
    thin = reading(store, tmp_path)
    thin.set_alias(name, "champion", thin.versions(name)[0])
    assert asks_mlflow(thin)
    assert aliases(thin, name) == aliases(store, name) == {"champion": 1, tags.CURRENT: 3}


def table_changed(file: Path, statement: str) -> None:
    with closing(sqlite3.connect(file)) as connection:
        connection.execute(statement)
        connection.commit()


@pytest.mark.integration
@pytest.mark.parametrize(
    "statement",
    [
        "ALTER TABLE latest_metrics RENAME COLUMN is_nan TO nan",
        "UPDATE experiments SET workspace = 'others'",
    ],
)
def test_tables_that_are_not_known_are_left_to_mlflow(tmp_path: Path, statement: str) -> None:
    Store.open(tmp_path)
    assert isinstance(connect(tmp_path, None, reads=True).client, ReadingClient)
    table_changed(tmp_path / "mlflow.db", statement)
    assert not isinstance(connect(tmp_path, None, reads=True).client, ReadingClient)


@pytest.mark.integration
def test_a_home_without_a_store_is_prepared_by_mlflow(tmp_path: Path) -> None:
    assert not isinstance(connect(tmp_path, None, reads=True).client, ReadingClient)
    assert (tmp_path / "mlflow.db").is_file()


def test_a_reader_that_fails_is_followed_by_mlflow_and_not_asked_again() -> None:
    asked: list[str] = []

    class Failing:
        def get_run(self, run_id: str) -> Any:
            asked.append(run_id)
            raise OSError("HTTP Error 401")

    class Whole:
        def get_run(self, run_id: str) -> str:
            return f"whole {run_id}"

    client = ReadingClient(Failing(), Whole)  # type: ignore[arg-type]
    assert [client.get_run("a"), client.get_run("b")] == ["whole a", "whole b"]
    assert asked == ["a"]


def test_only_the_filters_of_this_project_are_understood() -> None:
    assert parsed_filter(None) == Filter()
    assert parsed_filter("name = 'a b' and tags.`x.y` = 'z'") == Filter("a b", None, {"x.y": "z"})
    assert parsed_filter("name LIKE 'amlora.lease.%'") == Filter(None, "amlora.lease.")
    for text in ("metrics.a > 1", "name = 'a' or name = 'b'", "name = 'a' and ", "name LIKE '%a%'", "tags.x != 'y'"):
        with pytest.raises(UnknownError):
            parsed_filter(text)


@pytest.mark.parametrize("path", ["../x", "a/../b", "/etc/passwd", "a//b", "a\\b", "."])
def test_artifacts_are_looked_for_below_their_run_alone(path: str) -> None:
    with pytest.raises(UnknownError):
        checked_path(path)


def imported_by(arguments: list[str], home: Path, repository: Path = REPOSITORY) -> tuple[set[str], str]:
    """The heavy packages that a command has imported, and what it printed."""
    code = (
        "import sys, atexit, json\n"
        f"there = lambda: json.dumps([name for name in {HEAVY!r} if name in sys.modules])\n"
        "atexit.register(lambda: sys.stderr.write('\\nIMPORTED ' + there()))\n"
        f"sys.argv = ['amlora', *{arguments!r}]\n"
        "from pipelines.cli.main import main\nmain()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, env=os.environ | {"AMLORA_HOME": str(home)}, capture_output=True,
        text=True, timeout=240, check=False,
    )  # fmt: skip
    return set(json.loads(done.stderr.rpartition("IMPORTED ")[2])), done.stdout + done.stderr


@pytest.mark.integration
@pytest.mark.parametrize("command", ["show", "versions", "diff", "jobs"])
def test_a_command_that_only_looks_imports_nothing_heavy(
    store: Store, name: str, tmp_path: Path, command: str
) -> None:
    if command == "jobs":
        heavy, printed = imported_by(["jobs", "--address", "http://127.0.0.1:1"], tmp_path)
        assert "nobody answers" in printed and heavy <= {"ray"}, "Ray's client of jobs is Ray's"
        return
    publish_sequence(store, name, tmp_path)
    a_run(store, name)
    banks = [f"models:/{name}/1", f"models:/{name}/2"]
    uri = store.connection.uri
    arguments = [command, *(banks if command == "diff" else [name]), "--json", "--tracking-uri", uri]
    heavy, printed = imported_by(arguments, tmp_path)
    assert name in printed or command == "diff"
    assert '"' in printed, "it has printed JSON"
    assert not heavy
