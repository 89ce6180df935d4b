"""A search as Ray Tune asks and tells it, without Ray: which trials are stopped, that neither speed nor kills change it,
what ends it, and how many trials have room."""

from __future__ import annotations

import importlib
import itertools
import json
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from amlora_dist.config.loading import load_config
from amlora_dist.errors import HeldError, TrainingError, UserError
from amlora_dist.registry.connection import StoreAwayError
from amlora_dist.registry.store import Store
from amlora_dist.training.worker_cache import WorkerCache
from pipelines.cluster import resources
from pipelines.cluster.resources import GIB, Demand, Supply
from pipelines.runs.progress import Silent
from pipelines.runs.sequence import run_sequence
from pipelines.search.driver import _Search
from pipelines.search.journal import Journal
from pipelines.search.outcome import search_result
from pipelines.search.plan import SearchPlan, plan_search
from pipelines.search.schedulers import OPEN, Halving
from pipelines.search.trial import Order, is_outage, run_trial
from tests.tiny_config import write_config

STAGES = 4


def test_all_wait_for_each_other_and_the_best_share_goes_on() -> None:
    made = Halving(STAGES, [3, 1, 2, 4, 5], grace=1, reduction=2)
    for number, value in ((1, 0.5), (2, 0.4), (3, 0.5), (4, 0.1)):
        made.record(number, 1, value)
    assert [made.verdict(n) for n in (1, 2, 3, 4, 5)] == [OPEN] * 5 and made.due() == [5]
    assert [made.waits(n) for n in (1, 5)] == [True, False]
    made.end(5)
    assert [made.verdict(n) for n in (1, 2, 3, 4, 5)] == [OPEN, 1, OPEN, 1, None] and made.due() == [3, 1]
    made.record(1, 2, None)
    made.record(3, 2, 0.0)
    assert made.due() == [3, 1] and made.rung == 3, "what is undefined lets pass, and of one known value the best is it"
    made.record(3, 3, 0.1)
    made.record(1, 3, 0.2)
    assert made.verdict(3) == 3 and made.due() == [1] and not made.waits(1)
    made.record(1, 4, 0.3)
    assert made.verdict(1) is None and made.due() == []


def test_halving_ends_when_nobody_is_left() -> None:
    made = Halving(STAGES, [1, 2], grace=2, reduction=2)
    made.end(1)
    made.end(2)
    assert made.due() == [] and [made.verdict(n) for n in (1, 2)] == [None, None]
    whole = Halving(2, [1], grace=5, reduction=2)
    assert whole.rung == 2 and not whole.waits(1)


class Memory:
    """What a journal asks of a store, kept in memory; ``broken`` is raised by the next write."""

    def __init__(self) -> None:
        self.runs: dict[str, dict[str, str]] = {}
        self.files: dict[str, dict[str, Any]] = {}
        self.broken: Exception | None = None

    def find_runs(self, wanted: Mapping[str, str]) -> list[Any]:
        found = [SimpleNamespace(run=run, tags=dict(tags)) for run, tags in self.runs.items()]
        return [run for run in found if all(run.tags.get(key) == value for key, value in wanted.items())]

    def trial_run(self, above: str, search_id: str, number: int, values: Mapping[str, Any]) -> str:
        wanted = {"amlora.kind": "trial", "amlora.search": search_id, "amlora.trial": str(number)}
        self.runs.setdefault(f"run-{number}", {}).update(wanted)
        return f"run-{number}"

    def set_tags(self, run: str, values: Mapping[str, str]) -> None:
        if self.broken:
            raise self.broken
        self.runs[run].update(values)

    def log_json(self, run: str, name: str, value: dict[str, Any]) -> None:
        self.files[run] = dict(value)

    def load_json(self, run: str, name: str) -> dict[str, Any] | None:
        return self.files.get(run)

    def log_metrics_batch(self, run: str, rows: Any) -> None: ...

    def end_run(self, run: str, status: str) -> None: ...

    @property
    def connection(self) -> Any:
        return SimpleNamespace(uri="sqlite:////somewhere/mlflow.db")


@pytest.fixture(params=["none"])
def plan(tmp_path: Path, request: pytest.FixtureRequest) -> SearchPlan:
    space = {"adapters.rank": {"grid": [2, 4, 8]}, "training.l1": {"grid": [0.0, 0.1, 0.2, 0.3]}}
    data = {
        "name": "x", "workers": 0, "model": {"source": "owner/model"},
        "tasks": [f"helpdesk/{name}" for name in ("email_route", "chat_mood", "call_urgency", "review_topic")],
        "search": {"space": space, "scheduler": request.param, "grace_stages": 1},
    }  # fmt: skip
    file = tmp_path / "search.yaml"
    file.write_text(yaml.safe_dump(data), encoding="utf-8")
    return plan_search(load_config(file), str(file))


