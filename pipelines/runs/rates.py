"""``training.learning_rate: auto``: the number that it stands for, found once and noted in the journal.

The race (``training.rate_race``) is an entry of its own, under a fingerprint of all that decides it: the training
fingerprints of the first stage at each candidate (base, rows, targets, rank, seed, method and the rest of what that stage
reads), the steps, and the margin of near-ties. Runs and trials that begin alike therefore race once, whoever comes first.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amlora_dist.config.loading import to_mapping
from amlora_dist.digests import value_digest
from amlora_dist.methods import method_for
from amlora_dist.privacy import public_configuration
from amlora_dist.registry import tags
from amlora_dist.training.rate_race import DEFAULT_RATE, RATES, best_rate, candidate_folder, steps_of_race
from amlora_dist.training.stage_spec import RateRace, StageWork
from amlora_dist.training.stage_statistics import held_out_places
from pipelines.runs import results

if TYPE_CHECKING:
    from amlora_dist.registry.store import Store
    from pipelines.runs.inputs import Materials
    from pipelines.runs.journal import GrowingBank
    from pipelines.runs.progress import Progress
    from pipelines.runs.sequence import _Driver

log = logging.getLogger(__name__)

KIND = "race"
FILE = "race.json"
"""Artifact of a race's MLflow run: steps, held-out losses, and the rate that won."""
SCHEMA = 1
DEADLINE_S = 24 * 3600.0
"""How long a run waits for another one that races the same."""


def settle_rate(driver: _Driver, bank: GrowingBank) -> dict[str, Any] | None:
    """Put a number in the place of ``training.learning_rate: auto`` in all that a run reads and stores.

    Returns:
        What a report says of how it was found; None of one that was given.

    Raises:
        TrainingError: the loss is not finite at any candidate.
        StoppedError: stopped; the race goes on from its checkpoints.
    """
    materials, store = driver.materials, driver.store
    if materials.config.training.learning_rate != "auto":
        stored: dict[str, Any] = store.load_json(driver.parent_run, results.MATERIALS) or {}
        facts: dict[str, Any] | None = stored.get("rate")
        return facts
    search = RateSearch(materials, store, driver.storage, driver.progress, driver.run_id)
    if bank.version is not None:
        manifest = driver.publication.manifest_of(bank.version, driver.storage)
        chosen = search.of_bank(manifest.training_configuration, bank.version.uri)
    else:
        task = driver.names[0]
        rows, mixed = driver._training_rows(task, bank), materials.mixed_rows(task, driver.names)

        def work(fingerprint: str, folder: Path) -> StageWork:
            return driver._work(index=1, task=task, fingerprint=fingerprint, folder=folder, bank=bank, rows=rows)

        chosen = search.raced(task, rows, mixed, work=work, execute=lambda one: driver._execute(one, []))
    config = materials.config
    driver.config = materials.config = replace(config, training=replace(config.training, learning_rate=chosen.rate))
    driver.settings = materials.stage_settings()
    driver.method = method_for(driver.settings)
    driver.publication.mapping = public_configuration(to_mapping(driver.config))
    store.log_json(driver.parent_run, "config.json", driver.publication.mapping)
    return chosen.facts


@dataclass(frozen=True, slots=True)
class Chosen:
    """A rate, and what a report says of how it was found."""

    rate: float
    facts: dict[str, Any]


