"""YAML as a careful reader takes it: no key twice, ``1e-3`` a number, ``no`` a word, and the line of every key.

PyYAML follows YAML 1.1, in which ``1e-3`` is text, ``no`` is false, ``1:30`` is 90 and the second of two equal keys
silently wins. Here scalars resolve as in YAML 1.2 and doubled keys are faults.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import yaml

from amlora_dist.errors import Fault, FaultsError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MOST_VALUES = 100_000
"""Of a document, each alias counted as all that it stands for: ten lines of aliases of aliases can mean billions."""

MOST_DEPTH = 64
"""Of values in each other."""

_HALF = re.compile("[\ud800-\udfff]")
"""Of a character: an escape can write it, and no file can hold it."""

KeyPath = tuple[str | int, ...]
"""Where a value is in a document: keys of mappings and, from 0, places in lists."""


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2's core schema and a bound on how deep values are nested."""

    _depth = 0

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._brackets = re.search(rf"(?:[\[{{]\s*){{{MOST_DEPTH + 1}}}", text) is not None

    def get_single_node(self) -> yaml.Node | None:
        """See PyYAML, which looks ahead through brackets in a time that grows with the square of their number."""
        if self._brackets:
            raise yaml.composer.ComposerError(None, None, f"more than {MOST_DEPTH} values in each other", None)
        node: yaml.Node | None = super().get_single_node()
        return node

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """See PyYAML."""
        if self._depth == MOST_DEPTH:
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, f"more than {MOST_DEPTH} values in each other", mark)
        self._depth += 1
        try:
            node: yaml.Node | None = super().compose_node(parent, index)
            return node
        finally:
            self._depth -= 1


_TAG = "tag:yaml.org,2002:"
_SCALARS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "null": (r"~|null|Null|NULL|", "~nN\0"),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+.0123456789"
    ),
    "merge": (r"<<", "<"),
}  # fmt: skip
"""Pattern of each kind, and the letters that it may begin with."""
_Loader.yaml_implicit_resolvers = {}
for _tag, (_pattern, _first) in _SCALARS.items():
    # ``add_implicit_resolver`` files a pattern under the first letters it can match; "" stands for an empty scalar.
    _Loader.add_implicit_resolver(
        f"{_TAG}{_tag}", re.compile(f"(?:{_pattern})$"), ["" if c == "\0" else c for c in _first]
    )


def _construct(loader: yaml.SafeLoader, node: Any) -> Any:
    """A number, a truth or nothing; a tag that somebody wrote (``!!int many``) may be in front of anything."""
    kind, text = node.tag.removeprefix(_TAG), str(loader.construct_scalar(node))
    if not re.fullmatch(_SCALARS[kind][0], text):
        raise yaml.constructor.ConstructorError(None, None, f"a value that is no {kind}", node.start_mark)
    if kind != "int":
        return yaml.SafeLoader.yaml_constructors[node.tag](loader, node)
    try:
        number = int(text, 0) if text[:2] in ("0o", "0x") else int(text, 10)
        str(number)
    except ValueError:  # Python reads and writes no number of more than some thousand digits
        raise yaml.constructor.ConstructorError(None, None, "a number of thousands of digits", node.start_mark) from None
    return number


# YAML's core schema and no more: dates, sets and bytes are no values of a configuration.
_Loader.yaml_constructors = {
    tag: made
    for tag, made in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.removeprefix(_TAG) in ("str", "seq", "map")
}
for _tag in ("bool", "null", "int", "float"):
    _Loader.add_constructor(f"{_TAG}{_tag}", _construct)


@dataclass(slots=True)
class Document:
    """A YAML file whose top is a mapping."""

    name: str
    """The file, for messages."""
    data: dict[str, Any]
    lines: dict[KeyPath, int] = field(default_factory=dict)
    """Line of each key and list item, from 1."""
    faults: list[Fault] = field(default_factory=list)
    """Doubled keys and keys that are no text: the rest of the file can still be checked."""