def open_search(plan: SearchPlan, store: Memory) -> _Search:
    journal = Journal(store, "above", "s", lambda: None)  # type: ignore[arg-type]
    demand = Demand(0, 1, 1, STAGES, "fp32", 0)
    return _Search(plan, "s", journal, Silent(), Path("home"), Path("storage"), demand, False)


def report(number: int, stage: int) -> dict[str, Any]:
    """Of a trial whose scores depend on it and its stage alone."""
    draw = [random.Random(f"{number % 3 if at == 1 else number}.{at}").random() for at in range(1, stage + 1)]
    record = {"task": "t", "reused": False, "reused_from": None, "train_seconds": 1.0}
    record |= {"score_seconds": 1.0, "other_seconds": 0.0}
    return {
        "number": number, "stage": stage, "tasks": ["t"], "metrics": {"average_performance": draw[-1], "forgetting": 0.0},
        "objectives": [draw[-1]], "curve": [{"average_performance": one} for one in draw], "records": [record] * stage,
        "accuracy_matrix": [],
    }  # fmt: skip


def run(plan: SearchPlan, *, at_once: int, kills: int, seed: int) -> dict[str, Any]:
    """A search whose trials report in any order, which is killed so many times, and of which trial 5 fails."""
    draw, store = random.Random(seed), Memory()
    for start in range(kills + 1):
        search, steps = open_search(plan, store), itertools.count()
        working: dict[int, int] = {}
        until = None if start == kills else draw.randrange(1, 30)
        while until is None or next(steps) < until:
            while len(working) < at_once and (found := search.next()) and found != "later":
                working[found[0].number] = 0
            if not working:
                assert found is None, "nobody waits for ever"
                break
            number = draw.choice(sorted(working))
            working[number] += 1
            row = report(number, working[number])
            if number == 5 and working[number] == 3:
                search.ended(5, report(5, 2), "a loss that is not finite")
            elif search.stopped_by(row) or working[number] == STAGES:
                search.ended(number, row, None)
            else:
                continue
            del working[number]
    assert search.broken is None
    result = search_result(plan, "s", "model", list(search.journal.trials.values()), "uri")
    return {key: result[key] for key in ("ranking", "winner", "runner_up")} | {
        "trials": [
            (t["number"], t["outcome"], t["error"], t["metrics"], t["curve"], len(t["stages"])) for t in result["trials"]
        ],
        "counts": [result["cost"][f"stages_{what}"] for what in ("trained", "reused", "pruned", "total")],
    }


@pytest.mark.parametrize("plan", ["halving"], indirect=True)
def test_the_same_trials_are_pruned_whoever_is_faster_and_whatever_was_killed(plan: SearchPlan) -> None:
    alone = run(plan, at_once=1, kills=0, seed=0)
    outcomes = [outcome for _, outcome, *_ in alone["trials"]]
    assert outcomes.count("pruned") >= 4 and "finished" in outcomes
    assert outcomes[4] in ("failed", "pruned")
    for seed in range(16):
        assert run(plan, at_once=1 + seed % 4, kills=seed % 5, seed=seed) == alone, seed


@pytest.mark.parametrize("plan", ["halving"], indirect=True)
def test_a_search_that_began_under_the_former_scheduler_goes_on_and_what_had_ended_stays(plan: SearchPlan) -> None:
    store = Memory()
    before = open_search(plan, store).journal
    assert plan.listed is not None
    for number, outcome, stage in ((1, "finished", STAGES), (2, "pruned", 1), (3, "pruned", 2)):
        before.end(before.start(number, plan.listed[number - 1]), outcome, report(number, stage))  # type: ignore[arg-type]
    search, working = open_search(plan, store), dict[int, int]()
    while (found := search.next()) is not None or working:
        if found is not None and found != "later":
            working[found[0].number] = 0
            continue
        number = min(working)
        working[number] += 1
        if search.stopped_by(report(number, working[number])) or working[number] == STAGES:
            search.ended(number, report(number, working.pop(number)), None)
    assert [search.journal.trials[n].outcome for n in (1, 2, 3)] == ["finished", "pruned", "pruned"]
    ended = {trial.outcome for trial in search.journal.trials.values()}
    assert len(search.journal.trials) == plan.trials and ended == {"finished", "pruned"}


