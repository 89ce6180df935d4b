"""The journal of a search: one MLflow run for each trial, below the search's own, written by the search alone.

A trial's run carries its number and values from the moment it is proposed, and its outcome when it has ended. Starts
and ends are counted together, so that an algorithm that learns from results can be rebuilt by telling it the same
things in the same order.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from amlora_dist.registry import tags

if TYPE_CHECKING:
    from amlora_dist.registry.store import Store

Outcome = Literal["finished", "pruned", "failed"]
FILE = "trial.json"
"""Artifact of a trial's run: what it reported last."""
STATUS: dict[Outcome, str] = {"finished": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}
VALUES = "amlora.values"
REOPENED = "amlora.reopened"


@dataclass(slots=True)
class Trial:
    """What is known of a trial."""

    number: int
    run: str
    """MLflow's id."""
    values: dict[str, Any]
    asked: int
    told: int | None = None
    outcome: Outcome | None = None
    """None: it has not ended."""
    reopened: bool = False
    """It had ended, on data that have changed since: its values were proposed by what was known then."""
    report: dict[str, Any] = field(default_factory=dict)
    """Its last report (``pipelines.search.trial``), with ``error`` where it failed."""


class Journal:
    """The trials of one search; ``guard`` is called before each write (``Lease.check``)."""

    def __init__(self, store: Store, search_run: str, search_id: str, guard: Callable[[], None]) -> None:
        self._store, self._search_run, self._search_id, self._guard = store, search_run, search_id, guard
        self.trials: dict[int, Trial] = {}
        wanted = {tags.KIND: "trial", tags.SEARCH: search_id}
        for found in store.find_runs(wanted):
            values = found.tags
            if tags.ASKED not in values:
                continue  # died between the run's creation and its tags: proposed again
            number, told = int(values[tags.TRIAL]), values.get(tags.TOLD)
            ended: Any = values.get(tags.OUTCOME) if told else None
            trial = Trial(
                number, found.run, json.loads(values[VALUES]), int(values[tags.ASKED]), int(told) if told else None, ended,
                REOPENED in values,
            )  # fmt: skip
            trial.report = (store.load_json(found.run, FILE) or {}) if ended else {}
            self.trials[number] = trial
        self._count = max([0, *(t.asked for t in self.trials.values()), *(t.told or 0 for t in self.trials.values())])

    @property
    def tracking_uri(self) -> str:
        """Where it is written; absolute."""
        return self._store.connection.uri

    def events(self) -> list[tuple[Trial, bool]]:
        """Starts (False) and ends (True) of all trials, in their order."""
        both = [(t.asked, t, False) for t in self.trials.values()]
        both += [(t.told, t, True) for t in self.trials.values() if t.told is not None]
        return [(trial, ended) for _, trial, ended in sorted(both, key=lambda event: event[0])]

    def start(self, number: int, values: Mapping[str, Any]) -> Trial:
        """A trial is proposed, or goes on after the search died."""
        self._guard()
        run = self._store.trial_run(self._search_run, self._search_id, number, values)
        if number not in self.trials:
            self._count += 1
            trial = Trial(number, run, dict(values), self._count)
            self._store.set_tags(run, {VALUES: json.dumps(trial.values), tags.ASKED: str(trial.asked)})
            self.trials[number] = trial
        return self.trials[number]

    def reopen(self) -> None:
        """No trial has ended any more: each is started again, with the values it has."""
        for trial in self.trials.values():
            if trial.outcome:
                self._guard()
                self._store.set_tags(trial.run, {REOPENED: "yes", tags.OUTCOME: "", tags.TOLD: ""})
                trial.told, trial.outcome, trial.report, trial.reopened = None, None, {}, True

    def log(self, trial: Trial, report: Mapping[str, Any]) -> None:
        """A trial's metrics after a stage."""
        now, step = int(time.time() * 1000), int(report["stage"])
        rows = [(name, float(value), step, now) for name, value in report["metrics"].items() if value is not None]
        self._guard()
        self._store.log_metrics_batch(trial.run, rows)

    def end(self, trial: Trial, outcome: Outcome, report: Mapping[str, Any]) -> None:
        """A trial has ended; the tag that says so is written last."""
        self._guard()
        trial.report = dict(report)
        self._store.log_json(trial.run, FILE, trial.report)
        self._count += 1
        self._store.set_tags(trial.run, {tags.OUTCOME: outcome, tags.TOLD: str(self._count)})
        trial.told, trial.outcome = self._count, outcome
        self._store.end_run(trial.run, STATUS[outcome])
