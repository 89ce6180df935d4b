"""Prompts: the text of a row inside a Jinja template, rendered in a sandbox, always.

Four styles for a labelled task (``question``, ``options``, ``bare``, ``named``), or a template of the task's own.
A prompt ends in ``Answer:`` and the target is a space and the label's text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from jinja2 import Template, TemplateError, TemplateSyntaxError, meta

from amlora_dist.config.schema import did_you_mean
from amlora_dist.digests import value_digest
from amlora_dist.errors import Fault, UserError
from amlora_dist.tasks.named_fields import unknown_fields
from amlora_dist.tasks.sandbox import LimitError, PromptEnvironment, render_within
from amlora_dist.tasks.texts import NoTextError

if TYPE_CHECKING:
    from amlora_dist.tasks.sources import Row
    from amlora_dist.tasks.task import PromptStyle, TaskSpec

BANK_TEMPLATE = "{{ text }}\n{% if question %}{{ question }}\n{% endif %}Answer:"
"""Inference without a task: the text, and a question if the caller has one. Equals style ``question``, or ``bare``."""

STYLES: dict[str, str] = {
    "question": BANK_TEMPLATE,
    "options": "{{ text }}\n{% if question %}{{ question }}\n{% endif %}Options: {{ options | join(', ') }}\nAnswer:",
    "bare": "{{ text }}\nAnswer:",
    "named": "Task: {{ kind }}\nDataset: {{ task }}\n" + BANK_TEMPLATE,
}

CHAT_STYLES: dict[str, str] = {
    "question": "{{ text }}{% if question %}\n{{ question }}{% endif %}",
    "options": "{{ text }}{% if question %}\n{{ question }}{% endif %}\nOptions: {{ options | join(', ') }}",
    "bare": "{{ text }}",
    "named": "Task: {{ kind }}\nDataset: {{ task }}\n{{ text }}{% if question %}\n{{ question }}{% endif %}",
}
"""The same in the user's turn of a chat template, which says itself where the answer begins."""
BANK_CHAT_TEMPLATE = CHAT_STYLES["question"]

VARIABLES = ("text", "fields", "question", "options", "task", "kind")
"""What a template may read."""

# Text of rows is a variable, never part of a template, so it is not evaluated.
_SANDBOX = PromptEnvironment()


class PromptTemplate:
    """A template and all that is constant in it for one task.

    Args:
        source: Jinja. Variables: ``text`` (all fields, markers applied), ``fields`` (by name), ``question``,
            ``options`` (label texts), ``task``, ``kind``.
        question, options, task, kind: values of those variables.
        leaks_task: prompts made by it name the task (style ``named``) to the model; a router that reads the text alone does
            not see it.

    Raises:
        UserError: the template is not valid Jinja.
    """

    def __init__(
        self,
        source: str,
        *,
        question: str | None = None,
        options: Sequence[str] = (),
        task: str = "",
        kind: str = "",
        leaks_task: bool = False,
    ) -> None:
        self.source = source
        self.leaks_task = leaks_task
        self._constants = {"question": question, "options": list(options), "task": task, "kind": kind}
        self._template = compile_template(source, where=f"prompt template of {task or 'the bank'}")

    @property
    def question(self) -> str | None:
        """The question it asks, if any."""
        question = self._constants["question"]
        return question if isinstance(question, str) else None

    @property
    def digest(self) -> str:
        """sha256 over the source and those constants that it can read."""
        read = {name: value for name, value in self._constants.items() if name in self.source}
        return value_digest({"source": self.source, **read})

    def render(self, row: Row, *, text: str | None = None) -> str:
        """The prompt of a row; ``text`` in place of the row's own, where it had to be cut."""
        return self.render_text(row.text if text is None else text, fields=row.fields)

    def render_text(self, text: str, *, question: str | None = None, fields: Mapping[str, str] | None = None) -> str:
        """The prompt of a text without a row; ``question`` in place of the template's own.

        Raises:
            UserError: the template reads a variable that is not there, or does what the sandbox forbids.
        """
        values = {**self._constants, "text": text, "fields": dict(fields or {})}
        if question is not None:
            values["question"] = question
        return render(self._template, values, where=f"prompt template of {self._constants['task'] or 'the bank'}")


def template_for(spec: TaskSpec, style: PromptStyle | None = None, *, paraphrase: int | None = None) -> PromptTemplate:
    """The template of a task.

    Args:
        spec: the task.
        style: default: the task's own, then ``question``. A task with a template of its own has that in every style.
        paraphrase: index into ``prompt.paraphrases``, in place of the question (scoring with unseen paraphrases).

    Raises:
        UserError: unknown style, no such paraphrase, style ``options`` for free text.
    """
    style = style or spec.prompt_style or "question"
    if style not in STYLES:
        raise UserError(f"task {spec.name!r}: unknown prompt style {style!r}; known: {', '.join(STYLES)}")
    if style == "options" and spec.free_text and spec.prompt.template is None:
        raise UserError(f"task {spec.name!r}: prompt_style options needs labels, but its answers are free text")
    question = spec.prompt.question
    if paraphrase is not None:
        if not 0 <= paraphrase < len(spec.prompt.paraphrases):
            raise UserError(
                f"task {spec.name!r}: no paraphrase {paraphrase}; prompt.paraphrases has {len(spec.prompt.paraphrases)}"
            )
        question = spec.prompt.paraphrases[paraphrase]
    own = spec.prompt.template
    return PromptTemplate(
        (CHAT_STYLES if spec.chat else STYLES)[style] if own is None else own,
        question=question,
        options=spec.label_texts,
        task=spec.name,
        kind=spec.kind,
        leaks_task=style == "named" and own is None,
    )


