"""A grid of runs: methods x task orders x seeds, each a durable run of its own, with MLflow as the journal.

Every run has an id made of the comparison's, so whatever dies, the same command goes on: finished runs are taken as they
are, the one at work goes on from its checkpoint, and runs that agree on their first stages train them once.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amlora_dist.config.loading import RunConfig, home, named_keys, to_mapping, validate_config
from amlora_dist.config.schema import did_you_mean
from amlora_dist.config.strict_yaml import read_document
from amlora_dist.errors import TrainingError, UserError
from amlora_dist.methods import METHODS, method_class
from amlora_dist.methods.kinds import Trains
from amlora_dist.registry import tags
from amlora_dist.registry.runs import RESULT
from amlora_dist.registry.store import Store
from amlora_dist.reporting.comparing import UNIFORM, Entry, compare
from amlora_dist.reporting.facts import read_run
from amlora_dist.training.rate_race import RATES
from pipelines.runs import results
from pipelines.runs.inputs import gather_inputs, with_evidence
from pipelines.runs.resume_check import differences, refuse_other_configuration, refuse_other_data, taken_up
from pipelines.runs.sequence import run_sequence

if TYPE_CHECKING:
    from pipelines.runs.progress import Progress

log = logging.getLogger(__name__)

KIND = "comparison"
FILE = "comparison.json"
"""Artifact of the comparison's MLflow run: its plan, what was tuned, and its result so far."""
GIVEN = "given"
"""Name of the order in which the configuration lists its tasks."""


@dataclass(frozen=True, slots=True)
class Contender:
    """One row of the table: a method, or a variant of one."""

    name: str
    method: str
    overrides: tuple[str, ...] = ()
    tuned_as: str = ""
    """Another contender whose training it shares, and whose learning rate it therefore takes."""


VARIANTS = {
    "literal": Contender("literal", "am_lora", ("router.kind=literal",)),
    UNIFORM: Contender(UNIFORM, "am_lora", ("router.kind=uniform",), tuned_as="am_lora"),
    "permuted": Contender("permuted", "am_lora", ("router.kind=permuted",), tuned_as="am_lora"),
}
"""AM-LoRA under other routers: the paper's selector, and two controls that share every trained stage with ``am_lora``."""


@dataclass(slots=True)
class ComparisonPlan:
    """What is compared, all of it checked."""

    comparison_id: str
    file: Path
    overrides: list[str]
    contenders: list[Contender]
    seeds: list[int]
    orders: dict[str, list[Any]]
    """Name -> tasks, as a configuration lists them."""
    names: dict[str, list[str]]
    """Name of an order -> names of its tasks."""
    learning_rates: list[float]
    """Candidates for every method; none: the configuration's is taken."""
    base: RunConfig

    def run_id(self, contender: Contender, order: str, seed: int) -> str:
        return f"{self.comparison_id}.{contender.name}.{order}.s{seed}"

    def candidate_id(self, contender: Contender, rate: float) -> str:
        return f"{self.comparison_id}.{contender.name}.tune-{rate:g}"

    def config(self, contender: Contender, order: str, seed: int, rate: float | None, more: Sequence[str] = ()) -> RunConfig:
        """The configuration of one run."""
        own = [f"method={contender.method}", f"seed={seed}", f"tasks={json.dumps(self.orders[order])}", *contender.overrides]
        own += [] if rate is None else [f"training.learning_rate={rate!r}"]
        given = [*self.overrides, *own, *more]
        config, _ = validate_config(self.file, given)
        return taken_up(config, to_mapping(self.base), named_keys(self.file, given))

    @property
    def grid(self) -> Iterator[tuple[Contender, str, int]]:
        """All runs, seed by seed, so that a first table over all methods is there early."""
        for seed in self.seeds:
            for order in self.orders:
                for contender in self.contenders:
                    yield contender, order, seed

    def to_json(self) -> dict[str, Any]:
        """What the journal keeps of it."""
        return {
            "comparison_id": self.comparison_id,
            "config": to_mapping(self.base),
            "seeds": self.seeds,
            "orders": self.names,
            "learning_rates": self.learning_rates or None,
            "tuned_on": {"order": next(iter(self.orders)), "seed": self.seeds[0], "split": "dev"},
        }


