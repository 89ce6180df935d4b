"""Which learning rate wins a race, and when there is one."""

from __future__ import annotations

import pytest

from amlora_dist.errors import TrainingError
from amlora_dist.training.rate_race import RATES, best_rate, steps_of_race
from amlora_dist.training.settings import TrainingSettings


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ((1.0, 0.5, 0.4), 1e-2),
        ((0.5, 0.4, 0.9), 3e-3),
        ((0.500, 0.499, 0.498), 1e-3),  # near-ties go to the lower rate
        ((0.500, 0.400, 0.399), 3e-3),
        ((0.5, None, 0.3), 1e-2),  # what diverged has lost
        ((0.5, None, None), 1e-3),
    ],
)
def test_the_lowest_held_out_loss_wins_and_near_ties_go_to_the_lower_rate(
    losses: tuple[float | None, ...], expected: float
) -> None:
    assert best_rate(dict(zip(RATES, losses, strict=True)), near_tie=0.01) == expected


def test_rates_that_all_diverge_are_an_error_that_names_them() -> None:
    with pytest.raises(TrainingError, match=r"not finite at any of 0\.001, 0\.003, 0\.01; give a smaller number"):
        best_rate(dict.fromkeys(RATES), near_tie=0.01)


def test_losers_cost_no_more_than_their_share_and_short_stages_do_not_race() -> None:
    for steps in range(1, 2000):
        each = steps_of_race(steps)
        share = 0.15 if steps >= 100 else 0.5
        assert each == 0 or (each >= 8 and each * (len(RATES) - 1) <= share * steps)
    assert (steps_of_race(31), steps_of_race(32), steps_of_race(106), steps_of_race(107)) == (0, 8, 0, 8)


def test_no_stage_trains_at_a_rate_that_is_not_a_number_yet() -> None:
    assert TrainingSettings().learning_rate == "auto"
    assert TrainingSettings(learning_rate=1e-3).rate == 1e-3
    with pytest.raises(TrainingError, match=r"training\.learning_rate is still auto"):
        _ = TrainingSettings().rate
