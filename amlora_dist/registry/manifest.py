"""``manifest.json`` of a bank version, schema version 2: what it holds, how it was made, where each part is stored.

The manifest is read strictly: unknown keys, an unknown schema version, a path that leaves the folder, a bad name or
a digest that is not sha256 are refused, and the manifest's own digest covers all of it. Paths inside a bank are
never taken from the file: they follow from index and task name. Schema version 1, which knew no ``files``, is read too.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from amlora_dist.base_model import identity
from amlora_dist.config.schema import expected_words
from amlora_dist.digests import value_digest
from amlora_dist.errors import BankError
from amlora_dist.evaluation.plain_choice import PlainChoice, Way
from amlora_dist.methods import form_of
from amlora_dist.privacy import public_name
from amlora_dist.quantisation import Quantisation
from amlora_dist.tasks.task_entry import TaskEntry

if TYPE_CHECKING:
    from amlora_dist.base_model import BaseModel

SCHEMA_VERSION = 2
READ = (1, 2)
"""Schema versions that are read."""
FILE = "manifest.json"
ROUTER_FILE = "router.safetensors"
MAX_BYTES = 16 << 20
ALL = "all"
"""Written instead of an adapter's targets when it has every one of ``target_modules``."""

_DIGEST = "_digest"
_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
_UNSAFE = re.compile(r"[^A-Za-z0-9_.-]")
_SCALARS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def check_task_name(name: str) -> str:
    """Letters, digits and ``_ . - + / space``; ``/`` separates a family from a task (``helpdesk/email``)."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+/ -]{0,119}", name):
        raise ValueError("a task name: 1 to 120 letters, digits or _.+-/ and space, starting with a letter or digit")
    if any(part in {"", ".", ".."} for part in name.split("/")):
        raise ValueError("a task name without empty or dotted parts between its slashes")
    return name


def check_relative_path(path: str) -> str:
    """A POSIX path that stays below its root: not absolute, no ``..``, no backslash, no drive, no control character."""
    parts = path.split("/")
    if any(part in {"", ".", ".."} for part in parts) or re.search(r"[\\:\x00-\x1f\x7f]", path) or len(path) > 500:
        raise ValueError(
            "a relative path with forward slashes and without '..', backslashes, ':' or control characters"
        )
    return path


Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
TaskName = Annotated[str, AfterValidator(check_task_name)]
RelativePath = Annotated[str, AfterValidator(check_relative_path)]
ModelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_. -]{0,119}$")]
RunKey = Annotated[str, Field(pattern=r"^[A-Za-z0-9]{1,64}$")]
ModulePath = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*$", max_length=300)]
Targets = Annotated[list[ModulePath], Field(min_length=1)]


def slug(task: str) -> str:
    """The task's name as part of a file name: ``helpdesk/email`` becomes ``helpdesk-email``."""
    return _UNSAFE.sub("-", task)


def adapter_folder(index: int, task: str) -> str:
    """Folder of adapter ``index`` (1-based), relative to the bank: ``adapters/2-helpdesk-email``."""
    return f"adapters/{index}-{slug(task)}"


