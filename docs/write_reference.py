"""Write ``docs/reference/`` from the code: ``configuration.md``, ``task.md`` and ``commands.md``.

    python docs/write_reference.py
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

FOLDER = Path(__file__).resolve().parent / "reference"
PAGES = ("configuration.md", "task.md", "commands.md")
INTERNAL = {"origin"}
"""Fields that no file may give: who reads it fills them in."""
NOTE = "<!-- Written by docs/write_reference.py from the code; change it there. -->\n"


def configuration() -> str:
    """Every key of a run's YAML, by section."""
    from amlora_dist.config.loading import RunConfig

    about = (
        "Every key of a run's YAML. `amlora run FILE key.path=value` overrides one; `amlora validate FILE` names every fault"
        " at once. A key marked ○ changes no result: it may differ between two starts of one run. The keys of a task's own"
        " file: [a task's keys](task.md)."
    )
    return page("Configuration", about, RunConfig)


def task_file() -> str:
    """Every key of a task's YAML, by section."""
    from amlora_dist.tasks.task import TaskSpec

    about = (
        "Every key of a task's YAML. How they are used, with examples: [a task's file](../tasks.md). `amlora tasks FILE`"
        " shows a task and its first prompt."
    )
    return page("A task's keys", about, TaskSpec)


def page(title: str, about: str, root: Any) -> str:
    """A tree of settings, a table for each section."""
    from amlora_dist.tasks.task import TaskDefaults

    lines = [NOTE, f"# {title}\n", f"{about}\n"]
    for path, cls in sections(root, ()):
        lines += [f"## `{'.'.join(path)}`\n" if path else "## At the top\n", sentence(inspect.getdoc(cls) or ""), ""]
        lines += ["| key | values | default | meaning |", "|---|---|---|---|"]
        texts = field_texts(cls)
        for name, field in fields(cls).items():
            if name in INTERNAL:
                continue
            mark, key = " ○" if is_marked(field) else "", ".".join((*path, name))
            text = texts.get(name, "") or ("The section below." if inner_sections(field.annotation) else "")
            if not text and name in fields(TaskDefaults):
                text = f"As `task_defaults.{name}` of a run, for this task alone."
            lines.append(f"| `{key}`{mark} | {kind_of(cls, name)} | {default_of(field)} | {cell(text)} |")
        lines.append("")
    return "\n".join(lines)


def fields(cls: Any) -> dict[str, Any]:
    """Fields of a dataclass as pydantic keeps them."""
    found: dict[str, Any] = cls.__pydantic_fields__
    return found


def sections(cls: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """A tree of dataclasses, the outer ones first."""
    yield path, cls
    for name, field in fields(cls).items():
        for inner in inner_sections(field.annotation):
            yield from sections(inner, (*path, name))


def inner_sections(annotation: Any) -> list[Any]:
    """Dataclasses of settings that a field's type holds, in lists and alternatives too."""
    if hasattr(annotation, "__pydantic_fields__"):
        return [annotation]
    return [cls for part in get_args(annotation) for cls in inner_sections(part)]


def is_marked(field: Any) -> bool:
    """Whether the field changes no result."""
    from amlora_dist.config.schema import CHANGES_NO_RESULT

    return CHANGES_NO_RESULT in field.metadata


def field_texts(cls: Any) -> dict[str, str]:
    """The doc string under each field, from the source."""
    node = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(node, ast.ClassDef)
    found: dict[str, str] = {}
    for field, after in zip(node.body, node.body[1:], strict=False):
        text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else None
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, str):
            found[field.target.id] = sentence(text)
    return found


def kind_of(cls: Any, name: str) -> str:
    """The annotation and the bounds of a field, as the source has them."""
    node = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(node, ast.ClassDef)
    for field in node.body:
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and field.target.id == name:
            kind = annotation_text(field.annotation, vars(importlib.import_module(cls.__module__)))
            bounds = bounds_text(field.value)
            return f"{kind}{', ' + bounds if bounds else ''}"
    return ""


