"""``amlora jobs``: the jobs of a cluster as a table."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.table import Table

from pipelines.cli.tables import console_for

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipelines.cluster.jobs import ClusterJob


def show_jobs(jobs: Sequence[ClusterJob]) -> None:
    """Print them, oldest first."""
    table = Table(box=None, pad_edge=False)
    for heading in ("job", "run", "attempt", "status", "started", "seconds", "exit"):
        table.add_column(heading, justify="right" if heading in ("attempt", "seconds", "exit") else "left", no_wrap=True)
    for job in jobs:
        started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(job.started)) if job.started else ""
        seconds = f"{(job.ended or time.time()) - job.started:,.0f}" if job.started else ""
        code = "" if job.exit_code is None else str(job.exit_code)
        table.add_row(job.id, job.run_id or "", str(job.attempt or ""), job.status, started, seconds, code)
    console_for().print(table)