def plan_comparison(
    file: Path,
    overrides: Sequence[str],
    *,
    methods: Sequence[str],
    seeds: Sequence[int],
    orders: Sequence[str],
    learning_rates: Sequence[float],
    comparison_id: str,
) -> ComparisonPlan:
    """Read and check everything before the first run starts.

    Args:
        methods: names of methods or of ``VARIANTS``, each with overrides of its own if need be: ``ewc:method_settings.
            ewc_weight=10``, ``am_lora:training.l1=1:adapters.rank=4``.
        orders: each the path or name of a configuration whose ``tasks`` are taken, or places such as ``3-1-2``; none
            for the order of ``file``.

    Raises:
        UserError, FaultsError: something cannot be run; nothing was started.
    """
    base, _ = validate_config(file, list(overrides))
    if base.registered_model is not None or base.parent is not None:
        key = "registered_model" if base.registered_model is not None else "parent"
        raise UserError(f"{file}: {key} cannot be shared by the runs of a comparison; leave it out")
    ordered = _orders(orders, file, base)
    plan = ComparisonPlan(
        comparison_id=comparison_id,
        file=file,
        overrides=list(overrides),
        contenders=_contenders(methods),
        seeds=_distinct("--seeds", list(seeds)) or [base.seed],
        orders=ordered,
        names={name: _task_names(file, overrides, tasks) for name, tasks in ordered.items()},
        learning_rates=_distinct("--learning-rates", list(learning_rates)),
        base=base,
    )
    if bad := [rate for rate in plan.learning_rates if not 0 < rate < float("inf")]:
        raise UserError(f"--learning-rates: found {bad[0]:g}, expected numbers above 0")
    own = [one for c in plan.contenders for one in c.overrides if one.startswith("training.learning_rate=")]
    if base.training.learning_rate == "auto" and not plan.learning_rates and len(own) < len(plan.contenders):
        raise UserError(
            f"{file}: training.learning_rate: found auto, expected a number: a comparison tunes whole sequences, not first"
            f" stages; give --learning-rates {','.join(f'{rate:g}' for rate in RATES)}, or a rate in the file"
        )
    if plan.learning_rates and own:
        raise UserError(f"--learning-rates: {own[0]} in --methods sets it already; leave one of the two out")
    for contender in plan.contenders:
        for order in plan.orders:
            longest = [plan.run_id(contender, order, seed) for seed in plan.seeds]
            longest += [plan.candidate_id(contender, rate) for rate in plan.learning_rates]
            if len(run_id := max(longest, key=len)) > 100:
                raise UserError(f"--run-id: the run id {run_id!r} has {len(run_id)} letters, at most 100 fit; shorten it")
            plan.config(contender, order, plan.seeds[0], None)
    return plan


def run_comparison(
    plan: ComparisonPlan, *, command: str, progress: Progress, verbose: bool = False, allow_changed_data: bool = False
) -> dict[str, Any]:
    """Run what is not done yet, and return the result as ``amlora compare --json`` prints it.

    A run that fails for good (its loss diverged, say) leaves the others going; it is listed under ``failed``. Where rows,
    prompts or the base model have changed since it began, all of it is run again if ``allow_changed_data``, and otherwise
    nothing.

    Raises:
        UserError: the comparison id is that of something else; data or model are wrong.
        HeldError: another driver holds one of the runs.
        StoppedError: stopped by a signal; the same command goes on.
    """
    store = Store.open(home(), plan.base.mlflow.tracking_uri)
    journal = store.grouping_run(KIND, plan.comparison_id)
    stored = store.load_json(journal, FILE)
    if stored is not None:  # what the file does not name is what it was: new defaults change no old comparison
        plan.base = taken_up(plan.base, stored["config"], named_keys(plan.file, plan.overrides))
    comparison = _resumed(plan, stored) | {"command": command}
    driver = _Driver(plan, store, journal, progress, verbose, comparison)
    driver.check_data(allow=allow_changed_data)
    driver.save()  # before the first run: killed in it, and with other defaults since, the same command still goes on
    driver.tune()
    driver.run_grid()
    store.end_run(journal, "FAILED" if comparison["failed"] else "FINISHED")
    return comparison