def annotation_text(node: ast.expr, names: dict[str, Any]) -> str:
    """A type in words of YAML; ``names``: of its module, for aliases."""
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
        inner = node.slice
        if node.value.id == "Annotated" and isinstance(inner, ast.Tuple):
            bounds = [text for one in inner.elts[1:] if (text := bounds_text(one))]
            return ", ".join([annotation_text(inner.elts[0], names), *bounds])
        if node.value.id == "Literal":
            values = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            listed = [one.value for one in values if isinstance(one, ast.Constant)]
            return " ".join("`true`" if value is True else f"`{value}`" for value in listed)
        if node.value.id in ("list", "tuple"):
            first = inner.elts[0] if isinstance(inner, ast.Tuple) else inner
            return f"list of {annotation_text(first, names)}"
        if node.value.id == "dict":
            return "mapping"
    if isinstance(node, ast.BinOp):
        return " or ".join(text for one in (node.left, node.right) if (text := annotation_text(one, names)))
    words = {
        "str": "text", "int": "whole number", "float": "number", "bool": "true, false", "Path": "path", "None": "",
        "Name": "name", "Any": "anything", "DeepSpeedSection": "mapping",
    }  # fmt: skip
    text = ast.unparse(node)
    if text not in words and (values := get_args(names.get(text))) and all(isinstance(one, str | int) for one in values):
        return " ".join(f"`{one}`" for one in values)  # the alias of a Literal
    if text == "Limit":
        return "whole number, at least 1"
    return words.get(text, "section" if inner_sections(names.get(text)) else f"{text}")


def bounds_text(node: ast.expr | None) -> str:
    """``ge=1, le=8`` of a ``Field`` as ``from 1 to 8``."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Field"):
        return ""
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    values = {k.arg: ast.unparse(k.value).replace(" ** ", "^") for k in node.keywords if k.arg in words}
    return ", ".join(f"{words[name]} {value}" for name, value in values.items() if name)


def default_of(field: Any) -> str:
    """The default as YAML has it; empty where there is none, or where the key's text tells it."""
    from pydantic_core import PydanticUndefined

    from amlora_dist.tasks.task import UNSET

    if field.is_required():
        return "required"
    if field.default is PydanticUndefined:
        value = field.default_factory()
        return "" if dataclasses.is_dataclass(value) else f"`{value}`"
    value = field.default
    if value in (None, "", UNSET):
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`" if not isinstance(value, tuple) else f"`{list(value)}`"


def sentence(text: str) -> str:
    """One paragraph, with single back quotes."""
    first = re.sub(r"\s+", " ", text.strip().partition("\n\n")[0])
    return first.replace("``", "`")


def cell(text: str) -> str:
    """What may be in a table."""
    return text.replace("|", "\\|")


def commands() -> str:
    """Every command with its arguments and options."""
    from typer.main import get_command

    group: Any = get_command(importlib.import_module("pipelines.cli.main").app)
    lines = [NOTE, "# Commands\n", "`amlora COMMAND --help` prints the same.\n"]
    for name in sorted(group.commands):
        command = group.commands[name]
        usage = " ".join(usage_of(one) for one in command.params if one.param_type_name == "argument")
        line = " ".join(filter(None, ("amlora", name, usage, "[OPTIONS]")))
        lines += [f"## `amlora {name}`\n", sentence(command.help or ""), "", f"    {line}\n"]
        lines += ["| argument, option | meaning | default |", "|---|---|---|"]
        for one in command.params:
            if one.name == "help":
                continue
            called = cell(f"`{usage_of(one)}`")
            lines.append(f"| {called} | {cell(sentence(getattr(one, 'help', None) or ''))} | {shown_default(one)} |")
        lines.append("")
    return "\n".join(lines)


def usage_of(parameter: Any) -> str:
    """An argument's name, or an option's names."""
    if parameter.param_type_name == "argument":
        name = str(parameter.metavar or parameter.name.upper())
        name += "..." if parameter.nargs == -1 and not name.endswith("...") else ""
        return name if parameter.required or name.startswith("[") else f"[{name}]"
    return ", ".join([*parameter.opts, *parameter.secondary_opts])


def shown_default(parameter: Any) -> str:
    """The default of an argument or option, if it says anything."""
    if parameter.required:
        return "required"
    stated = getattr(parameter, "show_default", None)
    if isinstance(stated, str):
        return stated
    value = parameter.default
    if callable(value) or value in (None, False, (), [], ""):
        return ""
    return f"`{value}`" if value is not True else "on"


def pages() -> dict[str, str]:
    """All pages by file name."""
    return dict(zip(PAGES, (configuration(), task_file(), commands()), strict=True))


if __name__ == "__main__":
    for file, content in pages().items():
        (FOLDER / file).write_text(content, encoding="utf-8")
