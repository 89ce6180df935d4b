"""What a version must have to take an alias."""

from __future__ import annotations

import pytest

from amlora_dist.errors import UserError
from amlora_dist.evaluation.promotion import Requirement, check_covered, check_margin, judge

NEW = {"a": {"accuracy": 0.6, "routing_accuracy": 1.0}, "helpdesk/b": {"accuracy": 0.8, "routing_accuracy": 0.5}}
OLD = {"a": {"accuracy": 0.62, "routing_accuracy": 1.0}}


def passed(*required: str, margin: float = 0.0, replaced: dict | None = None) -> list[bool]:
    return [one.passed for one in judge([Requirement.parse(text) for text in required], margin, NEW, replaced)]


def test_requirements_hold_at_their_bound_and_not_below_it() -> None:
    assert passed("accuracy[a] >= 0.6", "accuracy[a] > 0.6", "accuracy[helpdesk/b]>=.81") == [True, False, False]
    assert passed("accuracy >= 0.7", "routing_accuracy > 0.75") == [True, False]


def test_a_version_may_be_worse_than_the_one_it_replaces_by_the_margin_and_no_more() -> None:
    assert passed(replaced=OLD, margin=0.02) == [True]
    assert passed(replaced=OLD, margin=0.01) == [False]
    (one,) = judge([], 0.01, NEW, OLD)
    assert str(one) == "accuracy[a] >= 0.610: found 0.600 (the replaced version has 0.620)"


@pytest.mark.parametrize(
    "text", ["accuracy[a] = 0.6", "accuracy[a] <= 0.6", "f1[a] >= 0.6", "accuracy[a] >= 60", "accuracy >= x", "", "accuracy"]
)
def test_what_is_no_requirement_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UserError, match=r"--require: found .*expected SCORE\[TASK\] >= NUMBER"):
        Requirement.parse(text)


def test_a_sample_that_cannot_tell_is_refused_by_the_name_of_the_task() -> None:
    with pytest.raises(UserError, match="no rows of 'c', only of a"):
        check_covered([Requirement.parse("accuracy[c] >= 0.1")], ["a"], [])
    with pytest.raises(UserError, match="no rows of b, which the version to be replaced serves"):
        check_covered([], ["a"], ["a", "b"])
    with pytest.raises(UserError, match="--margin: found 2, expected a share"):
        check_margin(2.0)
