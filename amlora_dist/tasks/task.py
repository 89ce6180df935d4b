"""A task as data: where its rows are, which columns count, how a prompt is made of them, what the answers are.

One YAML of about 25 lines is one task (``specs/*.yaml``). This module reads and checks such files and finds tasks by
name; ``sources`` reads their rows, ``prompts`` renders them. Nothing here imports torch, transformers or datasets.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, model_validator
from pydantic.dataclasses import dataclass

from amlora_dist.config.schema import check, meant
from amlora_dist.config.strict_yaml import Document, read_document
from amlora_dist.errors import FaultsError, UserError
from amlora_dist.tasks.texts import TAKEN, NoTextError, text_of

STRICT_KEYS = ConfigDict(extra="forbid")
SPECS = Path(__file__).with_name("specs")
SPLITS = ("train", "dev", "test")

PromptStyle = Literal["question", "options", "bare", "named"]
PromptForm = Literal["chat", "classic", "auto"]
Metric = Literal[
    "accuracy", "exact_match", "rouge_l", "token_f1", "json_fields", "same_text", "answer_letter", "code_similarity", "sari"
]
Limit = Annotated[int, Field(ge=1)]
UNSET = -1
"""A default that hangs on other keys, until the task was checked."""


def plain_value(value: object) -> str:
    """A label as data files hold it (``1``, ``1.0``, ``true``, ``" World "``) in the one form that is compared.

    Raises:
        NoTextError: it is no text or number.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return text_of(value).strip()


def _label_value(value: object) -> str:
    try:
        return plain_value(value)
    except NoTextError:
        raise ValueError(TAKEN) from None


def _text_field(value: object) -> object:
    return {"column": value} if isinstance(value, str) else value


def _text_fields(value: object) -> object:
    return [value] if isinstance(value, (str, dict)) else value


def _columns(value: object) -> object:
    return {"auto": True} if value == "auto" else value


def _label(value: object) -> object:
    return {"value": value, "text": _label_value(value)} if isinstance(value, (str, int, float)) else value


@dataclass(config=STRICT_KEYS, kw_only=True, slots=True)
class TextField:
    """One part of a row's text. The parts are below each other, one line each at least."""

    column: str | None = None
    """The column it is read from."""
    value: str | None = None
    """Instead of ``column``: a Jinja template over all columns of the row, such as ``{{ title }} ({{ year }})``."""
    marker: str = ""
    """Word in front of the part, followed by a colon: ``Title`` gives ``Title: ...``."""
    neutral: bool = False
    """The marker says nothing about the task (``sentence 1``) and stays under ``field_markers: strip``."""

    @model_validator(mode="after")
    def _one_way(self) -> TextField:
        if (self.column is None) == (self.value is None):
            raise ValueError("give either `column` or `value`")
        return self


@dataclass(config=STRICT_KEYS, kw_only=True, slots=True)
class Columns:
    """Which columns of the source make a row."""

    text: Annotated[list[Annotated[TextField, BeforeValidator(_text_field)]], BeforeValidator(_text_fields)] = Field(
        default_factory=list
    )
    """A column name, or the parts of the text in order."""
    label: str | None = None
    """Column of the label, for tasks with ``labels``."""
    answer: str | None = None
    """Column of the free-text answer, for tasks without ``labels``."""
    messages: str | None = None
    """Column of a conversation: a list of turns with role and content. This and what follows replace ``text``."""
    conversations: str | None = None
    """The same in ShareGPT's words (``from``, ``value``)."""
    prompt: str | None = None
    """With ``completion``: the request (a text, or messages) and the answer to it."""
    completion: str | None = None
    """The answer to ``prompt``."""
    instruction: str | None = None
    """With ``output``: what was asked, with ``input`` below it, and the answer."""
    input: str | None = None
    """What the instruction is about, if a column has it."""
    output: str | None = None
    """The answer to ``instruction``."""
    auto: Literal[True] | None = None
    """``columns: auto``: whichever of these forms of conversation the rows have."""

    @property
    def conversational(self) -> bool:
        """Rows are conversations."""
        return not self.text and self.label is None and self.answer is None

    @model_validator(mode="after")
    def _one_form(self) -> Columns:
        forms = [
            bool(self.text or self.label or self.answer), self.messages is not None, self.conversations is not None,
            self.prompt is not None or self.completion is not None,
            any(name is not None for name in (self.instruction, self.input, self.output)), self.auto is not None,
        ]  # fmt: skip
        if not any(forms) or (forms[0] and not self.text):
            others = "`messages`, `conversations`, `prompt` and `completion`, `instruction` and `output`, or `auto`"
            raise ValueError(f"`text` names the columns of a text (or give those of conversations: {others})")
        if sum(forms) > 1:
            raise ValueError("one form of rows: `text`, `messages`, `conversations`, `prompt` or `instruction`")
        if (self.prompt is None) != (self.completion is None):
            raise ValueError("`prompt` and `completion` go together")
        if forms[4] and (self.instruction is None or self.output is None):
            raise ValueError("`instruction` and `output` go together (and `input`, if there is one)")
        return self