@dataclass(slots=True)
class _Driver:
    plan: ComparisonPlan
    store: Store
    journal: str
    progress: Progress
    verbose: bool
    comparison: dict[str, Any]

    def check_data(self, *, allow: bool) -> None:
        """Compare rows, prompts and base model with those of the start before (of the first seed: others draw from the
        same files); where they differ and may, no run and no choice of a learning rate counts any more."""
        plan, seed = self.plan, self.plan.seeds[0]
        facts: dict[str, Any] = {"tasks": {}}
        for order in plan.orders:
            found = gather_inputs(plan.config(plan.contenders[0], order, seed, None), home()).facts()
            facts = {**found, "tasks": facts["tasks"] | found["tasks"]}
        first = plan.run_id(plan.contenders[0], next(iter(plan.orders)), seed)
        places = [
            {tags.KIND: KIND, tags.RUN_ID: plan.comparison_id},
            {tags.KIND: "sequence", tags.RUN_ID: first},  # comparisons of before 0.2 kept no facts
        ]
        name = f"--run-id: comparison {plan.comparison_id!r}"
        if refuse_other_data(self.store, places, facts, results.INPUTS, name, allow=allow, again="run all of it again"):
            self.progress.note("the data has changed since this comparison began: all of it runs again")
            ids = [plan.run_id(*one) for one in plan.grid]
            ids += [plan.candidate_id(contender, rate) for contender in plan.contenders for rate in plan.learning_rates]
            begun = {run.tags[tags.RUN_ID] for run in self.store.find_runs({tags.KIND: "sequence"})}
            self.comparison |= {"tuning": {}, "again": [one for one in ids if one in begun]}
            self.save()
        self.store.log_json(self.journal, results.INPUTS, facts)

    def tune(self) -> None:
        """The learning rate of each method: one run on the dev split for each candidate, the same for all."""
        plan, tuning = self.plan, self.comparison["tuning"]
        order, seed = next(iter(plan.orders)), plan.seeds[0]
        for contender in plan.contenders:
            if not plan.learning_rates or method_class(contender.method).trains is Trains.NOTHING:
                tuning[contender.name] = {"chosen": None, "scores": {}}
                continue
            if contender.tuned_as in (other.name for other in plan.contenders):
                continue
            scores = tuning.get(contender.name, {}).get("scores", {})
            for rate in plan.learning_rates:
                if f"{rate:g}" not in scores:
                    scores[f"{rate:g}"] = self._candidate(contender, order, seed, rate)
                    tuning[contender.name] = {"scores": scores, "chosen": None}
                    self.save()
            known = {rate: scores[f"{rate:g}"] for rate in plan.learning_rates if scores[f"{rate:g}"] is not None}
            if not known:
                raise TrainingError(f"--learning-rates: {contender.name} diverged at each of them; give smaller ones")
            best = max(sorted(known), key=known.__getitem__)
            tuning[contender.name] = {"scores": scores, "chosen": best}
            self.save()
            self.progress.note(f"{contender.name}: learning rate {best:g} of {len(scores)} tried on dev")
        for contender in plan.contenders:
            if contender.tuned_as in tuning and contender.name not in tuning:
                tuning[contender.name] = {"chosen": tuning[contender.tuned_as]["chosen"], "scores": {}}

    def run_grid(self) -> None:
        plan = self.plan
        grid = list(plan.grid)
        entries: list[Entry] = []
        self.comparison["failed"] = []
        for number, (contender, order, seed) in enumerate(grid, start=1):
            run_id = plan.run_id(contender, order, seed)
            self.progress.note(f"[{number}/{len(grid)}] {run_id}")
            config = plan.config(contender, order, seed, self.comparison["tuning"][contender.name]["chosen"])
            try:
                self._run(config, run_id, order)
            except TrainingError as error:
                log.warning("%s failed: %s", run_id, error)
                self.comparison["failed"].append({"run_id": run_id, "method": contender.name, "reason": str(error)})
                continue
            entries.append(Entry(contender.name, order, seed, read_run(self.store, run_id)))
            if number % len(plan.contenders) == 0 and number < len(grid):
                self.comparison |= compare(entries, plan.contenders[0].name)
                self.save()
        if not entries:
            raise TrainingError(f"no run of {plan.comparison_id!r} ended: {self.comparison['failed'][0]['reason']}")
        self.comparison |= compare(entries, plan.contenders[0].name)
        self.save()

    def _candidate(self, contender: Contender, order: str, seed: int, rate: float) -> float | None:
        """Average performance on the dev split, None where training diverged."""
        run_id = self.plan.candidate_id(contender, rate)
        only = ("split=dev", "cells=last", "untrained=false", "oracle=false", "also=[]", "paraphrases=0", "knockout=false")
        more = [f"evaluation.{key}" for key in only]
        self.progress.note(f"{contender.name}: trying learning rate {rate:g}")
        try:
            result = self._run(self.plan.config(contender, order, seed, rate, more), run_id, order)
        except TrainingError as error:
            self.progress.note(f"{contender.name}: learning rate {rate:g}: {error}")
            return None
        score: float | None = result["metrics"]["average_performance"]
        return score

    def _run(self, config: RunConfig, run_id: str, order: str) -> dict[str, Any]:
        """The result of a run; what is finished, on the data of now, is not touched again."""
        again = run_id in self.comparison.get("again", ())
        config.registered_model = run_id
        wanted = {tags.KIND: "sequence", tags.RUN_ID: run_id}
        found = self.store.find_runs(wanted, registered_model=run_id)
        if found and found[-1].status == "FINISHED" and not again:
            refuse_other_configuration(self.store, wanted, to_mapping(with_evidence(config)), f"run id {run_id!r}")
            result: dict[str, Any] | None = self.store.load_json(found[-1].run, RESULT)
            if result is not None and result["tasks"] == self.plan.names[order]:
                return result
        made = run_sequence(
            config, run_id=run_id, progress=self.progress, verbose=self.verbose, alone=False, allow_changed_data=again
        )
        if again:
            self.comparison["again"].remove(run_id)
            if not self.comparison["again"]:
                del self.comparison["again"]
            self.save()
        return made

    def save(self) -> None:
        """Write the plan, and what is known so far, into the journal."""
        self.store.log_json(self.journal, FILE, self.comparison)


