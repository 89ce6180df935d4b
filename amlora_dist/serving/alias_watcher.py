"""A server follows an alias: where it moves, the version that it then means is pulled, loaded and swapped in.

The old version goes on answering until the new one is loaded next to it, on the same base weights. Whatever goes
wrong (the store is down, a version is damaged) is logged and counted, and the old version stays.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

from amlora_dist.config.loading import home
from amlora_dist.errors import AmloraError
from amlora_dist.registry import tags
from amlora_dist.registry.pulling import manifest_of
from amlora_dist.registry.store import Store
from amlora_dist.registry.versions import Version, parse_uri
from amlora_dist.serving.bank import ServedBank
from amlora_dist.serving.service import Service

log = logging.getLogger(__name__)


def is_moving(bank: str) -> bool:
    """Whether a bank's URI may mean another version tomorrow: an alias, or ``latest``."""
    if not bank.startswith("models:"):
        return False
    _, alias, version = parse_uri(bank)
    return alias is not None or not version.isdecimal()


class Follower:
    """Looks at an alias every ``poll_s`` seconds, in a thread of its own.

    Args:
        service: gets the new versions.
        uri: ``models:/NAME@ALIAS``.
        tracking_uri: MLflow that has it; default: the store in ``AMLORA_HOME``.
        options: as for ``AMLoRAModel.from_bank``.
    """

    def __init__(self, service: Service, uri: str, tracking_uri: str | None = None, **options: Any) -> None:
        self._service, self._uri, self._tracking_uri, self._options = service, uri, tracking_uri, options
        self._store: Store | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="amlora-follower", daemon=True)
        self._failed: str | None = None

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more; a version that is being loaded now is not swapped in."""
        self._stop.set()

    def look(self) -> bool:
        """Look once; returns whether another version was swapped in.

        Raises:
            AmloraError: the store does not answer, or what the alias means cannot be loaded.
        """
        if self._store is None:
            self._store = Store.open(home(), self._tracking_uri, reads=True)
        version = self._store.resolve(self._uri)
        serving = self._service.bank
        if version.uri == serving.version or self._goes_back(version):
            return False
        bank = ServedBank.load(
            version.uri, serving.name, tracking_uri=self._tracking_uri, share_base_with=serving.model, **self._options
        )
        if self._stop.is_set():
            return False
        self._service.swap(bank)
        log.warning("%s: serving %s now, before %s", self._uri, bank.version, serving.version)
        return True

    def _goes_back(self, version: Version) -> bool:
        """Whether ``latest`` means fewer tasks than are served: the last version was deleted, which nobody asked to serve
        less for. An alias goes where a person puts it."""
        _, alias, wanted = parse_uri(self._uri)
        if alias is not None or wanted != tags.LATEST or self._store is None:
            return False
        return len(manifest_of(self._store, version).tasks) < len(self._service.bank.tasks)

    def _run(self) -> None:
        while not self._stop.wait(self._service.settings.poll_s):
            try:
                self.look()
                self._failed = None
            except (AmloraError, OSError, RuntimeError, ValueError) as error:
                self._service.metrics.follow_failed()
                if str(error) != self._failed:  # logged once, not every few seconds
                    log.warning("%s: %s; %s stays", self._uri, error, self._service.bank.version)
                self._failed = str(error)