def statistics_file(index: int, task: str) -> str:
    """File of the statistics of task ``index`` (1-based), relative to the bank."""
    return f"statistics/{index}-{slug(task)}.safetensors"


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class BaseEntry:
    """The base model, which is never stored: ``digest`` is over its files, ``revision`` only says where to look."""

    source: Annotated[str, Field(min_length=1, max_length=500)]
    revision: str | None = None
    digest: Digest
    architecture: Annotated[str, Field(min_length=1, max_length=100)]
    """transformers' ``model_type`` (``llama``, ``t5``)."""
    encoder_decoder: bool = False
    quantisation: Quantisation = "none"
    """How it was quantised while the adapters learned."""

    @property
    def identity(self) -> str:
        """What decides its features (``BaseModel.identity``)."""
        return identity(self.digest, self.quantisation)

    @classmethod
    def of(cls, base: BaseModel) -> BaseEntry:
        """The entry of a model that lies in a folder, which is not in it."""
        return cls(
            source=public_name(base.source),
            revision=base.revision,
            digest=base.digest,
            architecture=base.model_type,
            encoder_decoder=base.encoder_decoder,
            quantisation=base.quantisation,
        )


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class Stored:
    """Where MLflow keeps a part: an artifact path of a run, and the registered model it was first published in."""

    version_of: ModelName
    run: RunKey
    artifact_path: RelativePath


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class FileEntry:
    """A file as it was written."""

    sha256: Digest
    size: Annotated[int, Field(ge=0, le=1 << 44)]
    """Bytes; looked at before a file is fetched."""


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class LearnedTask:
    """One of several tasks that one adapter learned together."""

    task: TaskName
    task_spec: TaskEntry


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class AdapterEntry:
    """One adapter: ``digest`` is ``Adapter.digest()``, over name, rank, alpha and every tensor."""

    index: Annotated[int, Field(ge=1, le=100_000)]
    task: TaskName
    rank: Annotated[int, Field(ge=1, le=65_536)]
    alpha: Annotated[float, Field(gt=0)]
    targets: Targets
    digest: Digest
    training_fingerprint: Digest
    parent: Digest | None = None
    """``parent_digest`` of the bank it was trained on; none for a stage that starts from an empty bank."""
    stored: Stored | None = None
    """None: in this folder only (never published)."""
    task_spec: TaskEntry | None = None
    """Labels and prompt of the task; None when they are not known (an imported adapter)."""
    learned: list[LearnedTask] | None = None
    """Of an adapter of several tasks at once (method ``joint``): each of them, in order."""

    @property
    def folder(self) -> str:
        """Where it lies in the bank's folder."""
        return adapter_folder(self.index, self.task)


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class RouterEntry:
    """The router: what serving needs. ``digest`` is over tensors, names and settings, whatever wrote the file."""

    kind: Annotated[str, Field(pattern=r"^[a-z_]{1,40}$")]
    settings: dict[str, Any]
    digest: Digest
    file: Annotated[str, Field(pattern=rf"^{re.escape(ROUTER_FILE)}$")] = ROUTER_FILE

    @property
    def by_layers(self) -> bool:
        """Whether the adapted layers weigh the adapters themselves, by selectors whose settings these are."""
        return self.kind == "literal"


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class StatisticsEntry:
    """What only the continuation of a bank needs of one task (mean, count, scatter), stored once per stage."""

    index: Annotated[int, Field(ge=1, le=100_000)]
    task: TaskName
    digest: Digest
    stored: Stored | None = None

    @property
    def file(self) -> str:
        """Where it lies in the bank's folder."""
        return statistics_file(self.index, self.task)


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class AccuracyMatrix:
    """R so far: ``accuracy[t][i]`` is the score on ``tasks[i]`` after stage t; row 0 untrained, ``None`` not scored."""

    tasks: list[TaskName] = Field(default_factory=list)
    accuracy: list[list[float | None]] = Field(default_factory=list)
    ranked_accuracy: list[list[float | None]] = Field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("accuracy", "ranked_accuracy"):
            for number, row in enumerate(getattr(self, name)):
                if len(row) != len(self.tasks):
                    raise ValueError(f"{len(self.tasks)} scores in row {number} of {name}, one for each task")


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class Lineage:
    """Where the bank comes from."""

    parent: str | None = None
    """``models:/NAME/VERSION`` or folder of the bank that the run started from."""
    parent_digest: Digest | None = None
    """``manifest digest`` of that bank."""
    reused_from: str | None = None
    """``models:/NAME/VERSION`` whose training was reused for the last stage."""


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class Manifest:
    """Everything a reader must know of a bank. Holds no time stamps: equal runs write equal manifests."""

    base: BaseEntry
    bank_template: str
    """The Jinja template for inference without a task."""
    method: Annotated[str, Field(pattern=r"^[a-z0-9_]{1,60}$")]
    adapters: list[AdapterEntry]
    router: RouterEntry
    fan_in_fan_out: bool = False
    """True when the adapted layers are transformers' Conv1D, whose weight is (d_in, d_out)."""
    statistics: list[StatisticsEntry] = Field(default_factory=list)
    training_configuration: dict[str, Any] = Field(default_factory=dict)
    """The resolved configuration of the run."""
    accuracy_matrix: AccuracyMatrix = Field(default_factory=AccuracyMatrix)
    plain_text: PlainChoice | None = None
    """How plain text is answered by a bank that finds no task by itself; None of the others, and of those made before there
    was a choice: they rank. Not in the file where it is None."""
    lineage: Lineage = Field(default_factory=Lineage)
    library_versions: dict[str, str] = Field(default_factory=dict)
    files: dict[Annotated[str, Field(max_length=500)], FileEntry] | None = None
    """Every file that a loader of any kind reads, by its path in the bank (``registry/bank_files.py``, which is asked; no
    path is taken from here). Parts that a bank of schema version 1 brought are under their tensors' digests alone. None in
    such a bank, and before one is written."""
    run_id: Annotated[str, Field(max_length=120)] = ""
    stage: Annotated[int, Field(ge=0)] = 0
    epoch: Annotated[int, Field(ge=0)] = 0
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if [entry.index for entry in self.adapters] != list(range(1, len(self.adapters) + 1)):
            raise ValueError("adapters numbered 1, 2, 3, ... in their order")
        for name in ("adapters", "statistics"):
            counts = Counter(entry.task for entry in getattr(self, name))
            if twice := sorted(task for task, count in counts.items() if count > 1):
                raise ValueError(f"each task once in {name}, not {twice} twice")
        indices = [entry.index for entry in self.statistics]
        if indices != sorted(set(indices)):
            raise ValueError("statistics in rising order of their index")

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, in the order of the adapters."""
        return [entry.task for entry in self.adapters]

    @property
    def learned(self) -> dict[str, TaskEntry | None]:
        """What is known of each task whose rows were learned, in order: of ``tasks``, but that an adapter of several tasks
        at once stands for them."""
        found: dict[str, TaskEntry | None] = {}
        for line in self.adapters:
            found |= {line.task: line.task_spec} if line.learned is None else {o.task: o.task_spec for o in line.learned}
        return found

    @property
    def way(self) -> Way:
        """In which plain text is answered, where the bank finds no task by itself."""
        return "ranks" if self.plain_text is None else self.plain_text.way

    @property
    def targets(self) -> list[str]:
        """Every adapted module, sorted."""
        different = {id(entry.targets): entry.targets for entry in self.adapters}
        return sorted({module for targets in different.values() for module in targets})

    @property
    def form(self) -> str:
        """What the adapters are: ``LORA``, or what the method's own layers hold."""
        return form_of(self.method)

    def to_mapping(self) -> dict[str, Any]:
        """As JSON values, without the digest; target modules that all adapters share are written once."""
        # Thousands of adapters share one list of modules: it is compared by identity first, and never written out for each.
        mapping: dict[str, Any] = _whole().dump_python(
            self, mode="json", exclude={"adapters": {"__all__": {"targets"}}}
        )
        shared = self.targets
        mapping["target_modules"] = shared
        same: dict[int, bool] = {}
        for line, entry in zip(mapping["adapters"], self.adapters, strict=True):
            key = id(entry.targets)
            if key not in same:
                same[key] = entry.targets == shared
            line["targets"] = ALL if same[key] else list(entry.targets)
            if line["learned"] is None:  # as of all adapters of one task, and before there was the key
                del line["learned"]
            if line["task_spec"] is None:
                del line["task_spec"]
                continue
            if not line["task_spec"]["chat"]:  # keys that earlier versions do not know
                del line["task_spec"]["chat"], line["task_spec"]["system"]
            if line["task_spec"]["metric"] is None:
                del line["task_spec"]["metric"]
            if line["task_spec"]["fields"] is None:
                del line["task_spec"]["fields"]
        if mapping["files"] is None:
            del mapping["files"]
        if mapping["plain_text"] is None:
            del mapping["plain_text"]
        if self.base.quantisation == "none":
            del mapping["base"]["quantisation"]
        return mapping

    def digest(self) -> str:
        """sha256 over all of it: the bank's identity, accuracy and storage included."""
        known: str | None = self.__dict__.get(_DIGEST)
        if known is None:
            known = value_digest(self.to_mapping())
            self.__dict__[_DIGEST] = known  # frozen: it does not change
        return known

    def parent_digest(self) -> str:
        """sha256 over base and adapters alone: what a following stage is trained on, wherever it is stored."""
        return value_digest({"base": self.base.identity, "adapters": [entry.digest for entry in self.adapters]})

    def to_json(self) -> str:
        """The text of ``manifest.json``."""
        return (
            json.dumps(self.to_mapping() | {"digest": self.digest()}, indent=1, sort_keys=True, allow_nan=False) + "\n"
        )


