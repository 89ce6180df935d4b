"""``training.learning_rate: auto``: the number that it means, found once and noted in the journal.

The race (``training.rate_race``) is an entry of its own, under a fingerprint of all that decides it: the training
fingerprints of the first stage at each candidate (base, rows, targets, rank, seed, method and the rest of what that stage
reads), the steps, and the margin of near-ties. Runs and trials that begin alike therefore race once, whoever comes first;
so do those that differ in nothing but their statistics, by the adapters' fingerprints.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from amlora_dist.digests import value_digest
from amlora_dist.methods import method_for
from amlora_dist.methods.kinds import Trains
from amlora_dist.registry import tags
from amlora_dist.training.rate_race import DEFAULT_RATE, RATES, best_rate, candidate_folder, steps_of_race
from amlora_dist.training.stage_spec import RateRace
from amlora_dist.training.stage_statistics import held_out_places
from pipelines.runs import results
from pipelines.runs.plan import stage_work, training_rows

if TYPE_CHECKING:
    from amlora_dist.methods.base import Method
    from amlora_dist.training.stage_spec import StageWork
    from pipelines.runs.journal import RunJournal
    from pipelines.runs.plan import BankState
    from pipelines.runs.progress import Progress

log = logging.getLogger(__name__)

KIND = "race"
FILE = "race.json"
"""Artifact of a race's MLflow run: steps, held-out losses (null: it diverged) and seconds by rate, and the rate that won."""
SCHEMA = 1
DEADLINE_S = 24 * 3600.0
"""How long a run waits for another one that races the same."""
RunStage = Callable[["StageWork"], None]


def settle_rate(
    journal: RunJournal, bank: BankState, run: RunStage, on_wait: Callable[[], None], progress: Progress
) -> dict[str, Any] | None:
    """Put a number in the place of ``training.learning_rate: auto`` in all that a run reads and stores.

    Args:
        journal: of the run.
        bank: on which it begins.
        run: runs the race, if there is one.
        on_wait: called before waiting for another run that races the same.
        progress: shows it.

    Returns:
        What a report says of how it was found; None of one that was given.

    Raises:
        TrainingError: the loss is not finite at any candidate.
        StoppedError: stopped; the race goes on from its checkpoints.
    """
    inputs = journal.inputs
    if inputs.config.training.learning_rate != "auto":
        stored: dict[str, Any] = journal.store.load_json(journal.run, results.INPUTS) or {}
        facts: dict[str, Any] | None = stored.get("rate")
        return facts
    search = RateSearch(journal, run, on_wait, progress)
    if (version := journal.version_of(bank)) is not None:
        manifest = journal.versions.manifest_of(version)
        chosen = search.of_bank(manifest.training_configuration, version.uri)
    else:
        chosen = search.raced(bank, inputs.stage_names[0])
    config = inputs.config
    journal.note_configuration(replace(config, training=replace(config.training, learning_rate=chosen.rate)))
    return chosen.facts


@dataclass(frozen=True, slots=True)
class ChosenRate:
    """A rate, and what a report says of how it was found."""

    rate: float
    facts: dict[str, Any]


