"""Names of durable runs and searches."""

from __future__ import annotations

import re

from amlora_dist.errors import UserError


def checked_run_id(run_id: str) -> str:
    """``run_id`` if it can name a run, an MLflow model and a Ray job.

    Raises:
        UserError: it cannot.
    """
    return _checked("--run-id", run_id, 100)


def checked_search_id(search_id: str) -> str:
    """The same of a search; its trials' run ids have some characters more."""
    return _checked("--search-id", search_id, 80)


def _checked(option: str, name: str, most: int) -> str:
    if not isinstance(name, str) or len(name) > most or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise UserError(f"{option}: found {name!r}, expected at most {most} letters, digits and _ . -")
    return name