def replace(manifest: Manifest, **changes: Any) -> Manifest:
    """A copy with changes, checked again."""
    return dataclasses.replace(manifest, **changes)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object that has each key once: other readers of JSON may take the other value, which no digest is about."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"found the key {next(name for name in names if names.count(name) > 1)!r} twice")
    return made


def parse_manifest(text: str, file: str = FILE) -> Manifest:
    """Read the text of a ``manifest.json``.

    Raises:
        BankError: not JSON, another schema version, unknown or missing keys, bad values (all of them are named with
            their key, value and what is expected), or a digest that does not agree with the content.
    """
    try:
        data = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise BankError(f"{file}: not JSON ({error}); fetch the bank again") from error
    if not isinstance(data, dict):
        raise BankError(f"{file}: found {_short(data)}, expected a JSON object; fetch the bank again")
    schema = data.get("schema_version")
    if schema not in READ or isinstance(schema, bool):
        raise BankError(
            f"{file}: schema_version: found {_short(schema)}, expected {' or '.join(map(str, READ))}; "
            "a newer bank needs a newer amlora-dist"
        )
    if (schema == 1) != (data.get("files") is None):
        raise BankError(
            f"{file}: files: found {'none' if schema > 1 else 'some'} under schema_version {schema}; fetch the bank again"
        )
    digest = data.pop("digest", None)
    try:
        written = value_digest(data)
    except (ValueError, RecursionError):  # a number beyond all bounds; the validation names it
        written = ""
    shared = _take_targets(data)
    manifest = _validated(data, file)
    for line in manifest.adapters:
        if line.targets == [ALL] and shared is not None:
            object.__setattr__(line, "targets", shared)  # one list for all of them
    if written and digest == written:  # over the text's own values, which is the quickest way to it
        manifest.__dict__[_DIGEST] = written
    if digest != manifest.digest():
        raise BankError(
            f"{file}: digest: found {_short(digest)[:13]}..., expected '{manifest.digest()[:12]}...; "
            "the manifest was changed after it was written: fetch the bank again"
        )
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Read ``folder/manifest.json``; errors as in ``parse_manifest``."""
    file = folder / FILE
    if not folder.is_dir():
        raise BankError(f"{folder}: no such folder; give the folder of a bank, or pull one with: amlora pull")
    if not file.is_file() or file.is_symlink():
        raise BankError(f"{file}: missing, or not a plain file; give the folder of a bank, or pull one with: amlora pull")
    if file.stat().st_size > MAX_BYTES:
        raise BankError(f"{file}: found {file.stat().st_size} bytes, expected at most {MAX_BYTES}; fetch the bank again")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BankError(f"{file}: not UTF-8 ({error}); fetch the bank again") from error
    return parse_manifest(text, str(file))


def _take_targets(data: dict[str, Any]) -> list[str] | None:
    """Take ``target_modules`` out, checked, and leave ``[ALL]`` where an adapter has all of them; what is not as it should
    be is left for the validation to name."""
    modules = data.pop("target_modules", None)
    lines = data.get("adapters")
    lines = lines if isinstance(lines, list) else []
    wanting = [line for line in lines if isinstance(line, dict) and line.get("targets") == ALL]
    try:
        shared = TypeAdapter(Targets).validate_python(modules, strict=True) if wanting else None
    except ValidationError:
        shared = None
    for place, line in enumerate(wanting):
        line["targets"] = modules if shared is None and not place else [ALL]
    return shared


@functools.cache
def _whole() -> TypeAdapter[Manifest]:
    return TypeAdapter(Manifest)


def _validated(data: dict[str, Any], file: str) -> Manifest:
    try:
        return _whole().validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        lines = [
            f"  - {'.'.join(str(part) for part in fault['loc']) or 'the whole'}: "
            f"found {_short(fault.get('input'))}, expected {expected_words(fault)}"
            for fault in error.errors(include_url=False)
        ]
        raise BankError(
            f"{file}: {len(lines)} fault{'s' if len(lines) != 1 else ''}\n"
            + "\n".join(lines)
            + "\nfetch the bank again"
        ) from error


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