@dataclass(config=STRICT_KEYS, kw_only=True, slots=True)
class Label:
    """One class."""

    value: Annotated[str, BeforeValidator(_label_value)]
    """As it is in the data; two values may share a text."""
    text: Annotated[str, BeforeValidator(_label_value), Field(min_length=1)]
    """The verbaliser: what the model answers, of one or many tokens."""


@dataclass(config=STRICT_KEYS, kw_only=True, slots=True)
class SourceSpec:
    """Where the rows are."""

    kind: Literal["hub", "files", "builtin", "data_dir"]
    """``hub``: a data set of the Hugging Face Hub; ``files``: local files; ``builtin``: rows of this package; ``data_dir``:
    files below the run's ``data_dir``, as the authors of a suite give them away."""
    repository: str | None = None
    """Hub data set id, ``owner/name``."""
    revision: str | None = None
    """Commit or reference of the Hub data set; never left open."""
    config: str | None = None
    """Configuration (subset) of the Hub data set."""
    files: str | None = None
    """Of a Hub data set: the file in it (or a glob) that holds the rows; the splits cut it, as in ``train[:80%]``."""
    format: Literal["auto", "jsonl", "csv", "parquet"] = "auto"
    """Of local files; ``auto`` goes by the file's suffix."""
    records: str | None = Field(default=None, pattern=r"^[^.\s]+(\.[^.\s]+)*$")
    """Of local ``.json`` files that hold one object: the keys that lead to its list of rows, such as ``data.items``."""
    max_read: Limit | None = None
    """Rows read of each split at most, evenly spaced over it: keeps sets of millions of rows affordable."""
    mirror: str | None = None
    """Folder below ``data_dir`` that stands in for a Hub data set; default: the task's name."""

    @model_validator(mode="after")
    def _hub_is_pinned(self) -> SourceSpec:
        if self.kind == "hub" and not (self.repository and self.revision):
            raise ValueError("a Hub source needs `repository` and a pinned `revision`")
        if self.files is not None and self.kind != "hub":
            raise ValueError("`files` is for a Hub source")
        if self.records is not None and (self.kind not in ("files", "data_dir") or self.format not in ("auto", "jsonl")):
            raise ValueError("`records` is for local files that are JSON")
        return self


@dataclass(config=STRICT_KEYS, kw_only=True, slots=True)
class Splits:
    """Names of Hub splits, or paths / globs of local files (relative to the task's YAML)."""

    train: str
    """Rows that are learned."""
    test: str
    """Rows that are scored, and never learned."""
    dev: str | None = None
    """Left out: ``dev_rows`` rows are held out of ``train``, chosen by their content."""
    dev_rows: int = Field(default=200, ge=1)
    """How many are held out without ``dev``; at most a fifth of the training rows."""


@dataclass(config=STRICT_KEYS, kw_only=True, slots=True)
class SuiteFiles:
    """A Hub task's rows as the authors of its suite give them away: files below the run's ``data_dir``."""

    splits: Splits
    """Paths below ``data_dir``."""
    columns: Annotated[Columns, BeforeValidator(_columns)]
    records: str | None = None
    """As of ``source``."""


