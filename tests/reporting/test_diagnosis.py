"""The diagnosis: each planted fault raises its alarm, healthy numbers raise none. Pure numbers, no model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from amlora_dist.reporting.diagnosis import Recipe, RunFigures, diagnose

TASKS = ["dbpedia", "amazon", "yahoo", "agnews"]
ONE_HOT = [[1.0 if i == j else 0.0 for j in range(4)] for i in range(4)]
GOOD = [
    [0.96, 0.00, 0.03, 0.01],
    [0.00, 0.99, 0.01, 0.00],
    [0.04, 0.02, 0.90, 0.04],
    [0.01, 0.00, 0.04, 0.95],
]
MATRIX = [
    [0.00, 0.00, 0.06, 0.00],
    [0.95, 0.00, 0.00, 0.00],
    [0.95, 0.52, 0.10, 0.00],
    [0.94, 0.52, 0.60, 0.02],
    [0.94, 0.52, 0.59, 0.88],
]


def healthy() -> RunFigures:
    """What METHOD's order 1 looks like: nothing forgotten, 97% routed rightly, a recipe or two."""
    return RunFigures(
        tasks=TASKS,
        routed=True,
        matrix=MATRIX,
        oracle=[0.95, 0.52, 0.62, 0.89],
        rows=[200] * 4,
        adapters=TASKS,
        mass=GOOD,
        zero_mass=[0.0] * 4,
        chosen=GOOD,
        effective=1.1,
        recipes=[
            Recipe("amazon", None, {"dbpedia": 0.0}, 1.0),
            Recipe("yahoo", "amazon", {"dbpedia": 0.0, "amazon": 0.2}, 0.6),
        ],
        l1=0.1,
        mixed=[("dbpedia", "amazon", 0.04), ("yahoo", "agnews", 0.09)],
        losses={task: [3.0 - 0.1 * step for step in range(20)] for task in TASKS},
    )


def alarms(evidence: RunFigures) -> list[str]:
    return [finding.rule for finding in diagnose(evidence) if finding.level == "alarm"]


def with_routing(lines: list[list[float]], **more: object) -> RunFigures:
    return replace(healthy(), mass=lines, chosen=lines, **more)  # type: ignore[arg-type]


def test_a_healthy_run_raises_no_alarm_and_no_note() -> None:
    assert diagnose(healthy()) == []


@pytest.mark.parametrize("method_without_router", [True, False])
def test_a_run_of_one_task_raises_no_alarm(method_without_router: bool) -> None:
    one = RunFigures(
        tasks=["a"], routed=not method_without_router, matrix=[[0.0], [0.8]], oracle=[0.8], rows=[100], adapters=["a"],
        mass=[[1.0]], zero_mass=[0.0], chosen=[[1.0]], effective=1.0,
    )  # fmt: skip
    assert diagnose(one) == []


def test_a_router_collapsed_on_one_adapter_is_found_and_named() -> None:
    lines = [[0.1, 0.9, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.05, 0.95, 0.0, 0.0], [0.2, 0.8, 0.0, 0.0]]
    found = diagnose(with_routing(lines))
    assert [f.rule for f in found if f.level == "alarm"] == ["router_collapsed"]
    assert "amazon" in found[0].title


def test_a_router_collapsed_on_the_newest_of_two_adapters_is_found() -> None:
    lines = [[0.1, 0.9], [0.0, 1.0]]
    two = replace(
        healthy(), tasks=TASKS[:2], adapters=TASKS[:2], matrix=[row[:2] for row in MATRIX[:3]], oracle=[0.95, 0.52],
        mass=lines, chosen=lines, rows=[200, 200], recipes=[], mixed=[], zero_mass=[0.0, 0.0],
    )  # fmt: skip
    assert "router_collapsed" in alarms(two)


def test_gates_that_do_not_depend_on_the_input_are_found() -> None:
    # Measured on the literal selector: docs/method.md.
    line = [0.244, 0.157, 0.264, 0.335]
    evidence = replace(with_routing([line] * 4, effective=3.9), chosen=[[0.0, 0.0, 0.0, 1.0]] * 4)
    assert "router_blind" in alarms(evidence)