@dataclass(frozen=True, slots=True)
class RateSearch:
    """Finds the rate of one run.

    Args:
        journal: of the run.
        run: runs the race.
        on_wait: called before waiting for another run that races the same: it may need what this one has.
        progress: shows it.
    """

    journal: RunJournal
    run: RunStage
    on_wait: Callable[[], None]
    progress: Progress

    def of_bank(self, configuration: Mapping[str, Any], uri: str) -> ChosenRate:
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
        return ChosenRate(rate, {"chosen": rate, "how": "parent" if known else "default"})

    def raced(self, bank: BankState, task: str) -> ChosenRate:
        """The rate that the first stage's rows decide for.

        Args:
            bank: on which the run begins: an empty one.
            task: name of the first stage.

        Raises:
            TrainingError: the loss is not finite at any candidate.
            StoppedError: stopped; the race goes on from its checkpoints.
        """
        inputs, store = self.journal.inputs, self.journal.store
        rows, mixed = training_rows(inputs, bank, task), inputs.mixed_rows(task, inputs.stage_names)
        steps = self._steps(task, rows, mixed)
        if not steps:
            self.progress.note(
                f"learning rate {DEFAULT_RATE:g}: the default, no race (few steps, no rows held out, or nothing to learn)"
            )
            return ChosenRate(DEFAULT_RATE, {"chosen": DEFAULT_RATE, "how": "default"})
        methods = {f"{rate:g}": self._method_at(rate) for rate in RATES}
        stages = {name: inputs.training_fingerprint(one, 1, task, [], [], rows, mixed) for name, one in methods.items()}
        race = RateRace(stages, steps, tuple(name for name, one in stages.items() if self.journal.has_published(one)))
        near_tie = inputs.config.training.near_tie
        decided_by = {"schema": SCHEMA, "steps": steps, "near_tie": near_tie}
        fingerprint = value_digest(decided_by | {"stages": race.fingerprints})
        adapters = {name: inputs.adapter_fingerprint(one, 1, task, [], rows, mixed) for name, one in methods.items()}
        alike = None if None in adapters.values() else value_digest(decided_by | {"adapters": adapters})
        label = f"learning rates of run {self.journal.inputs.run_id!r}"
        with contextlib.ExitStack() as stack:
            while (entry := self._entry(fingerprint, alike)) is None:
                claim = store.claim_stage(alike or fingerprint, label=label, deadline_s=DEADLINE_S, on_wait=self.on_wait)
                if claim is None:
                    continue
                stack.callback(claim.release, forget=True)
                entry = self._entry(fingerprint, alike)
                if entry is None:
                    folder = inputs.storage / "races" / fingerprint
                    racing = stage_work(inputs, bank, task, rows, fingerprint, folder)
                    entry = self._race(fingerprint, alike, replace(racing, race=race), race)
                break
            else:
                for key in filter(None, (fingerprint, alike)):
                    store.drop_claim(key, label=label)
        rate = float(entry["chosen"])
        losses = ", ".join(f"{name} {'diverged' if one is None else f'{one:.3f}'}" for name, one in entry["losses"].items())
        self.progress.note(f"learning rate {rate:g} won over {entry['steps']} steps (held-out losses: {losses})")
        return ChosenRate(rate, entry | {"how": "race", "fingerprint": fingerprint})

    def _race(self, fingerprint: str, alike: str | None, racing: StageWork, race: RateRace) -> dict[str, Any]:
        store, storage = self.journal.store, self.journal.inputs.storage
        self.progress.note(f"learning rate auto: {', '.join(race.fingerprints)} race over {race.steps} steps each")
        racing.fetch()
        if not racing.race_file.is_file():
            self.run(racing)
        found: dict[str, Any] = json.loads(racing.race_file.read_text(encoding="utf-8"))
        rate = best_rate({float(name): loss for name, loss in found["losses"].items()}, racing.settings.training.near_tie)
        # The winner's steps are the stage's first ones, unless somebody has that stage already.
        stage = race.fingerprints[f"{rate:g}"]
        if not self.journal.has_published(stage):
            begun = storage / "stages" / stage
            begun.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(OSError):
                if not begun.exists():
                    candidate_folder(racing.path, rate).rename(begun)
        entry = found | {"chosen": rate, "stages": race.fingerprints}
        run = store.grouping_run(KIND, fingerprint)
        store.log_json(run, FILE, entry)
        if alike is not None:
            store.set_tags(run, {tags.ADAPTER_FINGERPRINT: alike})
        store.end_run(run, "FINISHED")
        shutil.rmtree(racing.path, ignore_errors=True)
        return entry

    def _entry(self, fingerprint: str, alike: str | None) -> dict[str, Any] | None:
        """A race of this fingerprint that is over, or one of the same adapters with other statistics (``alike``)."""
        for key, wanted in ((tags.RUN_ID, fingerprint), (tags.ADAPTER_FINGERPRINT, alike)):
            for run in self.journal.store.find_runs({tags.KIND: KIND, key: wanted}) if wanted else []:
                found = self.journal.store.load_json(run.run, FILE)
                if isinstance(found, dict) and {"chosen", "losses", "steps"} <= found.keys():
                    return found
        return None

    def _method_at(self, rate: float) -> Method:
        settings = self.journal.inputs.stage_settings()
        return method_for(replace(settings, training=replace(settings.training, learning_rate=rate)))

    def _steps(self, task: str, rows: dict[str, int | None], mixed: dict[str, int]) -> int:
        """Of each candidate; 0: no race."""
        config, data = self.journal.inputs.config, self.journal.inputs.data
        method = method_for(self.journal.inputs.stage_settings())
        if config.prompt_format == 1 or method.layers.selectors_alone or method.trains is not Trains.ADAPTER:
            return 0
        sizes = {name: len(data[name].rows["train"]) for name in rows}
        own = sum(sizes[name] for name, limit in rows.items() if limit is None) + sum(mixed.values())
        replayed = sum(min(sizes[name], limit) for name, limit in rows.items() if limit is not None)
        held = len(held_out_places(own, config.router.holdout, seed=config.seed, task=task))
        batches = math.ceil((own - held + replayed) / config.training.batch_size)
        return steps_of_race(batches * config.training.epochs) if held else 0