@dataclass(config=STRICT_KEYS, kw_only=True, slots=True)
class PromptSettings:
    """What is around the text."""

    question: str | None = None
    """The natural question that follows the text; without one, style ``question`` equals ``bare``."""
    paraphrases: list[str] = Field(default_factory=list)
    """Paraphrases of the question, for scoring with prompts that training never saw."""
    template: str | None = None
    """A Jinja template of the task's own, in place of the four styles."""
    format: PromptForm | None = None
    """``chat``: the model's own chat template, the template above in the user's last turn. ``classic``: text, question,
    ``Answer:``. ``auto``: chat where the model has a template and answers are free text. Default: ``auto`` for rows that are
    conversations, else ``classic``."""
    train_on: Literal["last", "all"] | None = None
    """Of conversations in the chat format: which of the assistant's turns are learned; default ``last``."""
    system: str | None = None
    """In the chat format: the system's turn of conversations that have none."""


@dataclass(config=STRICT_KEYS, kw_only=True, slots=True)
class TaskDefaults:
    """The ``task_defaults:`` section of a run: what holds for every task that does not say otherwise."""

    max_train: Limit | None = None
    """At most this many training rows; a label-balanced sample that depends on seed and rows, not on their order."""
    max_dev: Limit | None = None
    """At most this many dev rows, drawn likewise."""
    max_test: Limit | None = None
    """At most this many test rows, drawn likewise."""
    prompt_style: PromptStyle = "question"
    """``question``: the text and the task's question; ``options``: with the labels listed; ``bare``: the text alone;
    ``named``: with the task's and data set's names, which tells the adapters the task; the router reads the text alone
    (with ``prompt_format: 1`` the names as well, which makes routing trivial). Reports say so."""
    field_markers: Literal["strip", "keep"] = "strip"
    """``strip`` takes ``Title:``, ``Text:``, ``Question:`` away, which tell tasks apart; ``keep`` is flagged."""
    max_length: int = Field(default=512, ge=8)
    """Tokens of the prompt; the text is cut to fit, never the question."""
    on_bad_row: Literal["error", "skip"] = "error"
    """A row that cannot be used ends the run before anything trains, or is left out and counted in the report."""


