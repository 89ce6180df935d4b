"""What a bank says of the task behind an adapter, so that it can be used without the task's own files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from amlora_dist.tasks.named_fields import FieldEntry, fields_read, parts_of
from amlora_dist.tasks.prompts import PromptTemplate, template_for
from amlora_dist.tasks.task import Metric

if TYPE_CHECKING:
    from amlora_dist.tasks.task import TaskSpec

_Text = Annotated[str, Field(max_length=20_000)]


@dataclass(config=ConfigDict(extra="forbid"), frozen=True, kw_only=True)
class TaskEntry:
    """Labels and prompt of a task, as training had them. Holds no rows and no places of data."""

    kind: _Text = ""
    description: _Text = ""
    question: _Text | None = None
    labels: Annotated[list[Annotated[str, Field(min_length=1, max_length=2000)]], Field(min_length=2)] | None = None
    """The different verbalisers, in order; None: answers are free text."""
    template: _Text
    """Jinja source of the prompt, rendered in the sandbox."""
    max_length: Annotated[int, Field(ge=8, le=10_000_000)] = 512
    """Tokens of the prompt at most."""
    max_answer_tokens: Annotated[int, Field(ge=1, le=1_000_000)] = 32
    """Of free text; labels bring their own length."""
    chat: bool = False
    """Prompts are of the base model's own chat template; ``template`` is in the user's last turn."""
    system: _Text | None = None
    """In the chat format: the system's turn of conversations that have none."""

    fields: list[FieldEntry] | None = None
    """The parts that its texts are made of, where there are several, one behind a label, or a template that reads them by
    name; None: a text is one part."""
    metric: Metric | None = None
    """Of free text; None: what banks counted by that do not say it, exact match."""

    @property
    def counted_by(self) -> Metric:
        """The metric of the task's answers."""
        return "accuracy" if self.labels is not None else self.metric or "exact_match"

    @property
    def free_text(self) -> bool:
        """Answers are free text, not labels."""
        return self.labels is None

    def prompt(self, task: str, question: str | None = None) -> PromptTemplate:
        """The task's prompt; ``question`` in place of its own."""
        return PromptTemplate(
            self.template,
            question=self.question if question is None else question,
            options=self.labels or [],
            task=task,
            kind=self.kind,
        )


def task_entry(spec: TaskSpec) -> TaskEntry:
    """The entry of a task as its run resolved it."""
    return TaskEntry(
        kind=spec.kind,
        description=spec.description,
        question=spec.prompt.question,
        labels=None if spec.free_text else spec.label_texts,
        template=template_for(spec, spec.prompt_style).source,
        max_length=int(spec.max_length or 512),
        max_answer_tokens=spec.max_answer_tokens,
        chat=spec.chat,
        system=spec.prompt.system,
        fields=_parts(spec),
        metric=spec.metric if spec.free_text and spec.metric != "exact_match" else None,
    )


def _parts(spec: TaskSpec) -> list[FieldEntry] | None:
    parts = parts_of(spec)
    read = spec.prompt.template is not None and fields_read(spec.prompt.template) is not None
    return parts if read or len(parts) > 1 or any(part.label for part in parts) else None
