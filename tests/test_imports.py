"""Imports point one way: pipelines, then configuration, then the library towards the ground; and Ray stays above."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

# Each part may import itself, what stands on a lower floor, and the ground. Parts of one floor do not know each other.
FLOORS = [
    {"serving"},
    {"model"},
    {"rekeying"},
    {"importing"},
    {"bank_loading", "prompt_answering"},
    {"config", "config_checks", "inference"},
    {"training"},
    {"planning", "reporting"},
    {"registry"},
    {"methods"},
    {"evaluation"},
    {"adapters", "tasks", "search"},
    {
        "base_model", "crash_points", "digests", "errors", "files", "fingerprints", "former_values", "model_folder",
        "privacy", "schema", "strict_yaml",
    },
]
GROUND = FLOORS[-1]
TOGETHER = [{"config", "config_checks"}, GROUND]
"""Parts of one floor that may import each other."""
UPWARDS = {"registry/pyfunc.py": {"model"}}
"""Ways in from outside, which no module imports: MLflow calls the loader of a version."""

HEAVY = ("torch", "transformers", "mlflow", "ray", "datasets", "deepspeed", "pandas", "numpy")
LIGHT = [
    "amlora_dist",
    "amlora_dist.config",
    "amlora_dist.errors",
    "amlora_dist.tasks.background",
    "amlora_dist.tasks.task",
    "amlora_dist.tasks.prompts",
    "amlora_dist.adapters.settings",
    "amlora_dist.training.settings",
    "amlora_dist.training.deepspeed_section",
    "amlora_dist.evaluation.settings",
    "amlora_dist.methods",
    "amlora_dist.base_model",
    "amlora_dist.search",
    "pipelines.cli",
    "pipelines.display",
    "pipelines.progress",
    "pipelines.quiet",
]


def modules(package: str) -> list[str]:
    files = sorted((REPOSITORY / package).rglob("*.py"))
    names = [".".join(file.relative_to(REPOSITORY).with_suffix("").parts) for file in files]
    return [name.removesuffix(".__init__") for name in names]


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=240)


def imported_parts(file: Path) -> set[str]:
    """Parts of the library that a file imports at run time, anywhere in it."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            return
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}, line {node.lineno}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            names = []
        for name in names:
            parts = name.split(".")
            if parts[0] == "amlora_dist" and len(parts) > 1 and parts[1] != "__version__":
                found.add(parts[1])
            if parts[0] in ("ray", "pipelines"):
                found.add(parts[0])
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(file.read_text(encoding="utf-8")))
    return found


def allowed(part: str) -> set[str]:
    floor = next(n for n, parts in enumerate(FLOORS) if part in parts)
    below = {name for parts in FLOORS[floor + 1 :] for name in parts}
    together = {name for group in TOGETHER if part in group for name in group}
    return {part} | below | together


LIBRARY = REPOSITORY / "amlora_dist"


@pytest.mark.parametrize("file", sorted(str(f.relative_to(LIBRARY)) for f in LIBRARY.rglob("*.py")))
def test_library_imports_only_downwards(file):
    part = Path(file).parts[0].removesuffix(".py")
    if part == "__init__":
        assert not imported_parts(LIBRARY / file)
        return
    assert any(part in parts for parts in FLOORS), f"{part} stands on no floor: add it to FLOORS and CONTRIBUTING.md"
    assert imported_parts(LIBRARY / file) - allowed(part) - UPWARDS.get(file, set()) == set()


def test_no_module_imports_a_way_in_from_outside():
    names = {f"amlora_dist.{file.removesuffix('.py').replace('/', '.')}" for file in UPWARDS}
    text = "".join(file.read_text(encoding="utf-8") for file in LIBRARY.rglob("*.py"))
    assert not any(f"import {name}" in text or f"from {name}" in text for name in names)


@pytest.mark.integration
def test_library_never_imports_ray():
    names = modules("amlora_dist")
    done = python(
        "import importlib, sys\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "print([m for m in sys.modules if m == 'ray' or m.startswith(('ray.', 'pipelines'))])"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "[]"


def test_light_modules_import_nothing_heavy():
    done = python(
        "import importlib, sys\n"
        f"for name in {LIGHT!r}:\n"
        "    importlib.import_module(name)\n"
        f"    heavy = [m for m in {HEAVY!r} if m in sys.modules]\n"
        "    assert not heavy, (name, heavy)\n"
    )
    assert done.returncode == 0, done.stderr


def test_every_module_is_short_enough_to_be_one_idea():
    files = [file for package in ("amlora_dist", "pipelines") for file in (REPOSITORY / package).rglob("*.py")]
    long = {file.name: n for file in files if (n := len(file.read_text(encoding="utf-8").splitlines())) > 500}
    assert long == {}