@dataclass(frozen=True, slots=True)
class RateSearch:
    """Finds the rate of one run.

    Args:
        materials: of the run.
        store: the journal.
        storage: where stages lie.
        progress: hears of it.
        run_id: of the run, which its claims name.
    """

    materials: Materials
    store: Store
    storage: Path
    progress: Progress
    run_id: str

    def of_bank(self, configuration: Mapping[str, Any], uri: str) -> Chosen:
        """A run on a published bank keeps the bank's rate.

        Args:
            configuration: with which the bank was trained, as any version of this project wrote it.
            uri: of the bank.
        """
        training = configuration.get("training")
        found = training.get("learning_rate") if isinstance(training, Mapping) else None
        known = isinstance(found, (int, float)) and not isinstance(found, bool) and 0 < found < math.inf
        rate = float(found) if known else DEFAULT_RATE  # type: ignore[arg-type]
        self.progress.note(f"learning rate {rate:g}: {'that of' if known else 'the default, unknown of'} {uri}")
        return Chosen(rate, {"chosen": rate, "how": "parent" if known else "default"})

    def raced(
        self, task: str, rows: dict[str, int | None], mixed: dict[str, int], *,
        work: Callable[[str, Path], StageWork], execute: Callable[[StageWork], None],
    ) -> Chosen:  # fmt: skip
        """The rate that the first stage's rows decide for.

        Args:
            task: name of the first stage.
            rows: ``Method.rows`` of it.
            mixed: rows of other tasks among its own.
            work: makes the stage's work, of a fingerprint and a folder.
            execute: does some work on the run's workers.

        Raises:
            TrainingError: the loss is not finite at any candidate.
            StoppedError: stopped; the race goes on from its checkpoints.
        """
        steps = self._steps(task, rows, mixed)
        if not steps:
            self.progress.note(
                f"learning rate {DEFAULT_RATE:g}: the default, no race (few steps, no rows held out, or nothing to learn)"
            )
            return Chosen(DEFAULT_RATE, {"chosen": DEFAULT_RATE, "how": "default"})
        race = RateRace({f"{rate:g}": self._stage_at(rate, task, rows, mixed) for rate in RATES}, steps)
        near_tie = self.materials.config.training.near_tie
        fingerprint = value_digest(
            {"schema": SCHEMA, "stages": race.fingerprints, "steps": steps, "near_tie": near_tie}
        )
        label = f"learning rates of run {self.run_id!r}"
        with contextlib.ExitStack() as stack:
            while (entry := self._entry(fingerprint)) is None:
                claim = self.store.claim_stage(fingerprint, label=label, deadline_s=DEADLINE_S)
                if claim is None:
                    continue
                stack.callback(claim.release, forget=True)
                entry = self._entry(fingerprint) or self._race(fingerprint, race, work, execute)
                break
            else:
                self.store.drop_claim(fingerprint, label=label)
        rate = float(entry["chosen"])
        losses = ", ".join(f"{name} {'diverged' if one is None else f'{one:.3f}'}" for name, one in entry["losses"].items())
        self.progress.note(f"learning rate {rate:g} won over {entry['steps']} steps (held-out losses: {losses})")
        return Chosen(rate, entry | {"how": "race", "fingerprint": fingerprint})

    def _race(
        self, fingerprint: str, race: RateRace, work: Callable[[str, Path], StageWork], execute: Callable[[StageWork], None]
    ) -> dict[str, Any]:
        folder = self.storage / "races" / fingerprint
        self.progress.note(f"learning rate auto: {', '.join(race.fingerprints)} race over {race.steps} steps each")
        racing = replace(work(fingerprint, folder), race=race)
        racing.bring()
        if not racing.race_file.is_file():
            execute(racing)
        found: dict[str, Any] = json.loads(racing.race_file.read_text(encoding="utf-8"))
        rate = best_rate({float(name): loss for name, loss in found["losses"].items()}, racing.settings.training.near_tie)
        # The winner's steps are the stage's first ones, unless somebody has that stage already.
        begun = self.storage / "stages" / race.fingerprints[f"{rate:g}"]
        begun.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):
            if not begun.exists():
                candidate_folder(folder, rate).rename(begun)
        entry = found | {"chosen": rate, "stages": race.fingerprints}
        run = self.store.grouping_run(KIND, fingerprint)
        self.store.log_json(run, FILE, entry)
        self.store.end_run(run, "FINISHED")
        shutil.rmtree(folder, ignore_errors=True)
        return entry

    def _entry(self, fingerprint: str) -> dict[str, Any] | None:
        """A race of this fingerprint that is over."""
        for run in self.store.find_runs({tags.KIND: KIND, tags.RUN_ID: fingerprint}):
            found = self.store.load_json(run.run, FILE)
            if isinstance(found, dict) and {"chosen", "losses", "steps"} <= found.keys():
                return found
        return None

    def _stage_at(self, rate: float, task: str, rows: dict[str, int | None], mixed: dict[str, int]) -> str:
        settings = self.materials.stage_settings()
        method = method_for(replace(settings, training=replace(settings.training, learning_rate=rate)))
        return self.materials.training_fingerprint(method, 1, task, [], [], rows, mixed)

    def _steps(self, task: str, rows: dict[str, int | None], mixed: dict[str, int]) -> int:
        """Of each candidate; 0: no race."""
        config, data = self.materials.config, self.materials.data
        method = method_for(self.materials.stage_settings())
        if config.prompt_format == 1 or method.selectors_alone or not (method.trains and method.learns):
            return 0
        sizes = {name: len(data[name].rows["train"]) for name in rows}
        own = sum(sizes[name] for name, limit in rows.items() if limit is None) + sum(mixed.values())
        replayed = sum(min(sizes[name], limit) for name, limit in rows.items() if limit is not None)
        held = len(held_out_places(own, config.router.holdout, seed=config.seed, task=task))
        batches = math.ceil((own - held + replayed) / config.training.batch_size)
        return steps_of_race(batches * config.training.epochs) if held else 0
