from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from amlora_dist.errors import UserError
from amlora_dist.registry.connection import Connection, StoreAwayError, StoreError, StoreFullError, connect
from amlora_dist.registry.runs import check_model_name
from amlora_dist.registry.versions import parse_uri
from pipelines.cluster.resources import check_folder


@pytest.mark.integration
def test_mlflow_is_not_imported_before_a_store_is_opened() -> None:
    code = "import sys, amlora_dist.registry.store, amlora_dist.registry.pyfunc; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("uri", ["file:///tmp/mlruns", "mlruns", "./mlruns"])
def test_plain_files_are_refused_with_what_works(uri: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"mlflow.tracking_uri: found .*sqlite"):
        connect(tmp_path, uri)


def test_mlflows_own_variable_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "./mlruns")
    with pytest.raises(UserError, match=r"MLFLOW_TRACKING_URI: found './mlruns', expected http"):
        connect(tmp_path, None)


def test_a_server_that_does_not_listen_is_named_at_once(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{probe.getsockname()[1]}"
        begin = time.monotonic()
        with pytest.raises(UserError, match=f"found {uri}, expected a server that answers"):
            connect(tmp_path, uri)
        assert time.monotonic() - begin < 25


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("hello, I am a text" * 100)
    with pytest.raises(UserError, match=r"mlflow.db, expected a SQLite file .*file is not a database"):
        connect(tmp_path, None)


def test_a_home_that_no_database_uri_can_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="AMLORA_HOME"):
        connect(tmp_path / "50%", None)


@pytest.mark.parametrize("uri", ["sqlite://", "sqlite:///", "sqlite:///:memory:", "sqlite:///file:x?mode=memory&uri=true"])
def test_a_store_in_memory_which_would_keep_nothing_is_refused(uri: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"mlflow.tracking_uri: found 'sqlite:.* a store in memory that ends with"):
        connect(tmp_path, uri)


def test_a_home_that_cannot_be_reached_is_named(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for home in (tmp_path / "loop", tmp_path / ("x" * 300)):
        with pytest.raises(UserError, match=f"AMLORA_HOME: found {home}"):
            connect(home, None)
        with pytest.raises(UserError, match=f"AMLORA_HOME: found {home}, expected a folder that can be written"):
            check_folder(home)
        with pytest.raises(UserError, match=rf"mlflow.tracking_uri: found {home}/a.db"):
            connect(tmp_path, f"sqlite:///{home}/a.db")


@pytest.mark.parametrize("name", ["", "a/b", "a:b", "amlora.lease.x", "a'b", "-x", "x" * 130, "a\n"])
def test_names_that_mlflow_or_a_file_cannot_carry_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="registered_model: found"):
        check_model_name(name)


def test_uris_of_versions() -> None:
    assert parse_uri("models:/my bank@champion") == ("my bank", "champion", "latest")
    assert parse_uri("models:/helpdesk/12") == ("helpdesk", None, "12")
    assert parse_uri("models:/helpdesk/latest") == parse_uri("models:/helpdesk") == ("helpdesk", None, "latest")
    far = f"models:/a/{10**20}"
    for bad in ("models:/helpdesk/stage", "models:helpdesk/1", "runs:/x/bank", "models:/a@", "models:/a@b/1", far):
        with pytest.raises(UserError, match="expected models:/NAME@ALIAS"):
            parse_uri(bad)


@pytest.mark.integration  # importing mlflow
class TestRepeating:
    """``Connection.call`` against a function that fails."""

    connection = Connection(SimpleNamespace(), "sqlite:///x", None)  # type: ignore[arg-type]

    @staticmethod
    def failing(times: int, message: str, code: str) -> Any:
        from mlflow.exceptions import MlflowException
        from mlflow.protos.databricks_pb2 import ErrorCode

        calls = []

        def function() -> int:
            calls.append(1)
            if len(calls) <= times:
                raise MlflowException(message, error_code=ErrorCode.Value(code))
            return len(calls)

        return function

    def test_a_locked_database_is_tried_again_until_it_is_free(self) -> None:
        busy = self.failing(3, "(sqlite3.OperationalError) database is locked", "TEMPORARILY_UNAVAILABLE")
        assert self.connection.call("write", busy) == 4

    def test_a_database_that_stays_locked_is_named_at_the_deadline(self) -> None:
        busy = self.failing(10**6, "database is locked", "INTERNAL_ERROR")
        with pytest.raises(StoreError, match=r"write a tag: still busy after .* s .*locked.*tracking server"):
            self.connection.call("write a tag", busy, deadline_s=0.2)

    def test_other_errors_are_not_repeated(self) -> None:
        wrong = self.failing(1, "no such column", "BAD_REQUEST")
        with pytest.raises(StoreError, match="read: no such column"):
            self.connection.call("read", wrong)
        assert wrong() == 2

    def test_a_full_disk_is_named(self) -> None:
        def full() -> None:
            raise OSError(28, "No space left on device")

        with pytest.raises(StoreError, match=r"upload: .*No space left"):
            self.connection.call("upload", full)

    def test_existing_and_missing_things_are_reported_to_the_caller(self) -> None:
        from mlflow.exceptions import MlflowException

        for code in ("RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST"):
            with pytest.raises(MlflowException):
                self.connection.call("create", self.failing(1, "", code))

    def test_a_server_that_does_not_answer_is_waited_for(self) -> None:
        remote = Connection(SimpleNamespace(), "http://x", None)  # type: ignore[arg-type]
        gone = self.failing(3, "API request to http://x failed with exception Connection refused", "INTERNAL_ERROR")
        assert remote.call("write", gone) == 4
        local = self.failing(1, "API request to http://x failed with exception Connection refused", "INTERNAL_ERROR")
        with pytest.raises(StoreError):
            self.connection.call("write", local)

    def test_after_giving_up_on_a_server_every_call_tries_once_until_it_is_answered(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import requests

        monkeypatch.setattr("amlora_dist.registry.connection.OUTAGE_DEADLINE_S", 0.2)
        remote = Connection(SimpleNamespace(), "http://x", None)  # type: ignore[arg-type]
        calls = []

        def gone() -> None:
            calls.append(1)
            raise requests.ConnectionError("reset by peer")

        with pytest.raises(StoreAwayError, match=r"upload: no answer .*what was trained is kept.*same command"):
            remote.call("upload", gone)
        assert len(calls) > 1 and remote.away and StoreAwayError.exit_code == 2
        calls.clear()
        with pytest.raises(StoreAwayError):
            remote.call("release", gone)
        assert len(calls) == 1
        assert remote.call("read", lambda: 7) == 7
        assert not remote.away

    def test_a_refusal_of_the_server_is_no_absence(self) -> None:
        import requests

        remote = Connection(SimpleNamespace(), "http://x", None)  # type: ignore[arg-type]
        answer = requests.Response()
        answer.status_code = 403

        def refused() -> None:
            raise requests.HTTPError("403 Forbidden", response=answer)

        with pytest.raises(StoreError, match="403") as caught:
            remote.call("upload", refused)
        assert not isinstance(caught.value, StoreAwayError)

    def test_a_full_disk_is_the_users_to_fix_whoever_says_it(self) -> None:
        import shutil as files

        def copied() -> None:
            raise files.Error([("a", "b", "[Errno 28] No space left on device: 'b'")])

        locked = self.failing(1, "(sqlite3.OperationalError) database or disk is full", "TEMPORARILY_UNAVAILABLE")
        for function in (copied, locked):
            with pytest.raises(StoreFullError, match=r"the disk is full.*make room"):
                self.connection.call("upload", function)
        assert StoreFullError.exit_code == 2
