"""Notebooks of ``examples/``: every cell runs, in order, in a fresh process; what they show is small and of a real run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))

PROGRAM = """
import ast, builtins, json, sys

def display(value):
    ways = [getattr(value, name)() for name in ("_repr_html_", "_repr_png_") if hasattr(value, name)]
    assert any(ways) or not ways, f"{type(value).__name__} shows nothing"  # a figure has HTML in some backends only
    return repr(value)

builtins.display = display
cells = json.load(open(sys.argv[1], encoding="utf-8"))["cells"]
space = {"__name__": "__main__"}
for number, cell in enumerate(cells):
    if cell["cell_type"] == "code":
        tree = ast.parse("".join(cell["source"]), f"cell {number}")
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, f"cell {number}", "exec"), space)
        if last is not None:
            display(eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), space))
print("every cell")
"""
"""What Jupyter does with the cells: one name space, and the value of a cell's last line is shown."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("notebooks")


def cells_of(notebook: Path) -> list[dict[str, Any]]:
    return list(json.loads(notebook.read_text(encoding="utf-8"))["cells"])


def test_there_are_three() -> None:
    assert [file.stem for file in NOTEBOOKS] == ["classification_stream", "conversations", "reading_a_comparison"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda file: file.stem)
def test_what_is_shown_is_of_a_run_without_errors_and_small(notebook: Path) -> None:
    code = [cell for cell in cells_of(notebook) if cell["cell_type"] == "code"]
    outputs = [output for cell in code for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"execute_result", "display_data"}, "no error, no chatter"
    kinds = {kind for output in outputs for kind in output["data"]}
    assert {"text/html", "image/png"} <= kinds, "tables and pictures"
    text = notebook.read_text(encoding="utf-8")
    assert len(text) < 120_000 and not re.search(r"/(home|tmp|root|work)/", text), "small, and of no particular machine"
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1)), "run once, from the top"


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda file: file.stem)
def test_every_cell_runs(notebook: Path, home: Path) -> None:
    environment = {**os.environ, "AMLORA_HOME": str(home), "MPLBACKEND": "agg", "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(notebook)], cwd=EXAMPLES, env=environment, capture_output=True, text=True,
        timeout=1700,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("every cell\n")
    assert not (EXAMPLES / ".amlora").exists() and not (EXAMPLES / "mlruns").exists()
