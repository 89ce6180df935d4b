"""Check a mapping against a tree of dataclasses and name every fault: path, value found, value expected, the fix."""

from __future__ import annotations

import copy
import difflib
import json
import math
import unicodedata
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from pydantic import TypeAdapter, ValidationError

from amlora_dist.config.former_values import GONE
from amlora_dist.config.strict_yaml import KeyPath, dotted
from amlora_dist.errors import MOST_SHOWN, Fault

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

T = TypeVar("T")

CHANGES_NO_RESULT = "changes no result"
"""Next to a field, in ``Annotated``, whose value may differ between two starts of one run: workers, places, paces."""

_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a section (keys with values)",
    "dataclass_type": "a section (keys with values)",
    "path_type": "a path",
    "none_required": "nothing",
}
_PATTERNS = {
    r"^(above_router|all|last:[1-9][0-9]*)$": "above_router, all or last:K (such as last:6)",
    r"^[A-Za-z0-9][A-Za-z0-9_.-]*$": "letters, digits, '_', '.' and '-', a letter or digit first",
    r"^[a-z0-9][a-z0-9_.-]*(/[a-z0-9][a-z0-9_.-]*)?$": "small letters, digits, '_', '.' and '-', and at most one '/' inside",
    r"^models:/[^/@]+(@[^/@]+|/[0-9]+)$": "models:/NAME@ALIAS or models:/NAME/VERSION",
    r"^[^.\s]+(\.[^.\s]+)*$": "keys with points between them, such as data.items",
    r"^[0-9a-f]{64}$": "a sha256 digest",
    r"^router\.safetensors$": "router.safetensors",
}
_BOUNDS = {
    "greater_than": ("gt", "a number above {}"),
    "greater_than_equal": ("ge", "a number of at least {}"),
    "less_than": ("lt", "a number below {}"),
    "less_than_equal": ("le", "a number of at most {}"),
    "too_short": ("min_length", "a list of at least {}"),
    "too_long": ("max_length", "a list of at most {}"),
}


def keys_marked(cls: type, mark: str) -> tuple[str, ...]:
    """Dotted keys of the fields of a tree of dataclasses that carry a mark; of a marked section the section alone."""
    found: list[str] = []
    for name, field in getattr(cls, "__pydantic_fields__", {}).items():
        if mark in field.metadata:
            found.append(name)
            continue
        inner = [one for one in (field.annotation, *get_args(field.annotation)) if hasattr(one, "__pydantic_fields__")]
        found += [f"{name}.{key}" for one in inner for key in keys_marked(one, mark)]
    return tuple(found)


def check(cls: type[T], data: Mapping[str, Any]) -> tuple[T | None, dict[KeyPath, Fault]]:
    """Build ``cls`` from ``data`` without converting types: text is no number, true is no 1.

    Args:
        cls: a pydantic dataclass.
        data: what a YAML file held (JSON values).

    Returns:
        The object, or None where something is wrong, and the fault at each path.
    """
    faults = dict(_not_finite(data, ()))
    try:
        # JSON mode is strict about scalars and still takes a mapping for a dataclass and a list for a tuple.
        value = TypeAdapter(cls).validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        for number, item in enumerate(error.errors(include_url=False)):
            path = _data_path(item["loc"], data)
            # To suggest what was meant is to compare with all that is known: not for the thousandth, which is not shown.
            fault = _fault(cls, data, path, item) if number < MOST_SHOWN else Fault(dotted(path), "a value", "another")
            earlier = faults.get(path)
            if earlier is not None and fault.expected not in earlier.expected:
                fault = Fault(fault.where, fault.found, f"{earlier.expected}, or {fault.expected}", earlier.hint)
            faults[path] = fault
        # Of a union the branch that got furthest into the value tells most: ``targets[1]`` and not ``targets``.
        outer = {path[:length] for path in faults for length in range(len(path))}
        return None, {path: fault for path, fault in faults.items() if path not in outer}
    return (None if faults else value), faults


def without(data: Mapping[str, Any], paths: Iterable[KeyPath]) -> dict[str, Any]:
    """A copy of ``data`` without what is at ``paths``, so that the rest can still be checked."""
    out = copy.deepcopy(dict(data))
    for path in sorted(paths, key=lambda p: [str(part).rjust(9, "0") for part in p], reverse=True):
        at: Any = out
        for part in path[:-1]:
            at = _child(at, part)
        if path and _has(at, path[-1]):
            del at[path[-1]]
    return out


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``did you mean 'x'?`` for the nearest known word, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else ""


def meant(word: str, known: list[str]) -> str:
    """``" (did you mean 'x'?)"`` or nothing, for the end of a clause."""
    same = unicodedata.normalize("NFC", word)
    if alike := next((one for one in known if one != word and unicodedata.normalize("NFC", one) == same), None):
        return f" (it looks like {alike!r}, which is written with other code points: {alike!a}; write both in NFC)"
    hint = did_you_mean(word, known)
    return f" ({hint})" if hint else ""


