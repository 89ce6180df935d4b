"""Banks that find no task by themselves answer plain text in the way that rows prefer which nothing was trained on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from amlora_dist.base_model import load_tokenizer
from amlora_dist.config.loading import RunConfig, home, load_config
from amlora_dist.errors import UserError
from amlora_dist.evaluation.plain_choice import PlainChoice, decided, read_choice, shown_choice
from amlora_dist.inference.loading import pulled
from amlora_dist.inference.model import AMLoRAModel
from amlora_dist.registry import tags
from amlora_dist.registry.manifest import read_manifest
from amlora_dist.registry.store import Store
from amlora_dist.reporting.facts import read_run
from amlora_dist.tasks.task import TaskSpec
from amlora_dist.tasks.task_entry import task_entry
from amlora_dist.training.scoring import Scoring
from amlora_dist.training.stage import _Stage
from amlora_dist.training.stage_spec import CHOICE, Parent, StageWork
from pipelines.cli.scoring import Rows, score
from pipelines.cli.tables import console_for, show_result
from pipelines.runs import plan, stage_record
from pipelines.runs.executor import InProcess
from pipelines.runs.inputs import RunInputs, gather_inputs
from pipelines.runs.journal import RunJournal
from pipelines.runs.plain_choice import unseen_places
from pipelines.runs.plan import BankState, plan_stage
from pipelines.runs.progress import Silent
from pipelines.runs.results import load_result
from pipelines.runs.sequence import run_sequence
from tests.tiny_config import write_config

TASKS = ("colours", "shapes")
WRITES = PlainChoice(way="writes", ranks=0.25, writes=0.5, rows=16, of="held-out")


def config_of(folder: Path, *overrides: str) -> RunConfig:
    file = folder / "run.yaml"
    return load_config(file if file.is_file() else write_config(folder, tasks=TASKS), list(overrides))


def run(folder: Path, *overrides: str) -> dict[str, Any]:
    bare = ("method=seq_lora", "evaluation.untrained=false", "evaluation.oracle=false")
    return run_sequence(config_of(folder, *bare, *overrides), run_id="plain", progress=Silent())


def gathered(folder: Path, *overrides: str) -> RunInputs:
    return gather_inputs(config_of(folder, *overrides), folder / "home")


def score_of(task: str, ranks: float, writes: float, split: str = "train") -> dict[str, Any]:
    return {"mode": CHOICE, "task": task, "accuracy": ranks, "greedy_accuracy": writes, "rows": 8, "split": split}


def test_the_better_way_over_all_tasks_is_chosen_and_ties_go_to_ranking() -> None:
    assert decided([score_of("a", 0.5, 0.25), score_of("b", 0.25, 0.5)]).way == "ranks"
    assert decided([score_of("a", 0.5, 0.25), score_of("b", 0.25, 0.625)]).way == "writes"
    mixed = decided([score_of("a", 0.5, 0.25), score_of("b", 0.5, 0.25, "dev")])
    assert (mixed.way, mixed.rows, mixed.of) == ("ranks", 16, "held-out and dev")
    none = decided([])
    assert none.way == "ranks" and "no rows to decide on" in none.sentence
    assert decided([], WRITES) == WRITES, "what it extends does so, and no row says otherwise"
    assert decided([score_of("a", 0.5, 0.25)], WRITES).way == "ranks"
    assert read_choice(json.loads(json.dumps(WRITES.to_mapping())), "a file") == WRITES
    assert read_choice(None, "a file") is None
    with pytest.raises(UserError, match=r"a file: plain_text.format: found 2 .* newer"):
        read_choice(WRITES.to_mapping() | {"format": 2}, "a file")


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.parametrize("method", ["seq_lora", "joint", "replay"])
def test_rows_decide_that_no_stage_trains_on(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, amlora_home: Path
) -> None:
    seen: set[tuple[int, ...]] = set()
    divided = _Stage._divided

    def noted(self: _Stage, makes: Any, every: Any) -> Any:
        kept, unseen = divided(self, makes, every)
        replayed = self.rows.training()[1]
        seen.update(tuple(example.text) for example in (*kept, *replayed))
        return kept, unseen

    monkeypatch.setattr(_Stage, "_divided", noted)
    found: list[StageWork] = []
    ran = InProcess.run

    def looked_at(self: InProcess, work: StageWork, *more: Any) -> None:
        found.append(work)
        ran(self, work, *more)

    monkeypatch.setattr(InProcess, "run", looked_at)
    run(tmp_path, f"method={method}", "method_settings.replay_rows=16")
    inputs = gathered(tmp_path, f"method={method}", "method_settings.replay_rows=16")
    deciding = {cell.task: cell.places for cell in found[-1].cells if cell.mode == CHOICE}
    assert set(deciding) == set(TASKS) and all(deciding.values())
    rows = {task: [row.text for row in inputs.data[task].rows["train"]] for task in TASKS}

    tokenizer = load_tokenizer(inputs.base.path)
    for task, places in deciding.items():
        ids = [tuple(tokenizer(text)["input_ids"]) for text in rows[task]]
        texts = {ids[place] for place in places or ()}
        assert texts and not texts & seen
        assert len(set(ids) & seen) >= 16, "what was trained on is told apart"


def test_without_held_out_rows_those_of_the_dev_split_decide_and_never_those_that_are_scored(tmp_path: Path) -> None:
    def cells(*overrides: str) -> tuple[list[tuple[str, int]], bool]:
        inputs = gathered(tmp_path, "method=seq_lora", *overrides)
        first = plan_stage(inputs, BankState(), TASKS[0], [])
        deciding = [(cell.split, len(cell.places or ())) for cell in first.cells if cell.mode == CHOICE]
        return deciding, first.chooses

    assert cells() == ([("train", 8)], True)
    assert cells("router.holdout=0") == ([("dev", 6)], True)
    assert cells("router.holdout=0", "evaluation.split=dev") == ([], True), "says that there are no rows"
    assert cells("evaluation.cells=last") == ([], False), "nothing is scored after this stage"
    assert cells("evaluation.prompts=own") == ([], False)
    inputs = gathered(tmp_path)
    assert not plan_stage(inputs, BankState(), TASKS[0], []).chooses, "keys find the task"
    inputs = gathered(tmp_path, "method=replay")
    assert len(unseen_places(inputs, inputs.method, TASKS[0], 16)) < 8, "rows that were replayed are left out"


def test_where_replay_shows_every_held_out_row_again_the_dev_split_decides(tmp_path: Path) -> None:
    inputs = gathered(tmp_path, "method=replay", "method_settings.replay_rows=32")
    first = plan_stage(inputs, BankState(), TASKS[0], [])
    bank = BankState().grown(Parent(TASKS[0], "a", ""), first.fingerprint, "")
    second = plan_stage(inputs, bank, TASKS[1], [first])
    found = {cell.task: (cell.split, len(cell.places or ())) for cell in second.cells if cell.mode == CHOICE}
    assert found == {TASKS[0]: ("dev", 6), TASKS[1]: ("train", 8)}
    digests = second.work(inputs).data_digests
    assert {f"{TASKS[0]}/dev", f"{TASKS[1]}/train"} <= set(digests)


def test_a_bank_of_free_text_alone_chooses_nothing_and_nothing_is_said_of_ranking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = gathered(tmp_path, "method=seq_lora")
    monkeypatch.setattr(TaskSpec, "free_text", property(lambda _self: True))
    assert not plan_stage(inputs, BankState(), TASKS[0], []).chooses
    entry = replace(task_entry(inputs.specs[TASKS[0]]), labels=["yes", "no"])
    parent = BankState((Parent("old", "a", ""),), ("b",), ("c",), {"old": entry})
    assert plan_stage(inputs, parent, TASKS[0], []).chooses, "the bank that it extends has labels"
    before = {"run_id": "old", "last": {"own_prompt": [0.5]}, "ranked_accuracy_matrix": [[None], [None]]}
    assert shown_choice(before) is None
    assert shown_choice(before | {"ranked_accuracy_matrix": [[None], [0.5]]}) == PlainChoice(way="ranks")


@pytest.mark.slow
@pytest.mark.integration
def test_an_extended_bank_goes_on_as_before_where_no_row_decides(
    tmp_path: Path, amlora_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as choosing:
        choosing.setattr(stage_record, "decided", lambda _scores, _below: WRITES)
        run(tmp_path)
    settings = ["method=seq_lora", "router.holdout=0", "evaluation.split=dev", "evaluation.untrained=false"]
    more = write_config(tmp_path / "more", tasks=("sizes",))
    config = load_config(more, [*settings, "evaluation.oracle=false", "parent=models:/plain@current"])
    result = run_sequence(config, run_id="extended", progress=Silent())
    assert result["plain_text"] == WRITES.to_mapping()
    assert AMLoRAModel.from_bank("models:/extended@current", device="cpu").former.plain.way == "writes"


@pytest.fixture(params=["ranks", "writes"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which way the held-out rows are made to prefer."""
    choice = WRITES if request.param == "writes" else PlainChoice(way="ranks", ranks=0.5, writes=0.5, rows=16, of="held-out")
    monkeypatch.setattr(stage_record, "decided", lambda _scores, _below: choice)
    return str(request.param)


