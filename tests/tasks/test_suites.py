"""Suites whose rows are their authors' files: every task is read from a folder in that layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from amlora_dist.config.checks import resolve_tasks
from amlora_dist.config.loading import load_config
from amlora_dist.errors import FaultsError, UserError
from amlora_dist.evaluation.text_metrics import METRICS
from amlora_dist.tasks.sources import load_task
from amlora_dist.tasks.task import TaskDefaults, TaskSpec, at_hand, builtin_tasks, resolve_task

SUPERNI = [spec for spec in builtin_tasks() if spec.name.startswith("superni/")]
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


def test_without_the_files_the_task_says_where_to_get_them(tmp_path: Path) -> None:
    spec = _resolved(SUPERNI[0], None)
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
