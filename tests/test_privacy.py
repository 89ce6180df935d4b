"""Addresses, passwords and paths stay where they are; what travels says nothing of them."""

from __future__ import annotations

import json
import shutil
import sqlite3
import zipfile
from pathlib import Path
from typing import Any

import pytest

from amlora_dist.config.loading import load_config
from amlora_dist.errors import UserError
from amlora_dist.inference.model import AMLoRAModel
from amlora_dist.privacy import public_configuration, public_name, secrets_of, shown
from amlora_dist.registry.connection import connect
from amlora_dist.registry.store import Store
from pipelines.cluster.jobs import ClusterJob
from pipelines.cluster.resources import Supply
from pipelines.cluster.submit import PRIVATE, submit_run
from pipelines.runs.progress import Silent
from pipelines.runs.results import load_result
from pipelines.runs.sequence import run_sequence
from tests.tiny_config import write_config

SECRET = "hunter2secret"


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        (f"http://me:{SECRET}@host:5000 does not answer", "http://host:5000 does not answer"),
        (f"at http://me:{SECRET}/@@host/path", "at http://host/path"),
        (f"postgresql+psycopg://host/db?user=me&password={SECRET} fails", "postgresql+psycopg://host/db fails"),
        (f"sqlite:////a home/mlflow.db?password={SECRET}", "sqlite:////a home/mlflow.db"),
        (f"https://{SECRET}@host", "https://host"),
        ("models:/name@current and sqlite:////a@b/c.db", "models:/name@current and sqlite:////a@b/c.db"),
    ],
)
def test_addresses_are_shown_without_user_password_and_query(text: str, seen: str) -> None:
    assert shown(text) == seen


def test_a_password_is_taken_out_wherever_it_is() -> None:
    secrets = secrets_of(f"mysql+pymysql://me:{SECRET}%40@host/db")
    assert secrets == [f"{SECRET}%40", f"{SECRET}@"]
    assert shown(f"Access denied (using password {SECRET}@)", *secrets) == "Access denied (using password ***)"


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("/data/models/llama/", "llama"), ("~/llama", "llama"), ("../llama", "llama"), ("C:\\models\\llama", "llama"),
        ("models/llama", "models/llama"), ("owner/llama", "owner/llama"), ("package:tiny", "package:tiny"),
        (f"s3://me:{SECRET}@bucket/llama?x=1", "s3://bucket/llama"),
    ],
)  # fmt: skip
def test_an_absolute_path_is_named_by_its_last_part(source: str, name: str) -> None:
    assert public_name(source) == name
    assert public_name(name) == name


def test_texts_of_prompts_are_no_paths() -> None:
    task = {"task": "/home/me/tickets.yaml", "prompt": {"template": "/no_think {{ text }}"}, "labels": ["/a", "~b"]}
    found = public_configuration({"tasks": [task], "storage": "/mnt", "data_dir": "/data", "mlflow": {}})
    assert found == {"tasks": [task | {"task": "tickets.yaml"}]}


@pytest.mark.integration
@pytest.mark.parametrize(
    ("uri", "package"),
    [
        (f"mysql://me:{SECRET}@host/db", "mysqlclient"),
        (f"mssql+pyodbc://me:{SECRET}@host/db", "pyodbc"),
        (f"postgresql+asyncpg://me:{SECRET}@host/db", "asyncpg"),
    ],
)
def test_store_driver(uri: str, package: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"is not installed; run: pip install {package}$") as caught:
        connect(tmp_path, uri)
    assert SECRET not in str(caught.value)


@pytest.mark.integration
@pytest.mark.parametrize(
    "uri", [f"http://me:{SECRET}@127.0.0.1:9", f"http://127.0.0.1:9?password={SECRET}", f"foo://me:{SECRET}@host"]
)
def test_a_store_that_cannot_be_had_is_named_without_its_password(uri: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"mlflow\.tracking_uri: found (http|foo)://") as caught:
        connect(tmp_path, uri)
    assert SECRET not in str(caught.value)