def template_faults(spec: TaskSpec) -> list[Fault]:
    """What can be known of a task's templates to be wrong without its rows: Jinja, names of variables, no row in them."""
    faults = []
    own = spec.prompt.template
    if own is None:
        try:
            template_for(spec, spec.prompt_style)
        except UserError as error:
            faults.append(Fault("prompt_style", repr(spec.prompt_style), "a style that the task can have", str(error)))
    elif (wrong := _compile_fault(own)) is not None:
        faults.append(Fault("prompt.template", *wrong))
    else:
        read = variables_of(own) - _SANDBOX.globals.keys()
        known = ", ".join(VARIABLES)
        guarded = "defined" in own or "default" in own
        for name in sorted(read - {*VARIABLES}) if not guarded else ():
            hint = did_you_mean(name, VARIABLES)
            faults.append(Fault("prompt.template", f"the variable {name!r}", f"one of {known}", hint))
        if (limit := _endless(own, spec)) is not None:
            faults.append(Fault("prompt.template", _short(own), "a prompt that is made in few steps", limit))
        faults += unknown_fields(own, spec)
        if not read & {"text", "fields"}:
            faults.append(Fault("prompt.template", f"no text of a row in {_short(own)}", "{{ text }} somewhere in it"))
    values = [(place, part.value) for place, part in enumerate(spec.columns.text) if part.value is not None]
    read = {name for _, value in values for name in variables_of(value)} - _SANDBOX.globals.keys()
    constant = len(values) == len(spec.columns.text) and not read
    for place, value in values:
        if (wrong := _compile_fault(value)) is not None:
            faults.append(Fault(f"columns.text[{place}].value", *wrong))
        elif constant:
            hint = f"put the expression in braces: {{{{ {value} }}}}" if "{" not in value else ""
            faults.append(Fault(f"columns.text[{place}].value", _short(value), "a template that reads a column", hint))
    return faults


def _endless(source: str, spec: TaskSpec) -> str | None:
    """Why a template takes too long, or makes too much, for a text of one word; None where it does not."""
    columns = {part.column or part.marker.lower(): "text" for part in spec.columns.text}
    values = {"text": "text", "fields": columns, "question": "text", "options": spec.label_texts, "task": "x", "kind": "x"}
    try:
        render_within(compile_template(source, where=""), values, plain=False)
    except LimitError as error:
        return str(error)
    except (NoTextError, *_FAILURES):
        return None  # of what this text and these fields are not
    return None


def _compile_fault(source: str) -> tuple[str, str, str] | None:
    """Found, expected and fix of a template that cannot be compiled."""
    try:
        compile_template(source, where="")
    except UserError as error:
        return _short(source), "Jinja", str(error).partition("expected Jinja (")[2].removesuffix("); fix it")
    return None


def _short(source: str) -> str:
    return repr(source if len(source) <= 60 else f"{source[:57]}...")


def compile_template(source: str, *, where: str) -> Template:
    """A sandboxed template. Raises UserError where it is not valid Jinja, or uses what prompts may not."""
    try:
        return _compiled(source)
    except TemplateSyntaxError as error:
        reason = f"line {error.lineno}: {error.message}"
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError):
        # Of Python, which compiles what Jinja makes: loops in loops, brackets in brackets, numbers of 5,000 digits.
        reason = "too much of it inside each other, or too long a number"
    raise UserError(f"{where}: found {_short(source)}, expected Jinja ({reason}); fix it")


@lru_cache(maxsize=256)
def _compiled(source: str) -> Template:
    return _SANDBOX.from_string(source)


def variables_of(source: str) -> set[str]:
    """Variables that a template reads from outside; none where it is not valid."""
    try:
        return meta.find_undeclared_variables(_SANDBOX.parse(source))
    except (TemplateSyntaxError, SyntaxError, ValueError, OverflowError, RecursionError, MemoryError):
        return set()


def render(template: Template, values: Mapping[str, object], *, where: str) -> str:
    """Text of a template, in bounded time, memory and depth.

    Raises:
        UserError: undefined variables, what the sandbox forbids, what is too much (``sandbox.LimitError``), a text that
            holds half of a character.
    """
    try:
        return render_within(template, values, plain=False)
    except NoTextError as error:
        raise UserError(f"{where}: found {error}, expected text; fix the template or the text") from None
    except _FAILURES as error:
        raise UserError(f"{where}: {_reason(error)}; fix the template") from None


def render_value(template: Template, values: Mapping[str, object], *, where: str) -> str:
    """Text of a template over a row's columns, which may write texts and numbers only; nothing (None) is no text.

    Raises:
        NoTextError: it writes a list, a dictionary or another value that is no text.
        UserError: as ``render``.
    """
    try:
        return render_within(template, values, plain=True)
    except NoTextError:
        raise
    except _FAILURES as error:
        raise UserError(f"{where}: {_reason(error)}; fix the template") from None


_FAILURES = (
    TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError,
)  # fmt: skip


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it goes too deep into itself"
    if "int_max_str_digits" in str(error):
        return "it makes a text of a number of thousands of digits"
    return " ".join(str(error.args[-1] if error.args else error).split())[:300] or type(error).__name__
