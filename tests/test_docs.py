"""The documentation tells what is there: hops of the architecture, pictures and reference pages of today's code, links."""

from __future__ import annotations

import ast
import html
import re
import shlex
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


def test_the_demo_s_picture_ends_with_the_tickets_that_the_makefile_asks() -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    asked = re.search(r"^TICKETS = ((?:.*\\\n)*.*)", makefile, re.MULTILINE)
    drawn = html.unescape((REPOSITORY / "docs" / "images" / "demo.svg").read_text(encoding="utf-8")).replace("\xa0", " ")
    assert asked is not None
    tickets = shlex.split(asked[1].replace("\\\n", " "))
    missing = [text for text in tickets if text not in drawn]
    assert len(tickets) == 5 and not missing, "draw it again: python benchmarks/demo_picture.py demo docs/images/demo.svg"


def test_reference_pages_are_of_todays_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "docs"))
    import write_reference

    for name, content in write_reference.pages().items():
        written = (write_reference.FOLDER / name).read_text(encoding="utf-8")
        assert written == content, f"{name}: write it again: python docs/write_reference.py"


@pytest.mark.parametrize(("name", "least"), [("configuration", 120), ("task", 40), ("commands", 300)])
def test_every_row_of_the_reference_says_what_it_is_for(name: str, least: int) -> None:
    page = (REPOSITORY / "docs" / "reference" / f"{name}.md").read_text(encoding="utf-8")
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) >= least
    meaning = 1 if name == "commands" else 3
    for row in rows:
        assert len(row) == (3 if name == "commands" else 4), f"a cell is broken: {row}"
        assert row[meaning].strip(), f"{row[0]} says nothing"


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """What its headings are called in links."""
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" not in target and not target.startswith("mailto:"):
            name, _, anchor = target.partition("#")
            other = page.parent / name if name else page
            assert other.exists(), f"{page.name}: {target}"
            assert not anchor or other.suffix != ".md" or anchor in anchors(other), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_no_page_names_a_folder_of_somebodys_machine(page: Path) -> None:
    found = re.findall(r"(?<![\w.])/(?:root|work|tmp|home|Users)/[\w./-]+", page.read_text(encoding="utf-8"))
    assert {place for place in found if not place.startswith("/tmp/ray")} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_install_lines_name_extras_that_are_there_and_enough(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = {extra for extras in re.findall(r"pip install '\.\[([\w,]+)\]'", text) for extra in extras.split(",")}
    declared = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8").partition("[project.optional-dependencies]\n")[2]
    assert named <= set(re.findall(r"^(\w+) = \[", declared.partition("\n[")[0], flags=re.MULTILINE)), named
    assert "from openai import" not in text or "client" in named, "the line that installs the client is on the page"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_lists_and_tables_have_an_empty_line_in_front(page: Path) -> None:
    """MkDocs would make them part of the paragraph before."""
    before = ""
    for line in re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL).splitlines():
        if re.match(r"(- |1\. |\|)", line):
            assert not before.strip() or re.match(r"(\s|- |\d+\. |\||#)", before), f"{page.name}: {before} / {line}"
        before = line


def test_benchmarks_are_one_page_of_five_tables_whose_figures_are_in_the_evidence() -> None:
    page = (REPOSITORY / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    tables = page.split("\n## ")[1:6]
    assert [table[:3] for table in tables] == [f"{number}. " for number in range(1, 6)]
    assert all("](evidence/" in table for table in tables), "its command and date are one click away"
    assert "## What is won" in page and "## What is lost" in page and len(page.splitlines()) < 120
    listed = (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8")
    for file in (REPOSITORY / "docs" / "evidence").glob("*.md"):
        assert f"evidence/{file.name}" in page and f"- evidence/{file.name}" in listed, file.name
