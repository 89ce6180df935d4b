"""Ray's Jobs API as this project uses it: find the cluster and its token, follow a job, stop it after a checkpoint.

A job of run ``ID`` has the submission id ``ID-<attempt>``. Everything that identifies it is in that id, so that a head
node that lost its memory, or another machine to submit from, changes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amlora_dist.errors import AmloraError, UserError
from pipelines.cluster.resources import Supply, supply_of

TERMINAL = ("SUCCEEDED", "FAILED", "STOPPED")
STOP_WAIT_S = 600
"""How long a stopped driver may take for its step and its checkpoint before Ray kills it."""
LOST_S = 60.0
"""How long the cluster may be out of reach while a job is followed."""
ANSWER_S = 30.0
"""How long the dashboard may take to list its nodes."""
POLL_S = 0.5
TOKEN_FILE = Path("~/.ray/auth_token")


class JobLostError(AmloraError):
    """The cluster went away while a job was followed."""

    exit_code = 4


@dataclass(frozen=True, slots=True)
class ClusterJob:
    """One submission. ``run_id`` and ``attempt`` are None for jobs of others."""

    id: str
    status: str
    run_id: str | None
    attempt: int | None
    started: float | None
    """Seconds since 1970."""
    ended: float | None
    exit_code: int | None
    message: str
    configuration: dict[str, Any] | None = field(default=None, repr=False)
    """What was submitted and decides its result; None where nobody knows."""

    @property
    def running(self) -> bool:
        return self.status not in TERMINAL


class Jobs:
    """The jobs of one cluster."""

    def __init__(self, address: str) -> None:
        """Connect.

        Args:
            address: of the dashboard, ``http://HOST:8265``.

        Raises:
            UserError: the address is none, nobody answers, or the token is missing or wrong.
        """
        if not re.match(r"https?://[^/]+", address):
            raise UserError(f"--address: found {address!r}, expected the head node's dashboard such as http://head:8265")
        self.address = address.rstrip("/")
        token, self._token_from = find_token()
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        from ray.job_submission import JobSubmissionClient

        for name in ("job.sdk", "dashboard_sdk"):  # these set a level of their own
            logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)
        with _without("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"), self._answering():
            self._client = JobSubmissionClient(self.address, headers=self._headers)

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        from ray.exceptions import AuthenticationError
        from requests.exceptions import RequestException

        try:
            yield
        except AuthenticationError as error:
            if self._token_from is None:
                raise UserError(
                    f"--address: {self.address} wants a token and there is none: set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH"
                    f" to a file, or put it in {TOKEN_FILE}; on the head node `ray get-auth-token` prints it"
                ) from error
            raise UserError(
                f"--address: {self.address} refuses the token of {self._token_from}; on the head node"
                " `ray get-auth-token` prints the right one"
            ) from error
        except (ConnectionError, RequestException) as error:
            raise UserError(
                f"--address: nobody answers at {self.address} ({_line(error)}); is the head node up, the dashboard on"
                " (ray[default], --dashboard-host), and its port open?"
            ) from error

    def all(self) -> list[ClusterJob]:
        """Every job that was submitted, oldest first."""
        with self._answering():
            listed = self._client.list_jobs()
        jobs = [_job(details) for details in listed if details.submission_id]
        return sorted(jobs, key=lambda job: job.started or 0.0)

    def of_run(self, run_id: str) -> list[ClusterJob]:
        """The attempts at one run, in order."""
        return sorted((job for job in self.all() if job.run_id == run_id), key=lambda job: job.attempt or 0)

    def find(self, name: str) -> ClusterJob:
        """A job by its submission id, or the newest attempt at the run of that id.

        Raises:
            UserError: there is none; lists what there is.
        """
        jobs = self.all()
        found = next((job for job in jobs if job.id == name), None)
        if found is None:
            attempts = [job for job in jobs if job.run_id == name]
            found = max(attempts, key=lambda job: job.attempt or 0, default=None)
        if found is None:
            known = ", ".join(job.id for job in jobs[-10:]) or "none"
            raise UserError(f"no job or run {name!r} at {self.address}; the newest are: {known}")
        return found

    def get(self, job_id: str) -> ClusterJob:
        """One job as it is."""
        with self._answering():
            return _job(self._client.get_job_info(job_id))

    def supply(self) -> Supply:
        """What the cluster's nodes have, as its dashboard tells; all unknown where it does not."""
        import requests

        with self._answering():
            answer = requests.get(
                f"{self.address}/api/v0/nodes", params={"limit": 10_000}, headers=self._headers, timeout=ANSWER_S
            )
        try:
            listed = answer.json()["data"]["result"]["result"]
            return supply_of([node["resources_total"] for node in listed if node["state"] == "ALIVE"])
        except (KeyError, TypeError, ValueError):  # of a Ray whose dashboard speaks otherwise, or is just starting
            return Supply()

    def submit(self, job_id: str, entrypoint: str, runtime_env: dict[str, Any], metadata: dict[str, str]) -> bool:
        """Start a job; False if one of this id exists already."""
        with self._answering():
            try:
                self._client.submit_job(
                    submission_id=job_id, entrypoint=entrypoint, runtime_env=runtime_env, metadata=metadata
                )
            except RuntimeError as error:
                if "already exists" in str(error):
                    return False
                raise UserError(f"{self.address} does not take the job: {_line(error)}") from error
            except (TypeError, ValueError) as error:  # Ray's own checks of the runtime environment, before it sends it
                raise UserError(f"--runtime-env: {_line(error)}") from error
        return True

    def logs(self, job_id: str) -> str:
        """All that the job has printed."""
        with self._answering():
            return str(self._client.get_job_logs(job_id))

    def follow(self, job_id: str, write: Callable[[str], None]) -> ClusterJob:
        """Hand on what the job prints, from its start, until it ends; a lost connection is taken up again.

        Raises:
            JobLostError: the cluster cannot be reached for a minute.
        """
        written = 0
        lost: float | None = None
        while True:
            seen = 0

            def take(chunk: str) -> None:
                nonlocal seen, written, lost
                lost = None
                # A new connection tells everything from the start again.
                fresh = chunk[max(0, written - seen) :]
                seen += len(chunk)
                if fresh:
                    written += len(fresh)
                    write(fresh)

            try:
                with self._answering():
                    asyncio.run(self._tail(job_id, take))
                    job = self.get(job_id)
                if not job.running:
                    rest = self.logs(job_id)[written:]
                    if rest:
                        write(rest)
                    return job
                lost = None
            except _disconnected() as error:
                now = time.monotonic()
                lost = lost or now
                if now - lost > LOST_S:
                    raise JobLostError(
                        f"{self.address} was out of reach for {LOST_S:.0f} s ({_line(error)}); the job may go on:"
                        f" `amlora logs {job_id} --follow`, or submit the same run id again"
                    ) from error
            time.sleep(POLL_S)

    async def _tail(self, job_id: str, take: Callable[[str], None]) -> None:
        async for chunk in self._client.tail_job_logs(job_id):
            take(chunk)

    def stop(self, job_id: str, deadline_s: float) -> ClusterJob:
        """Ask the driver to checkpoint and end, and wait for it.

        Raises:
            UserError: it did not end before the deadline.
        """
        with self._answering():
            self._client.stop_job(job_id)
        deadline = time.monotonic() + deadline_s
        while (job := self.get(job_id)).running:
            if time.monotonic() > deadline:
                raise UserError(
                    f"job {job_id} was asked to stop and still runs after {deadline_s:.0f} s; its step may be long:"
                    f" `amlora logs {job_id} --follow` shows it, --deadline waits longer"
                )
            time.sleep(POLL_S)
        return job


