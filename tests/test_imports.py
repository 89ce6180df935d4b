"""Imports point one way: pipelines, then configuration, then the library towards the ground; and Ray stays above."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

# Each part may import itself, what is on a lower floor, and the ground. Parts of one floor do not know each other.
FLOORS = [
    {"serving"},
    {"inference"},
    {"config.loading", "config.checks"},
    {"training"},
    {"planning", "reporting"},
    {"registry"},
    {"methods"},
    {"evaluation"},
    {"adapters", "tasks", "config.search_space"},
    {
        "base_model", "config.former_values", "config.schema", "config.strict_yaml", "crash_points", "digests", "errors",
        "files", "fingerprints", "model_folder", "packaged_model", "privacy", "quantisation",
    },
]
GROUND = FLOORS[-1]
TOGETHER = [{"config.loading", "config.checks"}, GROUND]
"""Parts of one floor that may import each other."""
UPWARDS = {"registry/pyfunc.py": {"inference"}}
"""Ways in from outside, which no module imports: MLflow calls the loader of a version."""

HEAVY = ("torch", "transformers", "mlflow", "ray", "datasets", "deepspeed", "pandas", "numpy")
LIGHT = [
    "amlora_dist",
    "amlora_dist.config.loading",
    "amlora_dist.errors",
    "amlora_dist.tasks.background",
    "amlora_dist.tasks.task",
    "amlora_dist.tasks.prompts",
    "amlora_dist.adapters.settings",
    "amlora_dist.training.settings",
    "amlora_dist.training.deepspeed_config",
    "amlora_dist.evaluation.settings",
    "amlora_dist.methods",
    "amlora_dist.base_model",
    "amlora_dist.quantisation",
    "amlora_dist.config.search_space",
    "amlora_dist.registry.store",
    "pipelines.cli.main",
    "pipelines.cli.tables",
    "pipelines.runs.progress",
    "pipelines.runs.results",
    "pipelines.cli.bank_output",
    "pipelines.cluster.executor",
    "pipelines.cli.output",
]


def modules(package: str) -> list[str]:
    files = sorted((REPOSITORY / package).rglob("*.py"))
    names = [".".join(file.relative_to(REPOSITORY).with_suffix("").parts) for file in files]
    return [name.removesuffix(".__init__") for name in names]


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=240)


def part_of(path: Sequence[str]) -> str:
    """The part that a module's path below the library names; the configuration's files are on several floors."""
    return ".".join(path[:2]) if path[0] == "config" else path[0]


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
                found.add(part_of(parts[1:]))
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
    path = Path(file).with_suffix("").parts
    part = part_of(path)
    if path == ("__init__",):
        assert imported_parts(LIBRARY / file) == {"inference"}, "only what users import, and that lazily"
        return
    if path[-1] == "__init__" and part not in {name for parts in FLOORS for name in parts}:
        assert not imported_parts(LIBRARY / file)
        return
    assert any(part in parts for parts in FLOORS), f"{part} is on no floor: add it to FLOORS and CONTRIBUTING.md"
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


def test_the_model_is_imported_from_the_package():
    done = python("import amlora_dist; print(amlora_dist.AMLoRAModel.__module__, hasattr(amlora_dist, 'Nothing'))")
    assert done.returncode == 0 and done.stdout.split() == ["amlora_dist.inference.model", "False"], done.stderr


def source_files() -> list[Path]:
    return [file for package in ("amlora_dist", "pipelines") for file in sorted((REPOSITORY / package).rglob("*.py"))]


def test_a_class_name_means_one_thing():
    where: dict[str, list[str]] = {}
    for file in source_files():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                where.setdefault(node.name, []).append(str(file.relative_to(REPOSITORY)))
    assert {name: files for name, files in where.items() if len(files) > 1} == {}


@pytest.mark.parametrize("file", sorted((REPOSITORY / "benchmarks").glob("*.py")), ids=lambda file: file.stem)
def test_what_a_benchmark_imports_of_the_project_is_there(file: Path):
    """Nothing else looks at them: types are not checked there, and most take minutes to run."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    ours = [
        node for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("amlora_dist", "pipelines", "tests")
    ]  # fmt: skip
    for node in ours:
        assert node.module is not None
        module = importlib.import_module(node.module)
        for name in (alias.name for alias in node.names):
            if not hasattr(module, name):
                importlib.import_module(f"{node.module}.{name}")  # a module, or the error says what is missing
    if any(node.module and node.module.startswith("tests") for node in ours):
        assert "sys.path" in file.read_text(encoding="utf-8"), "`python benchmarks/...` has only its own folder there"


def test_every_module_is_short_enough_to_be_one_idea():
    files = source_files()
    long = {file.name: n for file in files if (n := len(file.read_text(encoding="utf-8").splitlines())) > 500}
    assert long == {}
