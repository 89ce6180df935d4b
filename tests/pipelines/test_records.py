"""What a run leaves in MLflow for people: logged models, data, descriptions, curves over the stages; each once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from amlora_dist.config.loading import load_config
from amlora_dist.registry import tags
from amlora_dist.registry.connection import StoreError
from amlora_dist.registry.records import DataInput, describe_run, log_data
from amlora_dist.registry.store import Store
from pipelines.runs.progress import Silent
from pipelines.runs.results import load_result
from pipelines.runs.sequence import run_sequence
from tests.tiny_config import write_config

pytestmark = pytest.mark.integration
TASKS = ("colours", "shapes")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, empty_home: Path) -> Any:
    """A run of two tasks, started twice, and its store."""
    folder = tmp_path_factory.mktemp("records")
    shutil.copytree(empty_home, folder / "home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AMLORA_HOME", str(folder / "home"))
        config = write_config(folder, tasks=TASKS)
        results = [run_sequence(load_config(config), run_id="seen", progress=Silent()) for _ in range(2)]
        yield Store.open(folder / "home"), results


@pytest.fixture(autouse=True)
def at_home(made: Any, amlora_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMLORA_HOME", str(Path(made[0].connection.artifacts).parent))


def runs(store: Store, kind: str) -> list[Any]:
    return store.find_runs({tags.RUN_ID: "seen", tags.KIND: kind})


def test_each_version_is_a_logged_model_with_its_parameters_and_scores(made: Any) -> None:
    store, (first, _) = made
    client = store.connection.client
    (above,) = runs(store, "sequence")
    experiment = client.get_run(above.run).info.experiment_id
    models = {model.tags[tags.VERSION]: model for model in client.search_logged_models([experiment])}
    assert sorted(models) == ["models:/seen/1", "models:/seen/2"], "one a version, and none again at the second start"
    model = models["models:/seen/2"]
    assert str(model.status) == "READY"
    assert model.params["tasks"] == "colours, shapes" and model.params["method"] == "am_lora"
    scores = {metric.key: (metric.value, metric.dataset_name) for metric in model.metrics}
    assert scores == {f"accuracy/{task}": (first["accuracy_matrix"][1][k], task) for k, task in enumerate(TASKS)}
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": "seen", "version": 2}]
    stage, sequence = client.get_run(model.source_run_id), client.get_run(above.run)
    assert [output.model_id for output in stage.outputs.model_outputs] == [model.model_id]
    linked = {(output.model_id, output.step) for output in sequence.outputs.model_outputs}
    assert linked == {(models[f"models:/seen/{number}"].model_id, number) for number in (1, 2)}, "its page leads to both"


def test_the_run_above_has_a_curve_for_each_task_and_the_loss_is_written_once(made: Any) -> None:
    store, (first, again) = made
    assert again["accuracy_matrix"] == first["accuracy_matrix"]
    (above,) = runs(store, "sequence")
    for k, task in enumerate(TASKS):
        found = [(step, value) for step, value, _ in store.metric_history(above.run, f"accuracy/{task}")]
        rows = enumerate(first["accuracy_matrix"], start=1)
        assert found == [(step, row[k]) for step, row in rows if row[k] is not None]
    for stage in runs(store, "stage"):
        assert [step for step, *_ in store.metric_history(stage.run, "loss")] == list(range(1, 17))
        assert len(store.metric_history(stage.run, "train_seconds")) == 1


def test_rows_whose_keys_prefer_another_task_s_label_are_a_metric_of_the_stage_and_in_the_result(made: Any) -> None:
    store, (first, _) = made
    counted = first["last"]["keys_elsewhere"]
    assert [isinstance(rows, int) for rows in counted] == [True, True], "a number of rows, not a share"
    for k, task in enumerate(TASKS):
        (found,) = store.metric_history(runs(store, "stage")[-1].run, f"keys_elsewhere/router/{task}")
        assert found[:2] == (2, counted[k])


def test_the_data_of_every_task_are_with_the_runs_that_read_them(made: Any) -> None:
    store, _ = made
    facts = store.load_json(runs(store, "sequence")[0].run, "materials.json")["tasks"]
    above = store.connection.client.get_run(runs(store, "sequence")[0].run).inputs.dataset_inputs
    assert sorted(one.dataset.name for one in above) == list(TASKS)
    stage = store.connection.client.get_run(runs(store, "stage")[0].run).inputs.dataset_inputs
    found = {(one.dataset.name, one.tags[0].value): one.dataset for one in stage}
    trained = found["colours", "training"]
    assert trained.digest == facts["colours"]["digests"]["train"][:32]
    assert json.loads(trained.profile)["num_rows"] == facts["colours"]["rows"]["train"]
    assert ("shapes", "evaluation") in found and json.loads(trained.source) == {"uri": "colours"}, "no absolute path"


def test_pages_of_versions_say_tasks_scores_and_how_to_load_them(made: Any) -> None:
    store, (first, _) = made
    client = store.connection.client
    text = client.get_model_version("seen", "2").description
    assert f"| colours | {first['accuracy_matrix'][1][0]:.3f} |" in text
    assert 'AMLoRAModel.from_bank("models:/seen/2")' in text
    assert "amlora serve models:/seen@champion" in client.get_registered_model("seen").description
    leases = store.lease_entries.entries(tags.LEASE_PREFIX)
    assert all(client.get_registered_model(name).description.startswith("Not a model") for name in leases) and leases


def test_the_run_s_page_answers_what_people_come_for(made: Any) -> None:
    store, (first, _) = made
    (above,) = runs(store, "sequence")
    lines = above.tags["mlflow.note.content"].splitlines()
    matrix, name = first["accuracy_matrix"], first["registered_model"]
    assert lines[0].endswith(": 2 of 2 tasks learned one after another.")
    assert f"[{name}](#/models/{name})" in lines[1] and f'from_bank("models:/{name}@champion")' in lines[1]
    assert lines[2].startswith(f"Average performance {first['metrics']['average_performance']:.3f}, backward transfer")
    learned = f"| colours | {matrix[0][0]:.3f} | {matrix[1][0]:.3f} | [1](#/models/{name}/versions/1) |"
    assert learned in lines and "*Datasets*: the rows trained on" in lines[-1]


def test_a_description_that_somebody_has_written_stays(made: Any) -> None:
    store, _ = made
    run = store.grouping_run("test", "described")
    describe_run(store, run, "one task")
    describe_run(store, run, "two tasks")
    assert store.run_tags(run)["mlflow.note.content"] == "two tasks", "ours goes on"
    store.set_tags(run, {"mlflow.note.content": "the one for the audit"})
    describe_run(store, run, "three tasks")
    assert store.run_tags(run)["mlflow.note.content"] == "the one for the audit"


def test_the_printed_line_leads_to_the_run(made: Any) -> None:
    store, (first, _) = made
    (above,) = runs(store, "sequence")
    experiment = store.connection.client.get_run(above.run).info.experiment_id
    page = f"http://127.0.0.1:5000/#/experiments/{experiment}/runs/{above.run}?workflowType=machine_learning"
    assert first["mlflow_page"] == page == load_result("seen")["mlflow_page"]


def test_a_store_without_these_parts_of_mlflow_is_warned_about_and_no_more(
    made: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store, _ = made

    def missing(*_given: Any, **_more: Any) -> None:
        raise StoreError("MLflow: note the data of a run: no such endpoint")

    monkeypatch.setattr(type(store.connection), "call", missing)
    log_data(store, "run", [DataInput("colours", "0" * 64, 1, "training", {"uri": "colours"})])
    assert "could not note the data of a run" in caplog.text and "goes on without" in caplog.text