@pytest.mark.slow
@pytest.mark.integration
def test_the_choice_is_what_is_counted_shown_and_served(
    way: str, tmp_path: Path, amlora_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(tmp_path, "training.epochs=2", "evaluation.cells=all")
    assert result["plain_text"]["way"] == way
    facts = read_run(Store.open(home(), None, reads=True), "plain")
    model = AMLoRAModel.from_bank("models:/plain@current", device="cpu")
    differ = 0
    for place, task in enumerate(TASKS):
        file = tmp_path / "tasks" / task / "test.jsonl"
        texts = [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]
        rows = facts.cell("router", task, 2)
        assert rows is not None
        by_rank = [(one.labels or [])[one.ranked or 0] for one in rows]
        freely = [one.output for one in rows]
        wanted = freely if way == "writes" else by_rank
        differ += sum(a != b for a, b in zip(by_rank, freely, strict=True))
        assert [one.served for one in rows] == wanted
        assert model.predict(texts) == wanted and model.predict(texts, batch_size=1) == wanted
        assert [one.label for one in model.classify(texts)] == by_rank, "who asks for a label gets one"
        score("models:/plain@current", Rows(str(file)), task, 4, {}, as_json=True)
        assert json.loads(capsys.readouterr().out)["accuracy"] == result["accuracy_matrix"][-1][place]
        assert sum(one.correct for one in rows) / len(rows) == pytest.approx(result["accuracy_matrix"][-1][place])
    assert differ, "else the choice would change nothing here"
    last = result["last"]
    assert result["accuracy_matrix"][-1] == last["greedy_accuracy" if way == "writes" else "model_accuracy"]
    show_result(result, console_for())
    shown = " ".join(capsys.readouterr().out.split())
    assert "by ranking" in shown and "written freely" in shown
    assert ("answered by what is written freely" if way == "writes" else "answered by ranking the labels") in shown
    folder = pulled("models:/plain@current", None)[1]
    assert facts.how.sentence in (folder / "README.md").read_text(encoding="utf-8")
    assert Store.open(home(), None, reads=True).run_tags(facts.run)[tags.PLAIN_TEXT] == way


@pytest.mark.slow
@pytest.mark.integration
def test_a_run_of_before_is_shown_and_served_by_ranking_and_nothing_of_it_is_scored_again(
    tmp_path: Path, amlora_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as before:
        before.setattr(plan, "chooses", lambda *_: False)
        old = run(tmp_path)
    assert "plain_text" not in old
    monkeypatch.setattr(InProcess, "run", lambda *_: pytest.fail("something was trained or scored"))
    result = run(tmp_path)
    assert "plain_text" not in result and result["accuracy_matrix"] == old["accuracy_matrix"]
    facts = read_run(Store.open(home(), None, reads=True), "plain")
    assert "by ranking" in facts.how.sentence
    folder = pulled("models:/plain@current", None)[1]
    assert "plain_text" not in json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert not AMLoRAModel.from_bank(folder, device="cpu").former.plain.writes


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.parametrize("killed_at", ["before it is scored", "before it is published"])
def test_a_run_that_died_around_the_choice_goes_on_to_the_same_bank(
    killed_at: str, tmp_path: Path, amlora_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as dying:
        if killed_at == "before it is scored":
            plainly = Scoring._score_plain

            def dies(self: Scoring, cell: Any) -> None:
                if cell.mode == CHOICE:
                    raise UserError("died")
                plainly(self, cell)

            dying.setattr(Scoring, "_score_plain", dies)
        else:
            def stops(*_: Any) -> None:
                raise UserError("died")

            dying.setattr(RunJournal, "_registered", stops)
        with pytest.raises(UserError, match="died"):
            run(tmp_path)
    scored: list[str] = []
    ran = InProcess.run

    def noted(self: InProcess, work: StageWork, *more: Any) -> None:
        scored.extend(cell.mode for cell in work.cells if work.task == TASKS[0])
        ran(self, work, *more)

    monkeypatch.setattr(InProcess, "run", noted)
    result = run(tmp_path)
    assert scored == ([CHOICE] if killed_at == "before it is scored" else []), "what was there is not made again"
    again = run(tmp_path)
    assert again["plain_text"] == result["plain_text"] and again["plain_text"]["rows"] == 16
    manifest = read_manifest(pulled("models:/plain@current", None)[1])
    assert manifest.plain_text is not None and manifest.plain_text.to_mapping() == result["plain_text"]
    assert load_result("plain")["plain_text"] == result["plain_text"]


@pytest.mark.slow
@pytest.mark.integration
def test_a_bank_with_keys_has_nothing_of_it(tmp_path: Path, amlora_home: Path) -> None:
    result = run(tmp_path, "method=am_lora", "evaluation.cells=last")
    folder = pulled("models:/plain@current", None)[1]
    assert "plain_text" not in result
    assert "plain_text" not in json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    facts = read_run(Store.open(home(), None, reads=True), "plain")
    assert not [one for stage in facts.stages for one in stage.scores if one["mode"] == CHOICE]
    assert torch.is_tensor(AMLoRAModel.from_bank(folder, device="cpu").rows_TN)
