"""Jinja for prompts in bounded time, memory and depth, and without anything that leads out of the template.

Jinja's own sandbox forbids what is dangerous, not what is endless: loops inside loops, a text that is multiplied, a
macro that calls itself. Here everything that makes or moves a value is paid for out of a budget before it is done, and
filters and methods are those that are known. Templates come with banks, which may come from anybody.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from functools import wraps
from typing import Any, cast

from jinja2 import StrictUndefined, TemplateRuntimeError, TemplateSyntaxError, Undefined, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.filters import FILTERS
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter, safe_range
from jinja2.tests import TESTS
from jinja2.utils import Cycler, Joiner, Namespace
from jinja2.visitor import NodeTransformer

from amlora_dist.tasks.texts import NoTextError, text_of

WORK = 2_000_000
"""Characters that a render may move, next to ``WORK_OF_INPUT`` for each one of its values."""
WORK_OF_INPUT = 32
STEP = 10
"""What a step of a loop costs, and a call, in characters."""
ITEM = 16
"""What a value costs by itself, next to its characters."""
DEEPEST = 20
"""Calls of macros and recursive loops inside each other; lists inside each other."""
WIDEST = 1000
"""Largest number that a filter, a method or a format may be given: widths, counts, digits."""
BITS = 1 << 16
"""Longest whole number."""

_FILTERS = (
    "abs", "batch", "capitalize", "center", "count", "d", "default", "dictsort", "e", "escape", "first", "float",
    "format", "groupby", "indent", "int", "items", "join", "last", "length", "list", "lower", "map", "max", "min",
    "reject", "rejectattr", "replace", "reverse", "round", "safe", "select", "selectattr", "slice", "sort", "string",
    "sum", "title", "tojson", "trim", "truncate", "unique", "upper", "wordcount",
)  # fmt: skip
_TEXT_METHODS = (
    "capitalize", "casefold", "center", "count", "endswith", "expandtabs", "find", "index", "isalnum", "isalpha",
    "isascii", "isdecimal", "isdigit", "islower", "isnumeric", "isspace", "istitle", "isupper", "join", "ljust", "lower",
    "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind", "rindex", "rjust", "rpartition", "rsplit",
    "rstrip", "split", "splitlines", "startswith", "strip", "swapcase", "title", "upper", "zfill",
)  # fmt: skip
_METHODS: list[tuple[type, tuple[str, ...]]] = [
    (str, _TEXT_METHODS),
    (Mapping, ("get", "items", "keys", "values")),
    (list, ("count", "index")),
    (tuple, ("count", "index")),
    (LoopContext, ("changed", "cycle")),
    (Cycler, ("next", "reset")),
    (Macro, ()),
]
MAKERS = (safe_range, dict, Namespace, Cycler, Joiner)
_UNWEIGHED = frozenset({
    "boolean", "callable", "count", "defined", "false", "float", "integer", "iterable", "length", "mapping", "none",
    "number", "sequence", "string", "true", "undefined",
})  # fmt: skip
"""Filters and tests that look at no more of a value than what it is and how long."""
_HIDDEN = frozenset({"_loop_vars", "_block_vars"})
"""What Jinja hands on with each call inside a loop or a block: nobody's argument."""
_SLOW = ("strip", "lstrip", "rstrip", "rfind", "rindex", "rsplit", "rpartition")
"""Methods whose time is the product of two lengths."""


class LimitError(TemplateRuntimeError):
    """The template would take too long, or make too much."""

    def __init__(self, what: str = "it takes too many steps, or makes too long a text") -> None:
        super().__init__(f"{what}; a prompt is a text with some words around it: make the template simpler")


class Budget:
    """What is left of a render's work.

    Args:
        work: characters that may be moved.
        plain: what is written must be a text or number, and nothing (None) is an empty text.
    """

    def __init__(self, work: int, *, plain: bool) -> None:
        self.left, self.plain, self.depth = work, plain, 0


_BUDGET: ContextVar[Budget] = ContextVar("budget")


def render_within(template: Any, values: Mapping[str, object], *, plain: bool, work: int = WORK) -> str:
    """The text of a template. Raises LimitError, NoTextError, and what Jinja and its filters raise."""
    more = 0
    with contextlib.suppress(LimitError):
        more = WORK_OF_INPUT * _weight(values, 64 * WORK)
    token = _BUDGET.set(Budget(work + more, plain=plain))
    try:
        return text_of(template.render(values))
    finally:
        _BUDGET.reset(token)


