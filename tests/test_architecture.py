"""``docs/architecture.md`` tells what is there: every hop exists, every life is short, the picture is of today's imports."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
HOP = re.compile(r"`((?:pipelines|amlora_dist)/[a-z_/0-9]+\.py):([A-Za-z_.]+)`")
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