def test_two_tasks_with_swapped_statistics_are_found_as_a_pair() -> None:
    lines = [ONE_HOT[0], [0.0, 0.03, 0.97, 0.0], [0.02, 0.94, 0.04, 0.0], ONE_HOT[3]]
    found = [f for f in diagnose(with_routing(lines)) if f.level == "alarm"]
    assert [f.rule for f in found] == ["statistics_exchanged"]
    assert "amazon → yahoo → amazon" in found[0].title


def test_permuted_statistics_are_found_as_a_circle() -> None:
    found = diagnose(with_routing([ONE_HOT[1], ONE_HOT[2], ONE_HOT[3], ONE_HOT[0]]))
    assert [f.rule for f in found] == ["statistics_exchanged"]
    assert "dbpedia → amazon → yahoo → agnews → dbpedia" in found[0].title


def test_a_gate_so_sparse_that_the_zero_adapter_answers_is_found() -> None:
    lines = [[0.3 * value for value in line] for line in GOOD]
    evidence = replace(with_routing(lines, zero_mass=[0.7] * 4), chosen=GOOD)
    assert alarms(evidence) == ["over_regularised_gate"]


def test_an_l1_coefficient_far_too_large_is_found_when_it_erased_what_would_have_helped() -> None:
    erased = [Recipe("yahoo", "amazon", {"dbpedia": 0.0, "amazon": 0.0}, 1.0)]
    assert alarms(replace(healthy(), recipes=erased, l1=3.0)) == ["over_regularised_recipe"]
    small = diagnose(replace(healthy(), recipes=erased, l1=0.1))
    assert [(f.level, f.rule) for f in small] == [("note", "over_regularised_recipe")]
    unhelped = [Recipe("yahoo", None, {"dbpedia": 0.0, "amazon": 0.0}, 1.0)]
    assert diagnose(replace(healthy(), recipes=unhelped, l1=3.0)) == []


def test_a_mixed_boundary_is_found_and_names_both_tasks() -> None:
    found = diagnose(replace(healthy(), mixed=[("amazon", "yahoo", 0.27)]))
    assert [f.rule for f in found] == ["mixed_boundary"]
    assert "amazon" in found[0].title and "yahoo" in found[0].title and "0.27" in found[0].detail


def test_a_misrouted_task_is_an_alarm_only_if_it_costs_much() -> None:
    lines = [*GOOD[:3], [0.0, 0.0, 0.5, 0.5]]
    costly = [*MATRIX[:4], [0.94, 0.52, 0.59, 0.45]]
    assert alarms(with_routing(lines, matrix=costly)) == ["misrouted"]
    cheap = diagnose(with_routing([*GOOD[:3], [0.0, 0.0, 0.25, 0.75]]))
    assert [(f.level, f.rule) for f in cheap] == [("note", "misrouted")]
    assert "Against being told the task this costs 0.010" in cheap[0].detail


def test_two_look_alikes_are_a_note() -> None:
    lines = [*GOOD[:2], [0.0, 0.0, 0.7, 0.3], [0.0, 0.0, 0.25, 0.75]]
    rules = {(f.level, f.rule) for f in diagnose(with_routing(lines))}
    assert ("note", "look_alikes") in rules and all(level == "note" for level, _ in rules)


def test_forgetting_beyond_chance_is_found() -> None:
    forgot = [*MATRIX[:4], [0.20, 0.10, 0.30, 0.88]]
    found = diagnose(replace(healthy(), routed=False, matrix=forgot))
    assert [f.rule for f in found] == ["forgotten"]
    assert "dbpedia 0.950 → 0.200" in found[0].detail
    little = [*MATRIX[:4], [0.94, 0.40, 0.59, 0.88]]
    assert alarms(replace(healthy(), routed=False, matrix=little, rows=[20] * 4)) == []


def test_a_task_that_was_not_learned_is_found() -> None:
    flat = [list(row) for row in MATRIX]
    flat[2][1] = flat[3][1] = flat[4][1] = 0.0
    found = diagnose(replace(healthy(), matrix=flat, oracle=[0.95, 0.0, 0.62, 0.89]))
    assert [(f.rule, f.title) for f in found] == [("not_learned", "amazon was not learned")]