def spend(work: int) -> None:
    """Pay for work before it is done. Raises LimitError where nothing is left."""
    budget = _BUDGET.get()
    budget.left -= max(1, work)
    if budget.left < 0:
        raise LimitError


def weigh(value: object) -> int:
    """Characters that a value would have when it is written down, as far as there is budget for it."""
    return _weight(value, _BUDGET.get().left)


def _weight(value: object, most: int) -> int:
    total, level, inside = 0, 0, [value]
    while inside:
        deeper: list[object] = []
        for one in inside:
            if isinstance(one, str):
                total += len(one)
            elif isinstance(one, int):
                total += 1 + one.bit_length() // 3
            elif isinstance(one, Mapping):
                deeper += [*one.keys(), *one.values()]
            elif isinstance(one, range):
                total += ITEM * len(one)
            elif isinstance(one, (list, tuple, set, frozenset, type({}.keys()), type({}.values()), type({}.items()))):
                deeper += one
            total += ITEM
            if total + len(deeper) > most:
                raise LimitError
        inside, level = deeper, level + 1
        if level > DEEPEST and inside:
            raise LimitError("it puts lists into lists without end")
    return total


def shown(value: object) -> str:
    """What ``{{ value }}`` writes. Raises NoTextError for what has no words: a macro, an iterator."""
    if isinstance(value, Undefined):
        return str(value)  # raises, and says what is undefined
    plain = _BUDGET.get().plain
    if plain and value is None:
        return ""
    if plain or isinstance(value, str):
        text = str(value) if isinstance(value, str) else text_of(value)
    elif value is None or isinstance(value, (bool, int, float, list, tuple, Mapping)):
        spend(weigh(value))
        text = str(value)
    else:
        raise NoTextError(f"a value of type {type(value).__name__}")
    spend(len(text))
    return text


@pass_context
def _finalize(context: Context, value: object) -> str:
    """Sees all that is written. That it wants the context keeps Jinja from working out constants when it compiles."""
    return shown(value)


# ---- filters of ours, put in by the parser; templates cannot write a name with a space ---------------------------


@pass_context
def _tick(context: Context, value: Any, cost: int) -> Any:
    spend(cost)
    return value


@pass_context
def _weighed(context: Context, value: Any) -> Any:
    spend(weigh(value))
    return value