def _resumed(plan: ComparisonPlan, stored: dict[str, Any] | None) -> dict[str, Any]:
    """The stored comparison with this plan put in, or a new one.

    Raises:
        UserError: the id is that of a comparison whose results the plan would contradict.
    """
    made = plan.to_json()
    if stored is None:
        return made | {"tuning": {}, "failed": [], "runs": [], "methods": {}}
    differing = [differences(stored["config"], made["config"])]
    differing += [_differing(key, stored[key], made[key]) for key in ("learning_rates", "tuned_on")]
    if any(differing):
        raise UserError(
            f"--run-id: comparison {plan.comparison_id!r} was started otherwise ({'; '.join(filter(None, differing))});"
            " methods, seeds and orders may be added to it, the rest needs another --run-id"
        )
    changed = [name for name, tasks in made["orders"].items() if stored["orders"].get(name, tasks) != tasks]
    if changed:
        raise UserError(f"--orders: {changed[0]!r} of comparison {plan.comparison_id!r} was {stored['orders'][changed[0]]}")
    return stored | made


def _differing(key: str, stored: Any, made: Any) -> str:
    return "" if stored == made else f"{key.replace('_', ' ')}: {stored!r} then, {made!r} now"


def _contenders(names: Sequence[str]) -> list[Contender]:
    known = {name: Contender(name, name) for name in METHODS} | VARIANTS
    chosen = list(METHODS) if list(names) == ["all"] else list(names)
    if not chosen:
        raise UserError(f"--methods: found nothing, expected names of {', '.join(known)}, or all")
    found = []
    for text in _distinct("--methods", chosen):
        name, *overrides = text.split(":")
        if name not in known:
            hint = did_you_mean(name, list(known))
            raise UserError(f"--methods: found {name!r}{f' ({hint})' if hint else ''}, expected one of {', '.join(known)}")
        if bad := [one for one in overrides if "=" not in one]:
            raise UserError(f"--methods: found {text!r}, expected METHOD:KEY.PATH=VALUE, but {bad[0]!r} has no =")
        found.append(_with_overrides(known[name], overrides))
    names = [contender.name for contender in found]
    if twice := [text for text, name in zip(chosen, names, strict=True) if names.count(name) > 1]:
        raise UserError(f"--methods: {' and '.join(map(repr, twice))} would have the same name in the table; run them apart")
    return found