def test_what_ends_a_search_is_kept_and_not_taken_for_a_trial_that_failed(plan: SearchPlan) -> None:
    store = Memory()
    search = open_search(plan, store)
    found = search.next()
    assert found is not None and found != "later"
    store.broken = HeldError("another driver has this search")
    with search.breaking():
        search.ended(found[0].number, report(found[0].number, STAGES), None)
    assert search.broken is store.broken


def test_a_trial_that_ends_too_early_has_failed(plan: SearchPlan) -> None:
    search = open_search(plan, Memory())
    found = search.next()
    assert found is not None and found != "later"
    search.stopped_by(report(1, 1))
    search.ended(1, report(1, 1), None)
    assert search.journal.trials[1].outcome == "failed"
    assert search.journal.trials[1].report["error"] == "it ended after stage 1 of 4"


def test_a_full_disk_ends_the_search_and_not_the_trial(plan: SearchPlan) -> None:
    full = UserError("cannot write a checkpoint under x: No space left on device; make room")
    assert is_outage(full) and is_outage(StoreAwayError("MLflow does not answer"))
    assert not is_outage(UserError("adapters.targets: matches nothing")) and not is_outage(TrainingError("not finite"))
    search = open_search(plan, Memory())
    assert search.next() is not None
    with search.breaking():
        search.stopped_by({"number": 1, "error": str(full), "outage": True})
    assert "make room" in str(search.broken) and search.journal.trials[1].outcome is None


