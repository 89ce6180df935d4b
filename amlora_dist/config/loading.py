"""The configuration of a run: one tree of dataclasses, each defined next to its component; YAML and overrides.

Reading a configuration imports nothing heavy and reports every fault at once. Relative paths inside a configuration
(``data_dir``, ``model.source``, task files) are relative to the current directory, like paths on the command line.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass

from amlora_dist.adapters.settings import AdapterSettings, RouterSettings
from amlora_dist.base_model import ModelSettings
from amlora_dist.config import checks
from amlora_dist.config.former_values import completed
from amlora_dist.config.schema import CHANGES_NO_RESULT, check, fields_at, shown, without
from amlora_dist.config.search_space import SearchSettings, nested
from amlora_dist.config.strict_yaml import KeyPath, dotted, parse_value, read_document
from amlora_dist.errors import Fault, FaultsError, UserError
from amlora_dist.evaluation.settings import AnswerSettings, EvaluationSettings
from amlora_dist.methods.settings import MethodSettings
from amlora_dist.tasks.prompt_format import DEFAULT_TEXT_TOKENS, PromptFormat
from amlora_dist.tasks.task import TaskDefaults, TaskSpec
from amlora_dist.training import deepspeed_config
from amlora_dist.training.settings import DeepSpeedSection, RecipeSettings, StageSettings, TrainingSettings

_WHOLE = "configuration"
"""What messages call a configuration whose file is not known where they are made."""
STRICT_KEYS = ConfigDict(extra="forbid")
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=100)]


@dataclass(config=STRICT_KEYS, kw_only=True, slots=True)
class MlflowSettings:
    """Where runs are recorded and banks registered."""

    tracking_uri: str | None = None
    """``sqlite:///FILE`` or ``http://HOST:PORT``; default: ``MLFLOW_TRACKING_URI``, or a SQLite file in ``AMLORA_HOME``."""


@dataclass(config=STRICT_KEYS, kw_only=True, slots=True)
class RunConfig:
    """One run: a sequence of tasks learned by one model."""

    name: Annotated[Name, CHANGES_NO_RESULT]
    """What the run is called where it is listed."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Of everything that is drawn: rows within limits, their order, first weights, dropout."""
    method: str = "am_lora"
    """The continual-learning algorithm, by its name in ``amlora_dist.methods``."""
    workers: Annotated[int, CHANGES_NO_RESULT] = Field(default=2, ge=0, le=4096)
    """Ranks of a stage; 0 runs the stages in the driver's process, without Ray and DeepSpeed."""
    min_workers: Annotated[int | None, CHANGES_NO_RESULT] = Field(default=None, ge=1, le=4096)
    """Elastic between stages: each takes as many workers as the cluster has, from this many up to ``workers``. Default:
    ``workers``, no fewer."""
    worker_lifetime: Annotated[Literal["run", "stage"], CHANGES_NO_RESULT] = "run"
    """How long workers live: for all stages, with the base model and the rows loaded, or for one."""
    placement: Annotated[Literal["PACK", "SPREAD"], CHANGES_NO_RESULT] = "PACK"
    """Where Ray puts a stage's workers: on few nodes, or on many."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the model and its activations; ``auto``: bf16 where the device has it, else fp32; on a cluster that is joined bf16
    where it has GPUs as the run starts: name it where they come on demand."""
    data_dir: Annotated[Path | None, CHANGES_NO_RESULT] = None
    """Folder of local data, ``<task>/<split>.jsonl``, used instead of the Hub."""
    parent: Annotated[str, Field(pattern=r"^models:/[^/@]+(@[^/@]+|/[0-9]+)$")] | None = None
    """A published bank to go on from, ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``."""
    registered_model: Name | None = None
    """Name of this run's model in the MLflow registry; default: the run id. Runs never share one."""
    storage: Annotated[str | None, CHANGES_NO_RESULT] = None
    """Folder of checkpoints and caches that all nodes share; default: a folder in ``AMLORA_HOME``. Or a URL that
    fsspec knows: the folder stays in ``AMLORA_HOME``, of any node its own, and checkpoints are copied to the URL."""
    model: ModelSettings
    tasks: list[str | dict[str, Any]] = Field(min_length=1)
    """In order: names of built-in tasks, task files, or mappings ``{task: NAME, ...overrides}``."""
    task_defaults: TaskDefaults = Field(default_factory=TaskDefaults)
    prompt_format: Literal[1, 2] = 2
    """2: texts are tokenised by themselves, and the router reads nothing else. 1: as 0.1 did, for runs of its time."""
    boundary_mix: float = Field(default=0.0, ge=0, le=0.5)
    """Share of each stage's training rows that are the next task's, as in a stream whose boundaries nobody knows."""
    adapters: AdapterSettings = Field(default_factory=AdapterSettings)
    router: RouterSettings = Field(default_factory=RouterSettings)
    training: TrainingSettings = Field(default_factory=TrainingSettings)
    recipe: RecipeSettings = Field(default_factory=RecipeSettings)
    answer: AnswerSettings = Field(default_factory=AnswerSettings)
    evaluation: EvaluationSettings = Field(default_factory=EvaluationSettings)
    """Short form: ``evaluate: seen+next``, ``all`` or ``last``."""
    method_settings: MethodSettings = Field(default_factory=MethodSettings)
    """What methods other than ``am_lora`` read."""
    deepspeed: Annotated[DeepSpeedSection, CHANGES_NO_RESULT] = Field(default_factory=dict)
    """DeepSpeed's own schema; ``zero_stage: 0-3`` is read as ``zero_optimization.stage``."""
    mlflow: Annotated[MlflowSettings, CHANGES_NO_RESULT] = Field(default_factory=MlflowSettings)
    tracking: Annotated[list[Literal["tensorboard", "wandb"]], CHANGES_NO_RESULT] = Field(default_factory=list)
    """In addition to MLflow, the journal: ``tensorboard`` (in ``AMLORA_HOME/tensorboard``), ``wandb`` (its own settings)."""
    search: SearchSettings | None = None
    """What ``amlora tune`` varies; ``amlora run`` ignores it."""

    @property
    def zero_stage(self) -> int:
        """ZeRO stage of the training, 0 to 3."""
        return deepspeed_config.zero_stage(self.deepspeed)

    def stage_settings(self) -> StageSettings:
        """The part that stages read."""
        return StageSettings(
            method=self.method,
            seed=self.seed,
            dtype="bf16" if self.dtype == "bf16" else "fp32",
            attention=self.model.attention,
            adapters=self.adapters,
            router=self.router,
            training=self.training,
            method_settings=self.method_settings,
            recipe=self.recipe,
            prompt_format=PromptFormat(self.prompt_format, self.router.max_text_tokens or DEFAULT_TEXT_TOKENS),
            answer=self.answer,
        )