def _with_overrides(contender: Contender, overrides: Sequence[str]) -> Contender:
    if not overrides:
        return contender
    short = "-".join(f"{one.partition('=')[0].rpartition('.')[2]}-{one.partition('=')[2]}" for one in overrides)
    gates_alone = all(one.startswith("router.gate.") for one in overrides)
    return Contender(
        name=re.sub(r"[^A-Za-z0-9_.-]", "-", f"{contender.name}-{short}"),
        method=contender.method,
        overrides=(*contender.overrides, *overrides),
        tuned_as=contender.tuned_as or (contender.name if gates_alone else ""),
    )


def _orders(names: Sequence[str], file: Path, base: RunConfig) -> dict[str, list[Any]]:
    """Tasks of each order, by a name that fits into a run id."""
    found: dict[str, list[Any]] = {}
    for name in names or [GIVEN]:
        if name == GIVEN:
            key, tasks = GIVEN, list(base.tasks)
        elif re.fullmatch(r"[0-9]+(-[0-9]+)*", name):
            places = [int(place) for place in name.split("-")]
            if sorted(places) != list(range(1, len(base.tasks) + 1)):
                raise UserError(
                    f"--orders: found {name!r}, expected each of the places 1 to {len(base.tasks)} once, such as"
                    f" {'-'.join(map(str, range(len(base.tasks), 0, -1)))}"
                )
            key, tasks = name, [base.tasks[place - 1] for place in places]
        else:
            path = next((p for p in (Path(name), file.parent / name, file.parent / f"{name}.yaml") if p.is_file()), None)
            if path is None:
                raise UserError(
                    f"--orders: found {name!r}, expected a configuration whose tasks are taken (a path, or the name of one"
                    f" next to {file}), places such as 2-1-3, or {GIVEN}"
                )
            key, tasks = re.sub(r"[^A-Za-z0-9_-]", "-", path.stem), list(read_document(path).data.get("tasks") or [])
        if key in found:
            raise UserError(f"--orders: {name!r} is given twice")
        found[key] = tasks
    return found


def _distinct(option: str, values: list[Any]) -> list[Any]:
    if twice := [value for n, value in enumerate(values) if value in values[:n]]:
        raise UserError(f"{option}: {twice[0]} is given twice")
    return values


def _task_names(file: Path, overrides: Sequence[str], tasks: list[Any]) -> list[str]:
    _, specs = validate_config(file, [*overrides, f"tasks={json.dumps(tasks)}"])
    return [spec.name for spec in specs]