def unknown_key(cls: type[Any], path: KeyPath) -> tuple[str, str]:
    """What a key may be called at this place (expected), and what was probably meant (hint)."""
    known = list(fields_at(cls, path[:-1]))
    word = str(path[-1])
    hint = did_you_mean(word, known)
    if not hint:
        elsewhere = [section for section, keys in _sections(cls) if word in keys]
        hint = f"did you mean {dotted((*elsewhere[0], word))!r}?" if len(elsewhere) == 1 else ""
    if hint:
        return "a known one", hint
    return f"one of {', '.join(known)}" if known else "no keys below this one", ""


def fields_at(cls: type[Any], path: KeyPath) -> dict[str, Any]:
    """Fields (name -> annotation) of the dataclass at a key path; empty where the path leaves the tree."""
    for part in path:
        annotation = _fields(cls).get(part) if isinstance(part, str) else None
        found = [a for a in (annotation, *get_args(annotation)) if hasattr(a, "__pydantic_fields__")]
        if not found:
            return {}
        cls = found[0]
    return _fields(cls)


def shown(value: Any) -> str:
    """A value as a message shows it, on one line and not too long."""
    if isinstance(value, dict):
        return "a section" if value else "an empty section"
    text = repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:56]}...{text[-1]}"


def _fields(cls: type[Any]) -> dict[str, Any]:
    return {name: field.annotation for name, field in getattr(cls, "__pydantic_fields__", {}).items()}


def _sections(cls: type[Any], path: KeyPath = ()) -> Iterable[tuple[KeyPath, dict[str, Any]]]:
    fields = fields_at(cls, path)
    if fields:
        yield path, fields
    for name in fields:
        yield from _sections(cls, (*path, name))


def _data_path(loc: tuple[int | str, ...], data: Any) -> KeyPath:
    """pydantic's location without the names of union branches, which are not in the data."""
    path: list[int | str] = []
    at = data
    for index, part in enumerate(loc):
        last = index == len(loc) - 1
        if _has(at, part):
            at = _child(at, part)
            path.append(part)
        elif last and isinstance(at, (dict, list)) and not _is_branch(part):
            path.append(part)
    return tuple(path)


def _is_branch(part: int | str) -> bool:
    return isinstance(part, str) and (
        "[" in part or part in ("str", "int", "float", "bool", "none", "constrained-str", "constrained-int")
    )


def _has(at: Any, part: int | str) -> bool:
    if isinstance(at, dict):
        return part in at
    return isinstance(at, list) and isinstance(part, int) and part < len(at)


def _child(at: Any, part: int | str) -> Any:
    return at[part] if _has(at, part) else None


def _not_finite(value: Any, path: KeyPath) -> Iterable[tuple[KeyPath, Fault]]:
    if isinstance(value, float) and not math.isfinite(value):
        yield path, Fault(dotted(path), str(value), "a finite number", "put it in quotes if it is a name")
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _not_finite(inner, (*path, key))


def _fault(cls: type[Any], data: Any, path: KeyPath, item: Any) -> Fault:
    kind, context = item["type"], item.get("ctx", {})
    where = dotted(path) or "file"
    value: Any = data
    for part in path:
        value = _child(value, part)
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        expected, hint = unknown_key(cls, path)
        return Fault(where, "an unknown key", expected, hint)
    if kind.startswith("missing"):
        return Fault(where, "nothing", "a value (it has no default)")
    expected, hint = expected_words(item), ""
    if kind == "literal_error" and isinstance(value, str):
        words = [word.strip(" '") for word in str(context["expected"]).replace(" or ", ",").split(",")]
        hint = GONE.get(where, {}).get(value) or did_you_mean(value, words)
    elif kind == "string_type" and isinstance(value, (int, float)) and not isinstance(value, bool):
        hint = "put it in quotes"
    elif kind in ("int_type", "float_type") and isinstance(value, str) and _is_number(value):
        hint = "take the quotes away"
    return Fault(where, shown(value), expected, hint)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def expected_words(item: Any) -> str:
    """What pydantic expected where it found one of its errors, in plain words."""
    kind, context, message = item["type"], item.get("ctx", {}), str(item["msg"])
    if kind in _BOUNDS:
        key, words = _BOUNDS[kind]
        bound = context[key]
        return words.format(int(bound) if isinstance(bound, float) and bound.is_integer() else bound)
    if kind == "literal_error":
        return str(context["expected"]).replace("'", "")
    if kind == "string_pattern_mismatch":
        return _PATTERNS.get(context["pattern"], f"text that matches {context['pattern']}")
    if kind in ("value_error", "assertion_error"):
        return message.removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return _EXPECTED.get(kind, message[:1].lower() + message[1:])