@pytest.mark.integration
def test_uri_password(tmp_path: Path, amlora_home: Path, empty_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Works as in MLflow, and is neither printed nor written: not in the bank, the store's artifacts or its tables."""
    shutil.copytree(empty_home, amlora_home)
    (amlora_home / "storage").mkdir()
    config = write_config(tmp_path, tasks=("colours",))
    uri = f"sqlite:///{amlora_home / 'mlflow.db'}?password={SECRET}"
    overrides = [
        f"mlflow.tracking_uri={uri}", f"storage={tmp_path / 'shared'}", f"data_dir={tmp_path / 'tasks'}",
        "training.epochs=1", "evaluation.untrained=false", "evaluation.oracle=false",
    ]  # fmt: skip
    result = run_sequence(load_config(config, overrides), run_id="quiet", progress=Silent())
    assert result["tracking_uri"] == f"sqlite:///{amlora_home / 'mlflow.db'}" == load_result("quiet")["tracking_uri"]
    store = Store.open(amlora_home)
    bank = store.pull("models:/quiet@current", tmp_path / "bank")
    manifest = json.loads((bank / "manifest.json").read_text(encoding="utf-8"))
    assert not {"mlflow", "storage", "data_dir"} & manifest["training_configuration"].keys()
    assert manifest["base"]["source"] == "model-llama" and manifest["training_configuration"]["tasks"] == ["colours.yaml"]
    written = [path for root in (bank, amlora_home / "artifacts") for path in root.rglob("*") if path.is_file()]
    assert len(written) > 15
    for path in written:
        for private in (SECRET, str(tmp_path), "sqlite:"):
            assert private.encode() not in path.read_bytes(), f"{path} holds {private}"
    with sqlite3.connect(amlora_home / "mlflow.db") as connection:
        params = [value for (value,) in connection.execute("SELECT value FROM params")]
    assert params and not [value for value in params if SECRET in value or str(tmp_path) in value]
    seen = capsys.readouterr()
    assert SECRET not in seen.out + seen.err
    model = AMLoRAModel.from_bank(bank, device="cpu")
    assert model.tasks == ["colours"], "its base model is found where this home knows it to lie"


class Cluster:
    """The part of ``pipelines.cluster.jobs.Jobs`` that a submission uses."""

    entrypoint, metadata, overrides = "", "", ""

    def of_run(self, run_id: str) -> list[ClusterJob]:
        return []

    def supply(self) -> Supply:
        return Supply()

    def get(self, job_id: str) -> ClusterJob:
        return ClusterJob(job_id, "RUNNING", "r", 1, None, None, None, "")

    def submit(self, job_id: str, entrypoint: str, runtime_env: dict[str, Any], metadata: dict[str, str]) -> bool:
        self.entrypoint, self.metadata = entrypoint, json.dumps(metadata)
        with zipfile.ZipFile(runtime_env["working_dir"]) as archive:
            self.overrides = archive.read(PRIVATE).decode() if PRIVATE in archive.namelist() else ""
        return True


@pytest.mark.integration  # writes a model
def test_a_jobs_command_line_and_metadata_hold_no_address_and_no_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path, tasks=("colours",))
    source = f"model.source={tmp_path / 'model-llama'}"
    given = [f"mlflow.tracking_uri=http://me:{SECRET}@host", "storage=/mnt/shared", source]
    cluster: Any = Cluster()
    submit_run(
        cluster, config, [*given, "training.epochs=1"], "r", working_dir=tmp_path, environment={}, runtime_env={}
    )
    assert cluster.entrypoint == f"exec python -m pipelines.cli run run.yaml @{PRIVATE} training.epochs=1 --run-id r"
    again: Any = Cluster()
    submit_run(
        again, config, [], "r", working_dir=tmp_path, environment={"AMLORA_HOME": "home"}, runtime_env={},
        allow_changed_data=True,
    )  # fmt: skip
    assert again.entrypoint.endswith(" --run-id r --allow-changed-data")
    for private in (SECRET, "host", "/mnt/shared", str(tmp_path)):
        assert private not in cluster.entrypoint + cluster.metadata
    assert cluster.overrides.splitlines() == given
    monkeypatch.chdir(tmp_path)
    (tmp_path / PRIVATE).write_text(cluster.overrides, encoding="utf-8")
    read = load_config(config, [f"@{PRIVATE}", "training.epochs=1"])
    assert read.storage == "/mnt/shared" and read.mlflow.tracking_uri == f"http://me:{SECRET}@host"
    with pytest.raises(UserError, match="expected @FILE with an override a line"):
        load_config(config, ["@nothing"])


@pytest.mark.parametrize(
    "password", ["pa'ss", 'pa"ss', "pa<s>s", "pa@ss", "pa/ss", "pa?ss", "pa#ss", "pä;s|s", "pa(s)s", "pa\\ss"]
)
@pytest.mark.parametrize("address", ["postgresql://me:{}@db:5432/x", "https://{}@host/x", "mysql+pymysql://me:{}@h/d?ssl=1"])
def test_a_password_of_any_signs_is_not_seen(address: str, password: str) -> None:
    address = address.format(password)
    message = f"mlflow.tracking_uri: cannot reach '{address}' (refused); see https://mlflow.org"
    for text in (shown(address), shown(message), shown(message, *secrets_of(address)), public_name(address)):
        assert password not in text and "pa" not in text.replace("package", ""), text
    assert shown(message).endswith("' (refused); see https://mlflow.org")


def test_a_fragment_is_not_seen() -> None:
    assert shown("at https://host/x#access_token=abc, twice") == "at https://host/x, twice"
    assert "abcd" not in shown("token abcd", *secrets_of("https://host/x#access_token=abcd"))


@pytest.mark.parametrize(
    "place",
    ["file:///home/me/model", "file:/home/me/model", "FILE://localhost/home/me/model", " /home/me/model", "dbfs:/me/model"],
)
def test_an_address_of_this_machines_files_is_a_path(place: str) -> None:
    assert public_name(place) == "model"