def home() -> Path:
    """``AMLORA_HOME`` (default ``.amlora``), absolute: the folder of everything the program writes."""
    return Path(os.environ.get("AMLORA_HOME") or ".amlora").expanduser().absolute()


def storage_of(config: RunConfig) -> tuple[Path, str | None]:
    """The folder of checkpoints and caches, absolute; and where checkpoints are copied to, if ``storage`` is a URL."""
    if config.storage is None:
        return home() / "storage", None
    if "://" in config.storage:
        return home() / "storage", config.storage.rstrip("/")
    return Path(config.storage).expanduser().absolute(), None


def load_config(path: Path | str, overrides: list[str] | None = None) -> RunConfig:
    """Read a run's YAML and apply ``key.path=value`` overrides, whose values are YAML too.

    Raises:
        FaultsError: every fault of the file and of the overrides, at once.
    """
    config, faults, places, _ = _load(Path(path), overrides or [])
    if config is None or faults:
        raise _error(path, faults, places)
    return config


def validate_config(
    path: Path | str,
    overrides: list[str] | None = None,
    also: Callable[[RunConfig, list[TaskSpec]], dict[KeyPath, Fault]] | None = None,
) -> tuple[RunConfig, list[TaskSpec]]:
    """``load_config``, and beyond the file itself: the tasks, their data files and the model's folder exist.

    Reads no rows and no weights.

    Args:
        path: of the YAML.
        overrides: ``key.path=value``.
        also: finds what else is wrong; of the model only what the others do not say.

    Raises:
        FaultsError: every fault at once.
    """
    config, faults, places, taken = _load(Path(path), overrides or [])
    specs: list[TaskSpec] = []
    if config is not None:
        specs, found = checks.resolve_tasks(config, taken)
        faults = found | faults
        if not faults.keys() & {("model",), ("model", "source")}:
            faults |= checks.model_faults(config.model)
            if config.training.packing and ("training", "packing") not in faults:
                faults |= checks.packed_model_faults(config.model)
        if also is not None:
            known = any(key[0] == "model" for key in faults)  # what is wrong with a model makes more of the same
            faults = {key: one for key, one in also(config, specs).items() if not (known and key[0] == "model")} | faults
    if config is None or faults:
        raise _error(path, faults, places)
    return config, specs