def test_a_task_at_chance_or_at_its_most_frequent_label_was_not_learned_though_it_beats_the_untrained_model() -> None:
    chance, majority = [0.07, 0.2, 0.1, 0.25], [0.1, 0.25, 0.12, 0.3]
    floored = replace(healthy(), chance=chance, majority=majority)
    assert diagnose(floored) == [], "amazon has 0.52, far above both"
    (found,) = diagnose(replace(floored, majority=[0.1, 0.51, 0.12, 0.3]))
    assert (found.level, found.rule, found.title) == ("alarm", "not_learned", "amazon was not learned")
    assert "0.000 untrained, 0.510 with its most frequent label always, 0.200 by chance" in found.detail
    unknown = [[None] * 4, *MATRIX[1:]]
    assert alarms(replace(floored, matrix=unknown, chance=[0.07, 0.51, 0.1, 0.25])) == ["not_learned"]
    assert alarms(replace(healthy(), matrix=unknown)) == [], "free text, not scored untrained: nothing to compare with"


def test_a_loss_that_did_not_fall_is_found() -> None:
    assert alarms(replace(healthy(), losses={"amazon": [2.0] * 10 + [2.5] * 10})) == ["loss_not_falling"]


def test_a_stage_that_began_where_nothing_was_left_to_gain_is_a_note_until_its_loss_rises() -> None:
    flat = [0.5, 0.7] * 10 + [0.75]
    noted = diagnose(replace(healthy(), losses={"yahoo": flat}))
    assert [(f.level, f.rule) for f in noted] == [("note", "loss_not_falling")]
    assert noted[0].title == "yahoo stayed where amazon had left it"
    assert alarms(replace(healthy(), losses={"amazon": flat})) == ["loss_not_falling"], "it began from no other task"
    assert alarms(replace(healthy(), losses={"yahoo": [0.5, 0.7] * 8 + [1.0, 1.2] * 2})) == ["loss_not_falling"]


def test_prompts_that_tell_the_task_and_skipped_rows_are_notes() -> None:
    bad = replace(healthy(), leaks={"dbpedia": ["prompt_style: named"]}, bad_rows={"yahoo": 3})
    assert [(f.level, f.rule) for f in diagnose(bad)] == [("note", "prompts_tell_the_task"), ("note", "rows_skipped")]


@pytest.mark.parametrize(
    ("leaks", "text_alone", "says", "not_said"),
    [
        (["prompt_style: named"], True, "tell the adapters the task, not the router", "easier"),
        (["prompt_style: named"], False, "Routing is easier than for a user's text, by prompt_style: named.", "adapters"),
        (["field_markers: keep"], True, "by field_markers: keep.", "adapters"),
        (["prompt_style: named", "field_markers: keep"], True, "by field_markers: keep.", "by prompt_style"),
    ],
)
def test_a_name_in_the_prompt_is_no_help_to_a_router_that_reads_the_text_alone_and_markers_are(
    leaks: list[str], text_alone: bool, says: str, not_said: str
) -> None:
    (found,) = diagnose(replace(healthy(), leaks={"dbpedia": leaks}, text_alone=text_alone))
    assert found.rule == "prompts_tell_the_task" and says in found.detail and not_said not in found.detail


def test_a_run_under_way_is_diagnosed_on_what_it_has() -> None:
    three = [*[line[:2] for line in GOOD[:2]], [0.5, 0.5]]
    under_way = replace(
        healthy(), matrix=MATRIX[:3], oracle=None, adapters=TASKS[:2], mass=[*three, None], chosen=[*three, None],
        zero_mass=[0.0, 0.0, 0.0, None], recipes=[], mixed=[],
    )  # fmt: skip
    assert diagnose(under_way) == []


def test_alarms_come_before_notes() -> None:
    found = diagnose(replace(healthy(), bad_rows={"yahoo": 3}, mixed=[("amazon", "yahoo", 0.3)]))
    assert [finding.level for finding in found] == ["alarm", "note"]
