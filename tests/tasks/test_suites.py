"""Suites whose rows are their authors' files: every task is read from a folder in that layout."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest

from amlora_dist.config.checks import resolve_tasks
from amlora_dist.config.loading import load_config
from amlora_dist.errors import FaultsError, UserError
from amlora_dist.evaluation.text_metrics import METRICS
from amlora_dist.tasks.sources import at_hand, load_task
from amlora_dist.tasks.task import TaskDefaults, TaskSpec, builtin_tasks, placed, resolve_task

ON_HUB = {spec.name: spec for spec in builtin_tasks() if spec.name.startswith("superni/") and spec.source.kind == "hub"}
SUPERNI = [placed(spec, Path("SAPT")) for spec in builtin_tasks() if spec.name.startswith("superni/")]
"""As the authors' files hold them."""
TRACE = [spec for spec in builtin_tasks() if spec.name.startswith("trace/")]
CONFIGS = Path(__file__).parents[2] / "configs"


def _write_superni(folder: Path, spec: TaskSpec, **more: Any) -> None:
    """Three splits of a task as SAPT gives them away: one indented object, answers as texts or lists."""
    answers: list[Any] = [label.text for label in spec.labels or []] or [["one", "another"], [" two "], "three"]
    for split, start in (("train", 0), ("dev", 10), ("test", 20)):
        rows = [
            {"id": f"x{n}", "input": f" text {start + n} ", "output": answers[n % len(answers)]} for n in range(6)
        ]
        path = folder / getattr(spec.splits, split)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"Definition": ["Do it."], "Instances": rows} | more, indent=2), encoding="utf-8")


def _resolved(spec: TaskSpec, folder: Path | None) -> TaskSpec:
    return resolve_task(spec.name, data_dir=folder, base_dir=Path.cwd(), defaults=TaskDefaults())


def test_the_suites_are_whole_and_their_configurations_name_every_task_once() -> None:
    assert len(SUPERNI) == 15 and len(TRACE) == 8
    import yaml

    orders = [yaml.safe_load((CONFIGS / f"superni_order{n}.yaml").read_text())["tasks"] for n in (1, 2)]
    assert orders[0] != orders[1] and {spec.name for spec in SUPERNI} == set(orders[0]) == set(orders[1])
    assert orders[0][0] == "superni/task1572_samsum_summary" and orders[1][-1] == "superni/task875_emotion_classification"
    assert all(len(order) == 15 for order in orders)
    assert yaml.safe_load((CONFIGS / "trace.yaml").read_text())["tasks"] == [
        f"trace/{name}" for name in
        ("c-stance", "fomc", "meetingbank", "py150", "scienceqa", "numglue-cm", "numglue-ds", "20minuten")
    ]  # fmt: skip


@pytest.mark.parametrize("name", [spec.name for spec in SUPERNI])
def test_a_task_of_superni_is_read_from_the_authors_files(tmp_path: Path, name: str) -> None:
    (spec,) = (one for one in SUPERNI if one.name == name)
    assert not at_hand(spec, tmp_path)
    _write_superni(tmp_path, spec)
    assert at_hand(spec, tmp_path)
    data = load_task(_resolved(spec, tmp_path), data_dir=tmp_path)
    assert {split: len(rows) for split, rows in data.rows.items()} == {"train": 6, "dev": 6, "test": 6}
    targets = {row.target for row in data.rows["train"]}
    assert targets == (set(spec.label_texts) if spec.labels else {"one", "two", "three"})
    assert {row.text for row in data.rows["test"]} == {f"text {n}" for n in range(20, 26)}


@pytest.mark.parametrize("name", [spec.name for spec in TRACE])
def test_a_task_of_trace_is_read_from_the_authors_files(tmp_path: Path, name: str) -> None:
    (spec,) = (one for one in TRACE if one.name == name)
    for split in ("train", "dev", "test"):
        path = tmp_path / getattr(spec.splits, split)
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"prompt": f"{split} {n}：文本", "answer": f"答 {n}"} for n in range(4)]
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    data = load_task(_resolved(spec, tmp_path), data_dir=tmp_path)
    assert {row.target for row in data.rows["dev"]} == {f"答 {n}" for n in range(4)}
    assert all(len(rows) == 4 for rows in data.rows.values())


def test_twelve_tasks_of_superni_are_read_from_the_hub_at_a_pinned_commit_where_no_files_are_given() -> None:
    recorded = json.loads(Path(__file__).with_name("recorded").joinpath("hub_schemas.json").read_text())
    schema = recorded["Muennighoff/natural-instructions|"]
    assert len(ON_HUB) == 12
    for name, spec in ON_HUB.items():
        source, columns = spec.source, spec.columns
        assert source.repository == "Muennighoff/natural-instructions" and re.fullmatch("[0-9a-f]{40}", str(source.revision))
        assert source.files == schema["files"].replace("TASK", name.partition("/")[2])
        assert {columns.text[0].column, columns.answer or columns.label} <= set(schema["columns"])
        assert spec.in_data_dir is not None and not at_hand(spec, None)


