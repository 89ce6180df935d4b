"""The one place that knows Ray Tune: its search algorithm, scheduler and callback as thin doors to a search."""

from __future__ import annotations

import json
import logging
import os
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from amlora_dist.config.loading import to_mapping
from amlora_dist.errors import TrainingError
from amlora_dist.privacy import DROPPED
from pipelines.search.trial import Order, Places, run_trial

if TYPE_CHECKING:
    from pipelines.search.driver import _Search

PENDING_DEADLINE_S = 600.0
"""Seconds for which no trial may be at work while some wait for resources."""
DRIVER_BYTES = 64 << 20
"""What a trial whose workers do the work asks for itself: Tune wants some resource, and it must be no CPU."""
SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the journal has it all
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # an interrupted search ends at once and goes on later
    "TUNE_WARN_THRESHOLD_S": "60",
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "3600",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths of a configuration mean the directory of the command
}


def tune_trials(search: _Search, concurrent: int, *, gpus: bool) -> None:
    """Run what is left of a search's trials, ``concurrent`` at once.

    Raises:
        TrainingError: nothing was at work for `PENDING_DEADLINE_S`.
        AmloraError: what broke the search (``_Search.broken``).
    """
    for key, value in SETTINGS.items():
        os.environ.setdefault(key, value)
    if not search.verbose:
        logging.getLogger("ray.tune").setLevel(logging.ERROR)
    plan = search.plan
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(run_trial, places=places_of(search)), _resources(search, gpus)),
        tune_config=tune.TuneConfig(
            search_alg=_Proposer(search, gpus),
            scheduler=_Stopper(search),
            num_samples=plan.trials * plan.stages,  # at most: a trial that waited is another one to Tune
            max_concurrent_trials=concurrent,
            reuse_actors=True,
            trial_dirname_creator=_directory,
        ),
        run_config=tune.RunConfig(
            name=f"{search.search_id}-{int(time.time())}",
            storage_path=str(search.storage / "ray"),
            failure_config=tune.FailureConfig(max_failures=plan.settings.retries),
            callbacks=[_Watch(search)],
            verbose=0,
        ),
    )
    tuner.fit()
    if search.broken:
        raise search.broken


def places_of(search: _Search) -> Places:
    """Of all trials."""
    return Places(
        home=str(search.home),
        folder=os.getcwd(),
        tracking_uri=search.journal.tracking_uri,
        config={key: value for key, value in to_mapping(search.plan.config({})).items() if key in DROPPED},
    )


def _resources(search: _Search, gpus: bool) -> dict[str, float]:
    """Of the trial's own process: all that the trial needs where it works in it, else no CPU."""
    if search.plan.base.workers:
        return {"memory": DRIVER_BYTES}
    return {"CPU": 1, "GPU": search.plan.settings.gpus or 1.0} if gpus else {"CPU": 1}


def _directory(trial: Any) -> str:
    return f"trial-{trial.trial_id}"


class _Stateless:
    """Tune pickles what it is given into a file for its own restoration, which is not used."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Proposer(_Stateless, Searcher):
    def __init__(self, search: _Search, gpus: bool) -> None:
        super().__init__()
        self._search, self._gpus = search, gpus
        self._shared = places_of(search).config
        self._numbers: dict[str, int] = {}

    def suggest(self, trial_id: str) -> Any:
        found = None
        with self._search.breaking():
            found = self._search.next()
        if found == "later":
            return None
        if found is None:
            return Searcher.FINISHED
        trial, config = found
        settings = self._search.plan.settings
        self._numbers[trial_id] = trial.number
        order = Order(
            number=trial.number,
            run_id=self._search.run_id(trial.number),
            mlflow_run=trial.run,
            config={key: value for key, value in config.items() if self._shared.get(key, ...) != value},
            objectives=list(settings.objectives),
            stages=self._search.plan.stages,
            gpus=settings.gpus or 1.0,
            threads=0 if self._gpus else 1,
            share=settings.share_stages,
            verbose=self._search.verbose,
        )
        return {"order": json.dumps(asdict(order))}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if error:
            return  # `_Watch` knows why
        report = _reported(result)
        with self._search.breaking():
            self._search.ended(self._numbers[trial_id], report, None if report else "it ended before its first stage")

    def save(self, checkpoint_path: str) -> None:
        """The journal is what a search is rebuilt from."""

    def restore(self, checkpoint_path: str) -> None:
        """As ``save``."""


class _Stopper(_Stateless, FIFOScheduler):
    def __init__(self, search: _Search) -> None:
        super().__init__()
        self._search = search

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        stop = False
        with self._search.breaking():
            stop = self._search.stopped_by(json.loads(result["report"]))
        return str(TrialScheduler.STOP if stop else TrialScheduler.CONTINUE)


class _Watch(_Stateless, tune.Callback):
    """Says when a trial's process died, and sees that nothing waits for ever."""

    def __init__(self, search: _Search) -> None:
        self._search = search
        self._idle_since: float | None = None

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        order = json.loads(trial.config["order"])
        last = (str(trial.get_error() or "").strip().splitlines() or ["no reason given"])[-1]
        reason = f"its process died {self._search.plan.settings.retries + 1} times ({last})"
        with self._search.breaking():
            self._search.ended(order["number"], _reported(trial.last_result), reason)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        order = json.loads(trial.config["order"])
        self._search.progress.note(f"  trial {order['number']}: its process died; it is started again and goes on")

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if self._search.broken:
            raise self._search.broken
        working = any(trial.status == "RUNNING" for trial in trials)
        waiting = any(trial.status == "PENDING" for trial in trials)
        now = time.monotonic()
        self._idle_since = (self._idle_since or now) if waiting and not working else None
        if self._idle_since is not None and now - self._idle_since > PENDING_DEADLINE_S:
            raise TrainingError(
                f"trials wait for CPUs or GPUs since {PENDING_DEADLINE_S:.0f} s and none is at work: did the cluster lose"
                " its nodes? Start the same command again when they are back"
            )


def _reported(result: dict[str, Any] | None) -> dict[str, Any] | None:
    """A trial's last report, out of what Tune knows of it."""
    found: dict[str, Any] | None = json.loads(result["report"]) if result and "report" in result else None
    return found
