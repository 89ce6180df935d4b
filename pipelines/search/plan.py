"""What a search will do, decided before a process is started: its trials, what each may differ by, what it refuses."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from amlora_dist.config.loading import RunConfig, with_values
from amlora_dist.config.search_space import Dimension, SearchSettings, described, dimensions, points
from amlora_dist.digests import named_seed, value_digest
from amlora_dist.errors import Fault, FaultsError, UserError
from amlora_dist.methods import method_class, method_for
from amlora_dist.methods.base import adapter_reads
from amlora_dist.methods.kinds import Trains

TRIES = 32
"""Places of the space at which a path is tried before it is reported to change nothing."""


@dataclass(frozen=True, slots=True)
class SearchPlan:
    """A checked search."""

    base: RunConfig
    """The run that the trials vary."""
    settings: SearchSettings
    dimensions: list[Dimension]
    listed: list[dict[str, Any]] | None
    """Values of every trial, trial 1 first; None where an algorithm proposes them as results come in."""
    order: list[int]
    """Numbers of the listed trials in the order in which they start."""

    @property
    def stages(self) -> int:
        """Of one trial's sequence."""
        return _stages(self.base)

    @property
    def trials(self) -> int:
        """How many there will be."""
        return len(self.listed) if self.listed is not None else int(self.settings.num_samples or 0)

    def config(self, values: Mapping[str, Any]) -> RunConfig:
        """The run of a trial: scored on the dev split, nothing else of the search in it."""
        made = with_values(self.base, values)
        # `last` is enough for the average performance at the end; pruning and forgetting need the rows before it.
        last = made.evaluation.cells == "last" and self.settings.scheduler == "none"
        last = last and self.settings.objectives == ["average_performance"]
        made.evaluation = replace(
            made.evaluation,
            split="dev",
            cells="last" if last else "seen",
            untrained=False,
            oracle=False,
            also=[],
            paraphrases=0,
            knockout=False,
        )
        made.registered_model = None
        return made

    def champion(self, values: Mapping[str, Any], registered_model: str) -> RunConfig:
        """The winner's run: the same training, scored on the test split with all that the configuration asks for."""
        made = with_values(self.base, values)
        made.evaluation = replace(made.evaluation, split="test")
        made.registered_model = registered_model
        return made


def plan_search(config: RunConfig, file: str) -> SearchPlan:
    """Draw the trials and check them, all together.

    Args:
        config: of ``validate_config``, so the section itself is sound.
        file: its name, for messages.

    Raises:
        UserError: there is no ``search`` section, or the method trains nothing.
        FaultsError: a path that cannot change the result, or values that do not go together.
    """
    settings = config.search
    if settings is None:
        raise UserError(
            f"{file}: no `search` section, so there is nothing to tune; configs/search.yaml shows one, `amlora run`"
            " runs the configuration as it is"
        )
    if method_class(config.method).trains is Trains.NOTHING:
        raise UserError(f"{file}: method {config.method!r} trains nothing, so there is nothing to tune")
    found, _ = dimensions(settings.space)
    for dimension in (d for d in found if d.path in ("tasks", "method")):
        if len(counts := {_stages(with_values(config, {dimension.path: value})) for value in dimension.values}) > 1:
            found_text = f"trials of {' and '.join(map(str, sorted(counts)))} stages"
            fault = Fault(f"search.space.{dimension.path}", found_text, "trials of equally many stages")
            raise FaultsError(file, [fault])
    if idle := [d for d in found if _is_idle(config, d, found)]:
        raise FaultsError(file, [_idle_fault(config, d) for d in idle])
    listed, order = None, []
    if settings.algorithm != "optuna":
        listed = points(found, algorithm=settings.algorithm, num_samples=settings.num_samples, seed=config.seed)
        for number, values in enumerate(listed, start=1):
            _check_point(config, values, number, file)
        order = _apart(config, listed)
    return SearchPlan(config, settings, found, listed, order)


def decides(config: RunConfig) -> dict[str, Any]:
    """What of a configuration decides the result of its sequence on the dev split.

    ``first`` decides the first stage (``adapter`` in the place of its ``reads``: that stage's adapter), ``later`` what comes
    on top of it in all others and in scoring. All are made of the same declarations as the fingerprints (``Method.reads``).
    """
    settings = config.stage_settings()
    method = method_for(settings)
    stage = 1 if config.parent is None else 2
    defaults = {key: value for key, value in asdict(config.task_defaults).items() if key != "max_test"}
    first = {
        "seed": config.seed, "method": config.method, "dtype": config.dtype, "model": asdict(config.model),
        "parent": config.parent, "tasks": config.tasks, "task_defaults": defaults,
        "boundary_mix": config.boundary_mix if len(config.tasks) > 1 else 0.0,
        "reads": method.reads(stage),
    }  # fmt: skip
    gate = {"kind": config.router.kind, **asdict(config.router.gate)} if method.routed else {}
    several = len(config.tasks) > 1 or config.parent is not None
    adapter = adapter_reads(method, stage) or first["reads"]
    later = {"reads": method.reads(2) if several else {}, "gate": gate if several else {}}
    return {"first": first, "adapter": adapter, "later": later}


def _stages(config: RunConfig) -> int:
    return len(method_class(config.method).stages.names([str(n) for n in range(len(config.tasks))], config.method))


def _is_idle(config: RunConfig, dimension: Dimension, others: Sequence[Dimension]) -> bool:
    """Whether no two values of the dimension make a difference, wherever in the space one looks."""
    if len({repr(value) for value in dimension.extremes()}) < 2:
        return False
    generator = random.Random(named_seed("idle", dimension.path))
    for _ in range(TRIES):
        values = {other.path: other.draw(generator) for other in others}
        pair = generator.sample(range(len(dimension.values)), 2)
        try:
            one, two = (
                decides(with_values(config, values | {dimension.path: dimension.extremes()[place]})) for place in pair
            )
        except FaultsError:
            continue
        if one != two:
            return False
    return True


def _idle_fault(config: RunConfig, dimension: Dimension) -> Fault:
    few = "a sequence of one task has no later stage that could read it" if len(config.tasks) == 1 else ""
    return Fault(
        f"search.space.{dimension.path}",
        f"a path that method {config.method!r} with this configuration does not read",
        "a path that can change the result",
        few,
    )


def _check_point(config: RunConfig, values: Mapping[str, Any], number: int, file: str) -> None:
    try:
        with_values(config, values)
    except FaultsError as error:
        where = f"search.space, trial {number} ({described(values)})"
        raise FaultsError(
            file, [Fault(f"{where}: {f.where}", f.found, f.expected, f.hint) for f in error.faults]
        ) from error


def _apart(config: RunConfig, listed: Sequence[Mapping[str, Any]]) -> list[int]:
    """An order in which trials that start together share no first stage: nobody waits for a stage of another's."""
    groups: dict[str, list[int]] = {}
    for number, values in enumerate(listed, start=1):
        decided_by = decides(with_values(config, values))
        first = decided_by["first"] | {"reads": decided_by["adapter"]}
        groups.setdefault(value_digest(_plain(first)), []).append(number)
    order: list[int] = []
    while any(groups.values()):
        order += [numbers.pop(0) for numbers in groups.values() if numbers]
    return order


def _plain(value: Any) -> Any:
    """As JSON knows it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)

