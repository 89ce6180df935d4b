"""Names of durable runs."""

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
