"""Chat templates of models, rendered as transformers renders them, but in bounded time, memory and depth.

They come with base models, which may come from anybody; transformers' own sandbox forbids what is dangerous, not what is
endless.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError, TemplateRuntimeError, TemplateSyntaxError, Undefined, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser

from amlora_dist.errors import UserError
from amlora_dist.tasks.sandbox import MAKERS, LimitError, PromptEnvironment, paid_for, render_within

WORK = 10_000_000
"""As ``sandbox.WORK``: these templates have many words of their own."""
_UNREADABLE = (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError)
"""Of Python, which compiles what Jinja makes: loops in loops, brackets in brackets, numbers of 5,000 digits."""
_FAILURES = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


def render_chat(source: str, values: Mapping[str, object]) -> str:
    """A conversation by a model's chat template.

    Args:
        source: of the template.
        values: its variables.

    Raises:
        TooMuchError: it takes too many steps for so many turns.
        UserError: it is no template, does what the sandbox forbids, or refuses the conversation.
    """
    try:
        template = _compiled(source)
    except TemplateSyntaxError as error:
        raise UserError(f"the chat template cannot be used: line {error.lineno}: {error.message}") from None
    except _UNREADABLE:
        raise UserError("the chat template cannot be used: too much of it inside each other, or too long a number") from None
    try:
        return render_within(template, values, plain=False, work=WORK)
    except _FAILURES as error:
        kind = TooMuchError if isinstance(error, LimitError) else UserError
        raise kind(f"the chat template refuses the conversation: {_reason(error)}") from None


class TooMuchError(UserError):
    """A template takes too many steps, or makes too long a text, of a conversation."""


@lru_cache(maxsize=16)
def _compiled(source: str) -> Template:
    return ChatEnvironment().from_string(source)


def _reason(error: Exception) -> str:
    return " ".join(str(error.args[0] if error.args else error).split())[:300] or type(error).__name__


def _raise_exception(message: object) -> None:
    raise TemplateRuntimeError(str(message))


def _to_json(
    value: object, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Generation(Extension):
    """``{% generation %}`` says which words are the assistant's; here they are words like others."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """See Jinja."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatEnvironment(PromptEnvironment):
    """The sandbox of prompts with all that transformers lets chat templates do."""

    makers = (*MAKERS, _raise_exception)

    def __init__(self) -> None:
        super().__init__()
        self.trim_blocks = self.lstrip_blocks = True
        self.keep_trailing_newline = False
        self.undefined = Undefined
        self.globals["raise_exception"] = _raise_exception
        self.filters["tojson"] = paid_for(_to_json, "tojson")
        for extension in (_Generation, LoopControlExtension):
            self.add_extension(extension)

    def unknown(self, kind: str, node: nodes.Filter | nodes.Test) -> None:
        """A filter or test that is not known, perhaps in a part for tools: refused where it is reached, as by Jinja."""

        def refuse(*args: object, **kwargs: object) -> None:
            raise SecurityError(f"it uses the {kind} {node.name!r}, which is not known here")

        (self.filters if kind == "filter" else self.tests)[node.name] = refuse
