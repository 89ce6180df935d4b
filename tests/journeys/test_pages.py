"""Commands of the documentation's pages: each exists with its options, and is typed in order on the bank that `make demo`
leaves (of a tiny model), or started for real by another test, named here."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from pipelines.cli.main import app
from tests.journeys.test_readme import REPOSITORY, at_home, folder
from tests.tiny_chat import write_chat_model

__all__ = ["at_home", "folder"]  # fixtures: the bank that `make demo` leaves, of a tiny model

DOCS = REPOSITORY / "docs"
PAGES = sorted(page for page in DOCS.rglob("*.md") if page.parent.name not in ("evidence", "reference"))
ELSEWHERE = ("push", "pull hf://", "serve", "--expect-digest", "premise=", "pairs.")
"""Lines of ``banks.md`` that need the Hub or a server, a digest that only a store knows, or a bank of pairs of texts
(``tests/pipelines/test_field_rows.py``): other tests have those."""
TYPED = {
    "tutorials/your-own-task.md": "test_application_developer.py", "banks.md": "test_pages.py", "tasks.md": "test_pages.py",
    "report.md": "test_pages.py", "planning.md": "test_pages.py", "how-to/backup-and-restore.md": "test_pages.py",
    "conversations.md": "test_pages.py",
}  # fmt: skip
"""Pages whose every command is typed in this folder."""
STARTED = {
    "doctor": "pipelines/test_submit.py", "submit": "pipelines/test_submit.py", "jobs": "pipelines/test_submit.py",
    "logs": "pipelines/test_submit.py", "stop": "pipelines/test_submit.py", "compare": "pipelines/test_comparison.py",
    "report": "journeys/test_pages.py", "tune": "pipelines/test_tune_crashes.py", "pull": "journeys/test_readme.py",
    "serve": "pipelines/test_serving.py", "evaluate": "pipelines/test_evaluate.py", "convert": "test_packaged_model.py",
    "validate": "pipelines/test_cli.py", "run": "pipelines/test_cli.py",
}  # fmt: skip
"""Commands of the other pages, which want a cluster, a server, a search or a download: who starts them."""


def lines_of(page: Path) -> list[str]:
    """Calls of our program in the blocks of a page, as they would be typed: without remarks and what is optional."""
    text = "\n".join(re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)).replace("\\\n", " ")
    found = []
    for line in text.splitlines():
        part = re.sub(r" \[[^\]]*\]", "", re.sub(r"\s#.*$", "", line)).split("|")[-1].strip()
        part = re.sub(r"^(?:[A-Z_]+=\S+ )+", "", part)
        if part.startswith("amlora "):
            found.append(part)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_every_command_of_a_page_exists_with_its_options(page: Path) -> None:
    program = typer.main.get_command(app)
    for line in lines_of(page):
        verb, *words = shlex.split(line)[1:]
        assert verb in program.commands, line  # type: ignore[attr-defined]
        parameters = program.commands[verb].params  # type: ignore[attr-defined]
        options = {name for parameter in parameters for name in (*parameter.opts, *parameter.secondary_opts)}
        assert {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)} <= options, line
        for name in (word for word in words if re.match(r"(configs|cluster)/", word)):
            assert (REPOSITORY / name).exists(), line


def test_pages_speak_of_one_bank() -> None:
    """``demo`` is what `make demo` leaves; other names are made by a command of the same page."""
    for page in PAGES:
        made = set(re.findall(r"--(?:run|search)-id ([\w-]+)", page.read_text(encoding="utf-8")))
        named = {name for line in lines_of(page) for name in re.findall(r"models:/([\w-]+)", line)}
        assert named <= made | {"demo", "demo-my", "chat", "NAME"}, page.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_every_command_of_a_page_is_typed_or_started_by_a_test(page: Path) -> None:
    here = page.relative_to(DOCS).as_posix()
    if here in TYPED:
        assert page.name in (REPOSITORY / "tests" / "journeys" / TYPED[here]).read_text(encoding="utf-8")
        return
    for line in lines_of(page):
        verb = line.split()[1]
        assert verb in STARTED, f"a new command of {here} needs a test: {line}"
        assert re.search(rf"[\"' ]{verb}[\"' ]", (REPOSITORY / "tests" / STARTED[verb]).read_text(encoding="utf-8")), verb


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_banks_are_used_word_for_word(at_home: Path) -> None:
    test = REPOSITORY / "amlora_dist" / "tasks" / "demo" / "chat_mood.test.jsonl"
    rows = [json.loads(line) for line in test.read_text(encoding="utf-8").splitlines()[:6]]
    texts = [row["text"] for row in rows]
    (at_home / "golden.jsonl").write_text("".join(json.dumps(row | {"task": "helpdesk/chat_mood"}) + "\n" for row in rows))
    for name in ("tickets.jsonl", "texts.jsonl"):
        (at_home / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (at_home / "tickets.csv").write_text("body\n" + "".join(json.dumps(text).replace('\\"', '""') + "\n" for text in texts))
    for name in ("mixed.txt", "tickets.log"):
        (at_home / name).write_text("\n".join(texts) + "\n")
    _write_key(at_home / "bank.key")
    typed, taken = 0, 0
    for line in lines_of(DOCS / "banks.md"):
        if any(word in line for word in ELSEWHERE):
            continue
        arguments = shlex.split(line)[1:]
        if arguments[0] == "export":
            taken += 1
            arguments[2] = f"out-{taken}"
            tasks = {"a=0.5": "helpdesk/email_route=0.5", "b=0.5": "helpdesk/chat_mood=0.5"}
            arguments = [tasks.get(one, one) for one in arguments]
        given = "\n".join(texts) + "\n" if arguments[0] == "classify" and len(arguments) == 2 else None
        done = CliRunner().invoke(app, arguments, input=given)
        allowed = (0, 5) if arguments[0] == "promote" else (0,)
        assert done.exit_code in allowed, f"{line}\n{done.output}\n{done.stderr}"
        typed += 1
    assert typed >= 15
    assert len((at_home / "labelled.csv").read_text(encoding="utf-8").splitlines()) == len(texts) + 1


def typed(line: str) -> str:
    """What a line prints on standard output."""
    done = CliRunner().invoke(app, shlex.split(line)[1:])
    assert done.exit_code == 0, f"{line}\n{done.output}\n{done.stderr}"
    return done.stdout


def typed_page(page: str) -> list[str]:
    """What each line of a page prints, typed in order."""
    return [typed(line) for line in lines_of(DOCS / page)]


def programs_of(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.timeout(1800)
class TestTyped:
    """Pages after ``banks.md``, word for word."""

    def test_rows_are_looked_at_and_a_run_is_planned(self, at_home: Path) -> None:
        typed("amlora init my.csv --force")
        (rows,) = typed_page("tasks.md")
        assert "garden" in rows and "train" in rows
        assert all("fits" in printed for printed in typed_page("planning.md"))

    def test_a_run_is_reported(self, at_home: Path) -> None:
        (at_home / "page.html").unlink(missing_ok=True)
        first, second = typed_page("report.md")
        assert first.strip() == str(at_home / "home" / "reports" / "demo.html"), "the file's path, and nothing else"
        assert second.strip().endswith("page.html") and "<title>" in (at_home / "page.html").read_text(encoding="utf-8")

    def test_a_home_is_backed_up_and_restored(self, at_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        backups = at_home / "backups"
        backups.mkdir()
        page = DOCS / "how-to" / "backup-and-restore.md"
        backup, restore = (line.replace(" /backup/", f" {backups}/") for line in lines_of(page))
        typed(backup)
        monkeypatch.setenv("AMLORA_HOME", str(at_home / "new" / "home"))
        typed(restore)
        assert "champion" in typed("amlora versions demo") and typed("amlora verify models:/demo@champion")

    def test_programs_of_the_pages_run(self, at_home: Path) -> None:
        (program,) = programs_of("python.md")
        space: dict[str, Any] = {}
        exec(compile(program, "python.md", "exec"), space)  # noqa: S102 (our own words)
        assert space["result"].bank == "models:/demo/4" and len(space["result"].matrix().columns) == 4
        library = programs_of("banks.md")[0]
        given = {"texts": ["My invoice shows the same order twice."], "tokens": {}}
        ready, _, _ = library.partition("model.generate(")  # needs tokens of one's own
        exec(compile(ready, "banks.md", "exec"), given)  # noqa: S102

    def test_conversations_are_learned_and_asked(self, at_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        config = yaml.safe_load((REPOSITORY / "configs" / "demo_chat.yaml").read_text(encoding="utf-8"))
        config["model"] = {"source": str(write_chat_model(at_home / "chat-model"))}
        config["task_defaults"] |= {"max_train": 12, "max_test": 3, "max_dev": 3, "max_length": 320}
        config["training"] |= {"epochs": 1, "probe_rows": 4, "cache_trunk": False}
        config["router"] = {"background": False}
        (at_home / "configs" / "demo_chat.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        test = REPOSITORY / "amlora_dist" / "tasks" / "demo" / "policy_answer.test.jsonl"
        answered = [json.loads(line)["messages"] for line in test.read_text(encoding="utf-8").splitlines()[:2]]
        for name, rows in (("answered", answered), ("questions", [turns[:-1] for turns in answered])):
            lines = [json.dumps({"messages": turns}) + "\n" for turns in rows]
            (at_home / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        learned, talked, written, scored = typed_page("conversations.md")
        assert "helpdesk/order_note" in learned and talked == ""
        assert len([json.loads(line)["routed_to"] for line in written.splitlines()]) == 2
        assert "helpdesk/policy_answer: 2 rows" in scored
        (program,) = programs_of("conversations.md")
        exec(compile(program, "conversations.md", "exec"), {})  # noqa: S102


def _write_key(file: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    form = serialization.PrivateFormat.TraditionalOpenSSL
    file.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