@contextlib.contextmanager
def named_file(path: Path | str, overrides: list[str] | None = None) -> Iterator[None]:
    """Inside, what turns out to be wrong with a value later on (against the model, the rows, the store or the cluster) is
    named with the place that the value came from: the configuration's file, or the command line.

    Raises:
        UserError: in place of one whose message begins with a key (``router.layer: found 40, ...``).
    """
    try:
        yield
    except UserError as error:
        found = re.match(r"(([a-z_]+)[^:\s]*): ", str(error))
        of_a_key = found is not None and found[2] in (_WHOLE, *fields_at(RunConfig, ()))
        if found is None or not of_a_key or type(error) is not UserError:  # the others name a file of their own
            raise
        given = any(text.partition("=")[0] == found[1] for text in overrides or [])
        rest = str(error).removeprefix(f"{_WHOLE}: ")
        raise UserError(f"{'command line' if given else path}: {rest}") from error


def to_mapping(config: RunConfig) -> dict[str, Any]:
    """The resolved configuration as JSON values; ``from_mapping`` takes it back."""
    mapping: dict[str, Any] = TypeAdapter(RunConfig).dump_python(config, mode="json")
    return mapping


def from_mapping(mapping: dict[str, Any]) -> RunConfig:
    """A configuration from what ``to_mapping`` made. Raises FaultsError where it no longer fits this code."""
    config, faults = check(RunConfig, completed(mapping))
    if config is None:
        raise FaultsError(_WHOLE, list(faults.values()))
    return config


def named_keys(path: Path | str, overrides: list[str] | None = None) -> frozenset[str]:
    """Paths of the values that a file and the overrides give themselves (``training.epochs``); the rest is default."""
    data = read_document(Path(path)).data
    _short_forms(data, {}, {})
    for text in overrides or []:
        _apply(data, text, {}, {})
    return frozenset(flat(data))


def flat(mapping: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """The values of nested sections by their paths; a list is one value, and so is a section with nothing in it."""
    out: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping) and value:
            out |= flat(value, f"{above}{key}.")
        else:
            out[f"{above}{key}"] = value
    return out


def with_values(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """A copy with other values at some paths, such as ``{"training.l1": 0.3}``; without the ``search`` section.

    Raises:
        FaultsError: an unknown path, or a value that is wrong there.
    """
    data = to_mapping(config)
    data.pop("search", None)
    faults: dict[KeyPath, Fault] = {}
    for path, value in values.items():
        _apply(data, f"{path}={json.dumps(value)}", {}, faults)
    made, found = check(RunConfig, data)
    faults |= found
    if made is not None:
        faults |= checks.cross_faults(made, lambda path: False)
    if made is None or faults:
        raise FaultsError(_WHOLE, list(faults.values()))
    return made


def _load(
    path: Path, overrides: list[str]
) -> tuple[RunConfig | None, dict[KeyPath, Fault], dict[KeyPath, str], list[KeyPath]]:
    """The configuration (without the values at fault, where the rest is sound enough), the faults, where each key was
    given (``line 3``, ``command line``), and the paths of the values that were left out."""
    document = read_document(path)
    data = document.data
    places = {key: f"line {line}" for key, line in document.lines.items()}
    faults: dict[KeyPath, Fault] = {("file", n): fault for n, fault in enumerate(document.faults)}
    _short_forms(data, places, faults)
    for text in expanded(overrides):
        _apply(data, text, places, faults)
    config, found = check(RunConfig, data)
    faults |= found
    taken: list[KeyPath] = []
    rest = data
    while config is None and (wrong := _to_take(found, taken)):
        # Take what is wrong away, so that faults between the other values are found in the same pass.
        taken += wrong
        rest = {"name": "unnamed", "tasks": ["unknown"]} | without(rest, wrong)
        if "source" not in rest.setdefault("model", {}):
            rest["model"]["source"] = "unknown"
        config, found = check(RunConfig, rest)
    if config is not None:
        faults = checks.cross_faults(config, lambda path: _touched(faults, path)) | faults
        if config.search is not None and not _touched(faults, ("search",)):
            faults |= checks.search_faults(config, with_values)
    return config, faults, places, taken


def _to_take(found: Iterable[KeyPath], taken: Sequence[KeyPath]) -> list[KeyPath]:
    """Paths of faults; where taking one away was no help (it is a value that lacks), what holds it."""
    out: dict[KeyPath, None] = {}
    known = set(taken)
    for path in found:
        while path in known:
            path = path[:-1]
        if path:
            out[path] = None
    return list(out)


def _error(path: Path | str, faults: dict[KeyPath, Fault], places: dict[KeyPath, str]) -> FaultsError:
    """The faults in the order of the file, each with its place; those of the command line last."""
    placed: list[tuple[float, Fault]] = []
    for key, fault in faults.items():
        place = next((places[key[:n]] for n in range(len(key), 0, -1) if key[:n] in places), "")
        own = re.match(r"lines? ([0-9]+)", fault.hint)
        if place and not own:
            fault = replace(fault, hint=f"{place}; {fault.hint}" if fault.hint else place)
        line = own or re.match(r"line ([0-9]+)", place)
        placed.append((float(line[1]) if line else math.inf, fault))
    return FaultsError(str(path), [fault for _, fault in sorted(placed, key=lambda pair: pair[0])])


def expanded(overrides: list[str]) -> list[str]:
    """Overrides with those of ``@FILE``, one a line, in its place.

    Raises:
        UserError: there is no such file.
    """
    found: list[str] = []
    for text in overrides:
        if not text.startswith("@"):
            found.append(text)
            continue
        try:
            lines = Path(text[1:]).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"command line: found {text!r}, expected @FILE with an override a line ({error})") from error
        found += [line for line in lines if line.strip()]
    return found


