"""Keys of the tags this project writes into MLflow, and names that mean something there. Imports nothing."""

from __future__ import annotations

PREFIX = "amlora."

# runs and versions
KIND = "amlora.kind"
"""``sequence`` for the run of a whole sequence, ``stage`` for one of its stages; ``search``, ``trial``, ``comparison``."""
RUN_ID = "amlora.run_id"
"""The durable run's id; on registered models too, because runs never share one."""
STAGE = "amlora.stage"
TASK = "amlora.task"
EPOCH = "amlora.epoch"
TRAINING_FINGERPRINT = "amlora.training_fingerprint"
ADAPTER_FINGERPRINT = "amlora.adapter_fingerprint"
"""Of a version: what decides its newest adapter, whatever its statistics are. Of a race of learning rates: the same of its
candidates."""
ADAPTER_OF = "amlora.adapter_of"
"""Of a version whose statistics were made again for an adapter that was there: the training fingerprint of the stage that
trained it."""
ARTIFACT_PATH = "amlora.artifact_path"
"""Folder of a version among the artifacts of its run."""
MANIFEST_DIGEST = "amlora.manifest_digest"
POINTED = "amlora.pointed"
"""Of a registered model: the version at which this project has left the alias ``current``, and its stage."""
TAKEN = "amlora.taken"
"""Of a version: epoch of the start that took it up again after a later version of its stage, whose data had come back."""
REUSED_FROM = "amlora.reused_from"
"""``models:/NAME/VERSION`` whose storage this version refers to instead of storing its adapter again."""

PLAIN_TEXT = "amlora.plain_text"
"""Of the run of a method without keys, and of its stages: ``ranks`` or ``writes``, how its bank answers plain text."""

VERSION = "amlora.version"
"""Of a logged model: the ``models:/NAME/VERSION`` that it is a version of."""
DESCRIBED = "amlora.described"
"""Of a run: first 12 digits of the digest of the description that this project wrote; another one is somebody's own."""
TRACKED = "amlora.tracked"
"""Of a stage's run: the trackers besides MLflow that have it, with commas between."""
FIRST_CHAMPION = "amlora.first_champion"
"""Of a registered model: the version that the first complete run gave the alias ``champion``; afterwards no run moves it."""
PROMOTION = "amlora.promotion"
"""Of a version: what its last promotion found, in words."""

# searches
SEARCH = "amlora.search"
"""Id of the search: on its run, its trials' runs and the version that won."""
TRIAL = "amlora.trial"
"""Number of a trial, from 1."""
OUTCOME = "amlora.outcome"
"""Of a trial that ended: ``finished``, ``pruned`` or ``failed``."""
ASKED, TOLD = "amlora.asked", "amlora.told"
"""Places, in one count from 1, of a trial's start and end among all starts and ends of its search."""
OBJECTIVE = "amlora.objective"
RUNNER_UP = "amlora.runner_up"

# lease entries
LEASE_PREFIX = "amlora.lease."
"""Registered models with this prefix are claims, never banks; listings of banks leave them out."""
HOLDER = "amlora.holder"
TOKEN = "amlora.token"
BEAT = "amlora.beat"
RELEASED = "amlora.released"
COUNTED = "amlora.counted"

# aliases
CURRENT = "current"
"""The newest version that counts, moved as the last step of publishing, unless a person has set it elsewhere. MLflow
reserves the alias ``latest`` for the highest version number, stale or not, and lets nobody set it; ``Store.resolve`` reads
``latest`` as the newest, which is the run's last stage (``registry/newest.py``)."""
CHAMPION = "champion"
"""The version that is served: set by the first complete run where none exists, then by promotion or a person."""
LATEST = "latest"
