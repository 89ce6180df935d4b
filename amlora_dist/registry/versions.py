"""What a registered version of a bank is, and the URIs that name one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from amlora_dist.errors import UserError
from amlora_dist.registry import tags
from amlora_dist.registry.manifest import Stored

_URI = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[A-Za-z0-9_-]+)|/(?P<version>[0-9]{1,9}|latest))?")


@dataclass(frozen=True, slots=True)
class Version:
    """A registered version of a bank."""

    registered_model: str
    number: int
    tags: dict[str, str]
    run: str
    """MLflow's id of the stage's run, which keeps the artifacts."""
    source: str
    epoch: int
    """Epoch of the lease under which it was written."""

    @property
    def uri(self) -> str:
        """``models:/NAME/NUMBER``."""
        return f"models:/{self.registered_model}/{self.number}"

    @property
    def run_id(self) -> str:
        """The durable run that published it."""
        return self.tags.get(tags.RUN_ID, "")

    @property
    def stage(self) -> int:
        """How far its run had come, from 1; 0 where nobody noted it."""
        stage = self.tags.get(tags.STAGE, "")
        return int(stage) if stage.isdecimal() else 0

    @property
    def taken(self) -> int:
        """The epoch in which its run last took it up or wrote it."""
        taken = self.tags.get(tags.TAKEN, "")
        return max(self.epoch, int(taken) if taken.isdecimal() else 0)

    @property
    def training_fingerprint(self) -> str:
        """Of the stage that made it."""
        return self.tags.get(tags.TRAINING_FINGERPRINT, "")

    @property
    def artifact_path(self) -> str:
        """Its folder among the artifacts of ``run``."""
        return self.tags.get(tags.ARTIFACT_PATH, "")


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a version about to be published will keep what it stores itself."""

    version_of: str
    run: str
    root: str

    def of(self, path: str) -> Stored:
        """The ``stored`` of a part, given its path in the bank (``entry.folder``, ``entry.file``)."""
        return Stored(version_of=self.version_of, run=self.run, artifact_path=f"{self.root}/{path}")


def parse_uri(uri: str) -> tuple[str, str | None, str]:
    """Registered model, alias if there is one, and version (a number or ``latest``) of a ``models:/`` URI.

    Raises:
        UserError: it is none.
    """
    match = _URI.fullmatch(uri)
    if match is None:
        raise UserError(f"found {uri!r}, expected models:/NAME@ALIAS, models:/NAME/VERSION or models:/NAME/latest")
    return match["name"], match["alias"], match["version"] or tags.LATEST


def read_version(found: Any) -> Version:
    """From MLflow's ``ModelVersion``."""
    values = dict(found.tags)
    epoch = values.get(tags.EPOCH, "0")
    return Version(
        registered_model=found.name,
        number=int(found.version),
        tags=values,
        run=found.run_id or "",
        source=found.source or "",
        epoch=int(epoch) if epoch.isdecimal() else 0,
    )