@pytest.mark.parametrize(
    ("workers", "fewest", "supply", "share", "at_once"),
    [
        (0, 0, Supply(cpus=8, memory=100 * GIB), 1.0, 8),
        (0, 0, Supply(cpus=8, memory=1 * GIB), 1.0, 3),
        (4, 4, Supply(cpus=8, memory=100 * GIB), 1.0, 2),
        (8, 2, Supply(cpus=5, memory=100 * GIB), 1.0, 1),
        (0, 0, Supply(cpus=64, gpus=4), 0.25, 16),
        (0, 0, Supply(cpus=64, gpus=4), 0.6, 4),
        (2, 2, Supply(cpus=1, gpus=4), 0.5, 4),
        (2, 2, Supply(cpus=64, gpus=4), 1.0, 2),
    ],
)
def test_as_many_trials_work_at_once_as_fit(
    workers: int, fewest: int, supply: Supply, share: float, at_once: int, plan: SearchPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = open_search(plan, Memory())
    search.plan = replace(plan, base=replace(plan.base, workers=workers), listed=[{}] * 100)
    search.demand = Demand(fewest, 1, 1, STAGES, "fp32", 0, share)
    monkeypatch.setattr(resources, "in_cluster", lambda: supply)
    assert search.room(bool(supply.gpus)) == at_once


def test_a_trial_that_never_fits_is_refused_with_what_it_needs(plan: SearchPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    search = open_search(plan, Memory())
    search.plan = replace(plan, base=replace(plan.base, workers=4))
    search.demand = Demand(4, 1, 1, STAGES, "fp32", 0)
    monkeypatch.setattr(resources, "in_cluster", lambda: Supply(cpus=2, memory=100 * GIB))
    with pytest.raises(UserError, match=r"one trial needs 4 processes.*the cluster has 2 CPUs"):
        search.room(False)


def order_of(search: _Search) -> Order:
    """Of the next trial, as Ray Tune carries it."""
    from pipelines.search.tuning import _Proposer

    return Order(**json.loads(_Proposer(search, gpus=False).suggest("any")["order"]))


def test_what_breaks_a_search_comes_out_of_ray_tune_as_it_was(plan: SearchPlan) -> None:
    from pipelines.search.tuning import _Proposer, _Watch

    search = open_search(plan, Memory())
    _Watch(search).on_step_end(0, [])
    search.broken = HeldError("another driver has this search")
    with pytest.raises(HeldError, match="another driver"):
        _Watch(search).on_step_end(0, [])
    search = open_search(plan, store := Memory())
    store.broken = StoreAwayError("MLflow does not answer")
    assert _Proposer(search, gpus=False).suggest("any") == "FINISHED" and search.broken is store.broken


@pytest.mark.integration
def test_a_trial_reports_after_every_stage_and_relative_paths_are_the_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray import tune

    from pipelines.search.tuning import places_of

    config = write_config(
        tmp_path, tasks=("colours", "shapes"), search={"space": {"training.l1": {"grid": [0.0, 0.5]}}},
    )  # fmt: skip
    data = yaml.safe_load(config.read_text(encoding="utf-8"))
    data["tasks"] = [str(Path(task).relative_to(tmp_path)) for task in data["tasks"]]
    config.write_text(yaml.safe_dump(data), encoding="utf-8")
    for name in ("AMLORA_HOME", "MLFLOW_TRACKING_URI", "TUNE_FUNCTION_THREAD_TIMEOUT_S"):
        monkeypatch.setenv(name, "of another search")
    monkeypatch.chdir(tmp_path)
    store = Store.open(tmp_path / "home", f"sqlite:///{tmp_path}/mlflow.db")
    above = store.search_run("model", "s", "s-champion", {})
    made = plan_search(load_config(config), str(config))
    journal = Journal(store, above, "s", lambda: None)
    demand = Demand(0, 1, 1, STAGES, "fp32", 0)
    search = _Search(made, "s", journal, Silent(), tmp_path / "home", tmp_path / "home" / "storage", demand, False)
    order = order_of(search)
    reports: list[dict[str, Any]] = []
    monkeypatch.setattr(tune, "report", lambda row: reports.append(json.loads(row["report"])))
    places = places_of(search)
    monkeypatch.chdir("/")  # as on a node where somebody else has started Ray
    run_trial({"order": json.dumps(asdict(order))}, places)
    assert [(one["stage"], len(one["records"]), len(one["curve"])) for one in reports] == [(1, 1, 1), (2, 2, 2)]
    assert not any("error" in one for one in reports) and reports[0]["first_step"] is not None
    sequence = store.find_runs({"amlora.kind": "sequence", "amlora.run_id": "s-t001"})
    assert [run.tags["mlflow.parentRunId"] for run in sequence] == [order.mlflow_run], "in the store of the search"
    reports.clear()
    run_trial({"order": json.dumps(asdict(order) | {"config": order.config | {"tasks": ["tasks/nowhere.yaml"]}})}, places)
    assert len(reports) == 1 and "nowhere" in reports[0]["error"] and not reports[0]["outage"]


@pytest.mark.slow
@pytest.mark.integration
def test_trials_that_one_process_runs_in_turn_read_the_base_and_the_texts_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And learn what each learns in a process of its own."""
    from ray import tune

    from pipelines.search import trial
    from pipelines.search.tuning import places_of

    calls: Counter[str] = Counter()

    def counted(name: str) -> None:
        module, _, function = name.rpartition(".")
        inner = getattr(importlib.import_module(module), function)

        def outer(*given: Any, **named: Any) -> Any:
            calls[function] += 1
            return inner(*given, **named)

        monkeypatch.setattr(name, outer)

    for used in ("worker_cache.load_model", "stage_statistics.read_texts", "stage_rows.encode", "stage_spec.load_task"):
        counted(f"amlora_dist.training.{used}")
    space = {"training.l1": {"grid": [0.5]}, "adapters.rank": {"grid": [2, 3, 4]}}
    config = write_config(tmp_path, tasks=("colours", "shapes"), search={"space": space, "scheduler": "none"})
    home, cache = tmp_path / "home", WorkerCache()
    for name, value in (("AMLORA_HOME", str(home)), ("MLFLOW_TRACKING_URI", ""), ("TUNE_FUNCTION_THREAD_TIMEOUT_S", "9")):
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trial, "_cache_of_this_process", lambda: cache)
    monkeypatch.setattr(tune, "report", lambda row: reports.append(json.loads(row["report"])))
    store = Store.open(home)
    made = plan_search(load_config(config), str(config))
    journal = Journal(store, store.search_run("model", "s", "s-champion", {}), "s", lambda: None)
    search = _Search(
        made, "s", journal, Silent(), home, home / "storage", Demand(0, 1, 1, STAGES, "fp32", 0), False
    )  # fmt: skip
    found: list[Any] = []
    after: list[dict[str, int]] = []
    for _ in range(3):
        reports: list[dict[str, Any]] = []
        run_trial({"order": json.dumps(asdict(order_of(search)))}, places_of(search))
        assert [one["stage"] for one in reports] == [1, 2] and not any("error" in one for one in reports)
        assert not any(record["reused"] for record in reports[-1]["records"]), "each has adapters of its own"
        found.append(reports[-1]["accuracy_matrix"])
        after.append(dict(calls))
    assert cache.loads == 1
    assert after[0]["load_model"] == 1 and after[0]["read_texts"] > 0
    assert after[0] == after[1] == after[2], "no trial after the first reads anything again"
    alone = load_config(config, ["adapters.rank=4", "training.l1=0.5", "evaluation.split=dev", "evaluation.cells=seen"])
    monkeypatch.setenv("AMLORA_HOME", str(tmp_path / "alone"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    alone.search = None
    assert run_sequence(alone, run_id="alone", progress=Silent())["accuracy_matrix"] == found[2]
