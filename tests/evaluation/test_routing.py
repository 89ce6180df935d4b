"""Routing statistics are what their names say, and undefined is None."""

from __future__ import annotations

import json

import pytest
import torch

from amlora_dist.evaluation.routing import effective_adapters, routing_drift, routing_statistics

GATES = [
    [1.0, 0.0, 0.0],  # a, right
    [0.5, 0.5, 0.0],  # a, right (first of equals)
    [0.0, 1.0, 0.0],  # b, right
    [0.8, 0.0, 0.2],  # b, misrouted
    [0.0, 0.0, 0.0],  # c, abstained: wrong
    [0.1, 0.0, 0.3],  # c, right task but mostly the zero adapter
    [1.0, 0.0, 0.0],  # unseen
]
TRUTH = [0, 0, 1, 1, 2, 2, 3]


def test_statistics_of_a_small_example_are_those_counted_by_hand() -> None:
    got = routing_statistics(GATES, TRUTH, tasks=["a", "b", "c", "unseen", "empty"], adapters=["a", "b", "c"])
    assert got.inputs == [2, 2, 2, 1, 0]
    assert got.mass[0] == pytest.approx([0.75, 0.25, 0.0])
    assert got.mass[2] == pytest.approx([0.05, 0.0, 0.15])
    assert got.mass[4] is None
    assert got.zero_mass == [0.0, 0.0, pytest.approx(0.8), 0.0, None]
    assert got.accuracy == [1.0, 0.5, 0.5, None, None]
    assert got.abstention == [0.0, 0.0, 1.0, 0.0, None]
    assert got.zeros == pytest.approx([0.5, 0.5, 2 / 3, 2 / 3, None])
    assert got.effective[0] == pytest.approx(1.5)
    assert got.overall_accuracy == pytest.approx(4 / 6)
    assert got.overall_abstention == pytest.approx(2 / 7)


def test_statistics_are_json_and_take_tensors_as_well_as_lists() -> None:
    names = ["a", "b", "c", "unseen"]
    from_lists = routing_statistics(GATES, TRUTH, tasks=names, adapters=names[:3])
    from_tensors = routing_statistics(
        torch.tensor(GATES, dtype=torch.float64), torch.tensor(TRUTH), tasks=names, adapters=names[:3]
    )
    text = json.dumps(from_lists.to_json(), allow_nan=False)
    assert json.loads(text)["tasks"] == names
    assert from_tensors.overall_accuracy == from_lists.overall_accuracy


def test_no_inputs_leave_everything_undefined() -> None:
    got = routing_statistics([], [], tasks=["a"], adapters=["a"])
    assert got.overall_accuracy is None and got.mass == [None] and got.inputs == [0]


def test_rounding_of_fp32_gates_is_no_share_of_the_zero_adapter() -> None:
    gates = torch.full((1, 3), 1 / 3)
    assert routing_statistics(gates * (1 - 1e-7), [0], tasks=["a"], adapters=["a", "b", "c"]).zero_mass == [0.0]


def test_columns_are_matched_by_name_not_by_place() -> None:
    got = routing_statistics([[0.0, 1.0]], [0], tasks=["b", "a"], adapters=["a", "b"])
    assert got.accuracy == [1.0, None]


def test_effective_adapters_count_from_none_to_all() -> None:
    gates = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 0, 0, 0], [0.25, 0.25, 0, 0], [0.25, 0.25, 0.25, 0.25]])
    torch.testing.assert_close(effective_adapters(gates), torch.tensor([0.0, 1.0, 2.0, 4.0]))


def test_drift_is_zero_when_later_tasks_only_take_a_share() -> None:
    got = routing_drift([[0.6, 0.4]], [[0.3, 0.2, 0.5]], old=2, new=3)
    assert got.moved == pytest.approx(0.0) and got.changed == 0.0 and got.taken == pytest.approx(0.5)


def test_drift_counts_rows_whose_choice_changed() -> None:
    got = routing_drift([[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]], old=2, new=3)
    assert (got.inputs, got.moved, got.changed, got.taken) == (2, 0.5, 0.5, 0.0)
    assert routing_drift([], [], old=2, new=3).moved is None
    assert json.dumps(got.to_json())


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="3 adapters"):
        routing_statistics([[1.0, 0.0]], [0], tasks=["a"], adapters=["a", "b", "c"])
    with pytest.raises(ValueError, match="1 rows of gates for 2"):
        routing_statistics([[1.0]], [0, 0], tasks=["a"], adapters=["a"])
    with pytest.raises(ValueError, match="expected 0 to 0"):
        routing_statistics([[1.0]], [1], tasks=["a"], adapters=["a"])
    with pytest.raises(ValueError, match="cannot follow"):
        routing_drift([[1.0, 0.0]], [[1.0]], old=2, new=1)
