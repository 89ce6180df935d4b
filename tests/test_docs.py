"""The documentation tells what is there: hops of the architecture, pictures and reference pages of today's code, links."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
HOP = re.compile(r"`((?:pipelines|amlora_dist)/[a-z_/0-9]+\.py):([A-Za-z_.]+)`")
PAGES = sorted(REPOSITORY.glob("*.md")) + sorted((REPOSITORY / "docs").rglob("*.md"))
LIVES = {part.partition("\n")[0]: part for part in PAGE.split("\n## ")[1:]}


def names(file: Path) -> set[str]:
    """Functions and classes of a file, and methods as ``Class.method``."""
    found = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = [one for one in node.body if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)]
            found |= {f"{node.name}.{one.name}" for one in methods}
    return found


@pytest.mark.parametrize("life", ["The life of a run", "The life of a row", "The life of a gate", "The life of a request"])
def test_every_hop_is_there_and_they_are_few(life: str) -> None:
    hops = re.findall(r"^\d+\. (.*)$", LIVES[life], flags=re.MULTILINE)
    assert 5 <= len(hops) <= 10
    assert all(HOP.match(hop) for hop in hops), "each begins with a file and a name in it"
    for path, name in HOP.findall(LIVES[life]):
        assert (REPOSITORY / path).is_file(), path
        assert name in names(REPOSITORY / path), f"{path} has no {name}"


def test_the_picture_is_of_todays_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "docs"))
    sys.modules.pop("draw_architecture", None)
    import draw_architecture

    assert draw_architecture.FILE.read_text(encoding="utf-8") == draw_architecture.drawing(), (
        "draw it again: python docs/draw_architecture.py"
    )


def test_reference_pages_are_of_todays_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "docs"))
    import write_reference

    for name, content in write_reference.pages().items():
        written = (write_reference.FOLDER / name).read_text(encoding="utf-8")
        assert written == content, f"{name}: write it again: python docs/write_reference.py"


def test_every_key_of_the_reference_says_what_it_is_for_or_is_a_section_or_plain() -> None:
    page = (REPOSITORY / "docs" / "reference" / "configuration.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) > 100
    silent = [row for row in rows if row.endswith("|  |") and "| section |" not in row]
    assert len(silent) < len(rows) / 4, silent


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target and not target.startswith(("#", "mailto:")):
            assert (page.parent / target.partition("#")[0]).exists(), f"{page.name}: {target}"
