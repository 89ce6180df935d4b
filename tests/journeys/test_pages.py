"""Commands of the documentation's pages: each exists with its options, and those of ``banks.md`` are typed in order."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from pipelines.cli.main import app
from tests.journeys.test_readme import REPOSITORY, at_home, folder

__all__ = ["at_home", "folder"]  # fixtures: the bank that `make demo` leaves, of a tiny model

DOCS = REPOSITORY / "docs"
PAGES = sorted(page for page in DOCS.rglob("*.md") if page.parent.name not in ("evidence", "reference"))
ELSEWHERE = ("push", "pull hf://", "serve", "--expect-digest")
"""Lines of ``banks.md`` that need the Hub or a server, or a digest that only a store knows: other tests have those."""


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


def _write_key(file: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    form = serialization.PrivateFormat.TraditionalOpenSSL
    file.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