def _touched(faults: dict[KeyPath, Fault], path: KeyPath) -> bool:
    """Whether something at, below or above a path is at fault."""
    return any(key[: len(path)] == path or key == path[: len(key)] for key in faults)


def _short_forms(data: dict[str, Any], places: dict[KeyPath, str], faults: dict[KeyPath, Fault]) -> None:
    """``evaluate: all`` and ``deepspeed.zero_stage`` written out; a section with nothing in it is left out."""
    for key in [k for k, v in data.items() if v is None and k in _SECTIONS]:
        del data[key]
    if "evaluate" in data:
        short = data.pop("evaluate")
        for path in [key for key in places if key[:1] == ("evaluate",)]:
            long: KeyPath = ("evaluation", *path[1:])
            places[long] = places[path]
        if "evaluation" in data:
            found = "both `evaluate` and `evaluation`"
            faults[("evaluate",)] = Fault("evaluate", found, "one of the two", "evaluate: X is evaluation.cells: X")
        else:
            data["evaluation"] = short
    search = data.get("search")
    if isinstance(search, dict) and isinstance(search.get("space"), dict):
        search["space"] = nested(search["space"])
        for path in [key for key in places if key[:2] == ("search", "space") and len(key) > 2]:
            longer: KeyPath = ("search", "space", *str(path[2]).split("."), *path[3:])
            places[longer] = places[path]
    if isinstance(data.get("evaluation"), str):
        data["evaluation"] = {"cells": data["evaluation"]}
        places.setdefault(("evaluation", "cells"), places.get(("evaluation",), ""))
    if isinstance(data.get("deepspeed"), dict):
        data["deepspeed"] = deepspeed_config.expand(data["deepspeed"])


_SECTIONS = (
    "task_defaults", "adapters", "router", "training", "recipe", "evaluation", "evaluate", "method_settings", "deepspeed",
    "mlflow",
)  # fmt: skip
_LONG_FORMS: dict[KeyPath, KeyPath] = {
    ("evaluate",): ("evaluation", "cells"),
    ("evaluation",): ("evaluation", "cells"),
    ("deepspeed", "zero_stage"): ("deepspeed", "zero_optimization", "stage"),
}


def _apply(data: dict[str, Any], text: str, places: dict[KeyPath, str], faults: dict[KeyPath, Fault]) -> None:
    """Put one ``key.path=value`` into ``data``."""
    key, equals, value_text = text.partition("=")
    parts = re.findall(r"([^.\[\]]+)|\[([0-9]+)\]", key)
    path: KeyPath = tuple(int(index) if index else name for name, index in parts)
    at: KeyPath = ("command line", text)
    if not equals or not path or dotted(path) != key or not key.isprintable():
        faults[at] = Fault("command line", shown(text), "key.path=value, such as training.epochs=3")
        return
    try:
        value = parse_value(value_text)
    except ValueError as error:
        faults[at] = Fault(f"command line, {key}", shown(value_text), "a YAML value", str(error))
        return
    if not isinstance(value, dict):
        path = _LONG_FORMS.get(path, path)
    if path[0] == "evaluate":
        path = ("evaluation", *path[1:])
    inner: Any = data
    for depth, part in enumerate(path):
        places[path[: depth + 1]] = "command line"
        last = depth == len(path) - 1
        if isinstance(inner, list) and not isinstance(part, int):
            faults[at] = Fault(f"command line, {key}", f"a list with {len(inner)} items", f"[0] or so in place of {part!r}")
            return
        if isinstance(part, int):
            if not isinstance(inner, list) or part >= len(inner):
                there = f"a list with {len(inner)} items" if isinstance(inner, list) else "no list"
                faults[at] = Fault(f"command line, {key}", there, f"an item number {part} to replace (from 0)")
                return
        elif not last and not isinstance(inner.get(part), (dict, list)):
            inner[part] = {}
        if last:
            inner[part] = value
        elif isinstance(part, int) and not isinstance(inner[part], (dict, list)):
            inner[part] = {"task": inner[part]} if path[0] == "tasks" else {}
            inner = inner[part]
        else:
            inner = inner[part]
