"""MLflow's own loaders on a published bank."""

from __future__ import annotations

import inspect
import json
import sys
import types
from pathlib import Path
from typing import Any

import pandas
import pytest

from amlora_dist.errors import BankError, UserError
from amlora_dist.registry import tags
from amlora_dist.registry.bank_folder import read_bank
from amlora_dist.registry.pyfunc import BankModel, complete
from amlora_dist.registry.store import Store
from tests.registry.tiny_banks import TASKS, publish_sequence, tiny_bank


class EchoModel:
    """Stands for AMLoRAModel: says how many adapters it was given."""

    def __init__(self, adapters: int) -> None:
        self.adapters = adapters

    @classmethod
    def from_bank(cls, folder: Path, **options: Any) -> EchoModel:
        return cls(len(read_bank(Path(folder)).adapters))

    def predict(self, texts: list[str], question: list[str] | None = None, **options: Any) -> list[str]:
        return [f"{text}|{asked}|{self.adapters}" for text, asked in zip(texts, question or texts, strict=True)]


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType("amlora_dist.model")
    module.AMLoRAModel = EchoModel
    monkeypatch.setitem(sys.modules, "amlora_dist.model", module)


def test_prediction_takes_a_column_of_texts_and_maybe_one_of_questions() -> None:
    model = BankModel(EchoModel(2))  # type: ignore[arg-type]
    assert model.predict(pandas.DataFrame({"text": ["a", "b"], "other": [1, 2]})) == ["a|a|2", "b|b|2"]
    assert model.predict(pandas.DataFrame({"text": ["a"], "question": ["q"]})) == ["a|q|2"]
    with pytest.raises(UserError, match=r"found columns \['body'\], expected .* 'text'"):
        model.predict(pandas.DataFrame({"body": ["a"]}))
    with pytest.raises(UserError, match="found columns list"):
        model.predict(["a"])


def test_what_is_passed_on_is_what_the_model_takes() -> None:
    from amlora_dist.model import AMLoRAModel

    assert "from_bank" in vars(AMLoRAModel)
    assert "question" in inspect.signature(AMLoRAModel.answer).parameters  # predict hands its options to it


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

    last = publish_sequence(store, name, tmp_path)[-1]
    store.set_alias(name, tags.CHAMPION, last)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(store.connection.uri)
    try:
        loaded = mlflow.pyfunc.load_model(f"models:/{name}@champion")
        assert list(loaded.predict(pandas.DataFrame({"text": ["hello"]}))) == ["hello|hello|3"]
        # stock tools give the version alone, as its card says
        folder = Path(mlflow.artifacts.download_artifacts(f"models:/{name}@champion", dst_path=str(tmp_path / "stock")))
        with pytest.raises(BankError, match="amlora pull"):
            read_bank(folder)
        assert "without its referred" in (folder / "README.md").read_text()
        assert read_bank(complete(folder, tmp_path / "whole")).manifest.tasks == list(TASKS)
    finally:
        mlflow.set_tracking_uri(before)
    assert json.loads((folder / "manifest.json").read_text())["run_id"] == name
