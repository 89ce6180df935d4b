"""Which trial comes next: from a list, or from Optuna, rebuilt by replaying what the journal holds."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from amlora_dist.config.search_space import DIRECTIONS, Dimension
from amlora_dist.errors import UserError

if TYPE_CHECKING:
    from pipelines.search.journal import Outcome, Trial
    from pipelines.search.plan import SearchPlan

log = logging.getLogger(__name__)


class Proposals(Protocol):
    """An algorithm with the usual ask and tell."""

    def next(self) -> tuple[int, dict[str, Any]] | None:
        """Number and values of the next trial to start; None: there is none."""

    def tell(self, number: int, outcome: Outcome, values: Sequence[float | None]) -> None:
        """A trial has ended, with its objectives (of the last stage that was scored)."""


def proposals_for(plan: SearchPlan, events: Sequence[tuple[Trial, bool]]) -> Proposals:
    """The plan's algorithm as it was after these events; trials that have started and not ended come first."""
    unfinished = [trial for trial, ended in events if not ended and trial.outcome is None]
    if plan.listed is not None:
        started = {trial.number for trial, _ in events}
        order = [trial.number for trial in unfinished] + [n for n in plan.order if n not in started]
        return _Listed([(number, plan.listed[number - 1]) for number in order])
    return _Optuna(plan, events, unfinished)


class _Listed:
    def __init__(self, left: list[tuple[int, dict[str, Any]]]) -> None:
        self._left = left

    def next(self) -> tuple[int, dict[str, Any]] | None:
        return self._left.pop(0) if self._left else None

    def tell(self, number: int, outcome: Outcome, values: Sequence[float | None]) -> None:
        """A list does not learn."""


class _Optuna:
    """Optuna's TPE (Bergstra et al. 2011), by ask and tell.

    The sampler draws from its seed and from the results it was given, in order: asking and telling the same again gives the
    same state, so nothing of Optuna's own needs to be stored.
    """

    def __init__(self, plan: SearchPlan, events: Sequence[tuple[Trial, bool]], unfinished: Sequence[Trial]) -> None:
        try:
            import optuna
        except ImportError as error:
            raise UserError(
                "search.algorithm: optuna is not installed; run: pip install 'amlora-dist[search]', or take random"
            ) from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna, self._plan = optuna, plan
        directions = [f"{DIRECTIONS[name]}imize" for name in plan.settings.objectives]
        self._study = optuna.create_study(directions=directions, sampler=optuna.samplers.TPESampler(seed=plan.base.seed))
        self._space = {d.path: self._distribution(d) for d in plan.dimensions}
        self._asked: dict[int, Any] = {}
        self._waiting = [(trial.number, trial.values) for trial in unfinished]
        for trial, ended in events:
            if not ended:
                self._replay(trial)
            elif trial.outcome is not None:
                self.tell(trial.number, trial.outcome, trial.report.get("objectives") or [])

    def next(self) -> tuple[int, dict[str, Any]] | None:
        if self._waiting:
            return self._waiting.pop(0)
        if len(self._asked) >= self._plan.trials:
            return None
        asked = self._study.ask(self._space)
        self._asked[asked.number + 1] = asked
        return asked.number + 1, self._values(asked.params)

    def tell(self, number: int, outcome: Outcome, values: Sequence[float | None]) -> None:
        state = self._optuna.trial.TrialState
        asked = self._asked[number]
        known = [value for value in values if value is not None]
        if outcome == "pruned" and len(self._plan.settings.objectives) == 1 and known:
            asked.report(known[0], step=1)
            self._study.tell(asked, state=state.PRUNED)
        elif outcome == "finished" and known and len(known) == len(values):
            self._study.tell(asked, known)
        else:
            self._study.tell(asked, state=state.FAIL)

    def _replay(self, trial: Trial) -> None:
        if trial.reopened:  # what it was proposed by does not count any more
            listed = {d.path for d in self._plan.dimensions if d.listed}
            self._study.enqueue_trial(
                {path: json.dumps(value) if path in listed else value for path, value in trial.values.items()}
            )
        asked = self._study.ask(self._space)
        self._asked[trial.number] = asked
        if self._values(asked.params) != trial.values:
            raise UserError(
                f"trial {trial.number} was proposed with {trial.values}, now Optuna {self._optuna.__version__} proposes"
                f" {self._values(asked.params)}: another version of Optuna than the search began with? Use that one, or"
                " another --search-id (finished stages are shared with it)"
            )

    def _distribution(self, dimension: Dimension) -> Any:
        made = self._optuna.distributions
        if dimension.listed:
            return made.CategoricalDistribution([json.dumps(value) for value in dimension.values])
        low, high = dimension.values
        if dimension.kind == "randint":
            return made.IntDistribution(low, high - 1)
        return made.FloatDistribution(low, high, log=dimension.kind == "loguniform")

    def _values(self, params: dict[str, Any]) -> dict[str, Any]:
        listed = {d.path for d in self._plan.dimensions if d.listed}
        return {d.path: json.loads(params[d.path]) if d.path in listed else params[d.path] for d in self._plan.dimensions}
