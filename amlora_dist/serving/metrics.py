"""Figures of a server for Prometheus."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

if TYPE_CHECKING:
    from amlora_dist.evaluation.requests import Route
    from amlora_dist.serving.engine_interface import AnswerEngine

CONTENT_TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class ServingMetrics:
    """A registry of its own, so that several servers can live in one process."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter("amlora_requests", "Requests answered", ["path", "status"], registry=registry)
        self._seconds = Histogram(
            "amlora_request_seconds", "From arrival to the last byte", ["path"], buckets=SECONDS, registry=registry
        )
        self._rows = Histogram("amlora_pass_rows", "Texts that shared a pass", ["kind"], buckets=ROWS, registry=registry)
        self._busy = Counter("amlora_pass_seconds", "Time in passes", ["kind"], registry=registry)
        self._tokens = Counter("amlora_tokens", "Tokens read and written", ["kind"], registry=registry)
        self._routed = Counter("amlora_routed", "Texts by the task they were routed to", ["task"], registry=registry)
        self._texts = Gauge("amlora_texts", "Texts inside, waiting or at work", registry=registry)
        self._waiting = Gauge("amlora_texts_waiting", "Texts that wait for their first pass", registry=registry)
        self._strongest = Counter(
            "amlora_strongest_row", "Texts between tasks, answered by the row of the strongest alone", registry=registry
        )
        self._away = Counter("amlora_engine_failures", "Texts that the engine's server did not answer", registry=registry)
        self._ready = Gauge("amlora_engine_ready", "1 where the engine can answer", registry=registry)
        self._version = Gauge("amlora_version", "1 for the version that is served", ["version"], registry=registry)
        self._failures = Counter("amlora_follow_failures", "Looks at the alias that failed", registry=registry)

    def watch(self, engine: AnswerEngine) -> None:
        """Read how much is inside ``engine`` whenever somebody asks."""
        self._texts.set_function(lambda: engine.texts)
        self._waiting.set_function(lambda: engine.waiting)
        self._ready.set_function(lambda: float(engine.alive and engine.ready))

    def passed(self, kind: str, rows: int, seconds: float) -> None:
        """A pass of the engine."""
        self._rows.labels(kind).observe(rows)
        self._busy.labels(kind).inc(seconds)

    def answered(self, path: str, status: int, seconds: float) -> None:
        """A request."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def tokens(self, *, read: int, written: int) -> None:
        """Tokens of a request."""
        self._tokens.labels("read").inc(read)
        self._tokens.labels("written").inc(written)

    def routed(self, route: Route) -> None:
        """A text."""
        self._routed.labels(route.task or "(none)").inc()

    def strongest_row(self) -> None:
        """A text between tasks was answered by the row of the strongest of them alone."""
        self._strongest.inc()

    def engine_failed(self) -> None:
        """The engine's server did not answer a text."""
        self._away.inc()

    def serving(self, version: str) -> None:
        """The version for new requests."""
        self._version.clear()
        self._version.labels(version).set(1)

    def follow_failed(self) -> None:
        """The alias could not be read, or what it means could not be loaded."""
        self._failures.inc()

    def page(self) -> bytes:
        """All figures in Prometheus' text format."""
        return generate_latest(self._registry)