def find_token() -> tuple[str | None, str | None]:
    """The cluster's token and where it was found, in Ray's own order; (None, None) if there is none.

    Raises:
        UserError: ``RAY_AUTH_TOKEN_PATH`` names no readable file.
    """
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token, "RAY_AUTH_TOKEN"
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    file = Path(named or TOKEN_FILE).expanduser()
    try:
        token = file.read_text(encoding="utf-8").strip()
    except OSError as error:
        if named:
            raise UserError(f"RAY_AUTH_TOKEN_PATH: cannot read {file}: {error.strerror}") from error
        return None, None
    return (token, str(file)) if token else (None, None)


def _job(details: Any) -> ClusterJob:
    job_id = str(details.submission_id)
    metadata = details.metadata or {}
    run_id = metadata.get("amlora_run_id")
    attempt = job_id.removeprefix(f"{run_id}-") if run_id else ""
    return ClusterJob(
        id=job_id,
        status=str(getattr(details.status, "value", details.status)),
        run_id=run_id,
        attempt=int(attempt) if attempt.isdigit() else None,
        started=details.start_time / 1000 if details.start_time else None,
        ended=details.end_time / 1000 if details.end_time else None,
        exit_code=details.driver_exit_code,
        message=str(details.message or ""),
        configuration=_configuration(metadata.get("amlora_config")),
    )


def _configuration(text: str | None) -> dict[str, Any] | None:
    with contextlib.suppress(ValueError, TypeError):
        value = json.loads(text or "")
        return value if isinstance(value, dict) else None
    return None


def _disconnected() -> tuple[type[Exception], ...]:
    """What a connection that breaks while it is read looks like."""
    from aiohttp import ClientError

    return (UserError, RuntimeError, ClientError, asyncio.TimeoutError, OSError)


@contextlib.contextmanager
def _without(*names: str) -> Iterator[None]:
    """Ray lets these variables win over the address that it is given."""
    removed = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(removed)


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
