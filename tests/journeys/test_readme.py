"""Every command of the README, typed word for word and in order, in a folder laid out like the repository whose
configurations have a tiny model and few rows. What needs a server, a search or a cluster is started by other tests, named
here; of those commands every option must exist."""

from __future__ import annotations

import json
import random
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from amlora_dist.config.checks import resolve_tasks
from amlora_dist.config.loading import load_config
from pipelines.cli.main import app
from tests import tiny_config

REPOSITORY = Path(__file__).resolve().parents[2]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
MAKEFILE = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
TUTORIAL = (REPOSITORY / "docs" / "tutorials" / "your-own-task.md").read_text(encoding="utf-8")
ELSEWHERE = {
    "serve": "tests/pipelines/test_serving.py", "tune": "tests/pipelines/test_tune_crashes.py",
    "doctor": "tests/pipelines/test_submit.py", "submit": "tests/pipelines/test_submit.py",
}  # fmt: skip
"""Commands that are started for real in another file."""
TYPED = ("ask", "init", "add", "pull", "run", "report", "compare", "plan", "promote")


def lines(page: str) -> list[str]:
    """Calls of our program in the blocks of a page, without remarks."""
    text = "\n".join(re.findall(r"```sh\n(.*?)```", page, flags=re.DOTALL)).replace("\\\n", " ")
    return [shlex.join(shlex.split(line, comments=True)) for line in text.splitlines() if line.startswith("amlora ")]


def line_of(verb: str) -> str:
    (found,) = [line for line in lines(README) if line.split()[1] == verb]
    return found


def typed(line: str, code: int = 0) -> str:
    program, *arguments = shlex.split(line)
    assert program == "amlora"
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == code, f"{line}\n{done.output}\n{done.stderr}"
    return done.stdout


def test_every_command_is_typed_here_or_started_elsewhere() -> None:
    verbs = [line.split()[1] for line in lines(README)]
    assert sorted(verbs) == sorted([*TYPED, *ELSEWHERE]), "a new command of the README needs a test"
    program = typer.main.get_command(app)
    for line in lines(README):
        verb, *words = shlex.split(line)[1:]
        options = {name for parameter in program.commands[verb].params for name in parameter.opts}  # type: ignore[attr-defined]
        assert {word.partition("=")[0] for word in words if word.startswith("-")} <= options, line
        if verb in ELSEWHERE:
            assert re.search(rf"[\"' ]{verb}[\"' ]", (REPOSITORY / ELSEWHERE[verb]).read_text(encoding="utf-8")), verb
        for name in (word for word in words if word.startswith("configs/")):
            load_config(REPOSITORY / name, [word for word in words if re.match(r"[a-z_.]+=", word)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's ``configs/`` with a tiny model, rows next to it, and the bank that ``make demo`` leaves."""
    place = tmp_path_factory.mktemp("readme") / "repository"
    (place / "configs").mkdir(parents=True)
    (place / "configs" / "plan_llama3_70b.yaml").write_bytes((REPOSITORY / "configs" / "plan_llama3_70b.yaml").read_bytes())
    (place / "my.csv").write_text(re.findall(r"```csv\n(.*?)```", TUTORIAL, flags=re.DOTALL)[0], encoding="utf-8")
    labels = write_rows(place.parent / "rows", ("amazon", "agnews"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("AMLORA_HOME", str(place / "home"))
        files = [place / "my.csv", *(REPOSITORY / "amlora_dist" / "tasks" / "demo").glob("*.jsonl")]
        texts = [*labels, *(file.read_text(encoding="utf-8") for file in files)]
        patch.setattr(tiny_config, "WORDS", sorted({*tiny_config.WORDS, *re.findall(r"\w+|[^\w\s]", " ".join(texts))}))
        model = tiny_config.write_model(place / "model", "llama")
        shrink("demo.yaml", place, model, workers=0)
        shrink("standard_cl_order1.yaml", place, model, tasks=["amazon", "agnews"])
        (made,) = re.findall(r"^\t\$\(BIN\)/(amlora run configs/demo\.yaml .*)$", MAKEFILE, re.MULTILINE)
        typed(made)
    return place


def shrink(name: str, place: Path, model: Path, **more: Any) -> None:
    """A configuration of the repository at another model, with few rows and steps."""
    config = yaml.safe_load((REPOSITORY / "configs" / name).read_text(encoding="utf-8")) | more
    config["model"] = {"source": str(model)}
    config["task_defaults"] |= {"max_train": 16, "max_test": 4, "max_dev": 4, "max_length": 40}
    config["training"] |= {"epochs": 1, "batch_size": 8, "probe_rows": 4}
    config["dtype"] = "fp32"
    (place / "configs" / name).write_text(yaml.safe_dump(config), encoding="utf-8")


def write_rows(rows: Path, tasks: tuple[str, ...]) -> list[str]:
    """Rows of tasks from the Hub as ``data_dir`` holds them. Returns the words of their labels."""
    config = load_config(REPOSITORY / "configs" / "standard_cl_order1.yaml", [f"tasks=[{', '.join(tasks)}]"])
    specs, _ = resolve_tasks(config)
    draw = random.Random(0)
    for spec in specs:
        (rows / spec.name).mkdir(parents=True)
        for split, count in (("train", 20), ("dev", 5), ("test", 5)):
            found = [
                {"text": " ".join([*draw.choices(tiny_config.WORDS, k=8), text]), "label": text}
                for text, _ in zip(spec.label_texts * count, range(count), strict=False)
            ]
            (rows / spec.name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return [text for spec in specs for text in spec.label_texts]


@pytest.fixture
def at_home(folder: Path, amlora_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("AMLORA_HOME", str(folder / "home"))
    return folder


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.timeout(1800)
class TestTyped:
    """In the order of the page."""

    def test_you_build_an_application(self, at_home: Path) -> None:
        answered = typed(f"{line_of('ask')} --json")
        assert json.loads(answered)["task"].startswith("helpdesk/")
        assert "amlora add" in typed(line_of("init"))
        assert "my learned" in typed(line_of("add"))
        typed(line_of("pull"))
        assert (at_home / "bank" / "manifest.json").is_file()

    def test_you_do_research(self, at_home: Path) -> None:
        assert "amazon" in typed(line_of("run"))
        typed(line_of("report"))
        assert list((at_home / "home").rglob("*o1-s0*.html")), "a page"
        compared = typed(f"{line_of('compare')} --json")
        assert len(json.loads(compared)["runs"]) == 18 and json.loads(compared)["failed"] == []

    def test_you_run_a_cluster(self, at_home: Path) -> None:
        assert "fits" in typed(line_of("plan"))
        test = REPOSITORY / "amlora_dist" / "tasks" / "demo" / "email_route.test.jsonl"
        rows = [json.loads(line) for line in test.read_text(encoding="utf-8").splitlines()[:8]]
        golden = [json.dumps(row | {"task": "helpdesk/email_route"}) + "\n" for row in rows]
        (at_home / "golden.jsonl").write_text("".join(golden), encoding="utf-8")
        done = CliRunner().invoke(app, shlex.split(line_of("promote"))[1:])
        assert done.exit_code == 5, f"a tiny model has not learned enough to be done\n{done.output}\n{done.stderr}"
        assert "accuracy[helpdesk/email_route]" in done.output
