"""Tests leave nothing in the folder that they are started in, and find nothing there."""

from __future__ import annotations

from pathlib import Path

import pytest

from amlora_dist.config.loading import home


@pytest.fixture(scope="session")
def of_a_session() -> Path:
    return home()


@pytest.fixture(scope="module")
def of_a_module() -> Path:
    return home()


def test_fixtures_of_many_tests_write_no_home_into_the_working_folder(
    of_a_session: Path, of_a_module: Path, shared_home: Path, amlora_home: Path
) -> None:
    assert of_a_session == of_a_module == shared_home
    assert home() == amlora_home != shared_home
