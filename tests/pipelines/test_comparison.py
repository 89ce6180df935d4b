"""Comparisons: one durable grid, learning rates tuned on dev, every run shared by what it has in common. No Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from amlora_dist.errors import UserError
from amlora_dist.registry.store import Store
from amlora_dist.reporting.report import report
from amlora_dist.training.failures import StoppedError
from pipelines.runs import comparison as comparison_module
from pipelines.runs.comparison import ComparisonPlan, plan_comparison, run_comparison
from pipelines.runs.progress import Silent
from tests.tiny_config import write_config

METHODS = ["am_lora", "uniform", "per_task"]
SMALL = {
    "evaluation": {"batch_size": 9},
    "training": {"epochs": 1, "batch_size": 6, "learning_rate": 0.03, "warmup_steps": 1, "probe_rows": 4},
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path, tasks=("colours", "shapes"), **SMALL)


def plan(config: Path, **more: Any) -> ComparisonPlan:
    options = {
        "methods": ["am_lora", "seq_lora"], "seeds": [0], "orders": [], "learning_rates": [], "comparison_id": "c",
    }  # fmt: skip
    return plan_comparison(config, more.pop("overrides", []), **(options | more))


# -- plans, without a model -----------------------------------------------------------------------------------------


def test_orders_are_places_configurations_or_the_given_one(config: Path) -> None:
    other = config.parent / "other.yaml"
    document = yaml.safe_load(config.read_text())
    other.write_text(yaml.safe_dump(document | {"tasks": document["tasks"][::-1]}))
    found = plan(config, orders=["given", "2-1", "other"])
    assert found.names == {"given": ["colours", "shapes"], "2-1": ["shapes", "colours"], "other": ["shapes", "colours"]}
    assert found.run_id(found.contenders[0], "2-1", 3) == "c.am_lora.2-1.s3"


def test_contenders_may_be_variants_and_carry_overrides(config: Path) -> None:
    found = plan(config, methods=["am_lora", "uniform", "am_lora:training.l1=1:adapters.rank=2"]).contenders
    assert [one.name for one in found] == ["am_lora", "uniform", "am_lora-l1-1-rank-2"]
    assert found[1].overrides == ("router.kind=uniform",)
    settings = plan(config).config(found[2], "given", 5, 0.5)
    assert (settings.training.l1, settings.adapters.rank, settings.seed, settings.training.learning_rate) == (1, 2, 5, 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["am_lor"]}, r"--methods: found 'am_lor' \(did you mean 'am_lora'"),
        ({"methods": []}, "--methods: found nothing"),
        ({"methods": ["ewc:weight"]}, "has no ="),
        ({"methods": ["ewc:method_settings.ewc_weigth=3"]}, "ewc_weigth"),
        ({"methods": ["ewc", "ewc"]}, "--methods: ewc is given twice"),
        ({"methods": ["ewc:training.batch_size=6", "ewc:evaluation.batch_size=6"]}, "the same name in the table"),
        ({"seeds": [1, 1]}, "--seeds: 1 is given twice"),
        ({"orders": ["1-2-3"]}, "each of the places 1 to 2 once, such as 2-1"),
        ({"orders": ["no-such"]}, "found 'no-such', expected a configuration"),
        ({"learning_rates": [0.0]}, "--learning-rates: found 0"),
        ({"learning_rates": [0.1], "methods": ["ewc:training.learning_rate=1"]}, "sets it already"),
        ({"overrides": ["registered_model=one"]}, "registered_model cannot be shared"),
        ({"overrides": ["training.epochs=0"]}, "training.epochs"),
        ({"comparison_id": "c" * 95}, "at most 100 fit"),
        ({"comparison_id": "c" * 80, "learning_rates": [0.00125]}, "at most 100 fit"),
        ({"overrides": ["workers=2", "deepspeed.zero_stage=3"], "methods": ["ewc"]}, "3 with method: ewc, which reads"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_starts(
    config: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        plan(config, **options)


# -- real runs --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("comparison")


@pytest.fixture(scope="module")
def compared(folder: Path) -> Iterator[dict[str, Any]]:
    patch = pytest.MonkeyPatch()
    patch.setenv("AMLORA_HOME", str(folder / "home"))
    config = write_config(folder, tasks=("colours", "shapes"), **SMALL)
    made = plan(
        config, methods=METHODS, seeds=[0, 1], learning_rates=[0.003, 0.03]
    )
    yield run_comparison(made, command="amlora compare", progress=Silent())
    patch.undo()


@pytest.fixture
def again(folder: Path, compared: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AMLORA_HOME", str(folder / "home"))
    return folder / "run.yaml"


@pytest.mark.integration
@pytest.mark.slow
def test_every_method_has_its_row_over_both_seeds(compared: dict[str, Any]) -> None:
    assert list(compared["methods"]) == METHODS
    for line in compared["methods"].values():
        own = line["metrics"]["average_performance"]
        assert line["runs"] == 2 and own["runs"] == 2 and own["deviation"] is not None
        assert own["interval"][0] <= own["mean"] <= own["interval"][1]
    am_lora = compared["methods"]["am_lora"]["metrics"]
    assert am_lora["forward_transfer_single"] is not None and am_lora["routing_accuracy"] is not None
    assert set(compared["differences"]) == set(METHODS[1:])
    assert len(compared["runs"]) == 6 and compared["failed"] == []


@pytest.mark.integration
@pytest.mark.slow
def test_the_mean_of_a_method_is_that_of_its_runs(compared: dict[str, Any]) -> None:
    for method, line in compared["methods"].items():
        values = [run["metrics"]["average_performance"] for run in compared["runs"] if run["method"] == method]
        assert line["metrics"]["average_performance"]["mean"] == pytest.approx(sum(values) / 2)
    difference = compared["differences"]["per_task"]["mean"]
    means = {m: line["metrics"]["average_performance"]["mean"] for m, line in compared["methods"].items()}
    assert difference == pytest.approx(means["am_lora"] - means["per_task"])


@pytest.mark.integration
@pytest.mark.slow
def test_learning_rates_are_tuned_on_dev_with_one_budget_and_controls_take_their_methods(
    folder: Path, compared: dict[str, Any]
) -> None:
    tuning = compared["tuning"]
    assert all(set(tuning[m]["scores"]) == {"0.003", "0.03"} for m in ("am_lora", "per_task"))
    assert tuning["uniform"] == {"chosen": tuning["am_lora"]["chosen"], "scores": {}}
    for method in ("am_lora", "per_task"):
        scores = {float(rate): score for rate, score in tuning[method]["scores"].items()}
        assert scores[tuning[method]["chosen"]] == max(scores.values())
    store = Store.open(folder / "home")
    run = store.find_runs({"amlora.run_id": "c.per_task.tune-0.03", "amlora.kind": "sequence"})[0]
    assert store.load_json(run.run, "config.json")["evaluation"]["split"] == "dev"


@pytest.mark.integration
@pytest.mark.slow
def test_what_training_shares_is_trained_once(compared: dict[str, Any]) -> None:
    reused = {(run["method"], run["seed"]): run["reused_stages"] for run in compared["runs"]}
    assert reused["am_lora", 0] == 2, "the winning candidate of the tuning trained both stages"
    assert reused["uniform", 1] == 2, "the control scores the same adapters"


@pytest.mark.integration
@pytest.mark.slow
def test_the_same_command_again_runs_nothing_and_says_the_same(
    again: Path, compared: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison_module, "run_sequence", lambda *a, **k: pytest.fail("a finished run was started again"))
    made = plan(
        again, methods=METHODS, seeds=[0, 1], learning_rates=[0.003, 0.03]
    )
    assert run_comparison(made, command="amlora compare", progress=Silent()) == compared


@pytest.mark.integration
@pytest.mark.slow
def test_keys_alone_are_taken_up_again_though_their_evidence_is_not_what_the_file_says(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run_comparison(plan(config, methods=["keys"]), command="", progress=Silent())
    monkeypatch.setattr(comparison_module, "run_sequence", lambda *a, **k: pytest.fail("a finished run was started again"))
    again = run_comparison(plan(config, methods=["keys"]), command="", progress=Silent())
    assert again == found and list(found["methods"]) == ["keys"]


@pytest.mark.integration
@pytest.mark.slow
def test_methods_may_be_added_and_other_changes_are_refused(again: Path, compared: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="was started otherwise"):
        run_comparison(plan(again, learning_rates=[0.5]), command="", progress=Silent())
    rates = [0.003, 0.03]
    with pytest.raises(UserError, match=r"adapters.rank: 4 then, 2 now"):
        run_comparison(plan(again, learning_rates=rates, overrides=["adapters.rank=2"]), command="", progress=Silent())


@pytest.mark.integration
@pytest.mark.slow
def test_a_comparison_has_a_report(again: Path, folder: Path) -> None:
    page = report(Store.open(folder / "home"), "c", folder / "comparison.html")
    names = [chart.name for chart in page.charts]
    assert names == ["average-performance", "differences", "by-stage", "tasks", "learning-rates"]
    text = (folder / "comparison.html").read_text(encoding="utf-8")
    assert "2 candidates, one run each on the dev split" in text and len(text) < 3_000_000


@pytest.mark.integration
@pytest.mark.slow
def test_a_run_that_fails_for_good_leaves_the_others_going(
    tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = comparison_module.run_sequence

    def fails_once(settings: Any, *, run_id: str, **more: Any) -> Any:
        if ".seq_lora." in run_id:
            raise comparison_module.TrainingError("the loss is not finite")
        return real(settings, run_id=run_id, **more)

    monkeypatch.setattr(comparison_module, "run_sequence", fails_once)
    result = run_comparison(plan(config, methods=["base", "seq_lora"]), command="", progress=Silent())
    assert list(result["methods"]) == ["base"]
    assert result["tuning"]["base"]["chosen"] is None
    assert result["failed"] == [
        {"run_id": "c.seq_lora.given.s0", "method": "seq_lora", "reason": "the loss is not finite"}
    ]
    monkeypatch.setattr(comparison_module, "run_sequence", real)
    fixed = run_comparison(plan(config, methods=["base", "seq_lora"]), command="", progress=Silent())
    assert list(fixed["methods"]) == ["base", "seq_lora"] and fixed["failed"] == []


@pytest.mark.integration
@pytest.mark.slow
def test_without_its_outputs_the_same_comparison_gives_exactly_the_same_numbers(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def numbers(home: str) -> dict[str, Any]:
        monkeypatch.setenv("AMLORA_HOME", str(tmp_path / home))
        made = plan(config, methods=["am_lora", "replay"], learning_rates=[0.003, 0.03])
        found = run_comparison(made, command="amlora compare", progress=Silent())
        for line in found["methods"].values():
            assert line.pop("train_seconds") > 0  # of the machine, not of the training
        return found

    assert numbers("first") == numbers("second")


@pytest.mark.integration
@pytest.mark.slow
def test_data_changed_under_a_comparison_is_refused_or_all_of_it_runs_again(tmp_path: Path, amlora_home: Path) -> None:
    config = write_config(tmp_path, tasks=("colours",), **SMALL)

    def compared(**more: Any) -> dict[str, Any]:
        made = plan(config, methods=["seq_lora", "base"], learning_rates=[0.03])
        return run_comparison(made, command="", progress=Silent(), **more)

    before = compared()
    rows = tmp_path / "tasks" / "colours" / "train.jsonl"
    rows.write_text("".join(rows.read_text(encoding="utf-8").splitlines(keepends=True)[1:]), encoding="utf-8")
    with pytest.raises(UserError, match=r"comparison 'c' was begun with other data: task 'colours', split train: 32 rows"):
        compared()
    after = compared(allow_changed_data=True)
    assert "again" not in after and len(after["runs"]) == 2
    run = Store.open(amlora_home).find_runs({"amlora.run_id": "c.seq_lora.given.s0", "amlora.kind": "sequence"})[-1]
    facts = Store.open(amlora_home).load_json(run.run, "materials.json")
    assert facts is not None and facts["tasks"]["colours"]["rows"]["train"] == 31
    assert before["tuning"].keys() == after["tuning"].keys()
    assert compared() == after, "the data of now are those of the comparison"


def test_a_comparison_that_an_older_version_began_goes_on(config: Path) -> None:
    made = plan(config)
    old = made.to_json() | {"tuning": {"am_lora": {"chosen": None, "scores": {}}}}
    old = json.loads(json.dumps(old))
    del old["config"]["evaluation"]["knockout"], old["config"]["method_settings"]
    old["config"]["workers"] = 2  # changes no number
    assert comparison_module._resumed(made, old)["tuning"] == old["tuning"]
    old["config"]["training"]["epochs"] = 7
    with pytest.raises(UserError, match=r"training\.epochs: 7 then, 1 now"):
        comparison_module._resumed(made, old)


def test_stopped_in_its_first_run_a_comparison_keeps_the_defaults_it_began_with(
    config: Path, monkeypatch: pytest.MonkeyPatch, amlora_home: Path
) -> None:
    begun: list[Any] = []

    def stops(settings: Any, **more: Any) -> Any:
        begun.append(settings)
        raise StoppedError("stopped")

    monkeypatch.setattr(comparison_module, "run_sequence", stops)
    with pytest.raises(StoppedError):
        run_comparison(plan(config, methods=["am_lora"]), command="", progress=Silent())
    store = Store.open(amlora_home)
    journal = store.grouping_run(comparison_module.KIND, "c")
    kept = store.load_json(journal, comparison_module.FILE)
    assert kept is not None and kept["config"]["router"]["label_keys"] == "stage", "today's default"
    del kept["config"]["router"]["label_keys"]  # as a version wrote it that did not know the key
    store.log_json(journal, comparison_module.FILE, kept)
    with pytest.raises(StoppedError):
        run_comparison(plan(config, methods=["am_lora"]), command="", progress=Silent())
    assert [one.router.label_keys for one in begun] == ["stage", "bank"]


@pytest.mark.crash
def test_killed_in_the_middle_the_same_command_goes_on_to_the_same_table(tmp_path: Path, config: Path) -> None:
    def command(home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        arguments = [sys.executable, "-m", "pipelines.cli", "compare", str(config), "--methods", "seq_lora,base", "--json"]
        environment |= {"AMLORA_HOME": str(home)}
        return subprocess.run(arguments, env=os.environ | environment, capture_output=True, text=True, timeout=240)

    crash = {"AMLORA_CRASH": "step_done:kill:6", "AMLORA_CRASH_ONCE": str(tmp_path / "once")}
    died = command(tmp_path / "home", **crash)
    assert died.returncode == -9, died.stderr
    resumed = command(tmp_path / "home")
    assert resumed.returncode == 0, resumed.stderr
    calm = json.loads(command(tmp_path / "elsewhere").stdout)
    result = json.loads(resumed.stdout)
    assert result["comparison_id"] == "tiny-compared"
    for key in ("tasks", "by_order", "differences"):
        assert result[key] == calm[key]
