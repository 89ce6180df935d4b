"""MLflow's own loaders on a published bank."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import types
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pandas
import pytest

from amlora_dist.errors import BankError, UserError
from amlora_dist.registry import tags
from amlora_dist.registry.bank_folder import read_bank
from amlora_dist.registry.pyfunc import BankModel, complete
from amlora_dist.registry.store import Store
from tests.ports import free_port
from tests.registry.tiny_banks import TASKS, publish_sequence, tiny_bank


class EchoModel:
    """Replaces AMLoRAModel: says how many adapters it was given, and the options of each text."""

    def __init__(self, adapters: int, base: str) -> None:
        self.adapters, self.base = adapters, base
        self.prompter = types.SimpleNamespace(learned={})

    @classmethod
    def from_bank(cls, folder: Path, base: str = "", dtype: str = "") -> EchoModel:
        assert dtype == "auto", "the default of the MLmodel"
        return cls(len(read_bank(Path(folder)).adapters), base)

    def predict(self, texts: list[str], *, max_new_tokens: int = 0, **options: list[str | None]) -> list[str]:
        predicted = [f"{text}|{self.adapters}{self.base}" + f"|{max_new_tokens}" * bool(max_new_tokens) for text in texts]
        for values in options.values():
            predicted = [f"{text}|{value}" for text, value in zip(predicted, values, strict=True)]
        return predicted


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType("amlora_dist.inference.model")
    module.AMLoRAModel = EchoModel
    monkeypatch.setitem(sys.modules, "amlora_dist.inference.model", module)


def test_prediction_takes_a_column_of_texts_and_maybe_questions_and_tasks() -> None:
    model = BankModel(EchoModel(2, ""))  # type: ignore[arg-type]
    assert model.predict(pandas.DataFrame({"text": ["a", "b"], "other": [1, 2]})) == ["a|2", "b|2"]
    frame = pandas.DataFrame({"text": ["a", "b"], "question": ["q", None], "task": [float("nan"), "agnews"]})
    assert model.predict(frame) == ["a|2|q|None", "b|2|None|agnews"]
    assert model.predict(frame[["text"]], {"max_new_tokens": 3}) == ["a|2|3", "b|2|3"]
    assert model.predict(frame[["text"]], {"max_new_tokens": 0}) == ["a|2", "b|2"]
    with pytest.raises(UserError, match=r"found columns \['body'\], expected .* 'text'"):
        model.predict(pandas.DataFrame({"body": ["a"]}))
    with pytest.raises(UserError, match="found columns list"):
        model.predict(["a"])
    with pytest.raises(UserError, match="row 1 of 2 has no text"):
        model.predict(pandas.DataFrame({"text": ["a", None]}))


@pytest.mark.parametrize(
    ("column", "value", "found"),
    [
        ("text", ["a"], "a list"),
        ("text", {"a": 1}, "a dictionary"),
        ("text", b"a", "bytes"),
        ("text", "a \ud83d", "half of a character"),
        ("text", float("inf"), "inf, which is not a finite number"),
        ("question", ["q"], "a list"),
    ],
)
def test_not_text_in_a_frame_names_row_and_column(column: str, value: Any, found: str) -> None:
    frame = pandas.DataFrame({"text": ["a", "b"], "question": ["q", "r"]}, dtype=object)
    frame.at[1, column] = value
    with pytest.raises(UserError, match=rf"predict: row 1 of 2, column '{column}': found {found}.*, expected a text"):
        BankModel(EchoModel(2, "")).predict(frame)  # type: ignore[arg-type]


def test_numbers_in_a_frame_are_texts_and_missing_values_are_none() -> None:
    model = BankModel(EchoModel(2, ""))  # type: ignore[arg-type]
    assert model.predict(pandas.DataFrame({"text": [1, 2]})) == ["1|2", "2|2"]
    for missing in (pandas.NA, pandas.NaT, float("nan"), None, " "):
        with pytest.raises(UserError, match="row 1 of 2 has no text"):
            model.predict(pandas.DataFrame({"text": ["a", missing]}, dtype=object))
    with pytest.raises(UserError, match="the column 'text' twice"):
        model.predict(pandas.DataFrame([["a", "b"]], columns=["text", "text"]))


def test_a_folder_of_a_version_alone_names_what_it_misses(tmp_path: Path) -> None:
    manifest = tiny_bank(tmp_path / "bank", ["a"])
    (tmp_path / "bank" / manifest.adapters[0].folder / "adapter_model.safetensors").unlink()
    with pytest.raises(BankError, match="does not say where it is stored"):
        complete(tmp_path / "bank", tmp_path / "whole")


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_mlflow_loads_a_version_with_the_adapters_it_refers_to(
    store: Store, name: str, tmp_path: Path, echo: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow
    from mlflow.exceptions import MlflowException

    last = publish_sequence(store, name, tmp_path)[-1]
    store.set_alias(name, tags.CHAMPION, last)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(store.connection.uri)
    try:
        loaded = mlflow.pyfunc.load_model(f"models:/{name}@champion")
        assert list(loaded.predict(pandas.DataFrame({"text": ["hello"]}))) == ["hello|3"]
        predicted = loaded.predict(pandas.DataFrame({"text": ["a"], "question": ["q"]}), params={"max_new_tokens": 5})
        assert list(predicted) == ["a|3|5|q"]
        with pytest.raises(MlflowException, match="missing inputs"):
            loaded.predict(pandas.DataFrame({"body": ["hello"]}))
        moved = mlflow.pyfunc.load_model(f"models:/{name}@champion", model_config={"base": "elsewhere"})
        assert list(moved.predict(loaded.input_example)) == [f"{loaded.input_example['text'][0]}|3elsewhere"]
        # stock tools give the version alone, as its card says
        folder = Path(mlflow.artifacts.download_artifacts(f"models:/{name}@champion", dst_path=str(tmp_path / "stock")))
        with pytest.raises(BankError, match="amlora pull"):
            read_bank(folder)
        assert "without its referred" in (folder / "README.md").read_text()
        assert read_bank(complete(folder, tmp_path / "whole")).manifest.tasks == list(TASKS)
    finally:
        mlflow.set_tracking_uri(before)
    assert json.loads((folder / "manifest.json").read_text())["run_id"] == name


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_mlflow_loads_a_folder_and_answers_as_the_model_does(tmp_path: Path) -> None:
    import mlflow

    from amlora_dist.inference.model import AMLoRAModel
    from tests.bank_with_base import TASKS as WORKING
    from tests.bank_with_base import texts_of, write_working_bank

    write_working_bank(tmp_path / "bank", tmp_path / "base")
    loaded = mlflow.pyfunc.load_model(str(tmp_path / "bank"))
    frame = pandas.DataFrame({"text": [texts_of(task, 1)[0] for task in WORKING]})
    model = AMLoRAModel.from_bank(tmp_path / "bank", device="cpu")
    assert list(loaded.predict(frame)) == model.predict(list(frame["text"]))
    named = list(loaded.predict(frame.assign(task="shapes")))
    assert named == model.predict(list(frame["text"]), task="shapes")


@pytest.mark.integration
def test_mlflow_models_serve_answers_as_the_model_does(
    embedded_home: Path, name: str, tmp_path: Path, repository: Path
) -> None:
    from amlora_dist.inference.model import AMLoRAModel
    from tests.bank_with_base import write_working_bank
    from tests.serving.load import publish

    write_working_bank(tmp_path / "bank", tmp_path / "base")
    store = Store.open(embedded_home)
    store.set_alias(name, tags.CHAMPION, publish(store, name, tmp_path / "bank"))
    uri = f"models:/{name}@champion"
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", uri, "--env-manager", "local"]
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(
            [*command, "--port", str(port)], stdout=log, stderr=log, start_new_session=True, cwd=tmp_path,
            env=os.environ | {
                "PYTHONPATH": str(repository), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "MLFLOW_TRACKING_URI": store.connection.uri,
            },
        )  # fmt: skip
    try:
        texts = ["the wall looks red", "a box is flat", "big house"]
        body = json.dumps({"dataframe_records": [{"text": text} for text in texts]}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations", body, {"Content-Type": "application/json"}
        )
        start = time.monotonic()
        answer = None
        while answer is None and time.monotonic() - start < 240 and server.poll() is None:
            try:
                with urllib.request.urlopen(request, timeout=60) as response:
                    answer = json.load(response)
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.5)
        assert answer is not None, (tmp_path / "log").read_text()[-3000:]
        assert answer["predictions"] == AMLoRAModel.from_bank(tmp_path / "bank", device="cpu").predict(texts)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=30)