@pytest.mark.parametrize("name", ["superni/task363_sst2_polarity_classification", "superni/task181_outcome_extraction"])
def test_rows_of_the_hub_are_cut_into_three_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    spec = _resolved(ON_HUB[name], None)
    answers = spec.label_texts or ["one", "two"]
    rows = [
        {"id": f"x{n}", "task_name": name, "definition": "Do it.", "inputs": f"text {n}", "targets": answers[n % 2]}
        for n in range(20)
    ]
    path = tmp_path / "hub" / str(spec.source.files)
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path.with_name("task1_other_train.jsonl").write_text(json.dumps(rows[0]) + "\n")
    local = dataclasses.replace(spec.source, repository=str(tmp_path / "hub"))  # a folder stands in for the repository
    data = load_task(dataclasses.replace(spec, source=local))
    assert [len(data.rows[split]) for split in ("train", "dev", "test")] == [16, 2, 2]
    assert {row.text for row in data.rows["test"]} == {"text 18", "text 19"}
    assert {row.target for row in data.rows["train"]} == set(answers)


def test_splits_and_columns_that_a_run_names_are_those_of_the_suites_files_too(tmp_path: Path) -> None:
    name, own_splits = "superni/task002_quoref_answer_generation", {"test": "my/test.json"}
    own = {"task": name, "splits": own_splits, "columns": {"answer": "a"}}
    found = resolve_task(own, base_dir=tmp_path, defaults=TaskDefaults(), data_dir=tmp_path)
    assert found.source.kind == "data_dir" and found.splits.test == "my/test.json" and found.columns.answer == "a"
    assert found.splits.train == "SuperNI/task002_quoref_answer_generation/train.json"
    inner = {"task": own["task"], "in_data_dir": {"splits": {"test": "other.json"}}}
    assert resolve_task(inner, base_dir=tmp_path, defaults=TaskDefaults(), data_dir=tmp_path).splits.test == "other.json"
    (tmp_path / "mine").mkdir()
    source = {"kind": "hub", "repository": "me/mine", "revision": "abc", "mirror": "mine"}
    elsewhere = resolve_task(own | {"source": source}, base_dir=tmp_path, defaults=TaskDefaults(), data_dir=tmp_path)
    assert elsewhere.source.repository == "me/mine"


def test_a_copy_of_a_suite_on_the_hub_is_named_in_the_run(tmp_path: Path) -> None:
    named = {"task": "trace/fomc", "source": {"kind": "hub", "repository": "me/trace", "revision": "abc", "config": "fomc"},
             "splits": {"train": "train", "dev": "eval", "test": "test"}}  # fmt: skip
    spec = resolve_task(named, base_dir=tmp_path, defaults=TaskDefaults())
    assert (spec.source.repository, spec.splits.dev, spec.columns.answer) == ("me/trace", "eval", "answer")


def test_without_the_files_the_task_says_where_to_get_them(tmp_path: Path) -> None:
    spec = _resolved(next(one for one in SUPERNI if one.name not in ON_HUB and one.free_text), None)
    with pytest.raises(UserError, match=rf"give data_dir, the folder that holds SuperNI/.*{spec.name[8:]}.*docs/suites.md"):
        load_task(spec)
    with pytest.raises(UserError, match="does not exist"):
        load_task(spec, data_dir=tmp_path)
    _write_superni(tmp_path, spec, Instances="none")
    with pytest.raises(UserError, match="records: found str at 'Instances', expected a list of objects"):
        load_task(spec, data_dir=tmp_path)
    _write_superni(tmp_path, spec, Instances=[1])
    with pytest.raises(UserError, match="row 1: found int, expected a JSON object"):
        load_task(spec, data_dir=tmp_path)
    _write_superni(tmp_path, spec, Instances=[{"input": "a", "output": []}])
    with pytest.raises(FaultsError, match="no answer"):
        load_task(spec, data_dir=tmp_path)


def test_a_run_without_its_suites_files_is_refused_before_anything_starts(tmp_path: Path) -> None:
    for overrides, found in (([], "no data_dir: the task is read"), ([f"data_dir={tmp_path}"], f"no file {tmp_path}")):
        faults = resolve_tasks(load_config(CONFIGS / "trace.yaml", overrides))[1]
        assert {path[1] for path in faults} == set(range(8))
        assert all(fault.found.startswith(found) for fault in faults.values())
    faults = resolve_tasks(load_config(CONFIGS / "superni_order1.yaml", []))[1]
    assert len(faults) == 15 - len(ON_HUB) and all(fault.found.startswith("no data_dir") for fault in faults.values())
    assert len(resolve_tasks(load_config(CONFIGS / "superni_order1.yaml", [f"data_dir={tmp_path}"]))[1]) >= 15


@pytest.mark.parametrize(
    ("metric", "output", "answer", "score"),
    [
        ("same_text", "A", "A", 1.0),
        ("same_text", "", "A", 0.0),
        ("same_text", " 支持", "支持", 1.0),
        ("same_text", "a dove", "dove", 0.0),
        ("answer_letter", "Answer: B\nBecause it is.", "Answer: B\nBecause of this.", 1.0),
        ("answer_letter", "Answer: C", "Answer: B\nBecause of this.", 0.0),
        ("answer_letter", "B", "Answer: B", 0.0),
        ("code_similarity", "x = <NUM_LIT:2>", "x = 2", 1.0),
        ("code_similarity", "f ( '<STR_LIT>' )", "f ( '' )", 1.0),
        ("code_similarity", "abcd", "abxd", 0.75),
        ("code_similarity", "", "x", 0.0),
    ],
)
def test_the_suites_own_metrics(metric: str, output: str, answer: str, score: float) -> None:
    assert METRICS[metric](output, answer) == pytest.approx(score)
