"""The report of a real run of tiny tasks, and of the same run with planted faults; no Ray."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from amlora_dist.adapters import router as router_module
from amlora_dist.adapters.keyed_router import KeyedRouter, keyed_router
from amlora_dist.adapters.statistics import TaskStatistics
from amlora_dist.config.loading import load_config
from amlora_dist.errors import UserError
from amlora_dist.registry.store import Store
from amlora_dist.reporting.facts import RunFacts, read_run
from amlora_dist.reporting.report import report
from amlora_dist.reporting.routing_facts import routing_by_stage
from amlora_dist.reporting.run_report import run_metrics
from pipelines.runs.progress import Silent
from pipelines.runs.sequence import run_sequence
from tests.reporting.browser import chromium, visit
from tests.tiny_config import write_config

pytestmark = pytest.mark.integration

Run = Callable[..., RunFacts]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reports")


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    """Runs of one configuration in one store, so that equal stages are trained once."""
    config = write_config(folder)

    def run(run_id: str, *overrides: str) -> RunFacts:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AMLORA_HOME", str(folder / "home"))
            run_sequence(load_config(config, list(overrides)), run_id=run_id, progress=Silent())
        return read_run(Store.open(folder / "home"), run_id)

    return run


@pytest.fixture(scope="module")
def facts(run: Run) -> RunFacts:
    return run("three")


@pytest.fixture(scope="module")
def two_tasks(folder: Path, facts: RunFacts) -> str:
    """The override that leaves the first two tasks."""
    return f"tasks={json.dumps(load_config(folder / 'run.yaml').tasks[:2])}"


@pytest.fixture(scope="module")
def html(folder: Path, facts: RunFacts) -> Path:
    file = folder / "report.html"
    report(Store.open(folder / "home"), "three", file)
    return file


def test_metrics_from_predictions_are_those_of_the_result(facts: RunFacts) -> None:
    found = run_metrics(facts)
    for name, (value, interval) in found.items():
        if name in facts.result["metrics"]:
            assert value == facts.result["metrics"][name]
        assert interval is not None and interval.value == pytest.approx(value)
        assert interval.low <= interval.value <= interval.high
    assert found["below_oracle"][0] == pytest.approx(
        sum(facts.result["oracle"]) / 3 - facts.result["metrics"]["average_performance"]
    )


def test_routing_is_known_for_every_stage_and_drift_from_the_second_on(facts: RunFacts) -> None:
    routing = routing_by_stage(facts)
    assert [one.stage for one in routing] == [1, 2, 3]
    assert [one.drift is None for one in routing] == [True, False, False]
    assert routing[-1].statistics.adapters == ["colours", "shapes", "sizes"]


def test_stages_record_their_recipe_and_their_boundaries(facts: RunFacts) -> None:
    assert facts.stages[0].training["recipe"] is None and facts.stages[0].training["mixed"] == {}
    assert set(facts.stages[2].training["recipe"]["weights"]) == {"colours", "shapes"}


def test_the_report_holds_every_figure_and_its_data(html: Path) -> None:
    text = html.read_text(encoding="utf-8")
    names = re.findall(r'download="([^"]+)"', text)
    assert {"accuracy-matrix.csv", "learning-curves.csv", "attention.csv", "loss.csv", "time.csv", "metrics.csv",
            "predictions-after-1.csv", "predictions-after-3.csv", "result.json"} <= set(names)  # fmt: skip
    assert len(names) == len(set(names))
    last = re.search(r'download="predictions-after-3.csv" href="data:[^,]+,([^"]+)"', text)
    assert last is not None
    lines = base64.b64decode(last[1]).decode().splitlines()
    assert len(lines) == 1 + 3 * 9 + 3 * 9 + 3 * 9, "router, oracle and untrained, nine test rows of three tasks"
    assert len(text) < 3_000_000


def test_page_and_pictures_are_in_mlflow(folder: Path, html: Path, facts: RunFacts) -> None:
    store = Store.open(folder / "home")
    for name in ("report.html", "accuracy-matrix.png", "attention.png", "loss.png"):
        assert store.has_artifact(facts.run, f"report/{name}"), name


def test_a_method_without_router_and_one_about_all_tasks_have_reports_too(
    folder: Path, run: Run, two_tasks: str
) -> None:
    for method in ("seq_lora", "joint"):
        run(method, f"method={method}", two_tasks)
        file = folder / f"{method}.html"
        page = report(Store.open(folder / "home"), method, file)
        assert file.stat().st_size > 10_000
        assert "attention" not in {chart.name for chart in page.charts}


@pytest.mark.slow
def test_planted_routing_faults_are_found_in_real_runs(folder: Path, run: Run, two_tasks: str) -> None:
    store = Store.open(folder / "home")
    planted = {
        "router.kind=permuted": "statistics_exchanged",
        "router.kind=uniform": "router_blind",
        "router.gate.form=absolute router.gate.threshold=0.9 router.gate.temperature=30": "over_regularised_gate",
        "training.l1=1000": "over_regularised_recipe",
        "boundary_mix=0.3": "mixed_boundary",
    }
    for number, (overrides, rule) in enumerate(planted.items()):
        run(f"planted-{number}", two_tasks, *overrides.split())
        page = report(store, f"planted-{number}", folder / "planted.html")
        assert rule in {f.rule for f in page.findings or [] if f.level == "alarm"}, (overrides, page.findings)
    healthy = report(store, "three", folder / "healthy.html").findings or []
    assert not {finding.rule for finding in healthy if finding.level == "alarm"} & set(planted.values())


def test_a_router_collapsed_on_purpose_is_found_in_a_real_run(
    folder: Path, run: Run, two_tasks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def collapsed(statistics: Sequence[TaskStatistics], **more: Any) -> KeyedRouter:
        made = keyed_router(statistics, **more)
        made.keys.bias[torch.tensor(made.keys.task) == 0] += 1e6
        return made

    monkeypatch.setattr(router_module, "keyed_router", collapsed)
    run("collapsed", two_tasks, "router.gate.threshold=0.11")  # scores of a gate that no other run has
    findings = report(Store.open(folder / "home"), "collapsed", folder / "collapsed.html").findings or []
    assert [f.title for f in findings if f.rule == "router_collapsed"] == ["The router has collapsed on colours"]


def test_knock_out_shows_what_each_task_owes_to_each_adapter(folder: Path, run: Run, two_tasks: str) -> None:
    alone = "answer.evidence=model"  # keys know a task without its adapter
    found = run("knockout", two_tasks, alone, "evaluation.knockout=true")
    lost = [[before - now for before, now in zip(found.matrix[-1], line, strict=True)] for line in found.result["knockout"]]
    assert len(lost) == 2 and lost[0][0] > 0.2, "without its own adapter a task is lost"
    assert found.matrix == run("two-alone", two_tasks, alone).matrix, "the other scores are what they are without it"
    file = folder / "knockout.html"
    page = report(Store.open(folder / "home"), "knockout", file)
    assert "knockout" in {chart.name for chart in page.charts}
    assert 'download="knockout-accuracy.csv"' in file.read_text(encoding="utf-8")


def test_the_command_writes_the_report_and_says_where(folder: Path, facts: RunFacts) -> None:
    command = [sys.executable, "-m", "pipelines.cli", "report", "three", "--output", str(folder / "command.html")]
    environment = os.environ | {"AMLORA_HOME": str(folder / "home")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(folder / "command.html") and (folder / "command.html").is_file()


def test_unknown_names_are_refused_with_those_there_are(folder: Path, facts: RunFacts) -> None:
    with pytest.raises(UserError, match=r"no run, search or comparison 'threee' at .*; there are: .*three"):
        report(Store.open(folder / "home"), "threee", folder / "never.html")


def test_a_run_without_a_finished_stage_has_no_report(folder: Path, facts: RunFacts) -> None:
    store = Store.open(folder / "home")
    store.parent_run("unfinished", "unfinished", {})
    with pytest.raises(UserError, match="has not finished a stage yet"):
        report(store, "unfinished", folder / "unfinished.html")


@pytest.mark.skipif(chromium() is None, reason="no Chromium on this machine")
def test_a_browser_shows_it_without_error_request_or_sideways_scrolling(folder: Path, html: Path) -> None:
    """On a desk, in a frame as wide as a phone, and printed."""
    control = folder / "control.html"
    asking = '<!doctype html><img src="http://127.0.0.1:9/x.png"><script>console.log(1)</script>'
    control.write_text(asking, encoding="utf-8")
    caught = visit(control, folder)
    assert len(caught.console) == 1 and caught.requests == ["http://127.0.0.1:9/x.png"], "the test would see both"
    seen = visit(html, folder)
    assert seen.console == [] and seen.requests == []
    host = folder / "phone.html"
    host.write_text(
        f"""<!doctype html><iframe id=f style="width:390px;height:800px;border:0" src="{html.as_uri()}"></iframe><script>
        f.onload = () => {{ const r = f.contentDocument.documentElement;
        document.title = JSON.stringify([r.scrollWidth, r.clientWidth]) }}</script>""",
        encoding="utf-8",
    )
    phone = visit(host, folder)
    sizes = re.search(r"<title>(\[.*?\])</title>", phone.dom)
    assert sizes is not None and json.loads(sizes[1])[0] <= 390
    printed = folder / "report.pdf"
    visit(html, folder, picture=printed)
    assert printed.read_bytes().startswith(b"%PDF")
