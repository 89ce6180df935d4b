"""The application developer's journey, typed word for word from its page: rows, a task, one more stage, an answer."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipelines import RunResult, Sequence
from pipelines.cli.main import app
from pipelines.runs.api import Step
from pipelines.runs.progress import Score, Silent
from tests import tiny_config

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1800)]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tutorials" / "your-own-task.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


def typed(line: str) -> str:
    program, *arguments = shlex.split(line)
    assert program == "amlora"
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, f"{line}\n{done.output}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny bank in place of the demo's, made through the Python API."""
    folder = tmp_path_factory.mktemp("journey")
    rows = blocks("csv")[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("AMLORA_HOME", str(folder / "home"))
        patch.setattr(tiny_config, "WORDS", sorted({*tiny_config.WORDS, *re.findall(r"\w+", rows)}))
        config = tiny_config.write_config(Path(), tasks=("colours", "shapes"), task_defaults={"max_length": 32})
        steps: list[Step] = []
        scores: list[Score] = []
        stages: list[RunResult] = []
        run = Sequence(config, ["training.epochs=2"], run_id="demo")
        result = run.run(progress=Silent(), on_step=steps.append, on_score=scores.append, on_stage=stages.append)
        _check_result(result, steps, scores, stages)
    (folder / "my.csv").write_text(rows, encoding="utf-8")
    return folder


def _check_result(result: RunResult, steps: list[Step], scores: list[Score], stages: list[RunResult]) -> None:
    assert {(step.task, step.done == step.total) for step in steps} >= {("colours", True), ("shapes", True)}
    assert {(score.mode, score.metric) for score in scores} >= {("router", "accuracy"), ("untrained", "accuracy")}
    assert [len(one.mapping["stages"]) for one in stages] == [1, 2]
    matrix, frame = result.matrix(), result.scores()
    assert list(matrix.columns) == ["colours", "shapes"]
    assert list(matrix.index) == ["untrained", "after 1 colours", "after 2 shapes", "oracle"]
    assert matrix.loc["after 2 shapes"].tolist() == result.mapping["accuracy_matrix"][-1]
    last = frame[(frame.stage == 2) & (frame.task == "colours")]
    assert last.score.item() == matrix.loc["after 2 shapes", "colours"] and set(frame.metric) == {"accuracy"}
    assert len(result.plot().axes[0].lines) == 2 and "<table" in result._repr_html_()
    assert RunResult.of("demo").bank == result.bank == "models:/demo/2"


def test_the_page_is_typed_from_rows_to_an_answer(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo)
    monkeypatch.setenv("AMLORA_HOME", str(demo / "home"))
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    assert [shlex.split(line)[1] for line in lines] == ["init", "tasks", "add", "ask"]
    drafted = typed(lines[0])
    assert "labels       3: garden 8, kitchen 8, travel 8" in drafted and "amlora add" in drafted
    assert "garden, kitchen, travel" in typed(lines[1])
    added = typed(lines[2])
    assert "models:/demo/2 -> models:/demo-my/1: my learned" in added
    for task in ("colours", "shapes", "my (new)"):
        figures = r" +\d+ +accuracy +[01]\.\d+ +[01]\.\d+ +\d+ of \d+$"
        assert re.search(f"^{re.escape(task)}{figures}", added, re.MULTILINE), added
    assert re.search(r"\d+ of 18 answers of earlier tasks changed", added)
    assert "try it: amlora ask models:/demo-my@champion " in added
    again = typed(lines[2])
    assert again == added, "the same command goes on where it was, and nothing is trained again"
    answer = json.loads(typed(f"{lines[3]} --json"))
    assert answer["text"] == "Water the roses in the evening" and answer["answer"]
    assert answer["task"] in ("colours", "shapes", "my")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing", "my/task.yaml"], "models:/nothing/latest: no registered model 'nothing'"),
        (["demo", "tasks/colours.yaml"], "models:/demo/2 knows task 'colours' already"),
        (["demo", "nowhere.yaml"], "task file .*nowhere.yaml does not exist"),
        (["demo", "my/task.yaml", "training.epoch=1"], r"training.epoch: .*did you mean 'epochs'"),
        (["demo", "my/task.yaml", "--check", "my/task.yaml"], "--check: found 'my/task.yaml', which is no task of"),
    ],
)
def test_what_cannot_be_added_is_reported_before_anything_is_trained(
    demo: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(demo)
    monkeypatch.setenv("AMLORA_HOME", str(demo / "home"))
    if not Path("my/task.yaml").is_file():
        typed("amlora init my.csv")
    done = CliRunner().invoke(app, ["add", *arguments, "--run-id", "refused"])
    assert done.exit_code == 2, done.output
    assert re.search(message, done.stderr), done.stderr
