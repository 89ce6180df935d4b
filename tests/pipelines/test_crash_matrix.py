"""Every crash point by every kind of death, in a child process with ``workers: 0``: the result is the undisturbed one."""

from __future__ import annotations

import re
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from amlora_dist.crash_points import POINTS
from tests.fork_server import ROOT, Server
from tests.pipelines.crash_cases import (
    DIES_AT,
    KINDS,
    ORDERS,
    Crashed,
    Outcome,
    calm,
    cases,
    crash,
    faults,
    matrix_config,
    nth_of,
)

CASES = cases()
IN_ORDER = [(order, kind) for order in ORDERS for kind in KINDS]
LANES = 2
"""Children at work at once."""


@pytest.fixture(scope="module")
def matrix(
    forking: Server, empty_home: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Future[Outcome], dict[tuple[str, str], Future[Crashed]]]:
    """All cases, at work in the background while the tests ask for one after the other; orders by their name."""
    folder = tmp_path_factory.mktemp("matrix")
    config = matrix_config(folder)
    with ThreadPoolExecutor(LANES) as lanes:
        undisturbed = lanes.submit(calm, forking.start, folder / "calm", config, empty_home)
        crashed = {
            (point, kind): lanes.submit(
                crash, forking.start, folder / f"{point}-{kind}", config, empty_home, point, kind, nth_of(point, 0)
            )
            for point, kind in CASES
        }
        for number, (order, kind) in enumerate(IN_ORDER):
            point, nth, meanwhile = ORDERS[order]
            place = folder / f"order-{number}"
            crashed[order, kind] = lanes.submit(
                crash, forking.start, place, config, empty_home, point, kind, nth, meanwhile=meanwhile
            )
        return undisturbed, crashed


def assert_ends_undisturbed(
    where: str, kind: str, undisturbed: Future[Outcome], crashed: dict[tuple[str, str], Future[Crashed]]
) -> None:
    case = crashed[where, kind].result()
    assert faults(case, undisturbed.result()) == []
    assert case.codes == [-9 if kind == "kill" else 1, 0]


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.parametrize(("point", "kind"), CASES, ids=[f"{point}-{KINDS[kind]}" for point, kind in CASES])
def test_a_run_that_died_there_ends_with_the_undisturbed_result(
    point: str, kind: str, matrix: tuple[Future[Outcome], dict[tuple[str, str], Future[Crashed]]]
) -> None:
    assert_ends_undisturbed(point, kind, *matrix)


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.parametrize(("order", "kind"), IN_ORDER, ids=[f"{order}-{KINDS[kind]}" for order, kind in IN_ORDER])
def test_whichever_of_a_stage_and_the_publication_before_it_dies_first_the_result_is_the_undisturbed_one(
    order: str, kind: str, matrix: tuple[Future[Outcome], dict[tuple[str, str], Future[Crashed]]]
) -> None:
    assert_ends_undisturbed(order, kind, *matrix)


def test_every_declared_point_is_in_the_code_and_exercised() -> None:
    code = "\n".join(
        file.read_text(encoding="utf-8") for part in ("amlora_dist", "pipelines") for file in (ROOT / part).rglob("*.py")
    )
    reached = set(re.findall(r"\breach\(\"(\w+)\"\)", code))
    assert reached == set(POINTS), "declared points and calls of reach() differ"
    assert {point for point, _ in CASES} == set(DIES_AT) == set(POINTS), "a declared point is not exercised"
    assert all({kind for point, kind in CASES if point == wanted} == {"raise", "kill"} for wanted in POINTS)
