"""Algorithms rebuilt from a journal go on as if nothing had happened."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from amlora_dist.config.loading import load_config
from amlora_dist.errors import UserError
from pipelines.search.journal import Trial
from pipelines.search.plan import SearchPlan, plan_search
from pipelines.search.proposals import proposals_for

pytest.importorskip("optuna")


def plan(folder: Path, **search: Any) -> SearchPlan:
    space = {
        "training.l1": {"uniform": [0.0, 1.0]}, "adapters.rank": {"choice": [2, 4, 8]},
        "training.epochs": {"randint": [1, 9]}, "training.learning_rate": {"loguniform": [1e-4, 1e-1]},
    }  # fmt: skip
    data = {
        "name": "x", "workers": 0, "model": {"source": "owner/model"},
        "tasks": ["helpdesk/email_route", "helpdesk/chat_mood"],
        "search": {"space": space, "algorithm": "optuna", "num_samples": 24} | search,
    }  # fmt: skip
    file = folder / "search.yaml"
    file.write_text(yaml.safe_dump(data), encoding="utf-8")
    return plan_search(load_config(file), str(file))


class Bench:
    """Runs trials two at a time with a made-up objective; its memory is what a journal keeps."""

    def __init__(self, made: SearchPlan) -> None:
        self.plan = made
        self.trials: dict[int, Trial] = {}
        self.count = 0
        self.proposals = proposals_for(made, [])
        self.working: list[int] = []

    def events(self) -> list[tuple[Trial, bool]]:
        both = [(t.asked, t, False) for t in self.trials.values()]
        both += [(t.told, t, True) for t in self.trials.values() if t.told is not None]
        return [(trial, ended) for _, trial, ended in sorted(both, key=lambda event: event[0])]

    def step(self) -> bool:
        """Start a trial if there is room, else end the one that has worked longest; False: all is done."""
        if len(self.working) < 2 and (found := self.proposals.next()):
            number, values = found
            if number not in self.trials:
                self.count += 1
                self.trials[number] = Trial(number, "run", values, self.count)
            self.working.append(number)
            return True
        if not self.working:
            return False
        trial = self.trials[self.working.pop(0)]
        values = trial.values
        good = -abs(values["training.l1"] - 0.3) - 0.1 * (values["adapters.rank"] != 4)
        trial.outcome = "failed" if trial.number == 5 else "pruned" if trial.number == 7 else "finished"
        scores = [good, values["training.epochs"] / 10][: len(self.plan.settings.objectives)]
        trial.report = {"objectives": [] if trial.outcome == "failed" else scores}
        self.count += 1
        trial.told = self.count
        self.proposals.tell(trial.number, trial.outcome, trial.report["objectives"])
        return True

    def die(self) -> None:
        """The search is killed: nothing is left but the journal."""
        self.working = []
        self.proposals = proposals_for(self.plan, self.events())


@pytest.mark.parametrize("objective", ["average_performance", ["average_performance", "forgetting"]])
def test_optuna_killed_again_and_again_proposes_what_it_would_have_proposed(objective: Any, tmp_path: Path) -> None:
    made = plan(tmp_path, objective=objective)
    calm = Bench(made)
    while calm.step():
        pass
    assert len(calm.trials) == 24
    hurt, draw = Bench(made), random.Random(0)
    while hurt.step():
        if draw.random() < 0.3:
            hurt.die()
    assert {n: t.values for n, t in hurt.trials.items()} == {n: t.values for n, t in calm.trials.items()}


def test_optuna_learns(tmp_path: Path) -> None:
    bench = Bench(plan(tmp_path))
    while bench.step():
        pass
    away = [abs(bench.trials[number].values["training.l1"] - 0.3) for number in range(1, 25)]
    assert sum(away[14:]) < sum(away[:10])


def test_trials_that_run_again_on_other_data_keep_their_values(tmp_path: Path) -> None:
    bench = Bench(plan(tmp_path))
    for _ in range(20):
        bench.step()
    values = {number: dict(trial.values) for number, trial in bench.trials.items()}
    for trial in bench.trials.values():  # as `Journal.reopen` leaves them
        trial.reopened, trial.told, trial.outcome, trial.report = True, None, None, {}
    for _ in range(3):
        bench.die()
        for _ in range(7):
            bench.step()
    while bench.step():
        pass
    assert len(bench.trials) == 24
    assert {number: bench.trials[number].values for number in values} == values


def test_optuna_that_proposes_something_else_than_before_says_so(tmp_path: Path) -> None:
    made = plan(tmp_path)
    bench = Bench(made)
    bench.step()
    bench.trials[1].values = bench.trials[1].values | {"training.l1": 0.123}
    with pytest.raises(UserError, match="another version of Optuna"):
        proposals_for(made, bench.events())


def test_a_list_goes_on_with_the_unfinished_and_then_the_untouched(tmp_path: Path) -> None:
    space = {"adapters.rank": {"grid": [2, 4, 8]}, "training.l1": {"grid": [0.0, 0.5]}}
    made = plan(tmp_path, algorithm="grid", num_samples=None, space=space)
    assert made.listed is not None
    order = list(made.order)
    ended = Trial(order[0], "run", made.listed[order[0] - 1], 1, 4, "finished")
    broken = Trial(order[1], "run", made.listed[order[1] - 1], 2)
    proposals = proposals_for(made, [(ended, False), (broken, False), (ended, True)])
    left = []
    while found := proposals.next():
        left.append(found[0])
        assert found[1] == made.listed[found[0] - 1]
    assert left == order[1:]