@pass_context
def _compared(context: Context, value: Any) -> Any:
    spend(len(value) // 64 if isinstance(value, str) else weigh(value))
    return value


@pass_context
def _joined(context: Context, values: list[Any]) -> str:
    return "".join(shown(value) for value in values)


class _Metered(NodeTransformer):
    """Puts a price on every loop, macro, comparison and list, and refuses what is not known."""

    def __init__(self, environment: PromptEnvironment) -> None:
        self._environment = environment

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        if isinstance(node, (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends, nodes.Block)):
            self._refuse("templates inside templates", node)
        if isinstance(node, (nodes.EvalContextModifier, nodes.ScopedEvalContextModifier)):
            self._refuse("autoescape", node)
        if isinstance(node, nodes.Filter) and node.name not in self._environment.filters:
            self._environment.unknown("filter", node)
        if isinstance(node, nodes.Test) and node.name not in self._environment.tests:
            self._environment.unknown("test", node)
        return super().generic_visit(node, *args, **kwargs)

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:  # noqa: N802 (the visitor's name)
        return nodes.Const(node.data, lineno=node.lineno)

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.iter = _priced(node.iter, "weighed ")
        if node.test is not None:
            node.test = _priced(node.test, "tick ", 3 * STEP)
        return self._counted(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return self._counted(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return self._counted(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _priced(nodes.List(node.nodes, lineno=node.lineno), "joined ")

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.expr = _priced(node.expr, "compared ")
        for operand in node.ops:
            operand.expr = _priced(operand.expr, "compared ")
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _priced(node, "weighed ") if isinstance(node.arg, nodes.Slice) else node

    def visit_List(self, node: nodes.List) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _priced(node, "weighed ")

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _priced(node, "weighed ")

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _priced(node, "weighed ") if node.ctx == "load" else node

    @staticmethod
    def _counted(node: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Node:
        cost = STEP * (1 + sum(1 for child in node.body for _ in child.find_all(nodes.Node)))
        ticked = _priced(nodes.Const(None, lineno=node.lineno), "tick ", cost)
        node.body = [nodes.ExprStmt(ticked, lineno=node.lineno), *node.body]
        return node

    @staticmethod
    def _refuse(what: str, node: nodes.Node) -> None:
        raise TemplateSyntaxError(f"a prompt may not use {what}", node.lineno)


def _priced(node: nodes.Node, name: str, *values: int) -> nodes.Filter:
    args = [nodes.Const(value, lineno=node.lineno) for value in values]
    return nodes.Filter(cast("nodes.Expr", node), name, args, [], None, None, lineno=node.lineno)


# ---- what templates call ----------------------------------------------------------------------------------------


def paid_for(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A filter or test that is paid for, and whose numbers are small."""
    skipped = 1 if hasattr(function, "jinja_pass_arg") else 0
    is_test = TESTS.get(name) is function

    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        first, given = args[:skipped], list(args[skipped:])
        value, others = (given[0] if given else None), [*given[1:], *kwargs.values()]
        spend(STEP + sum(map(weigh, others if name in _UNWEIGHED else [value, *others])))
        if not is_test:
            for other in others:
                _check_number(other)
            given = _prepared(name, given, kwargs)
        result = function(*first, *given, **kwargs)
        if isinstance(result, str):
            spend(len(result))
            return str(result)  # no Markup: prompts are not HTML
        return result

    return guarded


def _prepared(name: str, given: list[Any], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments of a filter, after what it will make of them was paid for."""
    value = given[0] if given else ""
    if name == "join":
        joint = given[1] if len(given) > 1 else kwargs.get("d", "")
        items = list(value)
        spend(weigh(items) + len(items) * weigh(joint))
        return [items, *given[1:]]
    if name == "string":
        return [shown(value)]
    if name == "format":
        _check_percent(value, (given[1:], kwargs))
    elif name == "replace" and len(given) > 2:
        text, old, new = (shown(one) for one in given[:3])
        spend(text.count(old) * len(new))
    elif name == "indent":
        width = given[1] if len(given) > 1 else kwargs.get("width", 4)
        spend((1 + str(value).count("\n")) * (len(width) if isinstance(width, str) else WIDEST))
    elif name == "trim" and isinstance(value, str):
        spend(len(value) * weigh([*given[1:], *kwargs.values()]) // 64)
    elif name == "sum" and not isinstance(given[2] if len(given) > 2 else kwargs.get("start", 0), (int, float)):
        raise LimitError("the filter 'sum' adds numbers only")
    elif name == "tojson":
        spend(weigh(value) * DEEPEST * (1 + int(given[1] if len(given) > 1 else kwargs.get("indent") or 0)))
    return given


def _check_number(value: object) -> None:
    if isinstance(value, (int, float)) and not -WIDEST <= value <= WIDEST:
        raise LimitError(f"it gives a filter or method the number {_short(value)}; {WIDEST} is the largest")


def _short(value: object) -> str:
    return str(value)[:20] if not isinstance(value, int) or value.bit_length() < 64 else "of many digits"


def _check_percent(form: object, values: object) -> None:
    """Before ``"%s" % values``: a width would make a text of any length."""
    if not isinstance(form, str):
        return
    signs = form.count("%")
    longest = max((int(digits) for digits in _numbers(form)), default=0) if signs else 0
    if signs and ("*" in form or longest > WIDEST):
        raise LimitError("it formats with a width that is too large")
    spend(len(form) + signs * (longest + weigh(values)))


def _numbers(text: str) -> list[str]:
    return "".join(one if one in "0123456789" else " " for one in text[:100_000]).split()


class _Formatter(SandboxedFormatter):
    """``str.format`` whose widths are small and whose values are paid for."""

    def convert_field(self, value: Any, conversion: Any) -> Any:
        spend(weigh(value))
        return super().convert_field(value, conversion)

    def format_field(self, value: Any, format_spec: str) -> str:
        for digits in _numbers(format_spec):
            if len(digits) > 4 or int(digits) > WIDEST:
                raise LimitError("it formats with a width that is too large")
        text = str(super().format_field(value, format_spec))
        spend(len(text))
        return text


class _Format:
    """``text.format`` or ``text.format_map``, inside the sandbox."""

    def __init__(self, formatter: _Formatter, text: str, *, mapped: bool) -> None:
        self._formatter, self._text, self._mapped = formatter, text, mapped

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        if self._mapped:
            args, kwargs = (), dict(*args, **kwargs)
        return self._formatter.vformat(self._text, args, kwargs)


class PromptEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with a budget; ``render_within`` sets it."""

    makers: tuple[Callable[..., Any], ...] = MAKERS
    """What a template may call besides its own macros and the methods of its values."""

    def __init__(self) -> None:
        # No autoescape: prompts are not HTML. Constants are worked out when rendered, where there is a budget.
        super().__init__(
            undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False, optimized=False, finalize=_finalize
        )
        self.intercepted_binops = frozenset(["+", "-", "*", "/", "//", "**", "%"])
        del self.globals["lipsum"]
        self.filters = {name: paid_for(FILTERS[name], name) for name in _FILTERS}
        self.filters |= {"tick ": _tick, "weighed ": _weighed, "compared ": _compared, "joined ": _joined}
        known: dict[str, Any] = dict(TESTS)
        self.tests = {name: paid_for(test, name) for name, test in known.items()}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = _Metered(self).visit(super()._parse(source, name, filename))
        assert isinstance(tree, nodes.Template)
        return tree

    def unknown(self, kind: str, node: nodes.Filter | nodes.Test) -> None:
        """A filter or test that is not known. Raises TemplateSyntaxError."""
        raise TemplateSyntaxError(f"a prompt may not use the {kind} {node.name!r}", node.lineno)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() + right.bit_length() if operator == "*" else left.bit_length() * max(0, right)
            if bits > BITS:
                raise LimitError("it makes a number of thousands of digits")
        elif operator == "*":
            times = next((one for one in (left, right) if isinstance(one, int)), 1)
            spend((weigh(left) + weigh(right)) * max(1, times))
        elif operator == "%":
            _check_percent(left, right)
        else:
            spend(weigh(left) + weigh(right))
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        bound = isinstance(value, (types.MethodType, types.BuiltinMethodType))
        if not bound or value.__name__ not in ("format", "format_map") or not isinstance(value.__self__, str):
            return None
        return _Format(_Formatter(self), str(value.__self__), mapped=value.__name__ == "format_map")

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        budget = _BUDGET.get()
        given = {key: value for key, value in kwargs.items() if key not in _HIDDEN}
        spend(STEP + weigh(args) + weigh(given))
        if isinstance(__obj, (types.MethodType, types.BuiltinMethodType)):
            args = __self._checked(__obj, args, given)
        elif not isinstance(__obj, (Macro, LoopContext, Undefined, Cycler, Joiner, _Format)) and not any(
            __obj is maker for maker in __self.makers
        ):
            raise SecurityError(f"a prompt may not call a value of type {type(__obj).__name__}")
        if budget.depth >= DEEPEST:
            raise LimitError("it calls macros or loops inside themselves without end")
        budget.depth += 1
        try:
            result = super().call(__context, __obj, *args, **kwargs)
        finally:
            budget.depth -= 1
        spend(weigh(result))
        return result

    @staticmethod
    def _checked(method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """The arguments of a method that is known, after what it will make of them was paid for."""
        own, name = method.__self__, method.__name__
        if not any(isinstance(own, kind) and name in names for kind, names in _METHODS):
            raise SecurityError(f"a prompt may not call {name!r} of a value of type {type(own).__name__}")
        if not isinstance(own, str):
            return args
        spend(len(own))
        for value in [*args, *kwargs.values()]:
            _check_number(value)
        if name == "join" and args:
            items = list(args[0])
            spend(weigh(items) + len(items) * len(own))
            return (items, *args[1:])
        if name == "replace" and len(args) > 1 and all(isinstance(one, str) for one in args[:2]):
            spend(own.count(args[0]) * len(args[1]))
        elif name == "expandtabs":
            spend(own.count("\t") * WIDEST)
        elif name in _SLOW:
            spend(len(own) * weigh([*args, *kwargs.values()]) // 64)
        return args
