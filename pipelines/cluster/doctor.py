"""``amlora doctor --address``: the checks of ``pipelines.cluster.node_checks``, run on a cluster as a job and read back."""

from __future__ import annotations

import json
import shlex
import tempfile
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from amlora_dist.errors import UserError
from pipelines.cluster.local_checks import Check
from pipelines.cluster.node_checks import MARK
from pipelines.cluster.working_dir import collect, pack

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipelines.cluster.jobs import Jobs


def examine_cluster(jobs: Jobs, storage: str | None, tracking_uri: str | None, working_dir: Path) -> Iterator[Check]:
    """All checks of all nodes.

    Args:
        jobs: of the cluster.
        storage: the folder that all nodes should share, or the URL.
        tracking_uri: of MLflow, as the nodes see it.
        working_dir: shipped, so that the cluster runs this code; empty if it has it installed.

    Raises:
        UserError: no storage is given, or the job could not run.
    """
    if storage is None or not (Path(storage).is_absolute() or "://" in storage):
        raise UserError(
            f"--storage: found {storage or 'nothing'}, expected the absolute path of the folder that all nodes share, or a"
            " URL such as s3://bucket/amlora"
        )
    command = ["python", "-m", "pipelines.cluster.node_checks", "--storage", storage]
    if tracking_uri:
        command += ["--tracking-uri", tracking_uri]
    job_id = f"amlora-doctor-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
    with tempfile.TemporaryDirectory(prefix="amlora-doctor-") as tmp:
        archive = Path(tmp) / "working_dir.zip"
        pack(collect(working_dir), archive)
        jobs.submit(job_id, f"exec {shlex.join(command)}", {"working_dir": str(archive)}, {})
    parts: list[str] = []
    job = jobs.follow(job_id, parts.append)
    text = "".join(parts)
    for line in text.splitlines():
        if line.startswith(MARK):
            yield Check(**json.loads(line.removeprefix(MARK)))
    if job.status != "SUCCEEDED":
        last = [line for line in text.strip().splitlines() if not line.startswith(MARK)][-3:]
        raise UserError(f"the checks did not come to their end on the cluster: {job.message or ' / '.join(last)}")