def read_document(path: Path) -> Document:
    """Read a YAML file.

    Raises:
        FaultsError: the file is missing, unreadable, not UTF-8, not YAML (with the line) or not a mapping.
    """
    name = str(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        reason = f"nothing readable ({(error.strerror or str(error)).lower()})"
        raise FaultsError(name, [Fault("file", reason, "a YAML file")]) from None
    except UnicodeDecodeError as error:
        raise FaultsError(name, [Fault("file", f"byte {error.start} that is not UTF-8", "UTF-8 text")]) from None
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        found = f"the character {text[error.position]!a}"
        raise FaultsError(name, [Fault(f"line {line}", found, "text without control characters, in UTF-8")]) from None
    try:
        node = loader.get_single_node()
        _check_size(node)
        lines: dict[KeyPath, int] = {}
        faults = list(_walk(node, (), lines, ())) if node is not None else []
        data = loader.construct_document(node) if node is not None and not _hopeless(faults) else None
    except yaml.YAMLError as error:
        raise FaultsError(name, [_syntax_fault(error, text)]) from None
    finally:
        loader.dispose()
    if _hopeless(faults):
        raise FaultsError(name, faults)
    if not isinstance(data, dict):
        found = "nothing" if data is None else f"a {type(data).__name__}"
        raise FaultsError(name, [Fault("file", found, "keys with values, such as `name: demo`")])
    return Document(name=name, data=_named(data), lines=lines, faults=faults)


def parse_value(text: str) -> Any:
    """One value in YAML: ``2``, ``1e-3``, ``true``, ``[a, b]``, ``{task: dbpedia}``; empty text is null.

    Raises:
        ValueError: the text is not YAML, or holds a key twice.
    """
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:
        raise ValueError(f"found the character {text[error.position]!a}, which no text may hold") from None
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_size(node)
        faults = list(_walk(node, (), {}, ()))
        if faults:
            raise ValueError(f"{faults[0].where}: {faults[0].found}")
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(_syntax_fault(error, text).hint) from None
    finally:
        loader.dispose()


def dotted(path: KeyPath) -> str:
    """``tasks[1].name`` for ``("tasks", 1, "name")``."""
    out = ""
    for part in path:
        out += f"[{part}]" if isinstance(part, int) else f".{part}" if out else part
    return out


def _check_size(node: yaml.Node | None) -> None:
    """Raises YAMLError where aliases make more than ``MOST_VALUES`` values of a document."""
    sizes: dict[int, int] = {}

    def size(one: yaml.Node) -> int:
        if id(one) not in sizes:
            sizes[id(one)] = 1  # of a circle, which `_walk` tells of
            inside = [part for pair in one.value for part in pair] if isinstance(one, yaml.MappingNode) else one.value
            sizes[id(one)] += sum(map(size, inside)) if isinstance(one, yaml.CollectionNode) else 0
        return sizes[id(one)]

    if node is not None and size(node) > MOST_VALUES:
        most = f"more than {MOST_VALUES} values, each alias counted as all that it stands for"
        raise yaml.composer.ComposerError(None, None, most, node.start_mark)


def _walk(node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int], above: tuple[int, ...]) -> Iterator[Fault]:
    """Fill ``lines`` and yield the faults of keys; ``above`` holds the nodes on the way down."""
    lines.setdefault(path, node.start_mark.line + 1)
    if id(node) in above:
        yield Fault(dotted(path), "an alias of what it is in", "values without circles", _CYCLE)
        return
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _walk(item, (*path, index), lines, (*above, id(node)))
    if isinstance(node, yaml.ScalarNode) and _HALF.search(node.value):
        yield Fault(dotted(path), f"{node.value!a}, half of a character", "text", _ESCAPE)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        where = (*path, str(key.value))
        if key.tag == "tag:yaml.org,2002:merge":
            continue
        if key.tag != "tag:yaml.org,2002:str":
            yield Fault(dotted(where), "a key that is no text", "a name", f"line {line}; put it in quotes")
            continue
        if key.value in seen:
            hint = f"lines {seen[key.value]} and {line}; remove one"
            yield Fault(dotted(where), "the key twice", "each key once", hint)
        seen[key.value] = line
        lines[where] = line
        yield from _walk(value, where, lines, (*above, id(node)))


def _named(value: Any) -> Any:
    """The value without keys that are no text: they are faults already."""
    if isinstance(value, dict):
        return {key: _named(inner) for key, inner in value.items() if isinstance(key, str)}
    return [_named(inner) for inner in value] if isinstance(value, list) else value


_ESCAPE = "write the character itself"
_CYCLE = "aliases must not form a circle"


def _hopeless(faults: list[Fault]) -> bool:
    """Whether the values cannot even be looked at."""
    return any(fault.hint in (_CYCLE, _ESCAPE) for fault in faults)


def _syntax_fault(error: yaml.YAMLError, text: str) -> Fault:
    """Where the text stops being YAML, the line that is there (or where what was not closed begins), and why."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return Fault("file", "text that is not YAML", "YAML", " ".join(str(error).split()))
    lines = text.splitlines()
    marks = [mark for mark in (error.problem_mark, error.context_mark) if mark is not None]
    mark = next((one for one in marks if one.line < len(lines) and lines[one.line].strip()), None)
    reason = " ".join((error.problem or error.context or "").replace("'<stream end>'", "the end of the file").split())
    if mark is None:
        return Fault("file", "text that is not YAML", "YAML", reason)
    line = lines[mark.line].strip()
    found = repr(line if len(line) <= 60 else f"{line[:57]}...")
    return Fault(f"line {mark.line + 1}", found, "YAML", reason)