@dataclass(config=STRICT_KEYS, kw_only=True, slots=True)
class TaskSpec:
    """One task. The settings at the end override the run's ``task_defaults``.

    ``resolve_task`` fills them in.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]*(/[a-z0-9][a-z0-9_.-]*)?$", max_length=80)
    """What the task is called in runs, banks and tables; perhaps a group and a name, such as ``helpdesk/chat_mood``."""
    version: int = Field(ge=1)
    """Raised whenever rows, labels or prompts of the task change."""
    kind: str
    """What sort of work it is, in a word or two; shown by the ``named`` prompt style."""
    description: str = ""
    """A line about the task, for people."""
    source: SourceSpec
    splits: Splits
    columns: Annotated[Columns, BeforeValidator(_columns)]
    """Which columns make a row, or ``auto``: a form of conversation, recognised by its columns."""
    in_data_dir: SuiteFiles | None = None
    """Of a Hub source: what replaces it, its splits and its columns in a run with ``data_dir``."""
    prompt: PromptSettings = Field(default_factory=PromptSettings)
    labels: Annotated[list[Annotated[Label, BeforeValidator(_label)]], Field(min_length=2)] | Literal["auto"] | None = None
    """Left out: answers are free text. ``auto``: what the training rows have, underscores as spaces (``auto_labels``)."""
    metric: Metric | None = None
    """Default: ``accuracy`` with labels, ``rouge_l`` for conversations, else ``exact_match``."""
    max_answer_tokens: int = Field(default=UNSET, ge=1)
    """Of free text; labels bring their own length. Default 32, of conversations 512."""
    seed: int | None = None
    """Of the sample that row limits take; default: the run's seed."""
    max_train: Limit | None = None
    max_dev: Limit | None = None
    max_test: Limit | None = None
    prompt_style: PromptStyle | None = None
    field_markers: Literal["strip", "keep"] | None = None
    max_length: Annotated[int, Field(ge=8)] | None = None
    on_bad_row: Literal["error", "skip"] | None = None
    origin: str = ""
    """File the task was read from, for messages."""

    @model_validator(mode="after")
    def _labels_and_metric_agree(self) -> TaskSpec:
        conversational = self.columns.conversational
        if self.metric is None:
            free = "rouge_l" if conversational else "exact_match"
            self.metric = "accuracy" if self.labels is not None else free  # type: ignore[assignment]
        if self.max_answer_tokens == UNSET:
            self.max_answer_tokens = 512 if conversational else 32
        if not conversational and self.prompt.train_on is not None:
            raise ValueError("`prompt.train_on` is for rows that are conversations")
        if self.prompt.format in (None, "classic") and not conversational and self.prompt.system is not None:
            raise ValueError("`prompt.system` is for `prompt.format: chat`")
        if self.labels is None:
            if self.metric == "accuracy":
                others = ", ".join(name for name in get_args(Metric) if name != "accuracy")
                raise ValueError(f"metric `accuracy` needs `labels`; free text has {others}")
            if conversational:
                return self
            if self.columns.answer is None or self.columns.label is not None:
                raise ValueError("a task without `labels` needs `columns.answer` (and no `columns.label`)")
            return self
        if self.metric != "accuracy":
            raise ValueError(f"a task with `labels` has metric `accuracy`, found {self.metric!r}")
        if self.columns.label is None or self.columns.answer is not None:
            raise ValueError("a task with `labels` needs `columns.label` (and no `columns.answer`)")
        if self.labels == "auto":
            return self
        values = [label.value for label in self.labels]
        if doubled := sorted({value for value in values if values.count(value) > 1}):
            raise ValueError(f"label values are there twice: {', '.join(doubled)}")
        if len(self.label_texts) < 2:
            raise ValueError("labels need at least two different texts")
        return self

    @property
    def free_text(self) -> bool:
        """Answers are free text, not labels."""
        return self.labels is None

    @property
    def chat(self) -> bool:
        """Prompts are of the model's own chat template."""
        return self.prompt.format == "chat"

    @property
    def open_format(self) -> bool:
        """Whether the model's tokenizer has yet to say which format its prompts have (``chat.settled``)."""
        return self.prompt.format == "auto" or (self.prompt.format is None and self.columns.conversational)

    @property
    def known_labels(self) -> list[Label]:
        """The labels; empty for free text, and of ``labels: auto`` until the rows were read."""
        return self.labels if isinstance(self.labels, list) else []

    @property
    def label_texts(self) -> list[str]:
        """The different verbalisers, in order; empty for free text, and of ``labels: auto`` until the rows were read."""
        return list(dict.fromkeys(label.text for label in self.known_labels))

    @property
    def leaks(self) -> list[str]:
        """Settings of this task by which prompts (``named``) or texts (``keep``) give away which task they belong to;
        reports name them."""
        found = ["prompt_style: named"] if self.prompt_style == "named" and self.prompt.template is None else []
        stripped = any(part.marker and not part.neutral for part in self.columns.text)
        return found + (["field_markers: keep"] if self.field_markers == "keep" and stripped else [])

    def to_mapping(self) -> dict[str, Any]:
        """JSON-able form without ``origin``; ``read_mapping`` takes it back."""
        mapping: dict[str, Any] = _ADAPTER.dump_python(self, mode="json", exclude={"origin"}, exclude_none=True)
        return mapping


_ADAPTER: TypeAdapter[TaskSpec] = TypeAdapter(TaskSpec)
_OVERRIDES = [field.name for field in dataclasses.fields(TaskDefaults)]


@cache
def _builtin_files() -> dict[str, Path]:
    return {path.relative_to(SPECS).with_suffix("").as_posix(): path for path in sorted(SPECS.rglob("*.yaml"))}


def builtin_tasks() -> list[TaskSpec]:
    """The tasks that come with the package, by name."""
    return [read_mapping(read_document(path).data, origin=path) for path in _builtin_files().values()]


def resolve_task(
    ref: str | dict[str, Any], *, data_dir: Path | None = None, base_dir: Path, defaults: TaskDefaults
) -> TaskSpec:
    """Find a task and fill in what the run's defaults say.

    Args:
        ref: a built-in name (``dbpedia``, ``helpdesk/email_route``), the path of a YAML file (relative to
            ``base_dir``), or a mapping ``{task: name or path, ...}`` whose other keys override the file's; a mapping
            without ``task`` is a whole task.
        data_dir: folder of local mirrors; a Hub task whose folder is missing there is an error at once.
        base_dir: folder of the run's YAML.
        defaults: the run's ``task_defaults``.

    Raises:
        UserError: unknown name (with what was probably meant), missing mirror.
        FaultsError: unreadable file; every key that is unknown, doubled or has a wrong value.
    """
    overrides = dict(ref) if isinstance(ref, dict) else {}
    name = overrides.pop("task", None) if isinstance(ref, dict) else ref
    if name is None:
        spec = read_mapping(overrides, origin=base_dir / "(task in the run's file)")
    else:
        path = _find(str(name), base_dir)
        document = read_document(path)
        spec = _overridden(document, overrides, path)
    spec = placed(with_defaults(spec, defaults), data_dir)
    if data_dir is not None and spec.source.kind == "hub":
        mirror_folder(spec, data_dir)
    return spec


