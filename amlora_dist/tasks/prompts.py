"""Prompts: the text of a row inside a Jinja template, rendered in a sandbox, always.

Four styles for a labelled task (``question``, ``options``, ``bare``, ``named``), or a template of the task's own.
A prompt ends in ``Answer:`` and the target is a space and the label's text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from jinja2 import StrictUndefined, Template, TemplateError, TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from amlora_dist.digests import value_digest
from amlora_dist.errors import UserError

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

# No autoescape: prompts are not HTML. Text of rows is a variable, never part of a template, so it is not evaluated.
_SANDBOX = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)


class PromptTemplate:
    """A template and all that is constant in it for one task.

    Args:
        source: Jinja. Variables: ``text`` (all fields, markers applied), ``fields`` (by name), ``question``,
            ``options`` (label texts), ``task``, ``kind``.
        question, options, task, kind: values of those variables.
        leaks_task: prompts made by it name the task (style ``named``), so that routing is trivial.

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
        paraphrase: index into ``prompt.paraphrases``, in place of the question (scoring with unseen wordings).

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
        STYLES[style] if own is None else own,
        question=question,
        options=spec.label_texts,
        task=spec.name,
        kind=spec.kind,
        leaks_task=style == "named" and own is None,
    )


def compile_template(source: str, *, where: str) -> Template:
    """A sandboxed template. Raises UserError where it is not valid Jinja."""
    try:
        return _SANDBOX.from_string(source)
    except TemplateSyntaxError as error:
        found = repr(source if len(source) <= 60 else f"{source[:57]}...")
        raise UserError(f"{where}: found {found}, expected Jinja (line {error.lineno}: {error.message}); mend it") from None


def render(template: Template, values: Mapping[str, object], *, where: str) -> str:
    """Text of a template. Raises UserError for undefined variables and what the sandbox forbids."""
    try:
        return template.render(values)
    except (TemplateError, TypeError, ZeroDivisionError, OverflowError) as error:
        raise UserError(f"{where}: {error}") from None
