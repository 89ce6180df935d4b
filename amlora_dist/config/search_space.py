"""What a search varies: the ``search:`` section of a configuration, its space, and the points drawn from it.

A space names configuration paths and, for each, how its values are drawn:

    space:
      training.l1: {grid: [0.0, 0.1, 0.3, 1.0]}     # every value, crossed with the other grids
      adapters.rank: {choice: [4, 8, 16]}           # one of them
      training.learning_rate: {loguniform: [1.0e-4, 1.0e-2]}
      router.shrinkage: {uniform: [0.0, 0.5]}
      training.epochs: {randint: [1, 4]}            # 1, 2 or 3: the end is left out, as Ray Tune has it

Points depend on the seed and their number alone, so that a search that is started again draws the same ones. Imports
nothing heavy.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from amlora_dist.config.schema import CHANGES_NO_RESULT, did_you_mean, shown
from amlora_dist.digests import named_seed
from amlora_dist.errors import Fault

Kind = Literal["choice", "grid", "uniform", "loguniform", "randint"]
KINDS: tuple[Kind, ...] = ("choice", "grid", "uniform", "loguniform", "randint")
Objective = Literal["average_performance", "forgetting"]
DIRECTIONS: dict[str, Literal["max", "min"]] = {"average_performance": "max", "forgetting": "min"}
GRID_LIMIT = 1000
"""Trials of a grid that are run without ``num_samples`` being asked for."""


@dataclass(config=ConfigDict(extra="forbid"), kw_only=True, slots=True)
class SearchSettings:
    """A search over whole sequences; ``amlora tune`` reads it, ``amlora run`` ignores it."""

    space: dict[str, Any] = Field(min_length=1)
    """Configuration paths, and how the values of each are drawn."""
    algorithm: Literal["grid", "random", "optuna"] = "grid"
    """``grid``: every point; ``random``: drawn by the seed; ``optuna``: TPE, which learns from the results."""
    num_samples: int | None = Field(default=None, ge=1)
    """Trials. Of a grid: at most so many of its points, drawn by the seed; default: all."""
    objective: Objective | list[Objective] = "average_performance"
    """On the dev split. Two of them (``optuna`` only) search for the front; the first one picks the winner."""
    scheduler: Literal["none", "halving"] = "none"
    """``halving``: after every stage the best trials go on, when all are there (Jamieson and Talwalkar 2016)."""
    grace_stages: int = Field(default=2, ge=1)
    """Stages before the first such decision."""
    reduction: float = Field(default=2.0, gt=1)
    """One of so many trials goes on at each decision."""
    max_concurrent: Annotated[int | None, CHANGES_NO_RESULT] = Field(default=None, ge=1)
    """Trials at once, at most; default: as many as the cluster has room for."""
    gpus: Annotated[float | None, CHANGES_NO_RESULT] = Field(default=None, gt=0)
    """Share of a GPU for each worker, where the cluster has GPUs; default: 1. Below 1 trials share a GPU."""
    retries: Annotated[int, CHANGES_NO_RESULT] = Field(default=3, ge=0)
    """How often a trial whose process died is started again; it goes on inside its sequence."""
    share_stages: bool = True
    """Trials that agree on everything that matters for a stage train it once."""

    @property
    def objectives(self) -> list[Objective]:
        """The objectives, the one that decides first."""
        return self.objective if isinstance(self.objective, list) else [self.objective]


@plain_dataclass(frozen=True, slots=True)
class Dimension:
    """One path of the space."""

    path: str
    kind: Kind
    values: tuple[Any, ...]
    """The values of ``choice`` and ``grid``; low and high of a range."""

    @property
    def listed(self) -> bool:
        """Whether the values are a list, not a range."""
        return self.kind in ("choice", "grid")

    def extremes(self) -> tuple[Any, ...]:
        """Values to check: all of a list; the ends of a range and, of one of fractions, a fraction in it."""
        if self.kind == "randint":
            return (self.values[0], self.values[1] - 1)
        if self.listed:
            return self.values
        low, high = self.values
        return (low, high, low + (high - low) * 0.618034)

    def draw(self, generator: random.Random) -> Any:
        """One value."""
        if self.listed:
            return generator.choice(self.values)
        low, high = self.values
        if self.kind == "randint":
            return generator.randrange(low, high)
        if self.kind == "loguniform":
            return math.exp(generator.uniform(math.log(low), math.log(high)))
        return generator.uniform(low, high)


def nested(space: Mapping[str, Any]) -> dict[str, Any]:
    """The space with ``training.l1`` as ``training: {l1: ...}``, so that overrides reach into it."""
    out: dict[str, Any] = {}
    for key, value in space.items():
        *above, last = str(key).split(".")
        inner = out
        for part in above:
            found = inner.setdefault(part, {})
            if not isinstance(found, dict):
                found = inner[part] = {}
            inner = found
        both = isinstance(value, dict) and isinstance(inner.get(last), dict)
        inner[last] = {**inner[last], **value} if both else value
    return out


def dimensions(space: Mapping[str, Any]) -> tuple[list[Dimension], list[Fault]]:
    """The dimensions of a space, in its order, and everything wrong with them."""
    found: list[Dimension] = []
    faults: list[Fault] = []
    for path, value in _leaves(space, ""):
        made = _dimension(path, value)
        if isinstance(made, Fault):
            faults.append(made)
        else:
            found.append(made)
    return found, faults


def _leaves(node: Mapping[str, Any], above: str) -> Iterator[tuple[str, Any]]:
    """Paths with what is there: a mapping with a key that is, or resembles, a kind, or anything but a mapping."""
    for key, value in node.items():
        path = f"{above}{key}"
        if isinstance(value, dict) and value and not any(key in KINDS or did_you_mean(str(key), KINDS) for key in value):
            yield from _leaves(value, f"{path}.")
        else:
            yield path, value


def _dimension(path: str, value: Any) -> Dimension | Fault:
    where = f"search.space.{path}"
    if not isinstance(value, dict) or len(value) != 1:
        found = shown(value) if not isinstance(value, dict) else f"{len(value)} keys"
        return Fault(where, found, "one of " + ", ".join(f"{{{kind}: [...]}}" for kind in KINDS))
    ((kind, values),) = value.items()
    if kind not in KINDS:
        return Fault(where, shown(kind), f"one of {', '.join(KINDS)}", did_you_mean(str(kind), KINDS))
    if not isinstance(values, list) or not values:
        return Fault(where, f"{kind} of {shown(values)}", "a list with at least one value")
    if kind in ("choice", "grid"):
        if len({repr(one) for one in values}) < len(values):
            return Fault(where, f"{kind} of {shown(values)}", "each value once")
        return Dimension(path, kind, tuple(values))
    return _range(path, where, kind, values)


def _range(path: str, where: str, kind: Kind, values: list[Any]) -> Dimension | Fault:
    whole = kind == "randint"
    right = all(isinstance(v, int if whole else (int, float)) and not isinstance(v, bool) for v in values)
    if len(values) != 2 or not right or not all(math.isfinite(v) for v in values):
        return Fault(where, f"{kind} of {shown(values)}", f"two {'whole ' if whole else ''}numbers, low and high")
    low, high = values
    if low >= high:
        return Fault(where, f"{kind} of {shown(values)}", "a low end below the high end")
    if kind == "loguniform" and low <= 0:
        return Fault(where, f"loguniform of {shown(values)}", "ends above 0", "the logarithm of 0 is no number")
    return Dimension(path, kind, (low, high))


def size_faults(settings: SearchSettings, found: Sequence[Dimension]) -> list[Fault]:
    """What is wrong with the search as a whole: its size, its algorithm, its objectives."""
    faults: list[Fault] = []
    grid = math.prod(len(d.values) for d in found if d.kind == "grid" or settings.algorithm == "grid")
    if settings.algorithm == "grid":
        if ranges := [d for d in found if not d.listed]:
            where = f"search.space.{ranges[0].path}"
            hint = f"or search.algorithm: random for {ranges[0].kind}"
            faults.append(Fault(where, ranges[0].kind, "grid or choice under search.algorithm: grid", hint))
        elif settings.num_samples is None and grid > GRID_LIMIT:
            hint = f"search.num_samples: N takes N of its points; without it a grid has at most {GRID_LIMIT:,}"
            faults.append(Fault("search.space", f"a grid of {grid:,} trials", "a limit", hint))
    elif settings.num_samples is None:
        faults.append(Fault("search.num_samples", "nothing", f"the number of trials (algorithm {settings.algorithm})"))
    elif settings.algorithm == "random" and grid * settings.num_samples > GRID_LIMIT and grid > 1:
        found_text = f"{settings.num_samples:,} samples of a grid of {grid:,}"
        faults.append(Fault("search.space", found_text, f"at most {GRID_LIMIT:,} trials", "choice draws one value a trial"))
    if settings.algorithm == "optuna" and (grids := [d for d in found if d.kind == "grid"]):
        faults.append(Fault(f"search.space.{grids[0].path}", "grid", "choice under search.algorithm: optuna"))
    goals = settings.objectives
    if not goals or len(set(goals)) < len(goals):
        faults.append(Fault("search.objective", shown(list(goals)), "one objective, or two different ones"))
    elif len(goals) > 1 and settings.algorithm != "optuna":
        faults.append(Fault("search.objective", f"{len(goals)} objectives", "one, or search.algorithm: optuna"))
    elif len(goals) > 1 and settings.scheduler != "none":
        faults.append(Fault("search.scheduler", f"{settings.scheduler} with several objectives", "none, or one objective"))
    if settings.algorithm == "optuna" and settings.scheduler == "halving":
        hint = "all trials start before the first one ends, so that Optuna would learn nothing; random goes with halving"
        faults.append(Fault("search.scheduler", "halving under search.algorithm: optuna", "none", hint))
    return faults


def points(
    found: Sequence[Dimension], *, algorithm: Literal["grid", "random"], num_samples: int | None, seed: int
) -> list[dict[str, Any]]:
    """The points of a grid or random search, as values by path; more samples keep those there were."""
    crossed = [d for d in found if d.kind == "grid" or algorithm == "grid"]
    drawn = [d for d in found if d not in crossed]
    total = math.prod(len(d.values) for d in crossed)
    if algorithm == "grid":
        chosen: Sequence[int] = range(total)
        if num_samples is not None and num_samples < total:
            chosen = random.Random(named_seed(seed, "grid")).sample(range(total), num_samples)
        return [_ordered(found, _grid_point(crossed, number)) for number in chosen]
    out = []
    for sample in range(num_samples or 1):
        generator = random.Random(named_seed(seed, "search", sample))
        values = {d.path: d.draw(generator) for d in drawn}
        out += [_ordered(found, values | _grid_point(crossed, number)) for number in range(total)]
    return out


def _grid_point(crossed: Sequence[Dimension], number: int) -> dict[str, Any]:
    """Point ``number`` of a grid; the last dimension runs fastest."""
    values: dict[str, Any] = {}
    for dimension in reversed(crossed):
        number, place = divmod(number, len(dimension.values))
        values[dimension.path] = dimension.values[place]
    return values


def _ordered(found: Sequence[Dimension], values: Mapping[str, Any]) -> dict[str, Any]:
    return {d.path: values[d.path] for d in found}


def described(values: Mapping[str, Any]) -> str:
    """``l1 0.1, rank 8``: a trial's values as people read them, by the last part of each path."""
    names = [path.rpartition(".")[2] for path in values]
    shown = names if len(set(names)) == len(names) else list(values)
    return ", ".join(f"{name} {brief(value)}" for name, value in zip(shown, values.values(), strict=True))


def brief(value: Any) -> str:
    """A value with at most four digits that matter."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