def placed(spec: TaskSpec, data_dir: Path | None) -> TaskSpec:
    """The task with the source that its rows have in a run with this ``data_dir``."""
    if data_dir is None or (files := spec.in_data_dir) is None:
        return spec
    source = SourceSpec(kind="data_dir", records=files.records)
    return dataclasses.replace(spec, source=source, splits=files.splits, columns=files.columns, in_data_dir=None)


def with_defaults(spec: TaskSpec, defaults: TaskDefaults) -> TaskSpec:
    """A copy of the task in which the settings that it leaves open are the run's."""
    open_keys = [key for key in _OVERRIDES if getattr(spec, key) is None]
    return dataclasses.replace(spec, **{key: getattr(defaults, key) for key in open_keys})


def mirror_folder(spec: TaskSpec, data_dir: Path) -> Path:
    """Folder that stands in for a Hub data set. Raises UserError where there is none."""
    name = spec.source.mirror or spec.name
    folder = data_dir / name
    if not folder.is_dir():
        there = [path.parent.relative_to(data_dir).as_posix() for path in sorted(data_dir.glob("**/test.jsonl"))]
        raise UserError(
            f"data_dir {data_dir}: no folder {name!r} for task {spec.name!r}{meant(name, there)}; "
            f"it holds {', '.join(there) or 'no task'}: put the mirror there, or fix data_dir"
        )
    return folder


def read_mapping(mapping: dict[str, Any], *, origin: Path) -> TaskSpec:
    """A checked task from a mapping; relative paths of local files become absolute, from the folder of ``origin``.

    Raises:
        FaultsError: every fault of the mapping at once.
    """
    spec, faults = check(TaskSpec, {**mapping, "origin": str(origin)})
    if spec is None:
        raise FaultsError(str(origin), list(faults.values()))
    if spec.source.kind == "files":
        for split in SPLITS:
            if (path := getattr(spec.splits, split)) is not None:
                setattr(spec.splits, split, str((origin.parent / Path(path).expanduser()).absolute()))
    return spec


def _overridden(document: Document, overrides: dict[str, Any], path: Path) -> TaskSpec:
    if document.faults:
        raise FaultsError(document.name, document.faults)
    mapping = _merged(document.data, overrides)
    if "source" in overrides:  # that one, wherever the run's rows are
        mapping.pop("in_data_dir", None)
    elif isinstance(files := mapping.get("in_data_dir"), dict):
        own = {key: overrides[key] for key in ("splits", "columns") if key in overrides}
        mapping["in_data_dir"] = _merged(files, own | overrides.get("in_data_dir", {}))
    source = mapping.get("source")
    if "name" in overrides and isinstance(source, dict):
        # A task under another name (the same data with other labels or prompts, say) keeps its mirror.
        mapping["source"] = {"mirror": document.data.get("name"), **source}
    return read_mapping(mapping, origin=path)


def _find(ref: str, base_dir: Path) -> Path:
    files = _builtin_files()
    if ref in files:
        return files[ref]
    if ref.endswith((".yaml", ".yml")):
        path = base_dir / Path(ref).expanduser()
        if not path.is_file():
            raise UserError(f"task file {path} does not exist; a path begins at the current folder")
        return path
    tails = {name.rpartition("/")[2]: name for name in files}
    near = meant(ref.lower(), [*files, *tails])
    for tail, name in tails.items():
        near = near.replace(f"{tail!r}", f"{name!r}")
    groups = dict.fromkeys(name if "/" not in name else f"{name.partition('/')[0]}/..." for name in files)
    raise UserError(
        f"unknown task {ref!r}{near}; known: {', '.join(groups)} (amlora tasks lists all); or give the path of a task's"
        " .yaml file"
    )


def _merged(base: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in overrides.items():
        inner = out.get(key)
        out[key] = _merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return out
