"""A stage is published while the next one trains: who waits for whom, and what happens when one of the two fails."""

from __future__ import annotations

import logging
import signal
import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import pytest

from amlora_dist.registry.connection import StoreAwayError
from pipelines.runs import publisher
from pipelines.runs.publisher import Publisher
from tests.fork_server import Child, Server
from tests.pipelines.crash_cases import NOT_PUBLISHED, Outcome, outcome_of

FIRST_STEP_OF_STAGE_2 = "step_done:stop:9"


# -- one publication --------------------------------------------------------------------------------------------------


def test_what_was_begun_goes_on_by_itself_and_is_waited_for_where_it_is_settled() -> None:
    one, go, done = Publisher(), threading.Event(), list[str]()
    one.settle()  # nothing was begun
    one.begin("stage 1", lambda: go.wait(60) and done.append("1"))
    assert not done, "begin returns at once"
    with pytest.raises(AssertionError, match="one at a time"):
        one.begin("stage 2", lambda: done.append("2"))
    go.set()
    one.settle()
    assert done == ["1"]
    one.begin("stage 2", lambda: done.append("2"))
    one.settle()
    assert done == ["1", "2"]


def test_its_error_is_raised_where_it_is_settled_and_once() -> None:
    one = Publisher()

    def fails() -> None:
        raise StoreAwayError("no answer")

    one.begin("stage 1", fails)
    with pytest.raises(StoreAwayError, match="no answer"):
        one.settle()
    one.settle()


def test_a_run_that_ends_otherwise_waits_a_little_and_says_what_became_of_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one, never = Publisher(), threading.Event()

    def fails() -> None:
        raise StoreAwayError("no answer")

    one.leave()  # nothing was begun
    with caplog.at_level(logging.WARNING):
        one.begin("stage 1 'mail'", fails)
        one.leave()
        monkeypatch.setattr(publisher, "LEAVE_DEADLINE_S", 0.01)
        one.begin("stage 2 'chat'", lambda: never.wait(60))
        one.leave()
    never.set()
    assert [record.getMessage() for record in caplog.records] == [
        "publishing stage 1 'mail' failed (no answer); all is kept, and the same command goes on with it",
        "publishing stage 2 'chat' has not ended; the same command goes on with it",
    ]


def test_one_that_does_not_end_is_reported_and_waited_for_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    one, never = Publisher(), threading.Event()
    monkeypatch.setattr(publisher, "DEADLINE_S", 0.01)
    one.begin("stage 1 'mail'", lambda: never.wait(60))
    with pytest.raises(StoreAwayError, match=r"publishing stage 1 'mail' did not end within .*the same command"):
        one.settle()
    never.set()


# -- whole runs -------------------------------------------------------------------------------------------------------


def start(server: Server, config: Path, home: Path, name: str, **environment: str) -> Child:
    return server.start(
        home.parent / name, "run", str(config), "--run-id", "r", "--json", AMLORA_HOME=str(home), **environment
    )


def published(home: Path) -> int:
    with closing(sqlite3.connect(home / "mlflow.db")) as database:
        (count,) = database.execute("SELECT count(*) FROM model_versions WHERE name = 'r'").fetchone()
    return int(count)


def held(home: Path) -> list[str]:
    """Leases and claims that somebody holds, without their keys."""
    with closing(sqlite3.connect(home / "mlflow.db")) as database:
        names = database.execute(
            "SELECT name FROM registered_models WHERE name LIKE 'amlora.lease.%' AND name NOT IN"
            " (SELECT name FROM registered_model_tags WHERE key = 'amlora.released') ORDER BY name"
        ).fetchall()
    return [name.split(".")[2] for (name,) in names]


@pytest.mark.integration
@pytest.mark.slow
def test_the_next_stage_trains_before_the_one_before_is_published_and_both_claims_are_held(
    forking: Server, config: Path, home: Path, undisturbed: Outcome
) -> None:
    run = start(forking, config, home, "start", AMLORA_CRASH=f"{NOT_PUBLISHED},{FIRST_STEP_OF_STAGE_2}")
    run.wait_paused()
    assert published(home) == 0
    assert held(home) == ["run", "stage", "stage"]
    run.send(signal.SIGCONT)
    assert run.wait() == 0, run.stderr
    assert outcome_of(home, run.stdout) == undisturbed
    assert held(home) == []


@pytest.mark.integration
@pytest.mark.slow
def test_a_signal_in_the_next_stage_lets_the_publication_end(
    forking: Server, config: Path, home: Path, undisturbed: Outcome
) -> None:
    run = start(forking, config, home, "start", AMLORA_CRASH=f"{NOT_PUBLISHED},{FIRST_STEP_OF_STAGE_2}")
    run.wait_paused()
    run.send(signal.SIGTERM)
    run.send(signal.SIGCONT)
    assert run.wait() == 143, run.stderr
    assert published(home) == 1
    assert held(home) == []
    again = start(forking, config, home, "again")
    assert again.wait() == 0, again.stderr
    assert "resumed after step" in again.stderr
    assert outcome_of(home, again.stdout) == undisturbed


@pytest.mark.integration
@pytest.mark.slow
def test_what_failed_is_reported_at_the_next_stages_end_and_nothing_is_trained_twice(
    forking: Server, config: Path, home: Path, undisturbed: Outcome
) -> None:
    run = start(forking, config, home, "start", AMLORA_CRASH="artifacts_uploaded:raise:1")
    assert run.wait() == 1
    assert "artifacts_uploaded" in run.stderr and "version 1" not in run.stderr
    assert len(list(home.glob("storage/stages/*/trained/adapter_model.safetensors"))) == 2, "the second stage was trained"
    assert (published(home), held(home)) == (0, [])
    again = start(forking, config, home, "again")
    assert again.wait() == 0, again.stderr
    assert " step " not in again.stderr
    assert outcome_of(home, again.stdout) == undisturbed
