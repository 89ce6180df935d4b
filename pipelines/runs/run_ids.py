"""Names of durable runs and searches."""

from __future__ import annotations

import re

from amlora_dist.errors import UserError


def checked_run_id(run_id: str) -> str:
    """``run_id`` if it can name a run, an MLflow model and a Ray job.

    Raises:
        UserError: it cannot.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", run_id):
        raise UserError(f"--run-id: found {run_id!r}, expected at most 100 letters, digits and _ . -")
    return run_id


def checked_search_id(search_id: str) -> str:
    """``search_id`` if it can name a search; its trials' run ids have some characters more.

    Raises:
        UserError: it cannot.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,79}", search_id):
        raise UserError(f"--search-id: found {search_id!r}, expected at most 80 letters, digits and _ . -")
    return search_id
